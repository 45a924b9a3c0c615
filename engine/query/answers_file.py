"""Answers as Parquet, written as they come: identifiers, and of every quantity the median, 16 and 84 % quantiles, draws.

    NAME_median, NAME_p16, NAME_p84    a number for a scalar, a list of n numbers for a vector; NaN without an answer
    NAME_draws                         a list of S of them: draw s of one quantity belongs to draw s of the others
    known_NAME                         whether anything was known of what was given

Units are in the columns' metadata ("unit"); the table's metadata ("armillary") say run, question, components and axes.

Shape legend: B rows, S draws, n components.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from armillary.models.quantities import Quantity

__all__ = ["METADATA", "AnswersFile"]

METADATA = b"armillary"
GROUP_BYTES = 16 << 20
"""Bytes that are collected before a group of rows is written."""

QUANTILES = {"p16": 0.16, "p84": 0.84}


class AnswersFile:
    """A Parquet file of answers; a context manager.

    Args:
        path: File to write.
        identifiers: Name and type of the columns that tell rows apart.
        given: Names of what is given.
        want: What is asked for.
        draws: Draws S that are kept of each; 0 for none.
        about: What the file shall say of itself, as JSON types.

    Raises:
        ValueError: An identifier has the name of another column.
    """

    def __init__(
        self,
        path: Path,
        identifiers: Mapping[str, pa.DataType],
        given: Sequence[str],
        want: Sequence[Quantity],
        draws: int,
        about: Mapping[str, Any],
    ) -> None:
        self._want, self._draws, self._about = tuple(want), draws, dict(about)
        fields = [pa.field(name, kind) for name, kind in identifiers.items()]
        fields += [pa.field(f"known_{name}", pa.bool_()) for name in given]
        for quantity in want:
            one = pa.float32() if quantity.size == 1 else pa.list_(pa.float32(), quantity.size)
            unit = {"unit": quantity.unit} if quantity.unit else None
            fields += [pa.field(f"{quantity.name}_{part}", one, metadata=unit) for part in ("median", *QUANTILES)]
            if draws:
                fields.append(pa.field(f"{quantity.name}_draws", pa.list_(one, draws), metadata=unit))
        names = [field.name for field in fields]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"key: column {twice[0]!r} has the name of a column of the answers; rename it in the table"
            )
        self.schema = pa.schema(fields)
        self._writer = pq.ParquetWriter(path, self.schema)
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> AnswersFile:
        """Nothing to do: the file is open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, which is not whole unless `finish` was called."""
        self._writer.close()

    def write(
        self,
        identifiers: Mapping[str, pa.Array],
        known: Mapping[str, np.ndarray],
        median: Mapping[str, np.ndarray],
        quantiles: Mapping[str, Mapping[str, np.ndarray]],
        draws: Mapping[str, np.ndarray],
    ) -> None:
        """Add rows.

        Args:
            identifiers: Columns of B rows.
            known: [B] bool by name of what is given.
            median: [B, n] float32 by name of what is wanted.
            quantiles: Likewise, by name of the quantile and of what is wanted.
            draws: [B, S, n] float32 by name; not looked at where none are kept.
        """
        arrays = [*identifiers.values(), *(pa.array(k) for k in known.values())]
        for quantity in self._want:
            name = quantity.name
            arrays.append(_lists(median[name], quantity.size))
            arrays += [_lists(quantiles[part][name], quantity.size) for part in QUANTILES]
            if self._draws:
                each = _lists(draws[name].reshape(-1, quantity.size), quantity.size)
                arrays.append(pa.FixedSizeListArray.from_arrays(each, self._draws))
        self._waiting.append(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        if sum(batch.nbytes for batch in self._waiting) > GROUP_BYTES:
            self._flush()

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Write what waits, and metadata with the counts."""
        self._flush()
        about = self._about | {
            "want": [{"name": q.name, "unit": q.unit, "components": q.components, "axis": q.axis} for q in self._want],
            "counts": dict(counts),
        }
        self._writer.add_key_value_metadata({METADATA: json.dumps(about)})

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting, self.schema))
            self._waiting = []


def _lists(values: np.ndarray, size: int) -> pa.Array:
    """[B, n] numbers as B numbers or B lists."""
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return flat if size == 1 else pa.FixedSizeListArray.from_arrays(flat, size)
