"""Batches of a packed survey: planned reads, checked, decoded, augmented and on the device ahead of need.

One background thread reads, another one decodes and transforms in order (reader and decoder have more threads of their
own) and keeps `prefetch` batches ready. On a GPU it works on a side stream and hands out finished batches.

See `batches` for arguments and state of a loader, and `catalog_loader` for loaders that read no shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from armillary.engine.choices import check_choice
from armillary.engine.data.loading.batches import EndlessBatches, OnePass
from armillary.engine.data.loading.decoding import BatchMaker
from armillary.engine.data.loading.epoch_order import MicroBatch
from armillary.engine.data.loading.readers import Reader, ReaderName, make_reader
from armillary.engine.data.loading.shard_files import ShardFiles
from armillary.engine.data.loading.stream import BatchRecipe, Prefetcher, Skipped, SplitStream

__all__ = ["Loader", "SequentialLoader", "ShardSource"]

OnCorrupt = Literal["error", "skip"]


class ShardSource(SplitStream):
    """A split whose shards are read: its files and the reader. Arguments are those of `SplitStream` and `StreamOptions`.

    Raises:
        FileNotFoundError: There is no survey, or a tar or index is missing.
        ValueError: A field has no meaning, the survey has no such split, or a tar is truncated.
        ModuleNotFoundError: DALI was asked for and is not installed.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str,
        *,
        rank: int = 0,
        world: int = 1,
        modalities: Sequence[str] | None = None,
        reader: ReaderName = "auto",
        on_corrupt: OnCorrupt = "error",
        threads: int = 2,
        packed: bool = False,
        **shared: Any,
    ) -> None:
        check_choice("on_corrupt", on_corrupt, OnCorrupt)
        if threads < 1:
            raise ValueError(f"threads: must be at least 1, got {threads}")
        super().__init__(folder, split, rank=rank, world=world, **shared)
        if modalities is not None and (not modalities or set(modalities) - set(self.survey.modalities)):
            has = ", ".join(self.survey.modalities)
            raise ValueError(f"modalities: must be some of the survey's ({has}), got {tuple(modalities)}")
        self.packed = packed or any(getattr(t, "packed", False) for t in self.transforms[:1])
        self.threads = threads
        self._skips = on_corrupt == "skip"
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

    def _begin(self, requests: Iterator[MicroBatch], skipped: Skipped) -> BatchRecipe:
        maker = BatchMaker(
            self.plan,
            self.files,
            self.survey,
            device=self.device,
            threads=self.threads,
            on_corrupt=skipped if self._skips else "error",
            packed=self.packed,
        )
        return BatchRecipe(Prefetcher(self.reader.read(requests), 1, "armillary-read"), maker.make, maker.describe)


class Loader(EndlessBatches):
    """Endless micro-batches of one rank, read from shards."""

    _stream = ShardSource


class SequentialLoader(OnePass):
    """Every sample of a split once, read from shards in the order of catalog.parquet."""

    _stream = ShardSource
