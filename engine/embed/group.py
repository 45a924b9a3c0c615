"""The processes that embed a survey together: they agree before work, go their own ways, and meet again at the end.

No batch needs another process, so nothing is exchanged in between, and a slow one holds up none but the last moment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from armillary.engine.zero.processes import (
    Ranks,
    gather_objects,
    launch_problems,
    of_lost_ranks,
    ranks,
    take_slurm_ranks,
)

__all__ = ["Refused", "Together", "joined"]

PATIENCE = timedelta(days=7)
"""How long a process waits for the others at the end: a survey takes hours, and its parts are not of one speed."""

SPEAKS_FIRST = 2.0
"""Seconds that rank 0 has to say what is wrong: a launcher ends the others when the first one leaves."""

T = TypeVar("T")


class Refused(ValueError):
    """All processes leave: at least one of them has found something wrong; the message says which and what."""


class Together:
    """This process among those of the job.

    Attributes:
        me: Rank and number of processes.
    """

    def __init__(self, me: Ranks) -> None:
        self.me = me

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which speaks and writes what is written once."""
        return self.me.rank == 0

    def all(self, function: Callable[[], T]) -> T:
        """Call a function in every process; what it returned in this one, once it has succeeded in all.

        Raises:
            Refused: In every process, where it failed in any with a ValueError or OSError (bad input, a full disk).
            SystemExit: In place of it in all processes but rank 0, which says it.
        """
        problem, value = "", None
        try:
            value = function()
        except (ValueError, OSError) as error:
            problem = str(error)
        problems: dict[str, int] = {}
        for rank, said in enumerate(self.gather(problem)):
            if said:
                problems.setdefault(said, rank)
        if problems and not self.first:
            time.sleep(SPEAKS_FIRST)
            raise SystemExit(2)
        if problems:
            alike = len(problems) == 1
            raise Refused("; ".join(said if alike else f"rank {rank}: {said}" for said, rank in problems.items()))
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """A value of every process, by rank."""
        return gather_objects(value)

    def require_same(self, name: str, value: str) -> None:
        """Refuse processes that disagree, for example on what a path holds.

        Raises:
            Refused: See `all`.
        """
        values = self.gather(value)

        def compare() -> None:
            if value != values[0]:
                raise ValueError(
                    f"{name}: must be the same for all processes, but is {value} for rank {self.me.rank} and {values[0]} for rank 0"
                )

        self.all(compare)


@contextmanager
def joined() -> Iterator[Together]:
    """The processes of this job for the length of a block: those that a launcher started, or this one alone.

    Raises:
        ValueError: The launcher's variables describe no group.
        RuntimeError: Another process is gone.
    """
    if problems := take_slurm_ranks(os.environ) or launch_problems():
        raise ValueError("; ".join(problems))
    me = ranks()
    if me.world > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Together(me)
    except RuntimeError as error:
        if not of_lost_ranks(error):
            raise
        raise RuntimeError(
            f"another process is gone, as process {me.rank} of {me.world} finds ({error}). Look at the first error among their "
            "outputs; parts that are finished stay, and the same command goes on"
        ) from error
    finally:
        if me.world > 1:
            dist.destroy_process_group()
