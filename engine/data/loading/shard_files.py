"""The files of a split on disk, and the blobs that readers hand on.

Where a sample lies in its tar is looked up in the shard's `.idx` file when the shard's turn comes, so starting costs the
same for a thousand samples and for 76 million.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from armillary.engine.data.format import shards
from armillary.engine.data.format.shards import INDEX_VERSION, Member, parse_line
from armillary.engine.data.format.survey import MODALITIES, Survey
from armillary.engine.data.loading.epoch_order import MicroBatch
from armillary.engine.data.loading.retry import Retry

__all__ = ["PAD_TO", "Blob", "Blobs", "ShardFiles"]

Blob = bytes | memoryview | np.ndarray

CACHED_INDICES = 16
CACHED_FILES = 64
PAD_TO = 16  # blobs on the GPU are padded to a multiple of this many bytes, so that rows are aligned


class Blobs(NamedTuple):
    """The blobs of a micro-batch.

    Attributes:
        host: For each modality that is read one blob a sample, None where the sample lacks it; bytes, or arrays that
            keep the reader's memory alive as long as they live.
        padded: [B, P] uint8 on the GPU, the blobs of the images (empty where one is lacking) with zeros behind them,
            where the reader has put them there.
    """

    host: Mapping[str, Sequence[Blob | None]]
    padded: torch.Tensor | None = None


class _Descriptor:
    """An open file that is closed when the last thread lets go of it, so that eviction cannot close it under a read."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardFiles:
    """The tars of one split and their indices; opens them when they are needed. Safe to use from several threads.

    Args:
        folder: The survey's folder.
        survey: Its description.
        split: The split to read.
        modalities: What to read of a sample; all that the survey has by default.
        retry: What to do about errors that pass.
    """

    def __init__(
        self,
        folder: Path,
        survey: Survey,
        split: str,
        modalities: Sequence[str] | None = None,
        retry: Retry | None = None,
    ) -> None:
        self.folder = folder
        self._retry = retry or Retry()
        self.modalities = survey.modalities if modalities is None else tuple(modalities)
        self.records = [shard for shard in survey.shards if shard.split == split]
        self._lines: OrderedDict[int, list[bytes]] = OrderedDict()
        self._files: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, shard: int) -> Path:
        """The tar of a shard of the split."""
        return self.folder / self.records[shard].name

    def check(self, rank: int = 0, world: int = 1) -> None:
        """Check that every tar and index is there and that no tar has been cut short.

        The sizes are looked at by one rank a shard: tens of thousands of them take a while on a network file system.

        Raises:
            FileNotFoundError: A tar or an index is missing.
            ValueError: A tar does not have the size that survey.json gives.
        """
        present = set(os.listdir(self.folder))
        for shard, record in enumerate(self.records):
            if record.name not in present:
                raise FileNotFoundError(
                    f"{self.path(shard)}: survey.json names this shard, but it is missing; copy it again"
                )
            index = self.path(shard).with_suffix(".idx")
            if index.name not in present:
                raise FileNotFoundError(f"{index}: this shard's index is missing; {self._rebuild(shard)}")
        for shard in range(rank, len(self.records), world):
            size, expected = self.path(shard).stat().st_size, self.records[shard].bytes
            if size != expected:
                what = "truncated" if size < expected else "not the file that was packed"
                raise ValueError(
                    f"{self.path(shard)}: {size} bytes, but survey.json says {expected}: {what}; copy it again and "
                    f"check the survey with `armillary data check {self.folder}`"
                )

    def lines(self, shard: int) -> list[bytes]:
        """Lines of a shard's DALI index without its header; see `shards.parse_line`.

        Raises:
            ValueError: The index is not one, or has not as many samples as survey.json says.
        """
        with self._lock:
            if shard in self._lines:
                self._lines.move_to_end(shard)
                return self._lines[shard]
        path = self.path(shard).with_suffix(".idx")
        header, *lines = self._retry.call(path.read_bytes, str(path)).splitlines() or [b""]
        version, _, count = header.partition(b" ")
        if version != INDEX_VERSION.encode() or not count.isdigit() or int(count) != len(lines):
            raise ValueError(
                f"{path}: not a complete DALI index (header {header!r}, {len(lines)} lines); {self._rebuild(shard)}"
            )
        if len(lines) != self.records[shard].count:
            raise ValueError(
                f"{path}: {len(lines)} samples, but survey.json says {self.records[shard].count}; {self._rebuild(shard)}"
            )
        with self._lock:
            self._lines[shard] = lines
            while len(self._lines) > CACHED_INDICES:
                self._lines.popitem(last=False)
        return lines

    def member(self, shard: int, index: int) -> Member:
        """Where a sample lies in its tar."""
        line = self.lines(shard)[index]
        try:
            return parse_line(line.decode())
        except ValueError:
            path = self.path(shard).with_suffix(".idx")
            raise ValueError(
                f"{path}: line {index + 2} is {line!r}, not `EXTENSION OFFSET SIZE KEY.EXTENSION` for each blob of a "
                f"sample; {self._rebuild(shard)}"
            ) from None

    def _rebuild(self, shard: int) -> str:
        program = f"import pathlib, {shards.__name__} as s; s.write_index(pathlib.Path({str(self.path(shard))!r}))"
        return f'write it anew: python -c "{program}"'

    def read(self, shard: int, index: int) -> dict[str, bytes | None]:
        """Read the blobs of a sample, by modality; None where it lacks one.

        Raises:
            OSError: The file cannot be read or ends before a blob does.
        """
        member = self.member(shard, index)
        wanted = {name: member.part(MODALITIES[name]) for name in self.modalities}
        found = [part for part in wanted.values() if part is not None]
        if not found:
            return dict.fromkeys(wanted)
        # The blobs of a sample are neighbours: one read for all of them.
        start, end = found[0].offset, found[-1].offset + found[-1].size
        data = self._retry.call(lambda: self._bytes(shard, start, end), f"{self.path(shard)}, sample {member.key!r}")
        if len(data) != end - start:
            raise OSError(
                f"{self.path(shard)}: ends {end - start - len(data)} bytes before sample {member.key!r} does (bytes "
                f"{start} ... {end}): truncated since it was checked at the start"
            )
        if len(found) == 1:
            return {name: None if part is None else data for name, part in wanted.items()}
        return {
            name: None if part is None else data[part.offset - start : part.offset - start + part.size]
            for name, part in wanted.items()
        }

    def _bytes(self, shard: int, start: int, end: int) -> bytes:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _Descriptor(self.path(shard))
            self._files.move_to_end(shard)
            while len(self._files) > CACHED_FILES:
                self._files.popitem(last=False)
        try:
            return os.pread(file.number, end - start, start)
        except OSError:
            with self._lock:  # a stale handle stays stale: the next try opens the file anew
                if self._files.get(shard) is file:
                    del self._files[shard]
            raise

    def read_planned(self, request: MicroBatch, number: int) -> dict[str, bytes | None]:
        """Read the blobs of one sample of a micro-batch; an error says at which position of which epoch it came."""
        try:
            return self.read(int(request.shard[number]), int(request.index[number]))
        except (OSError, ValueError) as error:
            error.add_note(f"while reading position {request.position[number]} of epoch {request.epoch}")
            raise

    def close(self) -> None:
        """Close the tars; they are opened again where they are needed."""
        with self._lock:
            self._files.clear()
