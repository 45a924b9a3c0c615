"""What the readers of published data sets share: rows of many files, HDF5 data sets that are checked, columns of labels.

A data set is cut into `Part`s, runs of rows of one file. `PartSource` makes them one `Source`: a reader describes rows of
a part and reads the pixels of one row; it keeps one file open at a time in each process.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa

from armillary.engine.data.format.shards import key_problem
from armillary.engine.data.format.survey import CATALOG_COLUMNS
from armillary.engine.data.sources.source import BadSample, Rows, Sample

__all__ = [
    "HDF5_SUFFIXES",
    "Part",
    "PartSource",
    "checked",
    "column_names",
    "find_files",
    "is_text",
    "label_name",
    "mask_pixels",
    "open_hdf5",
    "opened",
    "plain",
    "refuse_repeats",
]

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
READ_ERRORS = (OSError, RuntimeError, KeyError, ValueError, pa.ArrowException)  # ways to say that a file is damaged
CHUNK_CACHE_BYTES = 64 << 20
BLOCK = 512  # rows whose labels are read together
POSITION = {"ra": (0.0, 360.0), "dec": (-90.0, 90.0)}
KINDS = {"f": "floating-point", "fiu": "numeric", "iu": "whole", "SOU": "text", "SOUiu": "text or whole"}


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
    """

    def __init__(self, parts: Sequence[Part], open_file: Callable[[Path], Any]) -> None:
        self.parts = [part for part in parts if part.count]
        self._open = open_file
        self._ends = np.cumsum([part.count for part in self.parts], dtype=np.int64)
        self._forget()

    def _forget(self) -> None:
        self._handle: tuple[int, Path, Any] | None = None
        self._block: tuple[int, Rows] | None = None

    @property
    @abstractmethod
    def labels(self) -> dict[str, str]:
        """Label columns with their unit or meaning."""

    @abstractmethod
    def _columns(self, part: Part, low: int, high: int) -> Rows:
        """Rows [low, high) of a part's file; `bad` counts from `low` and names no file."""

    @abstractmethod
    def _payload(self, part: Part, row: int) -> dict[str, Any]:
        """Image, spectrum and vectors of a row of a part's file, as keyword arguments of `Sample`.

        Raises:
            ValueError: The row is unusable; the message names the column, not the file.
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
        mark = hashlib.sha256(repr(listing).encode()).hexdigest()
        files = {part.path for part in self.parts}
        return {f"{len(files)} files from {self.parts[0].name}, {len(self)} rows": f"listing-sha256:{mark}"}

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
                problem = rows.bad.get(i) or key_problem(key) or _position_problem(ra, dec)
                if problem:
                    bad[at + i] = f"{where(part)}: row {low + i}: {problem}"
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
        except READ_ERRORS as error:
            raise BadSample(f"{where(part)}: row {row}: {error}") from error
        labels: dict[str, float | str] = {}
        for name in self.labels:
            value = rows.columns[name][at]
            labels[name] = value if isinstance(value, str) else float(value)
        return Sample(
            key=rows.keys[at],
            **{"image": None, "valid": None} | payload,
            ra=float(rows.columns["ra"][at]),
            dec=float(rows.columns["dec"][at]),
            labels=labels,
            source=f"{part.name}{'' if part.group == '/' else f'[{part.group}]'}:{row}",
            split=part.split,
        )

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


def where(part: Part) -> str:
    """A part's file and group, for errors."""
    return f"{part.path}{'' if part.group == '/' else f': group {part.group!r}'}"


def find_files(
    path: Path | str | Sequence[Path | str], suffixes: tuple[str, ...], kind: str
) -> tuple[list[Path], list[str]]:
    """Files of a folder (sorted, with sub-folders), or those given; and short names that tell them apart.

    Names that begin with `_` or `.` are metadata and left out of folders.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: The folder holds no such files.
    """
    if not isinstance(path, str | Path):
        files = [Path(p) for p in path]
    elif Path(path).is_dir():
        found = (p for p in Path(path).rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        files = sorted(p for p in found if not p.name.startswith(("_", ".")))
    else:
        files = [Path(path)]
    if not files:
        raise ValueError(f"{path}: no {kind} files in it (looked for {', '.join(suffixes)})")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such {kind} file")
    folder = Path(os.path.commonpath([f.resolve().parent for f in files]))
    return files, [f.resolve().relative_to(folder).as_posix() for f in files]


def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file with a large chunk cache."""
    return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open an HDF5 file to look at its layout.

    Raises:
        ValueError: It is not readable (no HDF5, truncated, ...).
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:  # KeyError: a link to nowhere
        raise ValueError(f"{path}: not a readable HDF5 file: {error}") from error


def checked(place: str, group: Any, name: str, kinds: str, *shape: int | None, rows: int | None = None) -> Any:
    """A data set of a group, after a look at its type and shape.

    Args:
        place: File and group, for errors.
        group: The open group.
        name: The data set's name, with slashes for sub-groups.
        kinds: numpy's letters of the types that will do.
        shape: Sizes behind the rows; None for any.
        rows: Rows it must have; None for any number.

    Raises:
        ValueError: It is missing or another one.
    """
    if name not in group or not isinstance(group[name], h5py.Dataset):
        has = ", ".join(sorted(group)[:12]) or "nothing"
        raise ValueError(f"{place}: column {name!r} is missing; there is {has}")
    data = group[name]
    if data.dtype.kind not in kinds:
        raise ValueError(
            f"{place}: column {name!r} is of type {data.dtype}, must be {KINDS.get(kinds, f'one of {kinds}')}"
        )
    fits = len(data.shape) == len(shape) + 1
    if not fits or any(want not in (None, got) for want, got in zip(shape, data.shape[1:], strict=True)):
        wanted = " x ".join(["rows", *("any" if s is None else str(s) for s in shape)])
        raise ValueError(f"{place}: column {name!r} is {data.shape}, must be {wanted}")
    if rows is not None and data.shape[0] != rows:
        raise ValueError(f"{place}: column {name!r} has {data.shape[0]} rows, the others have {rows}")
    return data


def column_names(place: str, group: Any, rows: int, prefix: str = "") -> dict[str, bool]:
    """The data sets of a group with one value a row, by name, and whether each is text (see `is_text`).

    Raises:
        ValueError: One has another number of rows.
    """
    found = {}
    for name in sorted(group):
        data = group[name]
        if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "biufSOU" or data.ndim != 1:
            continue
        if data.shape[0] != rows:
            raise ValueError(f"{place}: column {prefix + name!r} has {data.shape[0]} rows, the others have {rows}")
        found[prefix + name] = is_text(name, data.dtype)
    return found


def is_text(name: str, dtype: np.dtype) -> bool:
    """Whether a column is read as text: text, and identifiers of 64 bits, which float64 would round."""
    return dtype.kind in "SOU" or (dtype.kind in "iu" and dtype.itemsize == 8 and name.lower().endswith("id"))


def plain(values: np.ndarray, text: bool) -> np.ndarray | list[str]:
    """A column as a label: float64, or a list of text."""
    if not text:
        return np.asarray(values, np.float64)
    return [v.decode("utf-8", "replace").strip() if isinstance(v, bytes) else str(v).strip() for v in values.tolist()]


def label_name(column: str) -> str:
    """The name of a column as a label: lower case, without its group, none of the catalogue's own names."""
    name = column.rsplit("/", 1)[-1].lower()
    return f"file_{name}" if name in CATALOG_COLUMNS else name


def refuse_repeats(keys: Sequence[str], column: str) -> dict[int, str]:
    """Reasons by place for keys that occurred before."""
    first: dict[str, int] = {}
    repeats = {}
    for i, key in enumerate(keys):
        if first.setdefault(key, i) != i:
            repeats[i] = f"column {column!r}: {key} is repeated, row {first[key]} of the source has it too"
    return repeats


def mask_pixels(image: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
    """`image` and `valid` of a sample; pixels without data become 0. The image is changed."""
    image[~valid] = 0
    return {"image": image, "valid": None if valid.all() else valid}


def _position_problem(ra: Any, dec: Any) -> str | None:
    for (name, (low, high)), value in zip(POSITION.items(), (float(ra), float(dec)), strict=True):
        if not (np.isnan(value) or low <= value <= high):
            return f"column {name!r}: {value} is outside [{low:g}, {high:g}] degrees"
    return None
