"""Tables in HDF5: a data set a column, data sets of records, and what pandas writes."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa

from armillary.engine.data.sources.tables.columns import Column, Table, Values, decoded

__all__ = ["Hdf5Table"]

ASTROPY_META = "__table_column_meta__"  # astropy's description of a table in HDF5


@dataclass(frozen=True)
class _Place:
    """Where a column lies: a data set, a field of its records, and the place among the numbers of a row."""

    data: str
    field: str | None = None
    index: int | None = None


class Hdf5Table(Table):
    """A data set a column in one group, one data set of records, or a frame of pandas.

    The rows are those of most data sets. What is of another length, a scalar, a group of its own or neither numbers nor text
    is no column, and is named in `unread`.
    """

    def __init__(self, path: Path, table: str | None) -> None:
        super().__init__(path)
        self.columns, self._places = {}, dict[str, _Place]()
        with h5py.File(path, "r") as file:
            node = _find_table(file, table)
            found = _pandas_columns(node) if "pandas_type" in node.attrs else _plain_columns(node, self.unread)
            for name, place, dtype, shape, unit in found:
                column = _numpy_column(dtype, shape, unit)
                if column is None or (dtype.kind == "O" and h5py.check_string_dtype(dtype) is None):
                    self.unread[name] = f"{dtype} {shape or ''}".strip()
                else:
                    self.columns[name], self._places[name] = column, place
            counts = {p.data: file[p.data].shape[0] for p in self._places.values()}
        self.count = _common_length({name: counts[place.data] for name, place in self._places.items()})
        for name in [n for n, place in self._places.items() if counts[place.data] != self.count]:
            self.unread[name] = f"{counts[self._places.pop(name).data]} rows, the table has {self.count}"
            del self.columns[name]

    def _load(self, name: str) -> Values:
        place = self._places[name]
        with h5py.File(self.path, "r") as file:
            data = file[place.data]
            if data.dtype.kind == "O":
                return Values(pa.array(data.asstr()[:], pa.large_string()))
            offset = data.id.get_offset() if data.chunks is None and file.userblock_size == 0 else None
            if offset is not None and not data.external:
                values: np.ndarray = np.memmap(self.path, data.dtype, "r", offset, data.shape)
                values = values if place.field is None else values[place.field]
            else:
                values = data[:] if place.field is None else data.fields(place.field)[:]
        if place.index is not None:
            values = values[:, place.index]
        return Values(pa.array([decoded(v) for v in values], pa.large_string()) if values.dtype == object else values)


def _common_length(lengths: dict[str, int]) -> int:
    """The length of most columns; columns that disagree one to one are no table."""
    (count, most), *others = Counter(lengths.values()).most_common(2) or [(0, 0)]
    if others and others[0][1] == most:
        first, second = (next(n for n, length in lengths.items() if length == c) for c in (count, others[0][0]))
        raise ValueError(
            f"column {second!r} has {others[0][0]} rows, {first!r} has {count}: which of them are the table's?"
        )
    return count


def _numpy_column(dtype: np.dtype, shape: tuple[int, ...], unit: str) -> Column | None:
    kinds = {"f": "float", "i": "int", "u": "int", "b": "bool", "S": "text", "O": "text", "U": "text"}
    kind: Any = kinds.get(dtype.kind)
    if kind is None or len(shape) > 1 or (shape and kind == "text") or 0 in shape:
        return None
    return Column(kind, shape[0] if shape else None, unit)


def _find_table(file: Any, table: str | None) -> Any:
    """The group, or data set of records, that holds the columns."""
    node = file
    if table is not None:
        if table not in file:
            raise ValueError(f"no group or data set {table!r}; it has {', '.join(file) or 'nothing'}")
        node = file[table]
    while isinstance(node, h5py.Group):
        if "pandas_type" in node.attrs:
            return node
        data = {k: v for k, v in node.items() if isinstance(v, h5py.Dataset) and not k.endswith(ASTROPY_META)}
        records = [v for v in data.values() if v.dtype.names]
        groups = [v for v in node.values() if isinstance(v, h5py.Group)]
        if len(records) == 1:
            node = records[0]
        elif not records and data:
            return node
        elif len(groups) == 1 and not records:
            node = groups[0]
        else:
            raise ValueError(f"{node.name} has no single table; name one of {', '.join(node) or 'none'} (table=...)")
    if not node.dtype.names or node.ndim != 1:
        raise ValueError(f"{node.name} is {node.dtype} of shape {node.shape}, not a column of records")
    return node


Found = tuple[str, _Place, np.dtype, tuple[int, ...], str]
"""A column: name, place, type, shape of a row, unit."""


def _plain_columns(node: Any, unread: dict[str, str]) -> list[Found]:
    """Columns of a group or of records; what else is in the group goes to `unread`."""
    if isinstance(node, h5py.Dataset):
        kinds = {name: _field(node.dtype[name]) for name in node.dtype.names}
        return [(name, _Place(node.name, name), *kind, "") for name, kind in kinds.items()]
    data = {}
    for name, inner in node.items():
        if isinstance(inner, h5py.Group):
            unread[name] = "a group"
        elif isinstance(inner, h5py.Dataset) and not inner.shape:
            unread[name] = "a single value"
        elif isinstance(inner, h5py.Dataset) and not name.endswith(ASTROPY_META):
            data[name] = inner
    return [(k, _Place(v.name), v.dtype, v.shape[1:], _hdf5_unit(v)) for k, v in data.items()]


def _pandas_columns(node: Any) -> list[Found]:
    """Columns of a frame that pandas wrote, in the format "table" or "fixed" (documented in pandas/io/pytables.py).

    Both keep columns of one type together in a block. Text of the format "fixed" is pickled, and is not read.
    """
    kind = decoded(node.attrs["pandas_type"])
    if kind == "frame_table":
        found: list[Found] = []
        records = node["table"]
        for name in records.dtype.names:
            dtype, shape = _field(records.dtype[name])
            names = _pickled_names(records.attrs.get(f"{name}_kind"))
            if name == "index" or not names:
                continue
            for i, column in enumerate(names):
                found.append((column, _Place(records.name, name, i if shape else None), dtype, (), ""))
        return found
    if kind != "frame":
        raise ValueError(f"{node.name} is a {kind} of pandas, and must be a frame")
    found = []
    for number in range(int(node.attrs["nblocks"])):
        names, values = node[f"block{number}_items"], node[f"block{number}_values"]
        for i, column in enumerate(decoded(v) for v in names[:].tolist()):
            shape = () if values.ndim == 2 else values.shape
            found.append((column, _Place(values.name, None, i), values.dtype, shape, ""))
    return found


class _NoGlobals(pickle.Unpickler):
    """Lists, texts and numbers only: nothing is imported."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _pickled_names(value: Any) -> list[str]:
    """Names of columns as pandas keeps them in an attribute; none where there is something else."""
    if not isinstance(value, bytes):
        return []
    try:
        names = _NoGlobals(io.BytesIO(value)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _field(dtype: np.dtype) -> tuple[np.dtype, tuple[int, ...]]:
    return dtype.base, dtype.shape


def _hdf5_unit(data: Any) -> str:
    found = next((data.attrs[name] for name in ("unit", "units", "UNIT", "UNITS") if name in data.attrs), "")
    return decoded(found)
