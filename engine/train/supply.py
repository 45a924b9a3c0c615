"""The loader's micro-batches, and what is done when they cannot be read any more: all ranks leave, with the state saved.

A rank that has nothing to read goes through the rest of the step with its last micro-batch, since the others wait for it in
collectives. It says so at the step's end; then all leave that step out, which leaves everything as it was before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from armillary.engine.config.randomness import random_states, set_random_states
from armillary.engine.data.format.codec import CorruptBlob
from armillary.engine.token_cache.cache import TokenCacheError
from armillary.engine.zero.processes import gather_objects
from armillary.models.method import Batch

__all__ = ["BatchSource", "DataLost", "Supply"]

UNREADABLE = (OSError, CorruptBlob, TokenCacheError)


class DataLost(RuntimeError):
    """The survey, or a sample of it, cannot be read; all ranks leave."""


class BatchSource(Protocol):
    """What the loop needs of a loader: see `engine.data.loading.loader.Loader`."""

    wait_seconds: float

    def __iter__(self) -> Iterator[Batch]:
        """Endless micro-batches of this rank."""

    def state_dict(self) -> dict[str, Any]:
        """Where the next global batch begins."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""

    def close(self) -> None:
        """Stop threads."""


class Supply:
    """Micro-batches of this rank.

    Args:
        loader: Where they come from.

    Attributes:
        lost: Why there are no more; empty as long as there are.
        state: The loader's state after the last whole step.
    """

    def __init__(self, loader: BatchSource) -> None:
        self._loader, self._batches = loader, iter(loader)
        self._first: Batch | None = None
        self._last: Batch | None = None
        self.lost = ""
        self.note_step()

    def note_step(self) -> None:
        """A step is done: what the next one draws and reads begins here."""
        self.state, self._random = self._loader.state_dict(), random_states()

    def begin(self) -> None:
        """Read the first micro-batch, which is handed out by `next`; where a rank cannot, none has one to go on with."""
        try:
            self._first = next(self._batches)
        except UNREADABLE as error:
            self.lost = _words(error)

    def next(self) -> Batch:
        """The next micro-batch, or the last one again where there are no more."""
        if self._first is not None:
            self._last, self._first = self._first, None
        elif not self.lost:
            try:
                self._last = next(self._batches)
            except UNREADABLE as error:
                self.lost = _words(error)
        assert self._last is not None, "`begin` comes first"
        return self._last

    def undo_step(self) -> None:
        """Forget what has been drawn since the last whole step."""
        set_random_states(*self._random)

    def losses(self) -> str:
        """What the ranks that have no more say, a line each; all ranks together."""
        said: dict[str, list[int]] = {}
        for rank, words in enumerate(gather_objects(self.lost)):
            if words:
                said.setdefault(words, []).append(rank)
        return "".join(f"\n  rank {', '.join(map(str, ranks))}: {words}" for words, ranks in said.items())


def _words(error: Exception) -> str:
    """What could not be read; where the system does not name it, the first note does."""
    unnamed = isinstance(error, OSError) and error.filename is None
    return "; ".join([str(error), *getattr(error, "__notes__", [])[: int(unnamed)]])
