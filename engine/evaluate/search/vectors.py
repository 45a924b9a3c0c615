"""Vectors on their way into an index: made unit length, read from files of embeddings piece by piece, told apart.

Shape legend: N vectors, D embedding dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from armillary.engine.evaluate.embedding.embeddings import METADATA_KEY

__all__ = ["CHUNK", "ORIGIN", "VectorFiles", "difference", "read_vector", "unit"]

CHUNK = 65_536  # vectors read, normalised and added at a time
ORIGIN = ("survey", "fingerprint", "encoder", "readout")  # what must agree for vectors to be comparable


@dataclass(frozen=True)
class VectorFiles:
    """Files of embeddings that belong together.

    Attributes:
        paths: The files.
        keys: N keys, in the order of the files.
        dimensions: D.
        metadata: What the first file says of itself.
    """

    paths: tuple[Path, ...]
    keys: pa.Array
    dimensions: int
    metadata: dict[str, str]

    @classmethod
    def open(cls, paths: Sequence[Path]) -> VectorFiles:
        """Read keys and check the files against each other.

        Args:
            paths: Parquet files of `armillary embed`.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: There is none, one holds something else, or they differ in dimensions or origin.
        """
        if not paths:
            raise ValueError("paths: need at least one file of embeddings")
        abouts = [_about(path) for path in paths]
        for path, (_, metadata) in zip(paths, abouts, strict=True):
            if problem := difference(abouts[0][1], metadata):
                raise ValueError(f"{path}: {problem}")
        if len(sizes := {size for size, _ in abouts}) > 1:
            raise ValueError(f"vectors: all files must have the same dimensions, got {sorted(sizes)}")
        columns = [pq.read_table(path, columns=["key"])["key"].cast(pa.large_string()) for path in paths]
        keys = pa.chunked_array([c for column in columns for c in column.chunks], pa.large_string())
        return cls(tuple(paths), keys.combine_chunks(), *abouts[0])

    def chunks(self) -> Iterator[np.ndarray]:
        """All vectors in order, some [n, D] at a time."""
        for path in self.paths:
            # A buffer reads the pages of a column one by one: whole row groups may not fit into memory.
            with pq.ParquetFile(path, buffer_size=1 << 24) as file:
                for batch in file.iter_batches(CHUNK, columns=["vector"]):
                    yield batch["vector"].flatten().to_numpy().reshape(len(batch), -1)


def read_vector(path: Path, key: str) -> tuple[np.ndarray, dict[str, str]]:
    """The embedding of one object in a file, and what the file says of itself.

    Args:
        path: Parquet file of `armillary embed`.
        key: Key of the object.

    Returns:
        [1, D], or [0, D] where the file has no such key, and the metadata.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    size, metadata = _about(path)
    found = pq.read_table(path, columns=["vector"], filters=[("key", "==", key)])["vector"]
    return found.combine_chunks().flatten().to_numpy().reshape(-1, size)[:1], metadata


def _about(path: Path) -> tuple[int, dict[str, str]]:
    """Dimensions and metadata of a file of embeddings."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no embeddings here; make them with `armillary embed`")
    try:
        schema = pq.read_schema(path)
        schema.field("key")
        return schema.field("vector").type.list_size, json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    except (pa.ArrowException, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of embeddings (key, split, vector): {error}") from error


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
