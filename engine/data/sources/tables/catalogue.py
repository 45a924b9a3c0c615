"""Columns of tables on disk, read one at a time: one file, or several with the same columns.

A column stays what it is on disk, an array of NumPy or Arrow; uncompressed FITS and HDF5 are mapped into memory and not
read at all. Only the rows that are asked for become numbers or text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from armillary.engine.data.sources.files.parts import short_names
from armillary.engine.data.sources.files.text_tables import EXACT
from armillary.engine.data.sources.listing import find_files
from armillary.engine.data.sources.sentinels import place_marks
from armillary.engine.data.sources.tables.columns import Column, Table, Values, decoded
from armillary.engine.data.sources.tables.formats import SUFFIXES, open_table

__all__ = ["Catalogue", "check_positions"]

SCANNED = 1 << 20  # rows looked through at a time
HOURS = ("h", "hr", "hour", "hours", "hourangle")
NO_DEGREES = ("rad", "radian", "radians", "arcsec", "arcmin", "mas")
FULL_DAY = (1.0, 23.0)  # RAs from below one to above the other, and none above 24, look like hours
DAY_ROWS = 100  # fewer rows tell nothing


class Catalogue:
    """A table in one file, or several files with the same columns one after the other.

    Args:
        path: One file, several, or a folder: the tables in it and its sub-folders, sorted.
        table: Which table of the file: number or name of a FITS HDU, path of an HDF5 group or data set. By default the
            only one, or the first of a FITS file.

    Attributes:
        files: The files.
        names: Short names of the files.
        count: Rows.
        columns: By name; columns of other types or shapes are not among them.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file is unreadable, has no rows, or its columns differ from those of the first.
    """

    def __init__(self, path: Path | str | Sequence[Path | str], table: int | str | None = None) -> None:
        self.files = find_files(path, SUFFIXES, "table")
        self.names = short_names(self.files)
        self._tables: list[Table] = [open_table(file, table) for file in self.files]
        self._ends = np.cumsum([t.count for t in self._tables])
        self.count = int(self._ends[-1])
        self.columns = dict(self._tables[0].columns)
        for file, other in zip(self.files[1:], self._tables[1:], strict=True):
            self._agree(file, other)

    def _agree(self, file: Path, other: Table) -> None:
        if odd := set(other.columns) ^ set(self.columns):
            raise ValueError(f"{file}: column {sorted(odd)[0]!r} is not in both this file and {self.files[0]}")
        for name, theirs in other.columns.items():
            mine = self.columns[name]
            numeric = "text" not in (mine.kind, theirs.kind)
            if mine.size != theirs.size or not (
                numeric or mine.kind == theirs.kind or "empty" in (mine.kind, theirs.kind)
            ):
                raise ValueError(
                    f"{file}: column {name!r} is {_words(theirs)}, in {self.files[0]} it is {_words(mine)}"
                )
            if mine.kind != theirs.kind:
                kinds = {mine.kind, theirs.kind} - {"empty"}
                self.columns[name] = replace(mine, kind=kinds.pop() if len(kinds) == 1 else "float")

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what was read."""
        return {**self.__dict__, "_tables": [t.closed() for t in self._tables]}

    def column(self, name: str, what: str) -> Column:
        """A column by its name.

        Raises:
            ValueError: There is none; `what` says what it was needed for.
        """
        if name not in self.columns:
            close = [c for c in self.columns if c.lower() == name.lower()]
            few = ", ".join(close or list(self.columns)[:12]) + (" ..." if not close and len(self.columns) > 12 else "")
            raise ValueError(f"{self.files[0]}: no column {name!r} ({what}) with numbers or text; there are {few}")
        return self.columns[name]

    def place(self, row: int) -> tuple[int, int]:
        """File number and row in it."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return number, row - (int(self._ends[number - 1]) if number else 0)

    def where(self, row: int) -> str:
        """File and row, for errors."""
        number, inside = self.place(row)
        return f"{self.files[number]}: row {inside}"

    def numbers(self, name: str, rows: np.ndarray) -> np.ndarray:
        """[n] or [n, size] float64 of some rows, ascending; NaN where there is no number or it is infinite."""
        return np.concatenate([_numbers(v, r, self.columns[name].size) for v, r in self._pieces(name, rows)])

    def numbers_between(self, name: str, start: int, stop: int) -> np.ndarray:
        """`numbers` of rows [start, stop), for tables that are read from end to end: see `Table.parts`."""
        size = self.columns[name].size
        found = [_numbers(v, np.arange(len(v.array)), size) for v in self._parts(name, start, stop)]
        return np.concatenate(found)

    def identifier_type(self, name: str) -> pa.DataType:
        """Type of `identifiers`: whole numbers stay what they are, everything else is text."""
        if self.columns[name].kind != "int":
            return pa.string()
        first = next(self._parts(name, 0, 1)).array
        return (
            pa.uint64() if str(first.dtype if isinstance(first, np.ndarray) else first.type) == "uint64" else pa.int64()
        )

    def identifiers(self, name: str, start: int, stop: int) -> pa.Array:
        """Rows [start, stop) of a column as they are, null where there is no value."""
        kind, pieces = self.identifier_type(name), []
        for values in self._parts(name, start, stop):
            if self.columns[name].kind == "int":
                pieces.append(_whole(values).cast(kind))
            else:
                pieces.append(pa.array([t or None for t in _texts(values, np.arange(len(values.array)))], kind))
        return pa.concat_arrays(pieces)

    def texts(self, name: str, rows: np.ndarray) -> list[str]:
        """Text of some rows, ascending, without blanks around it; "" where there is none."""
        return [t for v, r in self._pieces(name, rows) for t in _texts(v, r)]

    def codes(self, name: str) -> np.ndarray:
        """[count] integers, equal where a column's values are."""
        whole = [v.array for v in (t.values(name) for t in self._tables)]
        if all(isinstance(a, np.ndarray) and a.dtype.kind in "iu" for a in whole):
            return np.concatenate([a.astype(a.dtype.newbyteorder("=")) for a in whole])
        pieces = [pa.array(a) if isinstance(a, np.ndarray) else a.cast(pa.large_string()) for a in whole]
        chunks = pa.chunked_array([piece.cast(pa.large_binary()) for piece in pieces])
        return chunks.combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy()

    def exact(self, name: str) -> bool:
        """Whether all numbers of an integer column survive float64."""
        return all(_exact(table.values(name)) for table in self._tables)

    def _parts(self, name: str, start: int, stop: int) -> Iterator[Values]:
        before = 0
        for table in self._tables:
            first, last = max(start - before, 0), min(stop - before, table.count)
            if first < last:
                yield from table.parts(name, first, last)
            before += table.count

    def _pieces(self, name: str, rows: np.ndarray) -> list[tuple[Values, np.ndarray]]:
        if len(self._tables) == 1 or not len(rows):
            return [(self._tables[0].values(name), rows)]
        cuts = np.searchsorted(rows, self._ends)
        starts, begins = [0, *cuts[:-1]], [0, *self._ends[:-1]]
        return [
            (t.values(name), rows[a:b] - before)
            for t, a, b, before in zip(self._tables, starts, cuts, begins, strict=True)
            if b > a
        ]


def check_positions(
    catalogue: Catalogue, ra: str | None, dec: str | None, ra_unit: str | None, on_bad: str = "error"
) -> None:
    """Look through the columns of positions.

    Args:
        catalogue: The table.
        ra: Column of right ascensions, or None.
        dec: Column of declinations, or None.
        ra_unit: "degree", "hour", or None for degrees that must not look like hours.
        on_bad: "skip" leaves positions out of range to the rows that have them.

    Raises:
        ValueError: A position is out of range, or degrees are doubtful.
    """
    file = catalogue.files[0]
    if ra is not None and ra_unit is None and catalogue.columns[ra].unit.lower().strip() in HOURS:
        raise ValueError(f"{file}: column {ra!r}: its unit is hours; to convert them to degrees, say ra_unit='hour'")
    for axis in (ra, dec):
        if axis is not None and (unit := catalogue.columns[axis].unit.lower().strip()) in NO_DEGREES:
            raise ValueError(f"{file}: column {axis!r}: its unit is {unit}; convert it to degrees")
    ranges = {"ra": (0.0, 24.0 if ra_unit == "hour" else 360.0), "dec": (-90.0, 90.0)}
    low, high = np.inf, -np.inf
    for start in range(0, catalogue.count, SCANNED):
        rows = np.arange(start, min(start + SCANNED, catalogue.count))
        for name, column in (("ra", ra), ("dec", dec)):
            if column is None:
                continue
            values = place_marks(name, catalogue.numbers(column, rows))
            least, most = ranges[name]
            wrong = np.flatnonzero((values < least) | (values > most))
            if wrong.size and on_bad != "skip":
                value = values[wrong[0]]
                negative = bool(name == "ra" and -180 <= value < 0)
                raise ValueError(
                    f"{catalogue.where(int(rows[wrong[0]]))}, column {column!r}: {name} {value:g} is outside "
                    f"[{least:g}, {most:g}] {'hours' if most == 24 else 'degrees'}"
                    + ("; right ascensions from -180 to 180 must become 0 to 360: add 360 to negative ones" * negative)
                )
            if name == "ra" and not np.isnan(values).all():
                low, high = min(low, np.nanmin(values)), max(high, np.nanmax(values))
    if ra_unit is None and low < FULL_DAY[0] and FULL_DAY[1] < high <= 24 and catalogue.count >= DAY_ROWS:
        raise ValueError(
            f"{file}: column {ra!r}: right ascensions from {low:.3g} to {high:.3g} look like hours; say which they are: "
            "ra_unit='hour' or ra_unit='degree'"
        )


def _words(column: Column) -> str:
    return column.kind if column.size is None else f"{column.size} numbers a row"


def _numbers(values: Values, rows: np.ndarray, size: int | None) -> np.ndarray:
    array = values.array
    if isinstance(array, np.ndarray):
        raw = array[rows]
        if raw.dtype.kind not in "fiub":  # a column without a value in this file, and with numbers in others
            return np.full(len(rows), np.nan)
        out = raw.astype(np.float64)
        if values.null is not None:
            out[raw == values.null] = np.nan
    else:
        taken = array.take(pa.array(rows))
        if pa.types.is_large_string(taken.type):
            return np.full(len(rows), np.nan)
        out = taken.cast(pa.float64()).to_numpy(zero_copy_only=False).copy()
    out[np.isinf(out)] = np.nan
    return out if size is None else out.reshape(len(rows), size)


def _whole(values: Values) -> pa.Array:
    array = values.array
    if not isinstance(array, np.ndarray):
        return array
    native = array.astype(array.dtype.newbyteorder("="))
    return pa.array(native, mask=None if values.null is None else native == values.null)


def _texts(values: Values, rows: np.ndarray) -> list[str]:
    array = values.array
    if not isinstance(array, np.ndarray):
        return ["" if v is None else str(v).strip() for v in array.take(pa.array(rows)).to_pylist()]
    raw = array[rows]
    if raw.dtype.kind in "iu":
        return ["" if v == values.null else str(v) for v in raw.tolist()]
    return [decoded(v).strip(" \t\r\n\0") for v in raw.tolist()]


def _exact(values: Values) -> bool:
    array = values.array
    if not isinstance(array, np.ndarray):
        if not pa.types.is_integer(array.type):
            return True
        ends = pc.min_max(array).as_py()
        return all(v is None or abs(v) <= EXACT for v in ends.values())
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 8:
        return True
    for start in range(0, len(array), SCANNED):
        piece = array[start : start + SCANNED]
        if values.null is not None:
            piece = piece[piece != values.null]
        if piece.size and (int(piece.max()) > EXACT or int(piece.min()) < -EXACT):
            return False
    return True
