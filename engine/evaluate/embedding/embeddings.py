"""Embeddings of a survey's samples, kept as Parquet.

Shape legend: N samples, D embedding dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from armillary.engine.atomic_file import atomic_path
from armillary.engine.data.format.catalog import read_catalog

__all__ = ["Embeddings", "stack_splits"]

METADATA_KEY = b"armillary"


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
        values = pa.array(np.ascontiguousarray(self.vector, np.float32).reshape(-1))
        table = pa.table(
            {
                "key": pa.array(self.key, pa.string()),
                "split": pa.array(self.split, pa.string()),
                "vector": pa.FixedSizeListArray.from_arrays(values, self.vector.shape[1]),
            }
        ).replace_schema_metadata({METADATA_KEY: json.dumps(self.metadata)})
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def load(cls, path: Path) -> Embeddings:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds something else.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no embeddings here; make them with `armillary embed`")
        try:
            table = pq.read_table(path)
            column = table["vector"].combine_chunks()
            vector = column.flatten().to_numpy().reshape(len(table), column.type.list_size).astype(np.float32)
            key, split = (np.array(table[name].to_pylist(), dtype=object) for name in ("key", "split"))
            metadata = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
        except (pa.ArrowInvalid, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of embeddings (key, split, vector): {error}") from error
        return cls(key, split, vector, metadata)

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
