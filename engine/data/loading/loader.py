"""Batches of a packed survey: planned reads, checked, decoded, augmented and on the device ahead of need.

One background thread reads, another one decodes and transforms in order (reader and decoder have more threads of their
own) and keeps `prefetch` batches ready. On a GPU it works on a side stream and hands out finished batches.

See `batches` for a loader's state, and `rows` for loaders that read no shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from armillary.engine.data.loading.batches import EndlessBatches, OnePass
from armillary.engine.data.loading.decoding import BatchMaker, OnCorrupt
from armillary.engine.data.loading.epoch_order import MicroBatch
from armillary.engine.data.loading.readers import Reader, ReaderName, make_reader
from armillary.engine.data.loading.shard_files import ShardFiles
from armillary.engine.data.loading.stream import BatchRecipe, Prefetcher, SplitStream, Transform

__all__ = ["Loader", "SequentialLoader", "ShardSource"]


class ShardSource(SplitStream):
    """A split whose shards are read: its files and the reader.

    Where `packed` is set or the first transform says so of itself (an attribute `packed`), batches reach it undecoded, as
    `blobs` and `sizes`.

    Raises:
        FileNotFoundError: No survey, or a tar or index is missing.
        ValueError: A field has no meaning, the survey has no such split, or a tar is truncated.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str,
        *,
        rank: int,
        world: int,
        modalities: Sequence[str] | None,
        reader: ReaderName,
        threads: int,
        packed: bool = False,
        **shared: Any,
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads: must be at least 1, got {threads}")
        super().__init__(folder, split, rank=rank, world=world, **shared)
        if modalities is not None and (not modalities or set(modalities) - set(self.survey.modalities)):
            has = ", ".join(self.survey.modalities)
            raise ValueError(f"modalities: must be some of the survey's ({has}), got {tuple(modalities)}")
        self.packed = packed or any(getattr(t, "packed", False) for t in self.transforms[:1])
        self.threads = threads
        self._open = lambda: ShardFiles(self.folder, self.survey, split, modalities)
        self._reader_name = reader
        self.files = self._open()
        self.files.check(rank, world)
        self.reader = self._make_reader()

    def _make_reader(self) -> Reader:
        return make_reader(self._reader_name, self.files, device=self.device, threads=self.threads)

    def after_fork(self) -> None:
        """Begin anew in a forked child: locks may have been taken by threads that do not exist here."""
        self.files = self._open()
        self.reader = self._make_reader()

    def close(self) -> None:
        """Stop reading ahead and close the tars."""
        self.reader.close()

    def _begin(self, requests: Iterator[MicroBatch], on_corrupt: OnCorrupt) -> BatchRecipe:
        maker = BatchMaker(
            self.plan,
            self.files,
            self.survey,
            device=self.device,
            threads=self.threads,
            on_corrupt=on_corrupt,
            packed=self.packed,
        )
        return BatchRecipe(Prefetcher(self.reader.read(requests), 1, "armillary-read"), maker.make, maker.describe)


class Loader(EndlessBatches):
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
        if on_corrupt not in ("error", "skip"):
            raise ValueError(f"on_corrupt: must be error or skip, got {on_corrupt!r}")
        source = ShardSource(
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
        super().__init__(
            source,
            micro_batch=micro_batch,
            accumulation=accumulation,
            rank=rank,
            world=world,
            on_corrupt="replace" if on_corrupt == "skip" else "error",
        )


class SequentialLoader(OnePass):
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
        parts: Read only these places of the split, in this order; the last batch of each may be short.
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
        parts: Iterable[range] | None = None,
    ) -> None:
        if on_corrupt not in ("error", "skip"):
            raise ValueError(f"on_corrupt: must be error or skip, got {on_corrupt!r}")
        source = ShardSource(
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
        super().__init__(source, batch=batch, on_corrupt="drop" if on_corrupt == "skip" else "error", parts=parts)
