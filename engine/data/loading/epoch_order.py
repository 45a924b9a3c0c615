"""Which samples each rank reads: a pure function of (seed, epoch, position), never a stored permutation.

An epoch is one global order of a split: its shards permuted, and the samples of each shard permuted in place. Shuffling
across shards happens once, when the survey is packed; permuting within shards keeps a micro-batch's reads in one or two
files. Position p of the order is found from the shard counts alone, so 76 million samples (37,000 shards) cost one sort
of the shards an epoch and one sort of a shard's samples where it is read, and no file is opened.

Every draw is keyed by (seed, epoch, shard) through Philox-4x64 counters, whose raw output NumPy keeps stable between
releases (its `permutation` it does not), so a run resumes in the same order years later.

Global batches hold consecutive positions for any number of ranks: with A accumulation steps, W ranks and mb samples
a micro-batch, the global batch that starts at `first` has A W mb samples, and rank r reads in step a the positions
`first + (a W + r) mb ... + mb`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from armillary.engine.data.format.survey import Survey

__all__ = ["MicroBatch", "EpochOrder", "micro_batch_starts", "micro_batches", "sequential_batches"]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank reads for one micro-batch.

    Attributes:
        epoch: Which pass over the split.
        first: Position of the first sample of the global batch that this is part of.
        position: [B] int64, places in the epoch's global order.
        shard: [B] int64, indices into the split's shards.
        index: [B] int64, places in the shard.
        row: [B] int64, rows of catalog.parquet.
    """

    epoch: int
    first: int
    position: np.ndarray
    shard: np.ndarray
    index: np.ndarray
    row: np.ndarray


@lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """Permutation of `count` things; stream 0 orders the shards, stream s + 1 the samples of shard s."""
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    order = np.argsort(generator.random_raw(count), kind="stable")
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class EpochOrder:
    """The global order of a split.

    Attributes:
        counts: Samples of each of the split's shards, in stored order.
        first_rows: Row of catalog.parquet of each shard's first sample.
        seed: The run's seed, 0 <= seed < 2^64.
        shuffle: False for stored order in every epoch.
    """

    counts: tuple[int, ...]
    first_rows: tuple[int, ...]
    seed: int = 0
    shuffle: bool = True
    _cache: dict[int, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Refuse counts and seeds that have no meaning."""
        if len(self.counts) != len(self.first_rows):
            raise ValueError(f"plan: {len(self.counts)} shard counts but {len(self.first_rows)} first rows")
        if any(count < 0 for count in self.counts):
            raise ValueError(f"plan.counts: must not be negative, got {min(self.counts)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: must be in [0, 2^64), got {self.seed}")

    @classmethod
    def of(cls, survey: Survey, split: str, *, seed: int = 0, shuffle: bool = True) -> EpochOrder:
        """The order of one split of a survey.

        Raises:
            ValueError: The survey has no such split.
        """
        counts, first_rows, row = [], [], 0
        for shard in survey.shards:
            if shard.split == split:
                counts.append(shard.count)
                first_rows.append(row)
            row += shard.count
        if not counts:
            has = ", ".join(f"{name} ({survey.count(name)})" for name in sorted({s.split for s in survey.shards}))
            raise ValueError(f"split: survey {survey.name!r} has no split {split!r}; it has {has or 'none'}")
        return cls(tuple(counts), tuple(first_rows), seed=seed, shuffle=shuffle)

    @property
    def samples(self) -> int:
        """Samples in the split."""
        return sum(self.counts)

    def epoch_length(self, global_batch: int) -> int:
        """Samples an epoch: whole global batches only. What is left over differs from epoch to epoch.

        Raises:
            ValueError: The split is smaller than one global batch.
        """
        if global_batch < 1:
            raise ValueError(f"global_batch: must be at least 1, got {global_batch}")
        length = self.samples // global_batch * global_batch
        if length == 0:
            raise ValueError(f"global_batch: {global_batch} samples, but the split has only {self.samples}")
        return length

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the epoch's order and the position at which each begins, with the total at the end."""
        if epoch not in self._cache:
            shards = len(self.counts)
            order = _permutation(self.seed, epoch, 0, shards) if self.shuffle else np.arange(shards)
            begins = np.concatenate([[0], np.cumsum(np.asarray(self.counts, np.int64)[order])])
            while len(self._cache) > 1:
                self._cache.pop(next(iter(self._cache)))
            self._cache[epoch] = (order, begins)
        return self._cache[epoch]

    def locate(self, epoch: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find samples by their place in the epoch's global order.

        Args:
            epoch: Which pass, from 0.
            position: [n] int64, each in [0, samples).

        Returns:
            (shard, index): [n] int64 each, the split's shard and the place in it.
        """
        order, begins = self._order(epoch)
        position = np.asarray(position, np.int64)
        if position.size and not 0 <= position.min() <= position.max() < begins[-1]:
            raise ValueError(f"position: must be in [0, {begins[-1]}), got {position.min()} ... {position.max()}")
        # side="right" also steps over empty shards, which begin where the next one does.
        place = np.searchsorted(begins, position, side="right") - 1
        shard = order[place].astype(np.int64)
        index = position - begins[place]
        if self.shuffle:
            for s in np.unique(shard):
                here = shard == s
                index[here] = _permutation(self.seed, epoch, int(s) + 1, self.counts[s])[index[here]]
        return shard, index

    def read(self, epoch: int, first: int, position: np.ndarray) -> MicroBatch:
        """Where to read these positions of the epoch; `first` is their global batch's first position."""
        shard, index = self.locate(epoch, position)
        row = np.array([self.first_rows[s] for s in shard], np.int64) + index
        return MicroBatch(epoch, first, np.asarray(position, np.int64), shard, index, row)

    def rows(self, epoch: int, first: int, count: int) -> np.ndarray:
        """Rows of catalog.parquet at positions first ... first + count of the epoch, [count] int64."""
        return self.read(epoch, first, np.arange(first, first + count)).row


def micro_batch_starts(first: int, *, micro_batch: int, accumulation: int, rank: int, world: int) -> list[int]:
    """First position of each of a rank's micro-batches in the global batch that starts at `first`."""
    return [first + (step * world + rank) * micro_batch for step in range(accumulation)]


def micro_batches(
    plan: EpochOrder, epoch: int, position: int, *, micro_batch: int, accumulation: int, rank: int, world: int
) -> Iterator[MicroBatch]:
    """Everything a rank reads from (epoch, position) on, without end.

    Args:
        plan: The global order.
        epoch: Epoch to begin in.
        position: First position of the global batch to begin with, a multiple of the global batch.
        micro_batch: Samples a rank and accumulation step.
        accumulation: Micro-batches a rank and global batch.
        rank: This rank.
        world: Ranks.
    """
    global_batch = micro_batch * accumulation * world
    length = plan.epoch_length(global_batch)
    while True:
        for first in range(position, length, global_batch):
            for start in micro_batch_starts(
                first, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world=world
            ):
                yield plan.read(epoch, first, np.arange(start, start + micro_batch))
        epoch, position = epoch + 1, 0


def sequential_batches(plan: EpochOrder, batch: int, parts: Iterable[range] | None = None) -> Iterator[MicroBatch]:
    """Every sample of the plan's first epoch once; the last batch may be short.

    Args:
        plan: The order.
        batch: Samples a batch.
        parts: Only these positions, in this order; the last batch of each may be short.
    """
    for part in [range(plan.samples)] if parts is None else parts:
        for first in range(part.start, part.stop, batch):
            yield plan.read(0, first, np.arange(first, min(first + batch, part.stop)))
