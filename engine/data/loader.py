"""Batches of a packed survey: planned reads, checked, decoded, augmented and on the device ahead of need.

One background thread reads, another one decodes and transforms in order (reader and decoder have more threads of their
own) and keeps `prefetch` batches ready. On a GPU it works on a side stream and hands out finished batches.

The loader's state is (seed, epoch, position) after the global batches that were handed out; what is prefetched does not
count. It may be loaded at any number of ranks and micro-batch size, as long as the global batch is the same.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch

from armillary.engine.data.plan import micro_batches, sequential_batches
from armillary.engine.data.readers import ReaderName
from armillary.engine.data.stream import Prefetcher, Source, Transform
from armillary.models.method import Batch

__all__ = ["Loader", "SequentialLoader"]


class Loader:
    """Endless micro-batches of one rank, over epochs.

    The global batches are the same for any number of ranks, accumulation steps and either reader; see `plan`.

    Args:
        folder: The survey.
        split: Split to read.
        micro_batch: Samples a batch.
        accumulation: Batches a rank and global batch.
        rank: This rank.
        world: Ranks.
        seed: Keys the order and, with the position, every draw of `views` and `prepare`.
        device: Where batches are delivered.
        views: Makes crops of a batch; runs in the loader's thread. With a true attribute `packed` it gets undecoded blobs.
        prepare: Runs after `views`: what else the method wants made ahead of the step.
        modalities: What to read, of "image", "spectrum" and "vectors"; all that the survey has by default.
        reader: "dali", "webdataset", or "auto": DALI where it is installed.
        on_corrupt: "error" raises and names the sample; "skip" puts in its place the sample at the next position of
            the epoch that is not corrupt (its row, at the corrupt sample's position), logs and counts it.
        threads: Threads for reading and for decoding on the CPU.
        prefetch: Batches kept ready; up to four times as many where the consumer has had to wait.
        timeout_s: How long to wait for a batch before giving up on the storage.
        shuffle: False for stored order in every epoch.

    Attributes:
        survey: Description of the survey.
        global_batch: Samples a global batch.
        wait_seconds: Time the consumer has waited for batches.
        corrupt: Corrupt samples in the batches handed out so far.

    Raises:
        FileNotFoundError: No survey, or a tar or index is missing.
        ValueError: A field has no meaning, there is no such split, it is smaller than a global batch, or a tar is
            truncated.
        ModuleNotFoundError: DALI was asked for and is not installed.
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
        modalities: Sequence[str] | None = None,
        reader: ReaderName = "auto",
        on_corrupt: Literal["error", "skip"] = "error",
        threads: int = 2,
        prefetch: int = 2,
        timeout_s: float = 1800.0,
        shuffle: bool = True,
    ) -> None:
        for name, value in (("micro_batch", micro_batch), ("accumulation", accumulation)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if on_corrupt not in ("error", "skip"):
            raise ValueError(f"on_corrupt: must be error or skip, got {on_corrupt!r}")
        self._source = Source(
            folder,
            split,
            rank=rank,
            world=world,
            seed=seed,
            shuffle=shuffle,
            device=torch.device(device),
            transforms=(views, prepare),
            modalities=modalities,
            reader=reader,
            threads=threads,
            prefetch=prefetch,
            timeout_s=timeout_s,
        )
        self.survey = self._source.survey
        self.global_batch = micro_batch * accumulation * world
        if self._source.plan.samples < self.global_batch:
            raise ValueError(
                f"{folder}: split {split!r} has {self._source.plan.samples} samples, fewer than one global batch of "
                f"{self.global_batch} (micro_batch {micro_batch} x accumulation {accumulation} x world {world})"
            )
        self.wait_seconds = 0.0
        self.corrupt = 0
        self._slices = {"micro_batch": micro_batch, "accumulation": accumulation, "rank": rank, "world": world}
        self._on_corrupt: Literal["error", "replace"] = "replace" if on_corrupt == "skip" else "error"
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
            self._worker = self._source.start(requests, self._on_corrupt, self.global_batch)
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
        self._source.reader.close()
        self._closed = True

    def __enter__(self) -> Self:
        """Enter a block at whose end the loader is closed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the loader."""
        self.close()


class SequentialLoader:
    """Every sample of a split once, in the order of catalog.parquet; the last batch may be short.

    Iterating again starts over. Arguments as for `Loader`; a corrupt sample that is skipped is left out of its batch.

    Attributes:
        survey: Description of the survey.
        corrupt: Corrupt samples met so far.

    Args:
        folder: The survey.
        split: Split to read.
        batch: Samples a batch.
        device: Where batches are delivered.
        views: Transforms a batch in the loader's thread.
        modalities: What to read; all that the survey has by default.
        reader: "dali", "webdataset" or "auto".
        on_corrupt: "error" raises and names the sample; "skip" leaves it out, logs and counts it.
        threads: Threads for reading and for decoding on the CPU.
        packed: Hand out checked blobs and their sizes in place of images, for who decodes them himself.
        prefetch: Batches kept ready; up to four times as many where the consumer has had to wait.
        timeout_s: How long to wait for a batch before giving up on the storage.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        split: str,
        batch: int,
        device: torch.device | str,
        views: Transform | None = None,
        modalities: Sequence[str] | None = None,
        reader: ReaderName = "auto",
        on_corrupt: Literal["error", "skip"] = "error",
        threads: int = 2,
        prefetch: int = 2,
        packed: bool = False,
        timeout_s: float = 1800.0,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: must be at least 1, got {batch}")
        if on_corrupt not in ("error", "skip"):
            raise ValueError(f"on_corrupt: must be error or skip, got {on_corrupt!r}")
        self._source = Source(
            folder,
            split,
            rank=0,
            world=1,
            seed=0,
            shuffle=False,
            device=torch.device(device),
            transforms=(views,),
            modalities=modalities,
            reader=reader,
            threads=threads,
            prefetch=prefetch,
            packed=packed,
            timeout_s=timeout_s,
        )
        self.survey = self._source.survey
        self.corrupt = 0
        self._batch = batch
        self._on_corrupt: Literal["error", "drop"] = "drop" if on_corrupt == "skip" else "error"

    @property
    def samples(self) -> int:
        """Samples in the split, corrupt ones included."""
        return self._source.plan.samples

    def __len__(self) -> int:
        """Batches in one pass."""
        return -(-self.samples // self._batch)

    def __iter__(self) -> Iterator[Batch]:
        """One pass over the split. Its thread ends with the pass, also where the loop is left early."""
        requests = sequential_batches(self._source.plan, self._batch)
        worker = self._source.start(requests, self._on_corrupt, self._batch)
        try:
            for batch, corrupt in worker:
                self.corrupt += corrupt
                if len(batch["row"]):
                    yield self._source.hand_out(batch)
        finally:
            worker.close()
