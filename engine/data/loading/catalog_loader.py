"""Batches that name samples without reading them: methods whose inputs are catalogue columns or cached tokens need no more.

The order, the state and the global batches are those of `loader.Loader`. Only `row` and `position` are made here; the
transforms add the rest. No shard is opened, so the tars need not be on this machine.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

from armillary.engine.data.loading.batches import EndlessBatches, OnePass
from armillary.engine.data.loading.epoch_order import MicroBatch
from armillary.engine.data.loading.stream import BatchRecipe, Skipped, SplitStream
from armillary.models.method import Batch

__all__ = ["CatalogLoader", "RowSource", "SequentialCatalogLoader"]


class RowSource(SplitStream):
    """A split of which nothing is read but the plan."""

    def _begin(self, requests: Iterator[MicroBatch], skipped: Skipped) -> BatchRecipe:
        return BatchRecipe(_unread(requests), self._make, _describe)

    def _make(self, request: MicroBatch, _: None) -> tuple[Batch, int]:
        named = {"row": request.row, "position": request.position}
        return Batch(**{name: torch.from_numpy(x).to(self.device) for name, x in named.items()}), 0  # type: ignore[typeddict-item]

    def after_fork(self) -> None:
        """Nothing to begin anew."""

    def close(self) -> None:
        """Nothing to let go of."""


def _unread(requests: Iterator[MicroBatch]) -> Generator[tuple[MicroBatch, None], None, None]:
    for request in requests:
        yield request, None


def _describe(request: MicroBatch) -> str:
    return f"positions {request.position[0]} ... {request.position[-1]} of epoch {request.epoch}"


class CatalogLoader(EndlessBatches):
    """Endless micro-batches of one rank: the rows that a `Loader` of the same arguments would read. None is corrupt."""

    _stream = RowSource


class SequentialCatalogLoader(OnePass):
    """Every row of a split once, in stored order."""

    _stream = RowSource
