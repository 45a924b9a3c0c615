"""Starts the toy recipe in real processes, with or without the deepspeed launcher, each in a session of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import fork_server
import pytest

SCRIPT = Path(__file__).with_name("toy.py")


@dataclass
class Ended:
    """Exit codes by process (one for the launcher), output of all, seconds."""

    codes: list[int]
    output: str
    seconds: float

    @property
    def code(self) -> int:
        """The exit code where all agree."""
        assert len(set(self.codes)) == 1, f"{self.codes}\n{self.output}"
        return self.codes[0]


class Site:
    """A folder with a survey, where runs are started."""

    def __init__(self, folder: Path):
        import toy

        self.runs = folder / "runs"
        self.survey = toy.toy_survey(folder / "survey")
        self.live: list[subprocess.Popen | fork_server.Rank] = []

    def start(
        self,
        *arguments: str,
        world: int = 2,
        launcher: bool = False,
        fresh: bool = False,
        at_once: bool = True,
        script: Path = SCRIPT,
        **environment: str,
    ) -> list:
        """Start processes without waiting for them; world = 0 is one process that knows nothing of launchers.

        They are forked by the fork server, the launcher too, or, if `fresh`, interpreters that a shell would start. What a
        launcher starts are interpreters of its own. They leave `at_once` unless how they end is a question.
        """
        environment |= {"TOY_OUT": str(self.runs), "TOY_SURVEY": str(self.survey)}
        if fresh:
            command = [sys.executable, str(script), *arguments]
            ranks = fork_server.environments(world, environment)
            started: list = [fork_server.popen(command, rank) for rank in ranks]
        elif launcher:
            deepspeed = Path(sys.executable).with_name("deepspeed")
            options = ["--num_gpus", str(world), "--master_port", fork_server.free_port(), str(script), *arguments]
            started = fork_server.start(deepspeed, options, 0, at_once=at_once, **environment)
        else:
            started = fork_server.start(script, arguments, world, at_once=at_once, **environment)
        self.live += started
        return started

    def wait(self, processes: list, timeout: float = 150) -> Ended:
        """Wait until all have ended; whoever outlives the timeout is killed, with a failure."""
        begin = time.monotonic()
        texts = []
        try:
            for p in processes:
                texts.append(p.communicate(timeout=max(1, timeout - (time.monotonic() - begin)))[0])
        except subprocess.TimeoutExpired:
            self.stop(processes)
            pytest.fail(f"still running after {timeout} s: " + "".join(p.communicate()[0] for p in processes))
        return Ended([p.returncode for p in processes], "".join(texts), time.monotonic() - begin)

    def go(self, *arguments: str, **options) -> Ended:
        """Start and wait."""
        return self.wait(self.start(*arguments, **options))

    def stop(self, processes: list) -> None:
        """SIGKILL whole sessions: nothing a test started outlives it."""
        for p in processes:
            if p.poll() is not None:
                continue
            try:
                os.killpg(p.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def metrics(self, name: str) -> list[dict]:
        """Lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.runs / name / "metrics.jsonl").read_text().splitlines()]

    def checkpoint(self, name: str, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.runs / name / "checkpoints" / f"step-{step:08d}"

    def latest(self, name: str) -> str:
        """What `latest` says."""
        return (self.runs / name / "checkpoints" / "latest").read_text()
