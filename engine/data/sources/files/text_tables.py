"""Tables of text: bytes to lines, whatever encoding, compression, comments and delimiter; and which cells are identifiers."""

from __future__ import annotations

import csv
import gzip
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BLANKS", "EXACT", "IDENTIFIER", "WHOLE_FLOAT", "TextTable", "looks_like_identifiers"]

EXACT = 2**53
"""Larger whole numbers do not survive float64."""
BLANKS = {"", "nan", "na", "n/a", "null", "none", "--", "-"}
"""Cells of columns of numbers, in lower case, that mean "unknown"."""
IDENTIFIER = r"[+-]?0[0-9]+|[0-9]+(_[0-9]+)+"
"""Whole numbers that are names: with leading zeros, or with underscores."""
WHOLE_FLOAT = r"[0-9]{16,}\.0*"
"""A whole number of 16 digits and more that a program has written as a fraction; it is an identifier."""
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
DELIMITERS = (";", "\t", "|")

log = logging.getLogger("armillary.data")


@dataclass(frozen=True)
class TextTable:
    """A table of text, ready to be taken apart.

    Attributes:
        text: Lines from the header on.
        delimiter: Between cells.
        skipped: Lines before the header.
    """

    text: str
    delimiter: str
    skipped: int

    @classmethod
    def read(cls, data: bytes, name: str) -> TextTable:
        """Read the bytes of a file.

        Lines that begin with # are skipped where they stand before the header, unless the last of them is the header itself
        (as many cells as the next line). SkyServer puts `#Table1` there.

        Args:
            data: The file, compressed by gzip or not.
            name: The file, for errors.

        Raises:
            ValueError: It is no text.
        """
        try:
            raw = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        except (OSError, EOFError) as error:
            raise ValueError(f"{name}: not readable as gzip: {error}") from error
        lines = _decode(raw, name).splitlines(keepends=True)
        first = next(
            (i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), len(lines)
        )
        if first and first < len(lines):
            above = lines[first - 1].lstrip().lstrip("#").lstrip()
            delimiter = _delimiter(lines[first])
            cells = [len(next(csv.reader([line], delimiter=delimiter), [])) for line in (above, lines[first])]
            if cells[0] == cells[1] > 1:
                first -= 1
                lines[first] = above
        text = "".join(lines[first:])
        return cls(text, _delimiter(text[: text.find("\n")] if "\n" in text else text), first)


def _decode(raw: bytes, name: str) -> str:
    encoding = next((encoding for bom, encoding in BOMS.items() if raw.startswith(bom)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-16" or b"\0" in raw:
            raise ValueError(f"{name}: not readable as text: {error}") from error
        text = raw.decode("cp1252", "replace")
        log.warning("%s: it is not UTF-8 (byte %d), and was read as Latin-1 (cp1252)", name, error.start)
    if "\0" in text:
        raise ValueError(f"{name}: it is no text: byte {text.index(chr(0))} is 0")
    return text


def _delimiter(line: str) -> str:
    return "," if "," in line else next((d for d in DELIMITERS if d in line), ",")


def looks_like_identifiers(column: str, cells: Sequence[str]) -> bool:
    """Whether a column's cells are names though they are digits: leading zeros, underscores, or more than 2^53.

    Raises:
        ValueError: A column of identifiers was written with an exponent, so that its last digits are lost.
    """
    for cell in cells:
        if re.fullmatch(rf"{IDENTIFIER}|{WHOLE_FLOAT}", cell):
            return True
        if cell.lstrip("+-").isdigit() and abs(int(cell)) > EXACT:
            return True
        if re.fullmatch(r"[0-9.]+[eE]\+?[0-9]+", cell) and column.lower().endswith("id") and float(cell) > EXACT:
            raise ValueError(
                f"column {column!r}: {cell!r} is an identifier whose last digits are lost; write it anew as text"
            )
    return False
