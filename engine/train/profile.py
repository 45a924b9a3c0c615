"""Traces of a few steps: a file for a trace viewer, and the operations that took most of the time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from armillary.engine.config.run import Run

__all__ = ["StepProfile"]

ROWS = 15


class StepProfile:
    """Traces the steps that `profile.steps` names, on rank 0; the other ranks wait for it as long as it is slower.

    Args:
        run: The run.
        rank: This rank.
        device: Where it computes.
        say: Prints a line.
    """

    def __init__(self, run: Run, rank: int, device: torch.device, say: Callable[[str], None]):
        self._span = run.profile.span if rank == 0 else range(0)
        self._folder, self._say = run.folder / "profile", say
        self._cuda = device.type == "cuda"
        self._running: profile | None = None

    def before(self, done: int) -> None:
        """Before a step.

        Args:
            done: Steps done.
        """
        if self._running is None and done in self._span:
            if self._cuda:
                torch.cuda.memory._record_memory_history()
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._running = profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True)
            self._began = done
            self._running.start()

    def after(self, done: int) -> None:
        """After a step: write what was traced where it was the last one."""
        if done >= self._span.stop:
            self.close(done)

    def close(self, done: int) -> None:
        """Write what was traced, also where the run ends before the last step to trace; a full disk ends no run."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        key = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        self._say(running.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=45))
        name = f"steps-{self._began + 1}-{done}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            self._say(
                f"profile of steps {self._began + 1} to {done}: {self._folder / name}.json.gz, for ui.perfetto.dev"
            )
            if self._cuda:
                self._write_memory(self._folder / f"{name}.memory.pickle")
        except OSError as error:
            self._say(f"WARNING: the profile cannot be written: {error}")

    def _write_memory(self, path: Path) -> None:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
        self._say(f"memory of these steps: {path}, for pytorch.org/memory_viz")
