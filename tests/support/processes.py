"""Runs commands and recipes as a user does: the `armillary` command, and recipes with or without the deepspeed launcher.

Without the launcher, ranks are forked with the slow imports behind them, each with its own RANK, as Slurm or torchrun would
set it. That leaves out the launcher's two processes, which import all of deepspeed before the first rank starts.
"""

import contextlib
import importlib
import io
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import fork_server

from armillary.engine import cli
from armillary.engine.config.run import Run

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Command:
    """A recipe's command line on so many ranks."""

    script: Path
    arguments: list[str]
    ranks: int
    launcher: bool


class Job:
    """A command under way; each of its processes has a session of its own."""

    def __init__(self, command: Command):
        if not command.launcher:
            self.processes: list = fork_server.start(
                command.script, command.arguments, command.ranks, TRITON_INTERPRET="0"
            )
            return
        (environment,) = fork_server.environments(0, {"TRITON_INTERPRET": "0"})
        options = ["--num_accelerators", str(command.ranks), "--master_port", environment["MASTER_PORT"]]
        line = [sys.executable, "-m", "deepspeed.launcher.runner", *options, str(command.script), *command.arguments]
        self.processes = [fork_server.popen(line, environment)]

    def wait(self):
        """Wait for the end of all; returns their exit codes and what they said."""
        said = "".join(process.communicate()[0] for process in self.processes)
        return [process.wait() for process in self.processes], said


def armillary(*arguments, code=0):
    """Run the `armillary` command in this process, which spares its imports; returns what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        ended = cli.main([*map(str, arguments)])
    assert ended == code, f"armillary {' '.join(map(str, arguments))}\nexit code {ended}\n{said.getvalue()[-4000:]}"
    return said.getvalue()


def recipe(*arguments, ranks=2, name="dinov2_vitl", launcher=False):
    """A recipe on so many ranks."""
    return Command(ROOT / "recipes" / f"{name}.py", [*map(str, arguments)], ranks, launcher)


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
    assert ended == code, f"{command.script} {' '.join(command.arguments)}\nexit codes {codes}\n{said[-4000:]}"
    return said
