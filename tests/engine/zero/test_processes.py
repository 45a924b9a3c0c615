"""What a process of a run sets before it joins the others."""

import os

import pytest
import torch

from armillary.engine.zero import processes
from armillary.engine.zero.processes import start_processes


@pytest.fixture
def started(monkeypatch):
    """Starts a process as rank 1 of 2 on one machine, without group and GPU; returns its device and the group's backend."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed

    seen = {}
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that what the process sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda backend, **_: seen.update(backend=backend))
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: seen.update(gpu=gpu))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.update(threads=n))
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    precision = torch.get_float32_matmul_precision()
    yield lambda *args: (start_processes(*args), seen)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("tf32", [False, True])
def test_on_a_gpu(started, tf32):
    device, seen = started("cuda", 1.0, tf32)
    assert device == torch.device("cuda", 1) and seen == {"backend": "nccl", "gpu": 1, "threads": 6}
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_the_user_says_of_memory_and_threads_holds(started, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "threads" not in started("cuda", 1.0)[1]
    assert {k: v for k, v in os.environ.items() if k.endswith("_ALLOC_CONF")} == {name: "max_split_size_mb:64"}


def test_on_a_cpu(started):
    device, seen = started("cpu", 1.0)
    assert device == torch.device("cpu") and seen == {"backend": "gloo", "threads": 6}
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
