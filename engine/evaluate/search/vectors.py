"""Vectors on their way into an index: made unit length, read from files of embeddings piece by piece, told apart.

Shape legend: N vectors, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from armillary.engine.data.format.embedding_files import CHUNK, EmbeddingFiles

__all__ = ["CHUNK", "ORIGIN", "VectorFiles", "difference", "unit"]

ORIGIN = ("survey", "fingerprint", "encoder", "readout")  # what must agree for vectors to be comparable


@dataclass(frozen=True)
class VectorFiles:
    """Files of embeddings, or folders of their parts, that belong together.

    Attributes:
        files: Opened.
        keys: N keys, in the order of the files.
        dimensions: D.
        metadata: What the first file says of itself.
    """

    files: tuple[EmbeddingFiles, ...]
    keys: pa.Array
    dimensions: int
    metadata: dict[str, str]

    @classmethod
    def open(cls, paths: Sequence[Path]) -> VectorFiles:
        """Read keys and check the files against each other.

        Args:
            paths: Files or folders of `armillary embed`.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: There is none, one holds something else, or they differ in dimensions or origin.
        """
        if not paths:
            raise ValueError("paths: need at least one file of embeddings")
        files = tuple(EmbeddingFiles.open(path) for path in paths)
        for file in files:
            if problem := difference(files[0].metadata, file.metadata):
                raise ValueError(f"{file.path}: {problem}")
        if len(sizes := {file.dimensions for file in files}) > 1:
            raise ValueError(f"vectors: all files must have the same dimensions, got {sorted(sizes)}")
        keys = pa.chunked_array([chunk for file in files for chunk in file.keys().chunks], pa.large_string())
        return cls(files, keys.combine_chunks(), files[0].dimensions, files[0].metadata)

    def chunks(self) -> Iterator[np.ndarray]:
        """All vectors in order, some [n, D] at a time."""
        for file in self.files:
            yield from file.chunks()


def unit(vectors: np.ndarray, first: int = 0) -> np.ndarray:
    """Vectors divided by their lengths.

    Args:
        vectors: [N, D] floating.
        first: Number of the first of them, for messages.

    Returns:
        [N, D] float32 in C order.

    Raises:
        ValueError: A number is not finite, or a vector has length zero and so no direction.
    """
    # In C order, because another order of the sums of squares would change their last bits.
    vectors = np.ascontiguousarray(vectors, np.float32)
    wrong = ~np.isfinite(vectors).all(1)
    if wrong.any():
        raise ValueError(
            f"vectors: {int(wrong.sum())} of {len(vectors)} are not finite, first {first + int(wrong.argmax())}"
        )
    # The largest component first: squares of very long or short vectors leave the range of float32.
    scale = np.abs(vectors).max(1, keepdims=True)
    if not scale.all():
        raise ValueError(
            f"vectors: {int((scale == 0).sum())} of {len(vectors)} are all zero and have no direction, first "
            f"{first + int((scale[:, 0] == 0).argmax())}"
        )
    scaled = vectors / scale
    return scaled / np.linalg.norm(scaled, axis=1, keepdims=True)


def difference(mine: Mapping[str, str], other: Mapping[str, str], names: Sequence[str] = ORIGIN) -> str:
    """Why two sets of embeddings cannot be compared; empty if they can.

    Args:
        mine: What the indexed ones say of themselves.
        other: What the others say of themselves.
        names: What must agree; what either does not know is not compared.
    """
    for name in names:
        if name in mine and name in other and mine[name] != other[name]:
            return (
                f"embeddings from another {name}: the index holds those of {mine[name]!r}, these are of {other[name]!r}"
            )
    return ""
