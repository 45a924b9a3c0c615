"""Runs commands and recipes as a user does: the `armillary` command, and recipes as Slurm or torchrun would start them.

Ranks are forked with the slow imports behind them, each with its own RANK. The deepspeed launcher, whose two processes import
all of deepspeed before the first rank starts, is left to the tests of the trainer and of the wheel.
"""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
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


class Job:
    """A command under way; each of its processes has a session of its own."""

    def __init__(self, command: Command):
        self.processes = fork_server.start(command.script, command.arguments, command.ranks, at_once=True)

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


def recipe(*arguments, ranks=2, name="dinov2_vitl"):
    """A recipe on so many ranks."""
    return Command(ROOT / "recipes" / f"{name}.py", [*map(str, arguments)], ranks)


def presets(name):
    """The recipe and its presets: name of the constant -> Run."""
    module = importlib.import_module(f"armillary.recipes.{name}")
    return {constant: value for constant, value in vars(module).items() if isinstance(value, Run)}


def metrics(folder):
    """Lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """Loss of every step of a run."""
    return [line["loss"] for line in metrics(folder)]


def tensor_files(folder, step):
    """Contents of a checkpoint's tensor files: weights, moments, averages, buffers and random states of all ranks."""
    checkpoint = Path(folder) / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


def cut_after(folder, step, copy):
    """Copy a run as if it had died after a checkpoint that was not its last."""
    shutil.copytree(folder, copy)
    for later in (copy / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    (copy / "checkpoints" / "latest").write_text(f"step-{step:08d}")


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
