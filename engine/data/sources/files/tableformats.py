"""Files of tables by format: Parquet, CSV, ECSV, VOTable, FITS binary tables, HDF5, with their columns as they are on disk."""

from __future__ import annotations

import gzip
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
from astropy.io import fits

__all__ = ["SUFFIXES", "Column", "Table", "Values", "decoded", "open_table"]

PARQUET, CSV = (".parquet", ".pq"), (".csv", ".csv.gz")
FITS, HDF5 = (".fits", ".fits.gz", ".fit"), (".h5", ".hdf5")
ASTROPY = {".ecsv": "ascii.ecsv", ".vot": "votable", ".votable": "votable"}
"""Astropy's name of the format, by ending."""
SUFFIXES = (*PARQUET, *CSV, *ASTROPY, *FITS, *HDF5)
ASTROPY_META = "__table_column_meta__"  # astropy's description of a table in HDF5
WHOLE_CSV = 2**31 - 1  # bytes from which the types of a CSV's columns are told
UNREADABLE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, zlib.error, pa.ArrowException)


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        kind: "empty" has no value in any row.
        size: Numbers a row; None for a single value.
        unit: Unit in the file, if it names one.
    """

    kind: Literal["float", "int", "bool", "text", "empty"]
    size: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class Values:
    """A column's values as they are on disk, and the number that stands for none."""

    array: Any  # NumPy or Arrow array
    null: int | None = None


class Table(ABC):
    """One file. `_load` gives a column as it is on disk."""

    count: int
    columns: dict[str, Column]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[str, Values] = {}
        self._group: dict[str, tuple[int, Values]] = {}

    def values(self, name: str) -> Values:
        """A column; read once."""
        if name not in self._read:
            try:
                self._read[name] = self._load(name)
            except UNREADABLE as error:
                raise ValueError(f"{self.path}: column {name!r}: not readable: {error}") from error
        return self._read[name]

    def parts(self, name: str, start: int, stop: int) -> Iterator[Values]:
        """Rows [start, stop) of a column, in pieces. Of a Parquet file no more is kept than one group of rows."""
        whole = self.values(name)
        yield Values(whole.array[start:stop], whole.null)

    def closed(self) -> Table:
        """The same without what was read."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | {"_read": {}, "_group": {}, "_file": None}
        return other

    @abstractmethod
    def _load(self, name: str) -> Values:
        """Read a column."""


class _ArrowTable(Table):
    """Parquet, a column at a time; or a CSV, which can only be read as a whole."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._csv = path.name.lower().endswith(CSV)
        self._file: Any = self._open()
        schema = self._file.schema if self._csv else self._file.schema_arrow
        self.count = self._file.num_rows if self._csv else self._file.metadata.num_rows
        if twice := [name for name, n in Counter(schema.names).items() if n > 1]:
            raise ValueError(f"column {twice[0]!r} occurs twice")
        self.columns = {field.name: c for field in schema if (c := _arrow_column(field, self._length)) is not None}

    def _open(self) -> Any:
        return _read_csv(self.path) if self._csv else pq.ParquetFile(self.path, memory_map=True)

    def _length(self, name: str) -> int:
        """Numbers a row in a column of lists, as its first row has them."""
        first = next(self._file.iter_batches(1, columns=[name]), None)
        return 0 if first is None or first.column(0)[0].as_py() is None else len(first.column(0)[0])

    def parts(self, name: str, start: int, stop: int) -> Iterator[Values]:
        """Rows [start, stop) of a column, a piece for each group of rows."""
        if self._csv:
            yield from super().parts(name, start, stop)
            return
        if self._file is None:
            self._file = self._open()
        begin = 0
        for group in range(self._file.num_row_groups):
            end = begin + self._file.metadata.row_group(group).num_rows
            if begin < stop and start < end:
                number, values = self._group.get(name, (-1, Values(None)))
                if number != group:
                    try:
                        values = self._values(name, self._file.read_row_group(group, columns=[name]).column(0))
                    except UNREADABLE as error:
                        raise ValueError(f"{self.path}: column {name!r}: not readable: {error}") from error
                    self._group[name] = group, values
                yield Values(values.array[max(start - begin, 0) : stop - begin])
            begin = end

    def _load(self, name: str) -> Values:
        if self._file is None:
            self._file = self._open()
        return self._values(name, self._file.column(name) if self._csv else self._file.read(columns=[name]).column(0))

    def _values(self, name: str, chunks: pa.ChunkedArray) -> Values:
        kind, size = self.columns[name].kind, self.columns[name].size
        if kind == "text":
            return Values(chunks.cast(pa.large_string()).combine_chunks())
        if size is not None:
            flat = np.full((len(chunks), size), np.nan)
            known = chunks.is_valid().to_numpy()
            lengths = pc.list_value_length(chunks).drop_null().to_numpy()
            if (odd := lengths != size).any():
                row = int(np.flatnonzero(known)[odd][0])
                raise ValueError(f"row {row} has {lengths[odd][0]} numbers, the first row has {size}")
            flat[known] = pc.list_flatten(chunks).combine_chunks().to_numpy(zero_copy_only=False).reshape(-1, size)
            return Values(flat)
        array = chunks.combine_chunks()
        plain = array.null_count == 0 and kind in ("int", "float") and not pa.types.is_decimal(array.type)
        return Values(array.to_numpy() if plain else array)


class _AstropyTable(Table):
    """ECSV and VOTable: text, which is read as a whole."""

    def __init__(self, path: Path, table: int | str | None) -> None:
        super().__init__(path)
        self._table = table
        self._file: Any = self._open()
        self.count = len(self._file)
        described = ((c, self._file[c]) for c in self._file.colnames)
        found = {name: _numpy_column(c.dtype, c.shape[1:], str(c.unit or "")) for name, c in described}
        self.columns = {name: column for name, column in found.items() if column is not None}

    def _open(self) -> Any:
        from astropy.table import Table as AstropyTable  # here, since it takes half a second and few files are these

        name = next(form for ending, form in ASTROPY.items() if self.path.name.lower().endswith(ending))
        chosen = {} if self._table is None or name != "votable" else {"table_id": self._table}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # small breaches of the standard
            return AstropyTable.read(self.path, format=name, **chosen)

    def _load(self, name: str) -> Values:
        if self._file is None:
            self._file = self._open()
        column = self._file[name]
        values, hidden = np.asarray(column), np.ma.getmaskarray(np.ma.asarray(column))
        if self.columns[name].kind == "text":
            texts = [None if m else decoded(v) for v, m in zip(values.tolist(), hidden.tolist(), strict=True)]
            return Values(pa.array(texts, pa.large_string()))
        if not hidden.any():
            return Values(values)
        if values.ndim == 1:
            return Values(pa.array(values, mask=hidden))
        return Values(np.where(hidden, np.nan, values.astype(np.float64)))


class _FitsTable(Table):
    """A binary table extension of a FITS file, big-endian; mapped unless it is compressed."""

    def __init__(self, path: Path, table: int | str | None) -> None:
        super().__init__(path)
        self._table = table
        with self._hdu() as hdu:
            if twice := [name for name, n in Counter(hdu.columns.names).items() if n > 1]:
                raise ValueError(f"column {twice[0]!r} occurs twice")
            self.count = int(hdu.header["NAXIS2"])
            self._place, self._dtype = hdu.fileinfo()["datLoc"], hdu.columns.dtype.newbyteorder(">")
            self.columns = {c.name: found for c in hdu.columns if (found := _fits_column(c)) is not None}
            self._scales = {c.name: (c.format.format, c.bscale or 1, c.bzero or 0, c.null) for c in hdu.columns}
        self._file: Any = self._data() if self.count else None

    @contextmanager
    def _hdu(self) -> Iterator[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a truncated file shows when its data are mapped
            with fits.open(self.path, memmap=False) as hdus:
                chosen = list(hdus) if self._table is None else [hdus[self._table]]
                found = next((h for h in chosen if isinstance(h, fits.BinTableHDU)), None)
                if found is None:
                    raise ValueError(f"no binary table{'' if self._table is None else f' {self._table!r}'}")
                yield found

    def _data(self) -> np.ndarray:
        if not self.path.name.lower().endswith(".gz"):
            return np.memmap(self.path, self._dtype, "r", self._place, (self.count,))
        with self._hdu() as hdu:
            return np.asarray(hdu.data)

    def _load(self, name: str) -> Values:
        if self._file is None:
            self._file = self._data()
        raw = self._file[name]
        code, scale, zero, null = self._scales[name]
        null = null if isinstance(null, int) else None
        if code == "L":
            return Values(np.select([raw == ord("T"), raw == ord("F")], [1.0, 0.0], np.nan).astype(np.float32))
        if self.columns[name].kind != "int" and (scale != 1 or zero != 0):
            scaled = raw.astype(np.float64) * scale + zero
            return Values(scaled if null is None else np.where(raw == null, np.nan, scaled))
        if zero == 0:
            return Values(raw, null)
        shifted = raw.astype(np.int64)  # unsigned integers are stored less half of their range
        whole = shifted.view(np.uint64) ^ np.uint64(2**63) if zero == 2**63 else shifted + int(zero)
        return Values(whole, None if null is None else null + int(zero))


class _Hdf5Table(Table):
    """A data set a column in one group, or one data set of records."""

    def __init__(self, path: Path, table: str | None) -> None:
        super().__init__(path)
        with h5py.File(path, "r") as file:
            node, fields = _hdf5_table(file, table)
            self._node, self._records = node.name, isinstance(node, h5py.Dataset)
            self.columns = {name: c for name, dtype, shape, unit in fields if (c := _numpy_column(dtype, shape, unit))}
            sizes = {node.name: node.shape[0]} if self._records else {c: node[c].shape[0] for c in self.columns}
        self.count = next(iter(sizes.values()), 0)
        for name, size in sizes.items():
            if size != self.count:
                raise ValueError(f"column {name!r} has {size} rows, {next(iter(sizes))!r} has {self.count}")

    def _load(self, name: str) -> Values:
        with h5py.File(self.path, "r") as file:
            data = file[self._node] if self._records else file[self._node][name]
            if data.dtype.kind == "O":
                return Values(pa.array(data.asstr()[:], pa.large_string()))
            place = data.id.get_offset() if data.chunks is None and file.userblock_size == 0 else None
            if place is not None and not data.external:
                mapped = np.memmap(self.path, data.dtype, "r", place, data.shape)
                return Values(mapped[name] if self._records else mapped)
            values = data.fields(name)[:] if self._records else data[:]
        return Values(pa.array([decoded(v) for v in values], pa.large_string()) if values.dtype == object else values)


def open_table(path: Path, table: int | str | None) -> Table:
    """Open a file by its name's ending.

    Raises:
        ValueError: It is unreadable, or the table has no rows or no columns that can be read.
    """
    lower = path.name.lower()
    found: Table
    try:
        if lower.endswith((*PARQUET, *CSV)):
            found = _ArrowTable(path)
        elif lower.endswith(tuple(ASTROPY)):
            found = _AstropyTable(path, table)
        elif lower.endswith(FITS):
            found = _FitsTable(path, table)
        elif lower.endswith(HDF5):
            found = _Hdf5Table(path, None if table is None else str(table))
        else:
            raise ValueError(f"not the name of a table; it must end in one of {', '.join(SUFFIXES)}")
    except UNREADABLE as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(f"{path}: not readable as a table: {reason}") from error
    if not found.columns:
        raise ValueError(f"{path}: no column holds numbers or text")
    if not found.count:
        raise ValueError(f"{path}: the table has no rows")
    return found


def _read_csv(path: Path) -> pa.Table:
    """Read a CSV as one block, so that a column's type is told from all of its cells."""
    raw = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
    block = max(1, min(len(raw) + 1, WHOLE_CSV))
    options = pc_csv.ReadOptions(use_threads=False, block_size=block)  # threads lose the number of a faulty row
    table = pc_csv.read_csv(pa.BufferReader(raw), options)
    if twice := [name for name, n in Counter(table.column_names).items() if n > 1]:
        raise ValueError(f"column {twice[0]!r} occurs twice")
    wide = [f.name for f in table.schema if f.type == pa.float64() and _beyond_integers(table.column(f.name))]
    if wide:  # whole numbers of 64 bits without sign were taken for fractions
        texts = pc_csv.ConvertOptions(column_types=dict.fromkeys(wide, pa.string()), include_columns=wide)
        again = pc_csv.read_csv(pa.BufferReader(raw), options, convert_options=texts)
        for name in wide:
            if not pc.any(pc.match_substring_regex(again.column(name), r"[^0-9\s]")).as_py():
                table = table.set_column(table.column_names.index(name), name, again.column(name))
    return table.rename_columns([name.strip() for name in table.column_names])


def _beyond_integers(column: pa.ChunkedArray) -> bool:
    greatest = pc.max(column).as_py()
    return greatest is not None and greatest >= 2.0**63


def _arrow_column(field: pa.Field, length: Callable[[str], int]) -> Column | None:
    kind, types = field.type, pa.types
    unit = (field.metadata or {}).get(b"unit", b"").decode("utf-8", "replace")
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if not (types.is_integer(kind.value_type) or types.is_floating(kind.value_type)):
            return None
        return Column("float", kind.list_size if types.is_fixed_size_list(kind) else length(field.name), unit)
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_boolean(kind) or types.is_null(kind):
        return Column("bool" if types.is_boolean(kind) else "empty", None, unit)
    if types.is_integer(kind):
        return Column("int", None, unit)
    if types.is_floating(kind) or types.is_decimal(kind):
        return Column("float", None, unit)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_temporal(kind):
        return Column("text", None, unit)
    return None


def _numpy_column(dtype: np.dtype, shape: tuple[int, ...], unit: str) -> Column | None:
    kinds = {"f": "float", "i": "int", "u": "int", "b": "bool", "S": "text", "O": "text", "U": "text"}
    kind: Any = kinds.get(dtype.kind)
    if kind is None or len(shape) > 1 or (shape and kind == "text") or 0 in shape:
        return None
    return Column(kind, shape[0] if shape else None, unit)


def _fits_column(column: Any) -> Column | None:
    code, repeat = column.format.format, column.format.repeat
    unit = str(column.unit or "")
    if code == "A":
        return Column("text", None, unit) if repeat and not column.dim else None
    if code not in "LBIJKED" or repeat < 1 or (column.dim and "," in str(column.dim)):
        return None
    whole = (
        code in "BIJK" and column.bscale in (None, "", 1) and column.bzero in (None, "", 0, 2**15, 2**31, 2**63, -128)
    )
    kind: Any = "bool" if code == "L" else "int" if whole else "float"
    return Column(kind, None if repeat == 1 else repeat, unit)


def _hdf5_table(file: Any, table: str | None) -> tuple[Any, list[tuple[str, np.dtype, tuple[int, ...], str]]]:
    """The group or data set of records that holds the columns; name, type, shape a row and unit of each."""
    node = file
    if table is not None:
        if table not in file:
            raise ValueError(f"no group or data set {table!r}; it has {', '.join(file) or 'nothing'}")
        node = file[table]
    while isinstance(node, h5py.Group):
        data = {k: v for k, v in node.items() if isinstance(v, h5py.Dataset) and not k.endswith(ASTROPY_META)}
        records = [v for v in data.values() if v.dtype.names]
        groups = [v for v in node.values() if isinstance(v, h5py.Group)]
        if len(records) == 1:
            node = records[0]
        elif not records and data:
            columns = [(k, v.dtype, v.shape[1:], _hdf5_unit(v)) for k, v in data.items() if v.ndim]
            return node, columns
        elif len(groups) == 1 and not records:
            node = groups[0]
        else:
            raise ValueError(f"{node.name} has no single table; name one of {', '.join(node) or 'none'} (table=...)")
    if not node.dtype.names or node.ndim != 1:
        raise ValueError(f"{node.name} is {node.dtype} of shape {node.shape}, not a column of records")
    fields = [(name, *_field(node.dtype[name]), "") for name in node.dtype.names]
    return node, fields


def _field(dtype: np.dtype) -> tuple[np.dtype, tuple[int, ...]]:
    return dtype.base, dtype.shape


def _hdf5_unit(data: Any) -> str:
    found = next((data.attrs[name] for name in ("unit", "units", "UNIT", "UNITS") if name in data.attrs), "")
    return decoded(found)


def decoded(value: Any) -> str:
    """Text of bytes or of anything else."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
