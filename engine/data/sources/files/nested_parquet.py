"""Parquet files whose columns hold arrays as nested lists, as Hugging Face and HATS write them, read by row group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = ["NestedParquet", "dense", "field", "open_parquet"]


class NestedParquet:
    """An open file. The row group read last is kept, so rows are best read in order.

    Args:
        path: The file.

    Attributes:
        schema: Its Arrow schema.
        count: Rows.

    Raises:
        OSError, pa.ArrowException: It is not readable.
    """

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        self.schema: pa.Schema = self._file.schema_arrow
        self.count: int = self._file.metadata.num_rows
        sizes = [self._file.metadata.row_group(k).num_rows for k in range(self._file.metadata.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._kept: tuple[tuple[int, tuple[str, ...]], pa.Table] | None = None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, low: int, high: int, columns: Sequence[str]) -> pa.Table:
        """Rows [low, high) of some columns; row groups outside are not read."""
        first, last = np.searchsorted(self._ends, [low, high - 1], side="right").tolist()
        table = self._file.read_row_groups(list(range(first, last + 1)), columns=list(columns))
        return table.slice(low - (int(self._ends[first - 1]) if first else 0), high - low)

    def row(self, row: int, columns: Sequence[str]) -> dict[str, pa.Array]:
        """One row of some columns, each an array of length 1."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        wanted = (group, tuple(columns))
        if self._kept is None or self._kept[0] != wanted:
            self._kept = None  # before the next one is read: a row group can be large
            self._kept = (wanted, self._file.read_row_group(group, columns=list(columns)))
        at = row - (int(self._ends[group - 1]) if group else 0)
        return {name: self._kept[1][name].slice(at, 1).combine_chunks() for name in columns}


def open_parquet(path: Path) -> NestedParquet:
    """Open a Parquet file.

    Raises:
        ValueError: It is not readable (no Parquet, truncated, ...).
    """
    try:
        return NestedParquet(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def field(array: pa.Array, name: str) -> pa.Array | None:
    """A field of an array of structs, or of an array of lists of structs (as lists); None where there is no such field."""
    kind = array.type
    if pa.types.is_struct(kind):
        place = kind.get_field_index(name)
        return None if place < 0 else array.flatten()[place]
    if _is_list(kind) and pa.types.is_struct(kind.value_type):
        place = kind.value_type.get_field_index(name)
        if place < 0:
            return None
        return pa.ListArray.from_arrays(_offsets(array), array.flatten().flatten()[place])
    return None


def dense(array: pa.Array) -> np.ndarray:
    """Nested lists as an array: [n, ...] for n lists of lists of ... of equal lengths.

    Raises:
        ValueError: Lengths differ, or values are missing.
    """
    shape = [len(array)]
    while _is_list(array.type) or isinstance(array, pa.ExtensionArray):
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
            continue
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) > 1 or None in lengths:
            raise ValueError(f"lists of lengths {lengths}, must all be of one")
        shape.append(lengths[0] if lengths else 0)
        array = array.flatten()
    if array.null_count:
        raise ValueError(f"{array.null_count} values are missing")
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    return array.to_numpy(zero_copy_only=False).reshape(shape)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _offsets(array: pa.Array) -> pa.Array:
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
