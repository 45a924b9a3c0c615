"""Starts a function's source on several ranks (gloo), for tests of what is summed over ranks."""

import inspect
import os
import signal
import textwrap

import fork_server

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
    script = folder / "ranks.py"
    script.write_text(source + "dist.barrier()\ndist.destroy_process_group()\n")
    started = fork_server.start(script, world=ranks, at_once=True, FOLDER=str(folder), STORE=f"{folder}/store")
    try:
        outputs = [p.communicate(timeout)[0] for p in started]
    finally:
        for p in started:
            if p.poll() is None:
                os.kill(p.pid, signal.SIGKILL)
                p.wait()
    assert [p.returncode for p in started] == [0] * ranks, "\n---\n".join(outputs)


def run_on_two_ranks(function, folder, timeout=300):
    """`run_on_ranks` on two."""
    run_on_ranks(function, folder, 2, timeout)
