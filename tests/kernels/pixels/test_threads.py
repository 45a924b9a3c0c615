"""The extension's threads: those that cannot be made, and those that work while the process ends."""

import os
import subprocess
import sys

import pytest

CALLS = """
import numpy as np
from armillary import _C
x = np.ones((400, 1, 8, 8), np.float32)
blobs = [_C.encode(image, np.ones(1, np.float32), None) for image in x]
CALLS = {
    "decode": lambda threads: _C.decode_batch(blobs, np.empty_like(x), None, threads),
    "noise": lambda threads: _C.add_noise(x, np.ones((400, 1), np.float32), np.zeros((400, 3), np.uint32), 1, threads),
}
"""
FEW = """
import resource
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 200 * 2**20,) * 2)  # a thread's stack takes 8 MiB of it
CALLS[{call!r}](400)
"""
ENDING = """
import sys, threading
def work():
    while True:
        CALLS[{call!r}](2)
threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
CALLS[{call!r}](2)
"""
FORKED = """
import os, threading, time
threading.Thread(target=lambda: [CALLS[{call!r}](2) for _ in iter(int, 1)], daemon=True).start()
for _ in range(5):
    time.sleep(0.01)
    if not (child := os.fork()):
        break  # and ends as any process does, without the thread
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("call", ["decode", "noise"])
@pytest.mark.parametrize("what", [FEW, ENDING, FORKED], ids=["no more threads", "daemons at the end", "forked"])
def test_the_process_ends_well(what, call):
    given = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CALLS + what.format(call=call)]
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
