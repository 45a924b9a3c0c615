"""One switch: with no GPU the kernels run under Triton's interpreter."""

import os
import re
from pathlib import Path

import pytest
import torch
from interpreter import speed_up

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported

KERNELS = Path(__file__).with_name("kernels")
REAL_DATA = os.environ.get("ARMILLARY_REAL_DATA")


def pytest_collection_modifyitems(config, items):
    if not GPU:
        speed_up()
    for item in items:
        # Not `in item.keywords`, which holds the names of folders too: a checkout called gpu has no test that runs.
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        # Under the interpreter these are a good part of all tests: `make check` has them where a kernel's file has changed.
        if KERNELS in item.path.parents or re.search("kernel|triton", item.originalname):
            item.add_marker(pytest.mark.kernel)
        if "compile" in item.originalname:  # so are called those that compile a kernel ahead of time
            item.add_marker(pytest.mark.aot)
    if hasattr(config, "workerinput"):
        items.sort(key=longest_first(items))


def longest_first(items):
    """Order of files for several workers: those that start ranks, then those with slow tests, then the others.

    A worker takes one file after the other, so that at the end only short ones are left and no worker waits long for
    another; tests that measure time run beside tests that use one core each.
    """
    kinds = {}
    for item in items:
        kind = 0 if item.get_closest_marker("dist") else 1 if item.get_closest_marker("slow") else 2
        kinds[item.path] = min(kind, kinds.get(item.path, kind))
    return lambda item: kinds[item.path]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real galaxies (ARMILLARY_REAL_DATA); its tests skip where it is absent."""
    if not REAL_DATA:
        pytest.skip("real galaxies: set ARMILLARY_REAL_DATA to the folder that holds them")
    return Path(REAL_DATA)


@pytest.fixture
def poison_empty(monkeypatch):
    """torch.empty and torch.empty_like give NaN, so a kernel that leaves an element unwritten fails."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args, real=real, **kwargs):
            out = real(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, poisoned)
