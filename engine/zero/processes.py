"""The processes of a run: who they are, as the launcher says, and the group that they form.

Launchers: deepspeed, torchrun, MPI wrappers, which all set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; and
srun alone, whose own variables are read where those are not set. A process that nobody launched is the only one.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import re
import socket
import subprocess
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

T = TypeVar("T")

__all__ = [
    "Ranks",
    "end_processes",
    "gather_objects",
    "gpu_of",
    "launch_problems",
    "lost_ranks",
    "of_lost_ranks",
    "own_gpu_alone",
    "ranks",
    "ranks_here",
    "set_timeout",
    "share_cpus",
    "start_processes",
    "take_slurm_ranks",
]

PORTS = 20_000, 60_000
"""Range of the ports that a Slurm step derives from its number."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers: global rank, rank in this machine, number of processes."""

    rank: int
    local_rank: int
    world: int


def ranks() -> Ranks:
    """Read the launcher's environment; a process that nobody launched is the only one."""
    get = os.environ.get
    return Ranks(int(get("RANK", "0")), int(get("LOCAL_RANK", "0")), int(get("WORLD_SIZE", "1")))


def ranks_here() -> int:
    """Ranks of this machine, as the launcher says; all of them where it does not."""
    get = os.environ.get
    return int(get("LOCAL_WORLD_SIZE") or get("LOCAL_SIZE") or get("WORLD_SIZE") or "1")


def take_slurm_ranks(environment: MutableMapping[str, str]) -> list[str]:
    """Where a step of several Slurm tasks has no other launcher, each task is a rank: say so in the usual variables.

    A batch script itself is no step, so that a launcher which it starts is not disturbed.

    Args:
        environment: `os.environ`; changed.

    Returns:
        `variable: rule, got value`, one a broken rule; empty where nothing is wrong.
    """
    get = environment.get
    if "RANK" in environment or not get("SLURM_STEP_NUM_TASKS", "1").isdigit():
        return []
    world = int(get("SLURM_STEP_NUM_TASKS", "1"))
    if world < 2:
        return []
    try:
        hosts = get("SLURM_STEP_NODELIST", "")
        numbers = {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(
                _tasks_per_node(get("SLURM_STEP_TASKS_PER_NODE", ""))[int(get("SLURM_NODEID", "0"))]
            ),
        }
    except (KeyError, IndexError, ValueError) as error:
        return [f"SLURM_STEP_NUM_TASKS: {world} tasks must be described by Slurm's variables, got none for {error}"]
    step = 1000 * int(get("SLURM_JOB_ID", "0")) + int(get("SLURM_STEP_ID", "0"))
    low, high = PORTS
    numbers["MASTER_PORT"] = get("MASTER_PORT", str(low + step % (high - low)))
    if "MASTER_ADDR" not in environment:
        first = _first_host(hosts)
        if first is None:
            return [f"SLURM_STEP_NODELIST: must name the machines, got {hosts!r}; set MASTER_ADDR to that of rank 0"]
        numbers["MASTER_ADDR"] = first
    environment.update(numbers)
    return []


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE {text!r}")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _first_host(hosts: str) -> str | None:
    """The first machine of a list like "gpu[07-09,12],cpu1"; scontrol knows the syntax best."""
    try:
        said = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, timeout=20, check=True
        ).stdout.split()
        return said[0] if said else None
    except (OSError, subprocess.SubprocessError):
        match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", hosts)
        return match[1] + (match[2] or "") if match else None


def launch_problems() -> list[str]:
    """What the launcher's environment has that no process group can be made of, as `variable: rule, got value`."""
    get, found = os.environ.get, []
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not get(name, "0").isdigit():
            found.append(f"{name}: must be a whole number, got {get(name)!r}")
    if found or get("WORLD_SIZE", "1") == "1":
        return found
    address = get("MASTER_ADDR", "")
    try:  # a group waits half an hour for a name that nobody knows
        socket.getaddrinfo(address, int(get("MASTER_PORT", "0")), type=socket.SOCK_STREAM)
    except OSError as error:
        found.append(f"MASTER_ADDR: must be a machine that {socket.gethostname()} knows, got {address!r} ({error})")
    return found


def start_processes(device: str, minutes: float, tf32: bool = False) -> torch.device:
    """Choose DeepSpeed's accelerator, join the process group and return this process's device.

    Args:
        device: "cuda" or "cpu".
        tf32: Whether a GPU may round the factors of float32 products to 10 bits.
        minutes: How long ranks wait for each other before the run ends.
    """
    me = ranks()
    os.environ["DS_ACCELERATOR"] = device
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that newer versions of torch have replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Compiling this operator for the CPU backend takes 40 seconds; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device == "cuda":
        # The number of masked patches changes every step; fixed segments would be cut to pieces.
        if "PYTORCH_ALLOC_CONF" not in os.environ:  # torch would look at the older name first
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(gpu_of(me))
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    share_cpus()
    # Its functions' default arguments are the process group of the moment of import, which they would keep alive.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "nccl" if device == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=timedelta(minutes=minutes), verbose=False)
    return torch.device("cuda", gpu_of(me)) if device == "cuda" else torch.device("cpu")


def gather_objects(value: T) -> list[T]:
    """A value of every rank, by rank; this process's alone where it has joined no others."""
    if not torch.distributed.is_initialized():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def share_cpus() -> None:
    """Give each rank of this machine its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here()))


def of_lost_ranks(error: BaseException) -> bool:
    """Whether an error of a collective, or of the making of a group, says that other ranks do not answer.

    Gloo's errors have no class of their own.
    """
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def lost_ranks(error: BaseException, minutes: float, step_minutes: float) -> str | None:
    """What to look at after an error that says that other ranks do not answer; None for any other error.

    Args:
        error: What a collective, or the making of the group, raised.
        minutes: How long ranks wait for each other.
        step_minutes: And in steps, where that is shorter.
    """
    if not of_lost_ranks(error):
        return None
    me = ranks()
    return (
        f"other ranks are gone, or did not answer for train.timeout_minutes = {minutes:g} (in steps for "
        f"train.step_timeout_minutes = {step_minutes:g}, where that is shorter). This is rank {me.rank} of {me.world} on "
        f"{socket.gethostname()}; rank 0 is on {os.environ.get('MASTER_ADDR')}. Look at the first error among the outputs of all "
        "ranks, whether the machines still reach each other, and what their kernels say (dmesg: memory that ran out, a lost GPU)"
    )


def set_timeout(minutes: float) -> None:
    """Change how long ranks wait for each other, in every group, from the next call on; all ranks together."""
    group = torch.distributed.distributed_c10d
    for one in group._world.pg_map:
        group._set_pg_timeout(timedelta(minutes=minutes), one)


def end_processes() -> None:
    """Leave the process group, with its threads; all ranks together."""
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()
    gc.collect()


def own_gpu_alone() -> bool:
    """Whether the launcher shows each rank one GPU, as Slurm does with `--gpus-per-task=1`; there may be others."""
    return torch.cuda.device_count() == 1 and len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1


def gpu_of(me: Ranks) -> int:
    """This rank's GPU: the one with its number, or the only one where the launcher shows each rank its own."""
    return 0 if torch.cuda.device_count() == 1 else me.local_rank
