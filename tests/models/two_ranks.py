"""Starts a function's source on two ranks (gloo), for tests of what is summed over ranks."""

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
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=2)
"""


def run_on_two_ranks(function, folder, timeout=300):
    """Run `function(rank)`, which imports what it uses, on two ranks; fail with their output unless both succeed."""
    source = PREAMBLE + textwrap.dedent(inspect.getsource(function)) + f"\n{function.__name__}(rank)\n"
    source += "dist.barrier()\ndist.destroy_process_group()\n"
    ranks = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "STORE": f"{folder}/store"}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FOLDER": str(folder)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", source], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
            p.wait()
    assert [p.returncode for p in ranks] == [0, 0], "\n---\n".join(outputs)
