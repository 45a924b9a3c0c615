"""Starts test ranks by forking a process that has the slow imports behind it: real processes, real signals, real ends.

    python fork_server.py FOLDER PID

A rank gets a session, an environment, arguments and an output file of its own, runs a script as `__main__`, and leaves as
any Python process does, with the whole interpreter finalised, or at once, for tests of other things than the end. Triton reads TRITON_INTERPRET while it is imported, so there
is a server for each value; all workers of pytest-xdist share it. A server ends with the test run.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("torch", "torch._dynamo", "torch.utils.tensorboard", "torch.profiler", "deepspeed", "deepspeed.ops",
        "deepspeed.runtime.engine", "deepspeed.runtime.zero.stage3", "scipy.stats", "safetensors.torch", "tyro.constructors",
        "rich.progress", "typeguard", "cloudpickle", "setuptools", "webdataset", "nvidia.dali.plugin.pytorch", "pyarrow.parquet",
        "transformers.models.qwen2_vl.modeling_qwen2_vl", "armillary.engine.train.trainer", "armillary.engine.train.checks",
        "armillary.engine.weights.export", "armillary.models.dinov2.dinov2",
        "armillary.models.specformer.specformer_pretraining", "armillary.models.astroclip.astroclip",
        "armillary.kernels.adamw_ema")  # fmt: skip
SOCKET = "fork"
START_S = 300  # on a machine that many others use


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

    def kill(self) -> None:
        """SIGKILL it, and nothing that it has started."""
        os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it has said, when it has ended."""
        self.wait(timeout)
        return self._output.read_text(), None


class ForkServer:
    """The server's other end; who finds no folder makes it and starts the server, who finds one waits for its socket.

    Args:
        folder: For the socket and the output files.
        interpret: Value of TRITON_INTERPRET.
        owner: Process with whose end the server ends, and removes the folder.
    """

    def __init__(self, folder: Path, interpret: str, owner: int):
        self._folder, self._count = folder, 0
        self._pid = 0
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            return
        environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment["TRITON_INTERPRET"] = interpret
        environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow would start a thread
        command = [sys.executable, __file__, str(folder), str(owner)]
        quiet = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        self._pid = os.posix_spawn(
            sys.executable, command, environment, file_actions=quiet
        )  # which outlives this process

    def start(self, script: Path, arguments: Sequence[str], environment: Mapping[str, str], at_once: bool) -> Rank:
        """Fork a rank that runs a script."""
        deadline = time.monotonic() + START_S
        while not (self._folder / SOCKET).exists():
            ended = self._pid and os.waitpid(self._pid, os.WNOHANG) != (0, 0)
            assert not ended and time.monotonic() < deadline, "the fork server does not start"
            time.sleep(0.02)
        self._count += 1
        output = self._folder / f"output-{os.getpid()}-{self._count}"
        task = {"argv": [str(script), *arguments], "environment": dict(environment)}
        task |= {"output": str(output), "at_once": at_once}
        return Rank(self._folder / SOCKET, task)


@cache
def _server(interpret: str) -> ForkServer:
    """The server of this test run, which workers of pytest-xdist share: they are children of one process."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    run = os.environ["PYTEST_XDIST_TESTRUNUID"] if shared else uuid.uuid4().hex
    folder = Path(tempfile.gettempdir()) / f"armillary-ranks-{run}-{interpret}"
    return ForkServer(folder, interpret, os.getppid() if shared else os.getpid())


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environments(world: int, common: Mapping[str, str]) -> list[dict[str, str]]:
    """What a launcher sets for each of so many ranks, with a port of their own; for no rank, a plain process."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    kept |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    kept |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **common}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)} for r in range(world)]
    return [kept | own for own in ranks or [{}]]


def start(
    script: Path, arguments: Sequence[str] = (), world: int = 2, *, at_once: bool = False, **common: str
) -> list[Rank]:
    """Fork so many ranks that run a script.

    Args:
        script: What they run.
        arguments: Of the script.
        world: Ranks; 0 is one process that knows nothing of ranks.
        at_once: Let them leave without taking down the interpreter, which takes half of the time of a short run.
        common: Environment variables.
    """
    return [
        _server(environment.get("TRITON_INTERPRET", "0")).start(script, arguments, environment, at_once)
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


def _serve(path: str, owner: int) -> dict | None:
    """Fork a rank for each connection and tell how it ended; returns in each rank, with its task, and when the owner ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(owner, selectors.EVENT_READ, "owner")
    while True:
        for key, _ in waiting.select():
            if key.data == "owner":
                return None
            if key.fileobj is listener:
                connection, _ = listener.accept()
                with connection.makefile() as lines:
                    task = json.loads(lines.readline())
                pid = os.fork()
                if pid == 0:
                    for other in list(waiting.get_map().values()):
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
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        if not task["at_once"] or isinstance(left.code, str):
            raise
        leave(left.code or 0)
    if task["at_once"]:
        leave(0)


def leave(code: int) -> None:
    """End this process when all that is registered to be done at its end is done, and its threads have ended."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    import gc
    import importlib

    import interpreter

    os.chdir(ROOT)
    owner = os.pidfd_open(int(sys.argv[2]))
    for name in SLOW:
        with contextlib.suppress(ModuleNotFoundError):  # DALI is not everywhere
            importlib.import_module(name)
    interpreter.speed_up()
    getattr(sys.modules["deepspeed.ops"], "__compatible_ops__", None)  # each rank would find them out anew
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads, and what they had locked"
    gc.freeze()  # no rank's collections, nor that at its end, search and so copy these pages: half of a short run's time
    folder = Path(sys.argv[1])
    found = _serve(str(folder / SOCKET), owner)
    if found is not None:
        _become(found)
    else:
        shutil.rmtree(folder, ignore_errors=True)  # a rank may go on writing to it
