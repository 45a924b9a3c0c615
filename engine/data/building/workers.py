"""A pool of processes that share a source.

Processes are spawned, not forked: libraries that hold threads or file positions survive. Each imports the script that
was started, so a script that builds with more than one process needs the usual `if __name__ == "__main__":`.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from armillary.engine.data.sources.source import Source

__all__ = ["Workers", "in_order"]

Task = TypeVar("Task")
Result = TypeVar("Result")

UNGUARDED = 'put the call that builds below `if __name__ == "__main__":` in the script that was started'

_source: Source | None = None  # of this worker process


class Workers:
    """Runs functions of (source, task) in processes, or right here where one process is asked for.

    Args:
        source: Pickled once, and read by each process.
        processes: Worker processes; with 1 there are none.
        folder: Where the pickled source lies while they run.

    Raises:
        RuntimeError: This process is a worker that imports the script that was started.
        ValueError: `processes` is not positive.
    """

    def __init__(self, source: Source, processes: int, folder: Path) -> None:
        if processes < 1:
            raise ValueError(f"processes: must be at least 1, got {processes}")
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself tells it
            raise RuntimeError(f"this worker process came to the call that started it; {UNGUARDED}")
        self.source, self.processes = source, processes
        self._file = folder / "source.pickle"
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        """Start the processes."""
        if self.processes > 1:
            # Not as an argument of theirs: they read those from a pipe, and writing one that is larger than the pipe
            # would wait for ever for a process that died before it read.
            self._file.write_bytes(pickle.dumps(self.source))
            context = multiprocessing.get_context("spawn")
            try:
                self._started = context.Event()
                self._pool = ProcessPoolExecutor(
                    self.processes, context, initializer=_start, initargs=(self._file, self._started)
                )
            except OSError as error:
                self._file.unlink()
                raise OSError(
                    f"processes: {self.processes} cannot share locks, which lie in /dev/shm ({error}); make room there, or take 1"
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what runs, drop what waits."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._file.unlink(missing_ok=True)

    def map(self, function: Callable[[Source, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of tasks; tasks are taken as workers become free.

        Args:
            function: A module-level function.
            tasks: Picklable.

        Raises:
            RuntimeError: A process died.
        """
        if self._pool is None:
            for task in tasks:
                yield function(self.source, task)
            return
        pool = self._pool
        try:
            yield from in_order(lambda task: pool.submit(_run, function, task), tasks, 2 * self.processes)
        except BrokenProcessPool as error:
            if not self._started.is_set():
                raise RuntimeError(
                    f"the worker processes died as they started; where their error above does not say why, {UNGUARDED}"
                ) from error
            raise RuntimeError(
                "a worker process died (killed, or out of memory); use fewer processes and run the same command "
                "again: what is finished is kept"
            ) from error


def in_order(submit: Callable[[Task], Any], tasks: Iterable[Task], ahead: int) -> Iterator[Any]:
    """Results in the order of tasks, of which at most `ahead` are submitted and not yet handed out.

    Args:
        submit: Gives the task's future.
        tasks: Taken as results are.
        ahead: At least 1.
    """
    running: deque[Any] = deque()
    try:
        for task in tasks:
            running.append(submit(task))
            if len(running) >= ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _start(file: Path, started: Event) -> None:
    global _source
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with open(file, "rb") as f:
        _source = pickle.load(f)
    started.set()


def _die_with_parent() -> None:
    """End this process when the parent is gone: one killed by signal 9 cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run(function: Callable[[Source, Any], Any], task: Any) -> Any:
    if _source is None:
        raise RuntimeError("this process has no source: Workers starts it with one")
    return function(_source, task)
