"""Vectors in half precision beside an index of codes: mapped from a file that may be hundreds of GiB, and checked row by row.

A row's CRC-32 is compared whenever the row is read, so that damage is found where it would count, and no start reads the file
whole. The sums are a file of their own, of 4 bytes a row, which is hashed like the index's other files.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Self

import numpy as np

__all__ = ["SUMS", "VECTORS", "KeptVectors"]

VECTORS, SUMS = "vectors.npy", "vectors.crc32.npy"


class KeptVectors:
    """[N, D] unit vectors in half precision. Made by `create` or `load`.

    Args:
        vectors: [N, D] float16, mapped.
        sums: [N] uint32 CRC-32 of each row's bytes; None for those of an earlier version, which are not checked.
    """

    def __init__(self, vectors: np.memmap, sums: np.ndarray | None) -> None:
        self._vectors, self._sums = vectors, sums

    def __len__(self) -> int:
        """N."""
        return len(self._vectors)

    @classmethod
    def create(cls, path: Path, count: int, dimensions: int) -> Self:
        """A new file, whose rows are to be written; one of that name is replaced."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a saved index's file under another name
        vectors = np.lib.format.open_memmap(path, "w+", np.float16, (count, dimensions))
        return cls(vectors, np.zeros(count, np.uint32))

    def write(self, start: int, vectors: np.ndarray) -> None:
        """Write the rows from `start` on."""
        assert self._sums is not None, "of a file that `create` has made"
        half, rows = np.ascontiguousarray(vectors, np.float16), slice(start, start + len(vectors))
        self._vectors[rows] = half
        self._sums[rows] = [zlib.crc32(row) for row in half]

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self._vectors.flush()

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """[len(rows), D] float16.

        Raises:
            ValueError: One of them is damaged.
        """
        found = np.ascontiguousarray(self._vectors[rows])
        if self._sums is not None:
            for row, vector, stored in zip(rows, found, self._sums[rows], strict=True):
                if zlib.crc32(vector) != stored:
                    raise ValueError(
                        f"{self._vectors.filename}: the vector of row {row} is damaged: its CRC-32 is not that of {SUMS}; "
                        "build the index again"
                    )
        return found

    def save(self, folder: Path) -> None:
        """Put both files into a folder; the large one by a second name where the file system has such a thing."""
        source, target = Path(str(self._vectors.filename)), folder / VECTORS
        try:
            target.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, target)
        if self._sums is not None:
            np.save(folder / SUMS, self._sums)

    @classmethod
    def load(cls, folder: Path, dimensions: int, checked: bool) -> Self | None:
        """Those of a folder; None where it holds none.

        Args:
            folder: Where `save` put them.
            dimensions: D.
            checked: There are sums, whose file is whole.

        Raises:
            ValueError: They are no vectors of this length in half precision, or not as many as their sums.
        """
        if not (folder / VECTORS).exists():
            return None
        vectors = np.load(folder / VECTORS, mmap_mode="r")
        sums = np.load(folder / SUMS) if checked else None
        if vectors.ndim != 2 or vectors.shape[1] != dimensions or vectors.dtype != np.float16:
            raise ValueError(f"{VECTORS} is damaged: {vectors.dtype} {vectors.shape}, not float16 [N, {dimensions}]")
        if sums is not None and len(sums) != len(vectors):
            raise ValueError(f"{VECTORS} is damaged: {len(vectors)} vectors for {len(sums)} sums")
        return cls(vectors, sums)
