"""Labels of a folder of pictures or cutouts: a CSV file with a row for each.

One column names the file (`file`, or `key` or `name`); `ra` and `dec` (degrees, ICRS) and `split` (train, test, ...) are
known by name, in any case; every other column is a label. Blank cells mean "unknown". A column is numeric if its cells are,
and text where they are identifiers: with leading zeros, with underscores, or whole numbers that float64 would round.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from armillary.engine.data.format.survey import CATALOG_COLUMNS
from armillary.engine.data.sources.files.text_tables import BLANKS, WHOLE_FLOAT, TextTable, looks_like_identifiers
from armillary.engine.data.sources.sentinels import find_marks, mask_marks, place_marks, told
from armillary.engine.data.sources.source import POSITION, position_problem

log = logging.getLogger("armillary.data")

__all__ = ["LabelFile", "LabelTable", "beside", "read_labels", "stem"]

FILE_COLUMNS = ("file", "filename", "file_name", "key", "name", "path", "image")
"""Names of the column that names files; of several the first."""

KNOWN = ("ra", "dec", "split", *FILE_COLUMNS)
SUFFIXES = (".fits.gz", ".fits.fz", ".fits", ".fit", ".fz", ".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class LabelFile:
    """A CSV of labels in a folder or archive.

    Attributes:
        where: Its place, for errors.
        name: Its name without folders.
        data: Its bytes.
    """

    where: str
    name: str
    data: bytes

    @classmethod
    def open(cls, path: Path) -> LabelFile:
        """Read a file.

        Raises:
            FileNotFoundError: There is none.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of labels")
        return cls(str(path), path.name, path.read_bytes())

    def mark(self) -> str:
        """Checksum of its bytes."""
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"


@dataclass(frozen=True)
class LabelTable:
    """Values aligned with a list of files.

    Attributes:
        columns: `ra`, `dec` (always there) and the labels: float64 arrays or lists of text.
        splits: Split of each file; None where the CSV has no such column.
        labels: Meaning of each label column.
    """

    columns: dict[str, np.ndarray | list[str]]
    splits: list[str | None] | None
    labels: dict[str, str]

    def row(self, index: int) -> dict[str, float | str]:
        """Labels of one file."""
        values = {name: self.columns[name][index] for name in self.labels}
        return {name: v if isinstance(v, str) else float(v) for name, v in values.items()}


def beside(path: Path) -> LabelFile | None:
    """labels.csv in a folder, or in the folder of an archive; None where there is none."""
    found = (path if path.is_dir() else path.parent) / "labels.csv"
    return LabelFile.open(found) if found.exists() else None


def stem(name: str) -> str:
    """A path without the extension of a picture or FITS file."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def read_labels(
    file: LabelFile | None, files: Sequence[str], missing: Sequence[float] | None = None, on_bad: str = "error"
) -> LabelTable:
    """Read a CSV of labels and align it with `files` (paths relative to the folder or archive).

    A row may name a file by its path, its base name, or either without the extension. Files without a row have unknown
    labels.

    Args:
        file: The CSV; None for no labels.
        files: Paths of all files.
        missing: Numbers that mean "unknown"; by default those of `sentinels`.
        on_bad: "skip" leaves out, and counts, rows that name no file or one that has a row already.

    Raises:
        ValueError: A column, row or cell is wrong; the message names it.
    """
    count = len(files)
    unknown = {name: np.full(count, np.nan) for name in POSITION}
    if file is None:
        return LabelTable({**unknown}, None, {})
    header, rows = _parse(file)
    path = file.where
    name_column = next((c for c in FILE_COLUMNS if c in header), None)
    if name_column is None:
        raise ValueError(
            f"{path}: no column 'file': one column must name each row's file ({', '.join(FILE_COLUMNS)}); the columns "
            f"are {', '.join(header)}"
        )
    taken = [c for c in header if c in CATALOG_COLUMNS and c not in (*POSITION, "split", name_column)]
    if taken:
        raise ValueError(
            f"{path}: column {taken[0]!r}: the survey's catalogue uses this name itself; rename the column"
        )
    if ("ra" in header) != ("dec" in header):
        log.warning("%s: it has a column %r and no %r", path, *(("ra", "dec") if "ra" in header else ("dec", "ra")))
    at, rows = _match(path, name_column, rows, files, on_bad)
    columns: dict[str, np.ndarray | list[str]] = {**unknown}
    splits: list[str | None] | None = None
    labels = {}
    for column in header:
        cells = [row[column] for _, row in rows]
        if column == name_column:
            continue
        if column == "split":
            splits = [None] * count
            for i, cell in zip(at, cells, strict=True):
                splits[i] = cell or None
            continue
        numbers = _numbers(path, column, [line for line, _ in rows], cells)
        marks: dict[float, int] = {}
        if numbers is None:
            text = [""] * count
            for i, cell in zip(at, cells, strict=True):
                text[i] = re.sub(r"\.0*$", "", cell) if re.fullmatch(WHOLE_FLOAT, cell) else cell
            columns[column] = text
        else:
            if column not in POSITION:
                marks = find_marks(numbers) if missing is None else dict.fromkeys(missing, 0)
                mask_marks(numbers, marks)
            array = np.full(count, np.nan)
            array[at] = numbers
            columns[column] = array
        if column not in POSITION:
            labels[column] = f"{'text' if numbers is None else 'number'}, from {file.name}"
        if missing is None and marks:
            log.warning("%s: column %r: %s taken for unknown", path, column, told(marks))
            labels[column] += f"; {told(marks)} taken for unknown"
    return LabelTable(columns, splits, labels)


def _parse(file: LabelFile) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Column names, and (line, cells by column) of every row; cells stripped."""
    path = file.where
    table = TextTable.read(file.data, path)
    reader = csv.reader(io.StringIO(table.text, newline=""), strict=True, delimiter=table.delimiter)
    try:
        header = _header(path, [c.strip() for c in next(reader, [])])
        rows = []
        for cells in reader:
            if not any(c.strip() for c in cells):
                continue
            line = reader.line_num + table.skipped
            while len(cells) > len(header) and not cells[-1].strip():  # a comma at the end of each row
                cells.pop()
            if len(cells) != len(header):
                raise ValueError(f"{path}: row at line {line}: {len(cells)} cells, the header has {len(header)}")
            rows.append((line, dict(zip(header, (c.strip() for c in cells), strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num + table.skipped}: not readable as CSV: {error}") from error
    return header, rows


def _header(path: str, header: list[str]) -> list[str]:
    """Names of the columns; those that are known in any case in lower case."""
    if not header:
        raise ValueError(f"{path}: empty; the first line must name the columns")
    if "" in header:
        raise ValueError(f"{path}: column {header.index('') + 1} has no name")
    lower = [c.lower() for c in header]
    header = [low if low in KNOWN and lower.count(low) == 1 else c for c, low in zip(header, lower, strict=True)]
    twice = [c for c, n in Counter(header).items() if n > 1]
    if twice:
        raise ValueError(f"{path}: column {twice[0]!r} occurs twice")
    return header


def _match(
    path: str, column: str, rows: list[tuple[int, dict[str, str]]], files: Sequence[str], on_bad: str
) -> tuple[list[int], list[tuple[int, dict[str, str]]]]:
    """Index into `files` of every row, and the rows; without those that fit none where `on_bad` is "skip"."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(files):
        base = PurePosixPath(name).name
        for alias in {name, base, stem(name), stem(base)}:
            places.setdefault(alias, []).append(i)
    exact = {name: i for i, name in enumerate(files)}
    at: list[int] = []
    kept: list[tuple[int, dict[str, str]]] = []
    first_line: dict[int, int] = {}
    for line, row in rows:
        name = row[column].replace("\\", "/")
        found = [exact[name]] if name in exact else places.get(name, [])
        if on_bad == "skip" and (not found or found[0] in first_line):
            continue
        if not found:
            raise ValueError(
                f"{path}: row at line {line}, column {column!r}: no file {name!r} among the {len(files)} read; "
                "remove the row or add the file"
            )
        if len(found) > 1:
            raise ValueError(
                f"{path}: row at line {line}, column {column!r}: {name!r} could be {files[found[0]]} or "
                f"{files[found[1]]}; give the whole path"
            )
        if found[0] in first_line:
            raise ValueError(
                f"{path}: row at line {line}, column {column!r}: {name!r} already has a row at line "
                f"{first_line[found[0]]}; keep one of them"
            )
        first_line[found[0]] = line
        at.append(found[0])
        kept.append((line, row))
    if len(kept) < len(rows):
        log.warning("%s: left out %d rows that name no file, or one that has a row", path, len(rows) - len(kept))
    return at, kept


def _numbers(path: str, column: str, lines: list[int], cells: list[str]) -> np.ndarray | None:
    """Cells as float64 with NaN for blanks, or None for a column of text.

    A column of which more than half of the filled cells are numbers is numeric, and the others are mistakes.
    """
    position = column in POSITION
    try:
        if not position and looks_like_identifiers(column, cells):
            return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    values = np.full(len(cells), np.nan)
    wrong, filled = [], 0
    for i, cell in enumerate(cells):
        if cell.lower() not in BLANKS:
            filled += 1
            try:
                values[i] = float(cell)
            except ValueError:
                wrong.append(i)
    values[np.isinf(values)] = np.nan
    if not position and len(wrong) * 2 >= max(filled, 1) and (filled or any(cells)):
        return None
    if wrong:
        raise ValueError(
            f"{path}: row at line {lines[wrong[0]]}, column {column!r}: {cells[wrong[0]]!r} is not a number, as "
            f"{'a position must be' if position else 'most of the column is'}; correct it or leave it blank"
        )
    if position:
        place_marks(column, values)
        for line, value in zip(lines, values.tolist(), strict=True):
            if why := position_problem(column, value):
                raise ValueError(f"{path}: row at line {line}, column {column!r}: {why}")
    return values
