"""Embeddings of a survey's samples, kept as Parquet.

Shape legend: N samples, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from armillary.engine.atomic_file import atomic_path
from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.embedding_files import EmbeddingFiles, EmbeddingWriter, vectors_of

__all__ = ["Embeddings", "stack_splits"]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N samples.

    Attributes:
        key: [N] sample keys.
        split: [N] split of each.
        vector: [N, D] float32.
        metadata: run, encoder, survey, readout and whatever else tells where they come from.
    """

    key: np.ndarray
    split: np.ndarray
    vector: np.ndarray
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the arrays against each other."""
        if self.vector.ndim != 2 or not len(self.key) == len(self.split) == len(self.vector):
            raise ValueError(
                f"embeddings: need N keys, N splits and [N, D] vectors, got {len(self.key)}, {len(self.split)} and "
                f"{self.vector.shape}"
            )
        if len(np.unique(self.key)) != len(self.key):
            raise ValueError("embeddings: keys repeat; each sample may appear once")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.key)

    def save(self, path: Path) -> None:
        """Write a Parquet file: key, split, and vector as fixed-size lists of float32."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, EmbeddingWriter(temporary, self.metadata) as file:
            file.write(pa.array(self.key, pa.string()), self.split, self.vector)

    @classmethod
    def load(cls, path: Path) -> Embeddings:
        """Read a file of embeddings, or a folder of parts, whole.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds something else, is not finished, or a part is damaged.
        """
        files = EmbeddingFiles.open(path)
        vector = np.empty((files.rows, files.dimensions), np.float32)
        key, split = (np.empty(files.rows, object) for _ in range(2))
        at = 0
        try:
            for batch in files.batches(("key", "split", "vector")):
                piece = slice(at, at + len(batch))
                vector[piece] = vectors_of(batch)
                key[piece], split[piece] = (batch[name].to_pylist() for name in ("key", "split"))
                at += len(batch)
        except (pa.ArrowException, KeyError) as error:
            raise ValueError(f"{path}: not a file of embeddings (key, split, vector): {error}") from error
        return cls(key, split, vector, files.metadata)

    def aligned(self, key: np.ndarray) -> np.ndarray:
        """[len(key), D] vectors of the given samples.

        Raises:
            ValueError: Some of them have no embedding.
        """
        place = {k: i for i, k in enumerate(self.key)}
        missing = [k for k in key if k not in place]
        if missing:
            raise ValueError(
                f"embeddings: {len(missing)} of {len(key)} samples have none, e.g. {str(missing[0])!r}; were they made from "
                "this survey?"
            )
        return self.vector[[place[k] for k in key]]


def stack_splits(
    survey_dir: Path, parts: Mapping[str, tuple[np.ndarray, np.ndarray]], metadata: dict[str, str]
) -> Embeddings:
    """Put keys to embedded rows.

    Args:
        survey_dir: The survey; its catalogue gives the keys.
        parts: By split, [n] catalogue rows and [n, D] vectors.
        metadata: What the file shall say of itself.
    """
    catalogue: Any = read_catalog(survey_dir, ["key"])["key"]
    rows = np.concatenate([rows for rows, _ in parts.values()])
    return Embeddings(
        key=np.array(catalogue.take(rows).to_pylist(), dtype=object),
        split=np.concatenate([np.full(len(rows), name, dtype=object) for name, (rows, _) in parts.items()]),
        vector=np.concatenate([vectors for _, vectors in parts.values()]),
        metadata=metadata,
    )
