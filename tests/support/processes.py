"""Runs commands and recipes as a user does: the `armillary` command, and recipes with or without the deepspeed launcher.

Without the launcher, ranks are started as Slurm or torchrun would: each with its own RANK. That leaves out the launcher's
two processes, which import all of deepspeed before the first rank starts.
"""

import contextlib
import importlib
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from armillary.engine import cli
from armillary.engine.config.run import Run

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Command:
    """Command lines that are started together, one for each rank, or one alone."""

    lines: list[list[str]]
    environments: list[dict[str, str]]


@dataclass
class Job:
    """Processes under way; all of them write to one file."""

    command: Command
    processes: list[subprocess.Popen] = field(default_factory=list)

    def __post_init__(self):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        common = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}
        common.pop("TRITON_INTERPRET", None)
        self.output = tempfile.TemporaryFile("w+")
        for line, own in zip(self.command.lines, self.command.environments, strict=True):
            self.processes.append(
                subprocess.Popen(
                    line,
                    stdout=self.output,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=common | own,
                    start_new_session=True,
                )
            )

    def wait(self):
        """Wait for the end of all; returns their exit codes and what they said."""
        codes = [p.wait() for p in self.processes]
        with self.output:
            self.output.seek(0)
            return codes, self.output.read()


def armillary(*arguments, code=0):
    """Run the `armillary` command in this process, which spares its imports; returns what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        ended = cli.main([*map(str, arguments)])
    assert ended == code, f"armillary {' '.join(map(str, arguments))}\nexit code {ended}\n{said.getvalue()[-4000:]}"
    return said.getvalue()


def recipe(*arguments, ranks=2, name="dinov2_vitl", launcher=False):
    """A recipe on so many ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    line = [str(ROOT / "recipes" / f"{name}.py"), *map(str, arguments)]
    if launcher:
        options = ["--num_accelerators", str(ranks), "--master_port", port]
        return Command([[sys.executable, "-m", "deepspeed.launcher.runner", *options, *line]], [{}])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    own = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return Command([[sys.executable, *line]] * ranks, own)


def presets(name):
    """The recipe and its presets: name of the constant -> Run."""
    module = importlib.import_module(f"armillary.recipes.{name}")
    return {constant: value for constant, value in vars(module).items() if isinstance(value, Run)}


def start(command):
    """Start a command, each of its processes in a session of its own."""
    return Job(command)


def kill(job):
    """SIGKILL the command and everything it started."""
    for process in job.processes:
        os.killpg(process.pid, signal.SIGKILL)
    job.wait()


def run(command, code=0):
    """Run a command to its end; returns what it said. Of several processes the first that failed gives the code."""
    codes, said = start(command).wait()
    ended = next((c for c in codes if c), 0)
    lines = "\n".join(" ".join(line) for line in command.lines)
    assert ended == code, f"{lines}\nexit codes {codes}\n{said[-4000:]}"
    return said
