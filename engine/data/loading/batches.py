"""Where a loader stands in its batches: endless micro-batches of a rank, and one pass of a split. The bases of loaders.

The state is (seed, epoch, position) after the global batches that were handed out; what is prefetched does not count. It
may be loaded at any number of ranks and micro-batch size, as long as the global batch is the same.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import torch

from armillary.engine.data.loading.epoch_order import micro_batches, sequential_batches
from armillary.engine.data.loading.stream import Prefetcher, SplitStream, StreamOptions, Transform
from armillary.models.method import Batch

__all__ = ["EndlessBatches", "OnePass"]


class EndlessBatches:
    """Endless micro-batches of one rank, over epochs.

    The global batches are the same for any number of ranks, accumulation steps and either reader; see `epoch_order`.

    Args:
        folder: The survey.
        micro_batch: Samples a batch.
        device: Where batches are delivered.
        split: Split to read.
        accumulation: Batches a rank and global batch.
        rank: This rank.
        world: Ranks.
        seed: Keys the order and, with the position, every draw of `views` and `prepare`.
        views: Makes the method's inputs of a batch; runs in the loader's thread.
        prepare: Runs after `views`: what else the method wants made ahead of the step.
        shuffle: False for stored order in every epoch.
        options: See `StreamOptions`.

    Attributes:
        survey: Description of the survey.
        global_batch: Samples a global batch.
        wait_seconds: Time the consumer has waited for batches.
        corrupt: Corrupt samples in the batches handed out so far.

    Raises:
        FileNotFoundError: There is no survey, or a tar or index is missing.
        ValueError: A field has no meaning, there is no such split, it is smaller than a global batch, or a tar is
            truncated.
        ModuleNotFoundError: DALI was asked for and is not installed.
    """

    _stream: ClassVar[Any]
    """The `SplitStream` that makes the batches."""

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
        shuffle: bool = True,
        **options: Unpack[StreamOptions],
    ) -> None:
        for name, value in (("micro_batch", micro_batch), ("accumulation", accumulation)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        transforms = (views, prepare)
        order = {"rank": rank, "world": world, "seed": seed, "shuffle": shuffle}
        source: SplitStream = self._stream(folder, split, device=device, transforms=transforms, **order, **options)
        self._source = source
        self.survey = source.survey
        self.global_batch = micro_batch * accumulation * world
        if source.plan.samples < self.global_batch:
            raise ValueError(
                f"{source.folder}: split {source.split!r} has {source.plan.samples} samples, fewer than one global batch "
                f"of {self.global_batch} (micro_batch {micro_batch} x accumulation {accumulation} x world {world})"
            )
        self.wait_seconds = 0.0
        self.corrupt = 0
        self._slices = {"micro_batch": micro_batch, "accumulation": accumulation, "rank": rank, "world": world}
        self._epoch = 0
        self._position = 0
        self._step = 0  # micro-batches handed out of the global batch at _position
        self._worker: Prefetcher[tuple[Batch, int]] | None = None
        self._stop: weakref.finalize | None = None
        self._process = os.getpid()
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        """The loader itself: a second loop goes on where the first one stopped."""
        return self

    def __next__(self) -> Batch:
        """The next micro-batch, on the device.

        Raises:
            CorruptBlob: A sample is corrupt and `on_corrupt` is "error".
            OSError: A shard cannot be read.
            Exception: What `views` or `prepare` raised.
        """
        if self._closed:
            raise ValueError("loader: it is closed")
        if self._process != os.getpid():  # threads do not survive a fork
            self._worker, self._process = None, os.getpid()
            self._source.after_fork()
        if self._worker is None:
            requests = micro_batches(self._source.plan, self._epoch, self._position, **self._slices)
            for _ in range(self._step):
                next(requests)
            self._worker = self._source.start(requests, "replace", self.global_batch)
            self._stop = weakref.finalize(self, self._worker.close)
        start = time.perf_counter()
        try:
            batch, corrupt = next(self._worker)
        except Exception as error:
            error.add_note(
                f"the loader stopped at epoch {self._epoch}, position {self._position} of {self.epoch_length}, "
                f"micro-batch {self._step}"
            )
            raise
        self.wait_seconds += time.perf_counter() - start
        self.corrupt += corrupt
        self._step += 1
        if self._step == self._slices["accumulation"]:
            self._step = 0
            self._position += self.global_batch
            if self._position >= self.epoch_length:
                self._epoch, self._position = self._epoch + 1, 0
        return self._source.hand_out(batch)

    @property
    def epoch_length(self) -> int:
        """Samples an epoch: whole global batches."""
        return self._source.plan.epoch_length(self.global_batch)

    def state_dict(self) -> dict[str, int]:
        """Where to go on: seed, epoch and position of the first global batch not yet handed out whole.

        A global batch of which only some micro-batches were handed out counts as not handed out.
        """
        return {
            "seed": self._source.plan.seed,
            "epoch": self._epoch,
            "position": self._position,
            "global_batch": self.global_batch,
            "samples": self._source.plan.samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, saved with any number of ranks, accumulation steps and either reader.

        The state's seed replaces the loader's. What was prefetched is dropped.

        Raises:
            ValueError: The state is not one, or belongs to another global batch or another number of samples.
        """
        missing = [name for name in self.state_dict() if not isinstance(state.get(name), int)]
        if missing:
            raise ValueError(f"loader state: {', '.join(missing)} must be whole numbers, got {dict(state)}")
        if state["samples"] != self._source.plan.samples:
            raise ValueError(
                f"loader state: saved for a split of {state['samples']} samples, this one has "
                f"{self._source.plan.samples}; a run goes on only with the survey that it began with"
            )
        if state["global_batch"] != self.global_batch:
            raise ValueError(
                f"loader state: saved with global batches of {state['global_batch']} samples, this loader's have "
                f"{self.global_batch}; the position would not be at the start of one. Choose micro_batch, accumulation "
                f"and world so that their product is {state['global_batch']}"
            )
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < self.epoch_length or position % self.global_batch:
            raise ValueError(
                f"loader state: epoch {epoch}, position {position} is not the start of a global batch of "
                f"{self.global_batch} in epochs of {self.epoch_length}"
            )
        self._stop_worker()
        self._source.plan = replace(self._source.plan, seed=state["seed"])
        self._epoch, self._position, self._step = epoch, position, 0

    def _stop_worker(self) -> None:
        if self._stop is not None:
            self._stop()
        self._worker = self._stop = None

    def close(self) -> None:
        """End the loader's threads and close its files."""
        self._stop_worker()
        self._source.close()
        self._closed = True

    def __enter__(self) -> Self:
        """Enter a block at whose end the loader is closed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the loader."""
        self.close()


class OnePass:
    """Every sample of a split once, in stored order; the last batch may be short. Iterating again starts over.

    Args:
        folder: The survey.
        split: Split to read.
        batch: Samples a batch.
        device: Where batches are delivered.
        views: Makes the model's inputs of a batch; runs in the loader's thread.
        parts: Only these places of the split, in this order; the last batch of each may be short.
        options: See `StreamOptions`.

    Attributes:
        survey: Description of the survey.
        corrupt: Corrupt samples met so far.

    Raises:
        FileNotFoundError: There is no survey, or a tar or index is missing.
        ValueError: A field has no meaning, there is no such split, or a tar is truncated.
        ModuleNotFoundError: DALI was asked for and is not installed.
    """

    _stream: ClassVar[Any]
    """The `SplitStream` that makes the batches."""

    def __init__(
        self,
        folder: Path | str,
        *,
        split: str,
        batch: int,
        device: torch.device | str,
        views: Transform | None = None,
        parts: Iterable[range] | None = None,
        **options: Unpack[StreamOptions],
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: must be at least 1, got {batch}")
        self._source: SplitStream = self._stream(folder, split, device=device, transforms=(views,), **options)
        self.survey = self._source.survey
        self.corrupt = 0
        self._batch = batch
        self._parts = [range(self._source.plan.samples)] if parts is None else list(parts)

    @property
    def samples(self) -> int:
        """Samples in one pass, corrupt ones included."""
        return sum(map(len, self._parts))

    def __len__(self) -> int:
        """Batches in one pass."""
        return sum(-(-len(part) // self._batch) for part in self._parts)

    def __iter__(self) -> Iterator[Batch]:
        """One pass. Its thread ends with the pass, also where the loop is left early."""
        requests = sequential_batches(self._source.plan, self._batch, self._parts)
        worker = self._source.start(requests, "drop", self._batch)
        try:
            for batch, corrupt in worker:
                self.corrupt += corrupt
                if len(batch["row"]):
                    yield self._source.hand_out(batch)
        finally:
            worker.close()
