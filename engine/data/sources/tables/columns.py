"""Columns of a table as they are on disk; the base of the readers of one format each."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

__all__ = ["UNREADABLE", "Column", "Table", "Values", "decoded"]

UNREADABLE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, zlib.error, pa.ArrowException)
"""What the libraries raise for damaged tables."""


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
    """One file. `_load` gives a column as it is on disk.

    Attributes:
        count: Rows.
        columns: Those that hold numbers or text.
        unread: What the others hold, or why they are not read.
    """

    count: int
    columns: dict[str, Column]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unread: dict[str, str] = {}
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

    def told_unread(self) -> str:
        """Columns that cannot be read, in words; empty where all can."""
        few = [f"{name}: {what}" for name, what in list(self.unread.items())[:3]]
        more = ", ..." if len(self.unread) > len(few) else ""
        return f" that are no columns of numbers or text ({', '.join(few)}{more})" if few else ""

    @abstractmethod
    def _load(self, name: str) -> Values:
        """Read a column."""


def decoded(value: Any) -> str:
    """Text of bytes or of anything else."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
