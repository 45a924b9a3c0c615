"""Tokens of frozen encoders on disk, one file of flat numbers a tensor, for training that reads nothing else.

FOLDER/
  image_tokens.bin       [N, T, D] float16 or float32, little-endian, C order: sample i of the split in stored order
  spectrum_tokens.bin    likewise; which of them there are depends on the method
  rows.crc               [N, K] uint32: CRC-32 of each sample's bytes in each of the K files, in the order of their names
  tokens.json            what the tokens were made of, shapes, dtype, CRC-32 of rows.crc; written last
  .fill/                 only while unfinished, see `fill`

Readers check every sample they read; that costs a core about a second for 1.5 GB.

float16 rounds to 2^-11 of a value (to 3e-8 below 6e-5), so that tokens computed in bfloat16 keep every bit; it ends at
65,504, and larger values are refused. float32 keeps all.

Files are read by position, not mapped: where storage fails, a read raises an error and a mapped page kills the process.

Shape legend: N samples of the split, B samples of a batch, T tokens, D dimensions, K tensors.
"""

from __future__ import annotations

import json
import os
import weakref
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armillary.engine.data.loading.epoch_order import EpochOrder
from armillary.engine.data.loading.retry import Retry
from armillary.models.method import Batch, BatchKey

__all__ = ["DTYPES", "FORMAT", "CachedTokens", "TokenCache", "TokenCacheError", "TokenLayout", "refuse_difference"]

FORMAT = 1
DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


class TokenCacheError(ValueError):
    """A folder of tokens cannot be filled or read; the message begins with `data.token_cache`."""


@dataclass(frozen=True)
class TokenLayout:
    """Where a sample's tokens lie.

    Attributes:
        samples: Samples N of the split.
        dtype: "float16" or "float32".
        shapes: Shape [T, D] of a sample of each tensor, by name.
    """

    samples: int
    dtype: str
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> TokenLayout:
        """Rebuild from `asdict` after a way through JSON."""
        return cls(raw["samples"], raw["dtype"], {name: tuple(shape) for name, shape in raw["shapes"].items()})

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON types."""
        return {"samples": self.samples, "dtype": self.dtype, "shapes": {k: list(v) for k, v in self.shapes.items()}}

    @property
    def names(self) -> list[str]:
        """The tensors, in the order of rows.crc."""
        return sorted(self.shapes)

    def row_bytes(self, name: str) -> int:
        """Bytes of a sample in a tensor's file."""
        return int(np.prod(self.shapes[name])) * DTYPES[self.dtype].itemsize

    def files(self) -> dict[str, int]:
        """Bytes of every file but tokens.json, by its name."""
        sizes = {f"{name}.bin": self.samples * self.row_bytes(name) for name in self.names}
        return sizes | {"rows.crc": 4 * self.samples * len(self.names)}


def refuse_difference(folder: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a folder that holds, or is being filled with, other tokens than the wanted ones.

    Raises:
        TokenCacheError: Naming every field in which they differ.
    """
    found = _differences(theirs, json.loads(json.dumps(mine)))
    if found:
        listed = "; ".join(f"{name} {old!r} there, {new!r} here" for name, (old, new) in found.items())
        raise TokenCacheError(f"data.token_cache: {folder} holds other tokens ({listed}); choose another folder")


def _differences(old: Any, new: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys([*old, *new]):
            found |= _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return found
    return {} if old == new else {where: (old, new)}


class TokenCache:
    """A complete folder of tokens. Safe to use from several threads.

    Args:
        folder: The folder of the cache.
        plan: The split's order, of any seed: which row of the catalogue lies where.

    Attributes:
        layout: Shapes and dtype.
        made_of: What the tokens were made of.

    Raises:
        TokenCacheError: There is no complete cache, it is damaged, or has another number of samples than the split.
    """

    def __init__(self, folder: Path, plan: EpochOrder) -> None:
        self.folder = folder
        try:
            record = json.loads((folder / "tokens.json").read_text())
            self.layout, self.made_of = TokenLayout.from_json(record), record["made_of"]
            wanted, complete = record["crc"], record["complete"] and record["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TokenCacheError(
                f"data.token_cache: must be a complete token cache, got {folder} ({error})"
            ) from error
        for name, size in self.layout.files().items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise TokenCacheError(f"data.token_cache: {path} must have {size} bytes, got {found}; delete {folder}")
        crc = (folder / "rows.crc").read_bytes()
        if not complete or zlib.crc32(crc) != wanted:
            raise TokenCacheError(
                f"data.token_cache: {folder} is damaged: rows.crc is not what tokens.json says; delete it"
            )
        if plan.samples != self.layout.samples:
            raise TokenCacheError(
                f"data.token_cache: must hold tokens of the {plan.samples} samples of the split, got {self.layout.samples} in {folder}"
            )
        self._crc = np.frombuffer(crc, "<u4").reshape(self.layout.samples, -1)
        self._first_rows = np.asarray(plan.first_rows, np.int64)
        self._counts = np.asarray(plan.counts, np.int64)
        self._begins = np.concatenate([[0], np.cumsum(self._counts)])[:-1]
        self._retry = Retry()
        self._files = {n: os.open(folder / f"{n}.bin", os.O_RDONLY | os.O_CLOEXEC) for n in self.layout.names}
        self._close = weakref.finalize(self, _close_all, list(self._files.values()))

    def places(self, row: np.ndarray) -> np.ndarray:
        """Places in the split of rows of the catalogue, [B] int64.

        Raises:
            TokenCacheError: A row is not in the split.
        """
        shard = np.searchsorted(self._first_rows, row, side="right") - 1
        within = row - self._first_rows[shard]
        if (bad := (shard < 0) | (within >= self._counts[shard])).any():
            raise TokenCacheError(
                f"data.token_cache: rows must be of the split, got row {row[bad][0]} of catalog.parquet"
            )
        return self._begins[shard] + within

    def read_into(self, name: str, place: int, out: np.ndarray) -> None:
        """Read a sample's tokens and check them.

        Args:
            name: Which tensor.
            place: Place in the split.
            out: [T, D], contiguous, of the stored dtype.

        Raises:
            OSError: The file cannot be read, or is cut short.
            TokenCacheError: The sample is corrupt.
        """
        size = self.layout.row_bytes(name)
        view = out.reshape(-1).view(np.uint8).data
        path = self.folder / f"{name}.bin"
        self._retry.call(lambda: self._fill(self._files[name], view, place * size, path), str(path))
        if zlib.crc32(view) != self._crc[place, self.layout.names.index(name)]:
            raise TokenCacheError(
                f"data.token_cache: {path} is corrupt at sample {place} (bytes {place * size} ... {(place + 1) * size}); delete "
                f"{self.folder} and start again: it is filled anew"
            )

    @staticmethod
    def _fill(file: int, view: memoryview, offset: int, path: Path) -> None:
        while view:
            got = os.preadv(file, [view], offset)
            if not got:
                raise OSError(f"{path}: ends before byte {offset + len(view)}: cut short since it was opened")
            view, offset = view[got:], offset + got

    def close(self) -> None:
        """Close the files."""
        self._close()


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


class CachedTokens:
    """Adds cached tokens to batches of rows; a transform of `CatalogLoader`.

    Args:
        cache: The tokens.
        device: Where batches are delivered; on a GPU the tokens go there from pinned memory, in the stored dtype.
        dtype: What tokens are on the device: that in which the method computes.
        threads: Threads that read.
    """

    def __init__(self, cache: TokenCache, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        self._cache, self._device, self._dtype = cache, device, dtype
        self._pool = ThreadPoolExecutor(threads, "armillary-tokens")

    def __call__(self, batch: Batch, key: BatchKey) -> Batch:
        """The batch with [B, T, D] tokens of its rows."""
        layout = self._cache.layout
        places = self._cache.places(batch["row"].cpu().numpy()).tolist()
        pinned = self._device.type == "cuda"
        stored = {
            name: torch.empty((len(places), *shape), dtype=getattr(torch, layout.dtype), pin_memory=pinned)
            for name, shape in layout.shapes.items()
        }
        reads = [
            self._pool.submit(self._cache.read_into, name, place, out)
            for name, tensor in stored.items()
            for place, out in zip(places, tensor.numpy(), strict=True)
        ]
        for read in reads:
            read.result()
        tokens = {name: x.to(self._device, non_blocking=pinned).to(self._dtype) for name, x in stored.items()}
        return Batch(**{**batch, **tokens})  # type: ignore[typeddict-item]
