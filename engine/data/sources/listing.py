"""Which files of a folder are data: one listing for all readers, which says what it leaves out.

Links are followed, each folder once, so that a circle of links ends. Hidden files, checkpoints of notebooks, the forks that
macOS leaves beside files, links to nowhere, second names of one file, packed surveys, and what HATS, Spark and Hive keep beside
their data are no data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

__all__ = ["DATA", "Listing", "find_files", "leaving_out", "left_out_name", "list_folder"]

DATA = (
    *(".fits", ".fit", ".fits.gz", ".fits.fz", ".fz", ".h5", ".hdf5", ".hdf", ".parquet", ".pq", ".csv", ".csv.gz"),
    *(".jpg", ".jpeg", ".png", ".zip", ".npz", ".npy", ".tif", ".tiff", ".asdf", ".mat", ".tar", ".tar.gz"),
)
"""Endings of files that look like data: those that a reader does not take are named."""

HATS = {"partition_info.csv", "data_thumbnail.parquet", "per_partition_statistics.parquet", "partition_join_info.csv"}
HATS |= {"_metadata", "_common_metadata", "_success", "point_map.fits", "skymap.fits", "skymap.0.fits"}
PARTITION = "Norder="
COLLECTION, CATALOGUE = "collection.properties", ("hats.properties", "properties")
ROWS = ("object", "source", "")
"""What a HATS catalogue says it holds where its rows are objects; others (margin, index, association, map) repeat or describe them."""

PACKED = ("survey.json", ".build")  # in a survey's folder that lies in that of its source: none of it is read again
NAMED = 2

_unusable: ContextVar[frozenset[Path]] = ContextVar("unusable", default=frozenset())

log = logging.getLogger("armillary.data")


@dataclass
class Listing:
    """Files of a folder.

    Attributes:
        files: Those that may be data, sorted.
        left_out: Names below the folder of those that are none, by reason.
    """

    files: list[Path]
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        """Count a file as left out."""
        self.left_out.setdefault(reason, []).append(name.encode(errors="backslashreplace").decode())

    def tell(self, folder: Path | str) -> None:
        """Log what was left out and how many; once, where files turn out to be unusable one after the other."""
        if _unusable.get():
            return
        for reason, names in self.left_out.items():
            few = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
            log.warning("%s: left out %d %s (%s)", folder, len(names), reason, few)


@contextmanager
def leaving_out(files: Collection[Path]) -> Iterator[None]:
    """List folders without some files, which have been found unusable."""
    token = _unusable.set(frozenset(files))
    try:
        yield
    finally:
        _unusable.reset(token)


def left_out_name(name: str) -> str | None:
    """Why a path below a folder, or in an archive, is no data by its name; None if it may be."""
    parts = PurePosixPath(name).parts
    if any("\udc80" <= letter <= "\udcff" for letter in name):  # as Python reads bytes that are no text
        return "files whose names are not UTF-8"
    if "__MACOSX" in parts or parts[-1].startswith("._"):
        return "AppleDouble files of macOS"
    if ".ipynb_checkpoints" in parts:
        return "checkpoints of notebooks"
    if any(part.startswith(".") and part != ".." for part in parts):
        return "hidden files"
    return None


def list_folder(folder: Path) -> Listing:
    """All files of a folder and its sub-folders, links followed, that may be data.

    Raises:
        OSError: A folder cannot be listed.
    """
    listing = Listing([])
    folders_seen: set[tuple[int, int]] = set()
    files_seen: set[tuple[int, int]] = set()
    links: list[Path] = []

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if _identity(Path(root)) in folders_seen:
            listing.drop("folders that are linked more than once", os.path.relpath(root, folder))
            folders.clear()
            continue
        folders_seen.add(_identity(Path(root)))
        if Path(root) != folder and any(Path(root, mark).exists() for mark in PACKED):
            listing.drop("packed surveys", os.path.relpath(root, folder))
            folders.clear()
            continue
        folders.sort(key=lambda name: (Path(root, name).is_symlink(), name))  # a folder goes before a link to it
        for name in sorted(names):
            path = Path(root) / name
            below = path.relative_to(folder).as_posix()
            if reason := left_out_name(below):
                listing.drop(reason, below)
            elif path.is_symlink():
                links.append(path)
            elif path.is_file():
                listing.files.append(path)
                files_seen.add(_identity(path))
    for path in links:
        below = path.relative_to(folder).as_posix()
        if not path.exists():
            listing.drop("links to nowhere", below)
        elif path.is_file() and _identity(path) in files_seen:
            listing.drop("second names of one file", below)
        elif path.is_file():
            files_seen.add(_identity(path))
            listing.files.append(path)
    usable = sorted(set(listing.files) - _unusable.get())
    listing.files = _without_metadata(folder, _without_copies(folder, usable, listing), listing)
    return listing


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _without_copies(folder: Path, files: list[Path], listing: Listing) -> list[Path]:
    """Files of a HATS collection's primary table: not its margin caches, indices and maps, whose rows stand there, too.

    Source: HATS (IVOA note, 2025), section on collections; a table beside the folder that is read is left out, that folder itself
    never.
    """
    apart: list[tuple[Path, Path | None]] = []  # a folder, and what is read in it
    for file in files:
        if file.name == COLLECTION:
            primary = _properties(file).get("hats_primary_table_url", "")
            if primary and (file.parent / primary).is_dir():
                apart.append((file.parent, file.parent / primary))
        elif file.name in CATALOGUE and file.parent != folder:
            if _properties(file).get("dataproduct_type", "") not in ROWS:
                apart.append((file.parent, None))
    kept = []
    for file in files:
        if any(file.is_relative_to(place) and not (read and file.is_relative_to(read)) for place, read in apart):
            listing.drop("files of a HATS collection beside its primary table", file.relative_to(folder).as_posix())
        else:
            kept.append(file)
    return kept


def _properties(file: Path) -> dict[str, str]:
    """Lines `name = value` of a file; nothing where it is no text."""
    try:
        lines = [line.partition("=") for line in file.read_text().splitlines() if not line.startswith("#")]
    except UnicodeDecodeError:
        return {}
    return {name.strip(): value.strip() for name, _, value in lines}


def _without_metadata(folder: Path, files: list[Path], listing: Listing) -> list[Path]:
    """Files that are not metadata of a partitioned catalogue."""
    partitioned = any(part.startswith(PARTITION) for f in files for part in f.relative_to(folder).parts)
    kept = []
    for file in files:
        parts = file.relative_to(folder).parts
        own = parts[-1].lower() in HATS or (parts[-1].startswith("_") and parts[-1].lower().endswith(".parquet"))
        outside = partitioned and not any(p.startswith(PARTITION) for p in parts) and parts[-1].lower().endswith(DATA)
        if own or outside:
            listing.drop("files of metadata", "/".join(parts))
        else:
            kept.append(file)
    return kept


def find_files(
    path: Path | str | Sequence[Path | str],
    suffixes: tuple[str, ...],
    kind: str,
    *,
    prefix: str = "",
    companions: tuple[str, ...] = ("labels.csv",),
) -> list[Path]:
    """Files of a folder (sorted, with sub-folders), or those given; what is left out is logged.

    Args:
        path: A folder, a file or several files.
        suffixes: Endings of the names that are taken from a folder, in lower case.
        kind: What a file is called in errors.
        prefix: Beginning of the names that are taken from a folder.
        companions: Beginnings of the names of files that belong to the others, and need not be named.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: The folder holds no such files.
    """
    if not isinstance(path, str | Path):
        files = [Path(p) for p in path]
    elif Path(path).is_dir():
        listing = list_folder(Path(path))
        files = [f for f in listing.files if f.name.startswith(prefix) and f.name.lower().endswith(suffixes)]
        if files:
            others = set(listing.files) - set(files)
            for other in sorted(o for o in others if o.name.lower().endswith(DATA)):
                if not other.name.startswith(companions):
                    listing.drop(f"files that are no {kind}s by their names", other.relative_to(path).as_posix())
        listing.tell(path)
        if not files:
            raise ValueError(
                f"{path}: no {kind}s in it (looked for {_wanted(prefix, suffixes)}){_instead(listing.files)}"
            )
    else:
        files = [Path(path)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such {kind}, and no such folder")
    if not files:
        raise ValueError(f"{path}: no {kind}s given")
    return files


def _wanted(prefix: str, suffixes: Iterable[str]) -> str:
    return ", ".join(f"{prefix}*{suffix}" for suffix in suffixes)


def _instead(files: Sequence[Path]) -> str:
    """What there is instead, and what to do about NumPy's files."""
    if not files:
        return "; there is no file"
    names = ", ".join(f.name for f in files[:NAMED])
    arrays = any(f.suffix.lower() in (".npz", ".npy") for f in files)
    advice = "; files of NumPy are not read: write FITS, or HDF5 as `armillary data export` does" if arrays else ""
    return f"; there is {names}{', ...' if len(files) > NAMED else ''}{advice}"
