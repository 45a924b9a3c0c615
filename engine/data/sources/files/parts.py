"""What the readers of published data sets share: the files in a folder, and rows of many files as one source.

A data set is cut into `Part`s, runs of rows of one file. `PartSource` makes them one `Source`: a reader describes rows of
a part and reads the pixels of one row; it keeps one file open at a time in each process.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from armillary.engine.data.format.shards import key_problem
from armillary.engine.data.sources.source import BadSample, Rows, Sample, listing_mark, position_problem

__all__ = ["Part", "PartSource", "central_size", "refuse_differences", "refuse_repeats", "short_names"]

DAMAGE = (
    OSError,
    RuntimeError,
    KeyError,
    pa.ArrowException,
)  # the ways of h5py and pyarrow to say that a file is damaged
BLOCK = 512  # rows whose labels are read together


@dataclass(frozen=True)
class Part:
    """A run of rows of one file.

    Attributes:
        path: The file.
        name: Short name for `Sample.source`.
        count: Rows.
        first: The file's (or group's) first row that belongs to the part.
        group: HDF5 group that holds the columns.
        split: The split that the data set assigns to these rows.
    """

    path: Path
    name: str
    count: int
    first: int = 0
    group: str = "/"
    split: str | None = None


class PartSource(ABC):
    """A `Source` of the rows of several parts, one part behind the other; the base of readers.

    Args:
        parts: The parts, in order.
        open_file: Opens a file; its result has `close`.
        repeats: Reasons by row, for rows whose key occurred before; see `refuse_repeats`.

    Attributes:
        labels: Label columns with their unit or meaning.
    """

    labels: dict[str, str]

    def __init__(
        self, parts: Sequence[Part], open_file: Callable[[Path], Any], repeats: Mapping[int, str] | None = None
    ) -> None:
        self.parts = [part for part in parts if part.count]
        self._open = open_file
        self._repeats = repeats or {}
        self._ends = np.cumsum([part.count for part in self.parts], dtype=np.int64)
        self._forget()

    def _forget(self) -> None:
        self._handle: tuple[int, Path, Any] | None = None
        self._block: tuple[int, Rows] | None = None

    @abstractmethod
    def _columns(self, part: Part, low: int, high: int) -> Rows:
        """Rows [low, high) of a part's file; `bad` counts from `low` and names no file."""

    @abstractmethod
    def _payload(self, part: Part, row: int) -> dict[str, Any]:
        """Image, spectrum and vectors of a row of a part's file, as keyword arguments of `Sample`.

        For an unusable row a ValueError is raised, whose message names the column, not the file.
        """

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1]) if self.parts else 0

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open file."""
        return {**self.__dict__, "_handle": None, "_block": None}

    def inputs(self) -> dict[str, str]:
        """The files (checksum of names, sizes and rows: large data sets are not read twice)."""
        listing = [(p.name, p.group, p.first, p.count, p.path.stat().st_size) for p in self.parts]
        files = {part.path for part in self.parts}
        return {f"{len(files)} files from {self.parts[0].name}, {len(self)} rows": listing_mark(listing)}

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels; see `Described`. No image and no spectrum is read."""
        keys: list[str] = []
        splits: list[str | None] = []
        bad: dict[int, str] = {}
        pieces: dict[str, list[np.ndarray | list[str]]] = {name: [] for name in ("ra", "dec", *self.labels)}
        for part, low, high in self._runs(start, stop):
            rows = self._columns(part, low, high)
            at = start + len(keys)
            for i, (key, ra, dec) in enumerate(zip(rows.keys, rows.columns["ra"], rows.columns["dec"], strict=True)):
                problem = rows.bad.get(i) or self._repeats.get(at + i) or key_problem(key) or _misplaced(ra, dec)
                if problem:
                    bad[at + i] = f"{_where(part)}: row {low + i}: {problem}"
            keys += rows.keys
            splits += [part.split] * len(rows.keys)
            for name, piece in pieces.items():
                piece.append(rows.columns[name])
        columns: dict[str, np.ndarray | list[str]] = {}
        for name, piece in pieces.items():
            text = bool(piece) and isinstance(piece[0], list)
            columns[name] = [v for p in piece for v in p] if text else np.concatenate([np.zeros(0), *piece])
        return Rows(keys, columns, splits if any(s is not None for s in splits) else None, bad)

    def read(self, index: int) -> Sample:
        """Read one row.

        Raises:
            BadSample: The row is damaged or unusable.
            IndexError: There is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}: this source has {len(self)}")
        part, row, _ = next(self._runs(index, index + 1))
        try:
            start = index // BLOCK * BLOCK
            if self._block is None or self._block[0] != start:
                self._block = (start, self.describe(start, min(start + BLOCK, len(self))))
            rows, at = self._block[1], index - start
            if index in rows.bad:
                raise BadSample(rows.bad[index])
            payload = self._payload(part, row)
        except BadSample:
            raise
        except (ValueError, *DAMAGE) as error:
            what = "" if isinstance(error, ValueError) else "not readable: "
            raise BadSample(f"{_where(part)}: row {row}: {what}{error}") from error
        group = "" if part.group == "/" else f"[{part.group}]"
        return rows.sample(at, self.labels, f"{part.name}{group}:{row}", **payload)

    def _runs(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """(part, first row, last row + 1) in the parts' files of the source's rows [start, stop)."""
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            part, end = self.parts[number], min(stop, int(self._ends[number]))
            shift = part.first - (int(self._ends[number]) - part.count)
            yield part, start + shift, end + shift
            start = end

    def _file(self, part: Part) -> Any:
        """The open file of a part. One is open at a time: readers come in the order of rows, and caches add up."""
        if self._handle is None or self._handle[:2] != (os.getpid(), part.path):
            if self._handle is not None and self._handle[0] == os.getpid():
                self._handle[2].close()
            self._handle = (os.getpid(), part.path, self._open(part.path))
        return self._handle[2]


def _where(part: Part) -> str:
    """A part's file and group, for errors."""
    return f"{part.path}{'' if part.group == '/' else f': group {part.group!r}'}"


def short_names(files: Sequence[Path]) -> list[str]:
    """Paths below the folder that all files share."""
    folder = Path(os.path.commonpath([f.absolute().parent for f in files]))
    return [f.absolute().relative_to(folder).as_posix() for f in files]


def refuse_repeats(keys: Sequence[str], column: str) -> dict[int, str]:
    """Reasons by place for keys that occurred before."""
    first: dict[str, int] = {}
    repeats = {}
    for i, key in enumerate(keys):
        if first.setdefault(key, i) != i:
            repeats[i] = f"column {column!r}: {key} is repeated, row {first[key]} of the source has it too"
    return repeats


def refuse_differences(layouts: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Refuse files whose columns (name: what describes it) differ from those of the first one.

    Raises:
        ValueError: Naming file and column.
    """
    first, columns = layouts[0]
    for file, others in layouts[1:]:
        if odd := sorted(set(columns.items()) ^ set(others.items())):
            raise ValueError(f"{file}: column {odd[0][0]!r} is missing or differs from that of {first}")


def central_size(size: int | None, height: int, width: int) -> tuple[int, int]:
    """Height and width to cut out of images: both `size`, where it is given.

    Raises:
        ValueError: The images are smaller.
    """
    if size is None:
        return height, width
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size: must be within 1 and {min(height, width)}, the images' side, got {size}")
    return size, size


def _misplaced(ra: Any, dec: Any) -> str | None:
    for axis, value in (("ra", ra), ("dec", dec)):
        if why := position_problem(axis, float(value)):
            return f"column {axis!r}: {why}"
    return None
