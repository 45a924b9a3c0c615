"""Starts test ranks by forking a process that has the slow imports behind it: real processes, real signals, real ends.

    python fork_server.py SOCKET

A rank gets a session, an environment, arguments and an output file of its own, runs a script as `__main__`, and leaves as
any Python process does, with the whole interpreter finalised. Triton reads TRITON_INTERPRET while it is imported, so there
is a server for each value. Pyarrow, whose import starts a thread, and what imports it are imported by the rank. A server
ends with the process that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("torch", "torch._dynamo", "torch.utils.tensorboard", "torch.profiler", "deepspeed", "deepspeed.ops",
        "deepspeed.runtime.engine", "deepspeed.runtime.zero.stage3", "scipy.stats", "safetensors.torch", "tyro.constructors",
        "rich.progress", "cloudpickle", "setuptools", "webdataset", "nvidia.dali.plugin.pytorch",
        "armillary.models.dinov2.dinov2", "armillary.models.specformer.specformer_pretraining",
        "armillary.models.astroclip.astroclip", "armillary.kernels.adamw_ema")  # fmt: skip


class Rank:
    """A forked rank, as much of `subprocess.Popen` as tests use; its output goes to a file."""

    def __init__(self, path: Path, task: dict):
        self.returncode: int | None = None
        self._output = Path(task["output"])
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._socket.sendall(json.dumps(task).encode() + b"\n")
        self.pid = self._number()

    def _number(self) -> int:
        """The next number that the server sends."""
        line = b""
        while not line.endswith(b"\n"):
            more = self._socket.recv(1)
            assert more, "the fork server has died"
            line += more
        return int(line)

    def wait(self, timeout: float | None = None) -> int:
        """Exit code; negative for a signal."""
        if self.returncode is None:
            self._socket.settimeout(timeout)
            try:
                self.returncode = self._number()
            except TimeoutError as error:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0) from error
            self._socket.close()
        return self.returncode

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        try:
            return self.wait(1e-3)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it has said, when it has ended."""
        self.wait(timeout)
        return self._output.read_text(), None


class ForkServer:
    """The server's other end.

    Args:
        folder: For the socket and the output files.
        interpret: Value of TRITON_INTERPRET.
    """

    def __init__(self, folder: Path, interpret: str):
        self._folder, self._count = folder, 0
        self._path = folder / "fork"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment["TRITON_INTERPRET"] = interpret
        command = [sys.executable, __file__, str(self._path)]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, cwd=ROOT)

    def start(self, script: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> Rank:
        """Fork a rank that runs a script."""
        while not self._path.exists():
            assert self._process.poll() is None, "the fork server cannot start"
            time.sleep(0.02)
        self._count += 1
        output = self._folder / f"output-{self._count}"
        task = {"argv": [str(script), *arguments], "environment": dict(environment), "output": str(output)}
        return Rank(self._path, task)

    def close(self) -> None:
        """End the server; ranks go on."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@cache
def _server(interpret: str) -> ForkServer:
    folder = tempfile.TemporaryDirectory(prefix="armillary-ranks-")
    server = ForkServer(Path(folder.name), interpret)
    atexit.register(folder.cleanup)
    atexit.register(server.close)  # before its folder goes
    return server


def environments(world: int, common: Mapping[str, str]) -> list[dict[str, str]]:
    """What a launcher sets for each of so many ranks, with a port of their own; for no rank, a plain process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    kept |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    kept |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **common}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)} for r in range(world)]
    return [kept | own for own in ranks or [{}]]


def start(script: Path, arguments: Sequence[str] = (), world: int = 2, **common: str) -> list[Rank]:
    """Fork so many ranks that run a script, from a server of this process."""
    return [
        _server(environment.get("TRITON_INTERPRET", "0")).start(script, arguments, environment)
        for environment in environments(world, common)
    ]


def popen(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a new interpreter, or a launcher, in a session of its own; its output is read by `communicate`."""
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )


def _serve(path: str) -> dict | None:
    """Fork a rank for each connection and tell how it ended; returns in each rank, with its task, and at the end."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fd == 0:  # our starter has closed it, or is gone
                return None
            if key.fileobj is listener:
                connection, _ = listener.accept()
                with connection.makefile() as lines:
                    task = json.loads(lines.readline())
                pid = os.fork()
                if pid == 0:
                    for other in list(waiting.get_map().values()):
                        if other.fd != 0:
                            os.close(other.fd)
                    os.close(connection.detach())
                    listener.detach()
                    return task
                connection.sendall(b"%d\n" % pid)
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
                continue
            pid, connection = key.data
            waiting.unregister(key.fd)
            os.close(key.fd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            try:
                connection.sendall(b"%d\n" % code)
            except BrokenPipeError:  # nobody wants to know
                pass
            connection.close()


def _become(task: dict) -> None:
    """Take on a rank's session, environment, arguments and output, and run its script."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup started the tests
    output = os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(task["environment"])
    sys.argv = task["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    import gc
    import importlib

    for name in SLOW:
        with contextlib.suppress(ModuleNotFoundError):  # DALI is not everywhere
            importlib.import_module(name)
    getattr(sys.modules["deepspeed.ops"], "__compatible_ops__", None)  # each rank would find them out anew
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads, and what they had locked"
    gc.freeze()  # no rank's collections, nor that at its end, search and so copy these pages: half of a short run's time
    found = _serve(sys.argv[1])
    if found is not None:
        _become(found)
