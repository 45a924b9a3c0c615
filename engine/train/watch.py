"""Which rank does not come: each says in the group's store how far it is, and one that waits too long names those behind.

A thread of each rank does so once in a while, so that a step costs nothing more. It speaks before the time-out of the process group
ends the run, since NCCL then ends the process without a word from Python.
"""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["Watch"]

STARTED = (0, "the start")
STORE_SECONDS = 5.0
SECONDS = 1.0  # at most, between two words of a rank
PATIENCE_SECONDS = 10.0  # with a store on a machine that is gone: its time-out is kept by that machine, and TCP waits a quarter of an hour


class Watch:
    """How far this rank and the others are.

    Args:
        minutes: After so long at one place, with others behind, these are named; the lowest rank in front speaks.
    """

    def __init__(self, minutes: float):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._limit = 60 * minutes
        self._place, self._since = STARTED, time.monotonic()
        self._told: tuple[int, str] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if self.world > 1:
            # of its own, so that a call that waits keeps nobody else from the group's one
            shared: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("armillary/watch", shared.clone())
            self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
            self._publish()
            dist.barrier()
            self._thread = threading.Thread(target=self._go, name="watch", daemon=True)
            self._thread.start()

    def at(self, number: int, place: str, minutes: float | None = None) -> None:
        """This rank has come to a place.

        Args:
            number: Greater than before at each call.
            place: Its name in messages.
            minutes: How long others may take to come here; as before where absent.
        """
        if minutes is not None:
            self._limit = 60 * minutes
        self._place, self._since = (number, place), time.monotonic()

    def behind(self) -> str:
        """The ranks that are least far, as a sentence; within seconds, whatever has become of the machine that keeps the list."""
        said: list[str] = []
        asking = threading.Thread(target=lambda: said.append(self._behind()), name="watch-behind", daemon=True)
        asking.start()
        asking.join(PATIENCE_SECONDS)
        return said[0] if said else "rank 0, which keeps the list of ranks, does not answer"

    def _behind(self) -> str:
        try:
            self._publish()
            places = [self._read(rank) for rank in range(self.world)]
        except (RuntimeError, ValueError) as error:
            return f"rank 0, which keeps the list of ranks, cannot be reached: {error}"
        least = min(place for place, _ in places)
        late = ", ".join(str(rank) for rank, (place, _) in enumerate(places) if place == least)
        if least[0] >= self._place[0]:
            return f"no rank is behind the others: all are at {least[1]}"
        silent = max(age for place, age in places if place == least)
        return (
            f"rank {late} did not come to {self._place[1]}, where rank {self.rank} has waited for "
            f"{time.monotonic() - self._since:.0f} s; it was last at {least[1]} and last heard of {silent:.0f} s ago"
        )

    def close(self) -> None:
        """End the thread; one that waits for a store that does not answer is left behind."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)

    def _publish(self) -> None:
        number, name = self._place
        self._store.set(str(self.rank), f"{number}|{time.time():.1f}|{name}")

    def _read(self, rank: int) -> tuple[tuple[int, str], float]:
        number, said, name = self._store.get(str(rank)).decode().split("|", 2)
        return (int(number), name), max(0.0, time.time() - float(said))

    def _go(self) -> None:
        while not self._ended.wait(min(SECONDS, self._limit / 10)):
            try:
                self._publish()
                if time.monotonic() - self._since > self._limit and self._told != self._place:
                    self._tell()
            except (
                RuntimeError,
                ValueError,
            ):  # the group is going down, or rank 0 is gone: the collectives will say so
                continue

    def _tell(self) -> None:
        """Say who is behind, where this is the lowest of the ranks in front."""
        places = [self._read(rank)[0] for rank in range(self.world)]
        front = [rank for rank, place in enumerate(places) if place[0] >= self._place[0]]
        if len(front) < self.world and self.rank == front[0]:
            self._told = self._place
            print(f"WARNING: {self.behind()}", file=sys.stderr, flush=True)
