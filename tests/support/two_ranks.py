"""Starts a function's source on several ranks (gloo), for tests of what is summed over ranks."""

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

PREAMBLE = """
import os, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=world)
"""


def run_on_ranks(function, folder, ranks, timeout=300):
    """Run `function(rank)`, which imports what it uses, on so many ranks; fail with their output unless all succeed."""
    source = PREAMBLE + textwrap.dedent(inspect.getsource(function)) + f"\n{function.__name__}(rank)\n"
    source += "dist.barrier()\ndist.destroy_process_group()\n"
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FOLDER": str(folder), "STORE": f"{folder}/store"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", source], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert [p.returncode for p in processes] == [0] * ranks, "\n---\n".join(outputs)


def run_on_two_ranks(function, folder, timeout=300):
    """`run_on_ranks` on two."""
    run_on_ranks(function, folder, 2, timeout)
