"""Rows of a catalogue: labels and vectors by object, from Parquet, CSV, ECSV, VOTable, FITS and HDF5.

    TableRows("dc2.hdf5", key="id", vectors={"photometry": ("mag_u_lsst", "mag_g_lsst")}, labels=("redshift",))

A catalogue has no pixels; `joined.Joined` puts its rows beside images or spectra.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from armillary.engine.choices import check_choice
from armillary.engine.data.format.survey import CATALOG_COLUMNS, VectorRecord
from armillary.engine.data.sources.files.text_tables import EXACT
from armillary.engine.data.sources.sentinels import find_marks, mask_marks, place_marks, told
from armillary.engine.data.sources.source import (
    BadSample,
    Rows,
    Sample,
    key_from_name,
    listing_mark,
    position_problem,
)
from armillary.engine.data.sources.tables.catalogue import Catalogue, check_positions
from armillary.engine.data.sources.tables.formats import SUFFIXES
from armillary.models.file_hash import sha256_of

__all__ = ["TableRows"]

RaUnit = Literal["degree", "hour"]
Duplicates = Literal["error", "first"]

log = logging.getLogger("armillary.data")

DIGESTED = 4 << 30  # bytes up to which inputs are known by their checksum, not by their size


class TableRows:
    """A `Source` of the rows of one table, or of several files with the same columns.

    Columns are read when they are first needed and stay arrays as on disk; uncompressed FITS and HDF5 are mapped. Blank
    cells, nulls, TNULL, infinities and the marks in `missing` are NaN (text: ""). Integer columns with values above 2^53
    and identifiers with leading zeros are text, since labels are float64. Labels have the column's name in lower case; one that is a name of the packed
    catalogue's own (`source`, `split`, ...) gets a `_` at its end.

    Args:
        path: One file, several, or a folder.
        key: Column of the keys, or several, joined by `_`; characters that keys cannot have become `_`. By default file
            and row number.
        ra: Column of right ascensions, ICRS; by default one called ra, in any case, if there is one.
        dec: Column of declinations, degrees, likewise.
        labels: Columns to be labels, or a mapping of columns to the labels' names. By default every column of single
            values but ra and dec.
        vectors: Columns of single numbers, or the name of one column with several numbers a row, by vector's name.
        units: Unit or meaning by label or vector, where the file has none.
        components: Names of a vector's components, by vector's name; by default the columns' names or 0, 1, ...
        missing: Numbers that mean "no value" in every label and vector, or such numbers by column; () for none. By
            default those of `sentinels`, whose numbers are logged.
        text: Columns of whole numbers that are text whatever their values: identifiers.
        ra_unit: "degree" or "hour"; by default degrees, but what looks like hours is refused.
        duplicates: Refuse a table in which a key occurs twice, or keep the first row of each.
        table: Number or name of a FITS HDU, path of an HDF5 group or data set.
        on_bad: "skip" makes rows with impossible positions unusable samples.

    Attributes:
        catalogue: The columns.
        rows: [n] int64 rows of the files that are samples; None for all of them.
        removed: How many rows were left out, by reason.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is unreadable or empty; a column is missing, of the wrong type or named twice; a position is
            out of range; a key occurs twice.
    """

    bands: tuple[str, ...] = ()
    pixel_scale_arcsec: float | None = None
    unit = ""

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        *,
        key: str | Sequence[str] | None = None,
        ra: str | None = None,
        dec: str | None = None,
        labels: Sequence[str] | Mapping[str, str] | None = None,
        vectors: Mapping[str, str | Sequence[str]] | None = None,
        units: Mapping[str, str] | None = None,
        components: Mapping[str, Sequence[str]] | None = None,
        missing: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        text: Sequence[str] = (),
        ra_unit: RaUnit | None = None,
        duplicates: Duplicates = "error",
        table: int | str | None = None,
        on_bad: str = "error",
    ) -> None:
        if ra_unit is not None:
            check_choice("ra_unit", ra_unit, RaUnit)
        check_choice("duplicates", duplicates, Duplicates)
        self.catalogue = Catalogue(path, table)
        self.rows: np.ndarray | None = None
        self.removed: dict[str, int] = {}
        self._key = () if key is None else (key,) if isinstance(key, str) else tuple(key)
        self._position = {"ra": self._find("ra", ra), "dec": self._find("dec", dec)}
        self._parts = {n: (c,) if isinstance(c, str) else tuple(c) for n, c in (vectors or {}).items()}
        self.vectors = tuple(self._record(name, units or {}, components or {}) for name in self._parts)
        if strangers := set(components or {}) - set(self._parts):
            raise ValueError(f"components: no vector is called {sorted(strangers)[0]!r}")
        self._columns = self._label_columns(labels)
        self._text = {label: self._is_text(column, column in text) for label, column in self._columns.items()}
        self.labels = {label: self._meaning(label, column, units or {}) for label, column in self._columns.items()}
        if strangers := set(units or {}) - set(self.labels) - set(self._parts):
            raise ValueError(f"units: no label or vector is called {sorted(strangers)[0]!r}")
        self._marks = self._missing(missing)
        check_positions(self.catalogue, self._position["ra"], self._position["dec"], ra_unit, on_bad)
        self._hours = ra_unit == "hour"
        for column in self._key:
            if self.catalogue.column(column, "key").kind not in ("int", "text"):
                raise self._wrong(column, "numbers with fractions, or none at all, cannot be keys")
        self._check_keys(duplicates)

    def __len__(self) -> int:
        """Number of rows."""
        return self.catalogue.count if self.rows is None else len(self.rows)

    def inputs(self) -> dict[str, str]:
        """The files with their checksums (beyond 4 GiB: of names, sizes and number of rows), and what was left out."""
        files = dict(zip(self.catalogue.names, self.catalogue.files, strict=True))
        if sum(f.stat().st_size for f in files.values()) <= DIGESTED:
            marks = {name: f"sha256:{sha256_of(file)}" for name, file in files.items()}
        else:
            listing = [(name, f.stat().st_size) for name, f in files.items()] + [("rows", self.catalogue.count)]
            marks = {f"{len(files)} files from {self.catalogue.names[0]}": listing_mark(listing)}
        return marks | {f"cut: {why}": f"removed {count} rows" for why, count in self.removed.items()}

    def keep(self, wanted: np.ndarray, why: str) -> None:
        """Leave rows out.

        Args:
            wanted: [len] bool.
            why: Recorded in `removed`.

        Raises:
            ValueError: No row is left.
        """
        self.removed[why] = int((~wanted).sum())
        self.rows = np.flatnonzero(wanted) if self.rows is None else self.rows[wanted]
        if not len(self.rows):
            taken = "; ".join(f"{reason}: {count:,}" for reason, count in self.removed.items())
            raise ValueError(f"{self.catalogue.files[0]}: no row is left of {self.catalogue.count:,} ({taken})")

    def values(self, column: str) -> np.ndarray:
        """[len] or [len, size] float64 of a whole column, with `missing` as NaN."""
        return self._clean(column, self._rows(0, len(self)))

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels of rows [start, stop); see `Described`."""
        rows = self._rows(start, stop)
        columns: dict[str, np.ndarray | list[str]] = {}
        for name, column in self._position.items():
            numbers = np.full(len(rows), np.nan) if column is None else self.catalogue.numbers(column, rows)
            place_marks(name, numbers)
            columns[name] = numbers * 15 if name == "ra" and self._hours else numbers
        for label, column in self._columns.items():
            columns[label] = self.catalogue.texts(column, rows) if self._text[label] else self._clean(column, rows)
        keys = self._keys(rows)
        bad = {}
        for i, (key, ra, dec) in enumerate(zip(keys, columns["ra"], columns["dec"], strict=True)):
            why = position_problem("ra", float(ra)) or position_problem("dec", float(dec))
            if why or not key:
                why = why or f"no value in {' or '.join(self._key)}, so it has no key"
                bad[start + i] = f"{self.catalogue.where(int(rows[i]))}: {why}"
        return Rows(keys, columns, None, bad)

    def read(self, index: int) -> Sample:
        """Read one row.

        Raises:
            BadSample: The row has no key.
            IndexError: There is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}: this source has {len(self)}")
        found = self.describe(index, index + 1)
        if found.bad:
            raise BadSample(found.bad[index])
        rows = self._rows(index, index + 1)
        number, inside = self.catalogue.place(int(rows[0]))
        vectors = {
            name: np.concatenate([self._clean(column, rows).reshape(-1) for column in columns]).astype(np.float32)
            for name, columns in self._parts.items()
        }
        return found.sample(0, self.labels, f"{self.catalogue.names[number]}:{inside}", vectors=vectors)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop) if self.rows is None else self.rows[start:stop]

    def _wrong(self, column: str, why: str) -> ValueError:
        return ValueError(f"{self.catalogue.files[0]}: column {column!r}: {why}")

    def _find(self, name: str, given: str | None) -> str | None:
        """The column of ra or dec, which must hold single numbers."""
        column = given or next((c for c in self.catalogue.columns if c.lower() == name), None)
        if column is None:
            return None
        found = self.catalogue.column(column, name)
        if found.kind not in ("float", "int") or found.size is not None:
            what = "text" if found.kind == "text" else "not a single number a row"
            raise self._wrong(column, f"{what}, but {name} must be decimal degrees")
        return column

    def _record(self, name: str, units: Mapping[str, str], components: Mapping[str, Sequence[str]]) -> VectorRecord:
        columns = self._parts[name]
        found = [self.catalogue.column(c, f"vector {name!r}") for c in columns]
        if not found or not name.isidentifier():
            raise ValueError(f"vectors: {name!r} must be letters, digits and _, and have at least one column")
        for column, what in zip(columns, found, strict=True):
            if what.kind == "text":
                raise self._wrong(column, f"text, but the other parts of vector {name!r} must be numbers like it")
            if len(columns) > 1 and what.size is not None:
                raise self._wrong(column, f"{what.size} numbers a row, beside other columns of vector {name!r}")
        size = found[0].size
        parts = columns if size is None else tuple(str(k) for k in range(size))
        named = tuple(components.get(name, parts))
        if len(named) != len(parts) or len(set(named)) != len(named):
            raise ValueError(f"components: vector {name!r} needs {len(parts)} different names, got {list(named)}")
        unit = units.get(name, " ".join(dict.fromkeys(what.unit for what in found)).strip())
        return VectorRecord(name, named, unit, f"from {self.catalogue.names[0]}")

    def _label_columns(self, labels: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
        """Column by label."""
        if isinstance(labels, str):
            raise ValueError(f"labels: must be a sequence of columns or a mapping, got the text {labels!r}")
        if labels is None:
            used = set(self._position.values())
            chosen = [c for c, what in self.catalogue.columns.items() if what.size is None and c not in used]
            named = {c: _label(c) for c in chosen}
        else:
            named = dict(labels) if isinstance(labels, Mapping) else {c: _label(c) for c in labels}
        columns: dict[str, str] = {}
        for column, label in named.items():
            size = self.catalogue.column(column, f"label {label!r}").size
            if size is not None:
                raise self._wrong(column, f"{size} numbers a row cannot be a label; make it a vector")
            if label in CATALOG_COLUMNS:
                raise self._wrong(column, f"label {label!r} is a name of the survey's own catalogue; rename it")
            if label in columns:
                raise self._wrong(column, f"label {label!r} is also that of column {columns[label]!r}; rename one")
            columns[label] = column
        return columns

    def _is_text(self, column: str, identifier: bool) -> bool:
        kind = self.catalogue.columns[column].kind
        if identifier and kind not in ("int", "text"):
            raise self._wrong(column, "an identifier must be whole numbers or text, others have lost digits")
        return kind == "text" or identifier or (kind == "int" and not self.catalogue.exact(column))

    def _meaning(self, label: str, column: str, units: Mapping[str, str]) -> str:
        return units.get(label) or self.catalogue.columns[column].unit or f"{column} of {self.catalogue.names[0]}"

    def _missing(self, missing: Sequence[float] | Mapping[str, Sequence[float]] | None) -> dict[str, list[float]]:
        """Numbers that mean "no value", by column."""
        parts = {c for columns in self._parts.values() for c in columns}
        used = parts | {column for label, column in self._columns.items() if not self._text[label]}
        if missing is None:
            return {column: marks for column in sorted(used) if (marks := self._look_for_marks(column))}
        if not isinstance(missing, Mapping):
            return {column: list(missing) for column in used} if len(missing) else {}
        for column in missing:
            self.catalogue.column(column, "missing values")
        return {column: list(marks) for column, marks in missing.items()}

    def _look_for_marks(self, column: str) -> list[float]:
        """Marks of a column by the rule of `sentinels`; what is found is logged and told with the label."""
        file = self.catalogue.files[0]
        if self.catalogue.columns[column].kind not in ("float", "int"):
            return []
        values = self.catalogue.numbers(column, np.arange(self.catalogue.count))
        if column.lower().endswith("id") and (np.abs(values) > EXACT).any():
            log.warning(
                "%s: column %r: identifiers as floating-point numbers; their last digits are lost", file, column
            )
        if marks := find_marks(values):
            log.warning("%s: column %r: %s taken for unknown", file, column, told(marks))
            for label, own in self._columns.items():
                if own == column:
                    self.labels[label] += f"; {told(marks)} taken for unknown"
        return list(marks)

    def _clean(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Numbers with missing values as NaN; marks are compared in the column's own precision, float32 included."""
        return mask_marks(self.catalogue.numbers(column, rows), self._marks.get(column, ()))

    def _keys(self, rows: np.ndarray) -> list[str]:
        """Keys; "" where a part is missing."""
        if not self._key:
            stems = [key_from_name(_stem(name)) for name in self.catalogue.names]
            places = [self.catalogue.place(int(row)) for row in rows]
            return [f"{stems[number]}-{row:07d}" for number, row in places]
        parts = [self.catalogue.texts(column, rows) for column in self._key]
        return [key_from_name("_".join(row)) if all(row) else "" for row in zip(*parts, strict=True)]

    def _check_keys(self, duplicates: str) -> None:
        """Refuse or drop rows whose key an earlier row has."""
        if not self._key:
            return
        codes = [self.catalogue.codes(column) for column in self._key]
        order = np.lexsort(codes[::-1])  # stable: of equal keys the first row comes first
        same = np.ones(max(len(order) - 1, 0), bool)
        for code in codes:
            same &= code[order[1:]] == code[order[:-1]]
        later = np.sort(order[1:][same])
        later = later[np.array([bool(key) for key in self._keys(later)], bool)]  # rows without a key are bad anyway
        if not later.size:
            return
        if duplicates == "first":
            wanted = np.ones(len(order), bool)
            wanted[later] = False
            self.keep(wanted, f"{'_'.join(self._key)} of an earlier row")
            return
        alike = np.logical_and.reduce([code == code[later[0]] for code in codes])
        raise ValueError(
            f"{self.catalogue.where(int(later[0]))}, column {' and '.join(map(repr, self._key))}: "
            f"{self._keys(later[:1])[0]} is also that of {self.catalogue.where(int(np.argmax(alike)))} ({later.size} "
            "repetitions in all); remove them, or keep the first of each: duplicates='first'"
        )


def _label(column: str) -> str:
    """Name of a column's label."""
    return f"{column.lower()}_" if column.lower() in CATALOG_COLUMNS else column.lower()


def _stem(name: str) -> str:
    """A file's name without the ending of a table."""
    ending = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), "")
    return name[: len(name) - len(ending)]
