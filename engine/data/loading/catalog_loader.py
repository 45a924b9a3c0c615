"""Batches that name samples without reading them: for methods whose inputs are catalogue columns or cached features.

The order, the state and the global batches are those of `loader.Loader`; only `row` and `position` are made here, and the
transforms put the rest to them. No shard is opened, so the tars need not be on this machine.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import torch

from armillary.engine.data.loading.batches import EndlessBatches, OnePass
from armillary.engine.data.loading.decoding import OnCorrupt
from armillary.engine.data.loading.epoch_order import MicroBatch
from armillary.engine.data.loading.stream import BatchRecipe, SplitStream, Transform
from armillary.models.method import Batch

__all__ = ["CatalogLoader", "RowSource", "SequentialCatalogLoader"]


class RowSource(SplitStream):
    """A split of which nothing is read but the plan."""

    def _begin(self, requests: Iterator[MicroBatch], on_corrupt: OnCorrupt) -> BatchRecipe:
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
    """Endless micro-batches of one rank, over epochs: the rows that a `Loader` of the same arguments would read.

    Args:
        folder: The survey.
        split: Split to name rows of.
        micro_batch: Samples a batch.
        accumulation: Batches a rank and global batch.
        rank: This rank.
        world: Ranks.
        seed: Keys the order and, with the position, every draw of `views` and `prepare`.
        device: Where batches are delivered.
        views: Adds the model's inputs to a batch of rows; runs in the loader's thread.
        prepare: Runs after `views`: what else the method wants made ahead of the step.
        prefetch: Batches kept ready; up to four times as many where the consumer has had to wait.
        timeout_s: How long to wait for a batch before giving up.
        shuffle: False for stored order in every epoch.

    Attributes:
        survey: Description of the survey.
        global_batch: Samples a global batch.
        wait_seconds: Time the consumer has waited for batches.
        corrupt: Always 0.

    Raises:
        FileNotFoundError: No survey.
        ValueError: A field has no meaning, there is no such split, or it is smaller than a global batch.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        micro_batch: int,
        device: torch.device | str,
        split: str = "train",
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        views: Transform | None = None,
        prepare: Transform | None = None,
        prefetch: int = 2,
        timeout_s: float = 1800.0,
        shuffle: bool = True,
    ) -> None:
        source = RowSource(
            folder,
            split,
            rank=rank,
            world=world,
            seed=seed,
            shuffle=shuffle,
            device=torch.device(device),
            transforms=(views, prepare),
            prefetch=prefetch,
            timeout_s=timeout_s,
        )
        super().__init__(source, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world=world)


class SequentialCatalogLoader(OnePass):
    """Every row of a split once, in stored order; the last batch may be short. Iterating again starts over.

    Args:
        folder: The survey.
        split: Split to name rows of.
        batch: Samples a batch.
        device: Where batches are delivered.
        views: Adds the model's inputs to a batch of rows; runs in the loader's thread.
        prefetch: Batches kept ready; up to four times as many where the consumer has had to wait.
        timeout_s: How long to wait for a batch before giving up.
        parts: Only these places of the split, in this order; the last batch of each may be short.

    Attributes:
        survey: Description of the survey.
        corrupt: Always 0.

    Raises:
        FileNotFoundError: No survey.
        ValueError: A field has no meaning, or there is no such split.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        split: str,
        batch: int,
        device: torch.device | str,
        views: Transform | None = None,
        prefetch: int = 2,
        timeout_s: float = 1800.0,
        parts: Iterable[range] | None = None,
    ) -> None:
        source = RowSource(
            folder,
            split,
            rank=0,
            world=1,
            seed=0,
            shuffle=False,
            device=torch.device(device),
            transforms=(views,),
            prefetch=prefetch,
            timeout_s=timeout_s,
        )
        super().__init__(source, batch=batch, parts=parts)
