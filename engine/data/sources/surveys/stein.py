"""The DESI Legacy Survey cutouts of Stein et al. (2021), in HDF5: 76 million galaxies, grz, 152 x 152 pixels.

Each file (`north/images_npix152_*.h5`, `south/...`) holds a data set `images` of rows x bands x height x width float32
nanomaggies and one data set a catalogue column with as many rows. Columns with a value a band become one label a band.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from armillary.engine.data.format.survey import CATALOG_COLUMNS
from armillary.engine.data.sources.source import BadSample, Rows, Sample, centre_crop

__all__ = ["SteinSurvey"]

BANDS = ("g", "r", "z")
PIXEL_SCALE_ARCSEC = 0.262
IDENTITY = ("release", "brickid", "objid")  # together unique in the Legacy Survey
NO_REDSHIFT = -99.0  # the photometric-redshift catalogue's mark for "none"
SUFFIXES = (".h5", ".hdf5")
MEANING = {
    "ebv": "Galactic reddening E(B-V), mag",
    "flux": "model flux, nanomaggy",
    "fiberflux": "flux in a 1.5 arcsec fibre, nanomaggy",
    "psfdepth": "5 sigma point-source depth as inverse variance, 1/nanomaggy^2",
    "psfsize": "weighted mean PSF FWHM, arcsec",
    "z_spec": "spectroscopic redshift; NaN where there is none",
}
CHUNK_CACHE_BYTES = 64 << 20


class SteinSurvey:
    """A `Source` of the HDF5 cutouts.

    The key of a sample is `release_brickid_objid`, or file and row where the columns are missing. Pixels that are not
    finite, or exactly zero where `zero_is_missing`, carry no data (bands without coverage are stored as 0). Redshift
    columns hold -99 where there is no redshift; it becomes NaN.

    Args:
        path: One file, several, or a folder: its files or those of its sub-folders, sorted (north before south).
        rows: (start, stop) over the concatenation of all files; all rows by default.
        size: Cut the central `size` x `size` pixels out of every image.
        zero_is_missing: Pixels of exactly 0 carry no data.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file is not of this layout, the files differ, or `rows` or `size` does not fit them.
    """

    bands = BANDS
    pixel_scale_arcsec: float | None = PIXEL_SCALE_ARCSEC
    unit = "nanomaggy"

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        *,
        rows: tuple[int, int] | None = None,
        size: int | None = None,
        zero_is_missing: bool = True,
    ) -> None:
        self.files, self._names = _find(path)
        self.zero_is_missing = zero_is_missing
        self._handle: tuple[int, int, Any] | None = None
        layouts = [_layout(f) for f in self.files]
        first = layouts[0]
        for file, layout in zip(self.files, layouts, strict=True):
            if layout.shape != first.shape:
                raise ValueError(f"{file}: images of {layout.shape}, those of {self.files[0]} are {first.shape}")
            if layout.columns != first.columns:
                odd = sorted(set(layout.columns.items()) ^ set(first.columns.items()))[0][0]
                raise ValueError(f"{file}: column {odd!r} is missing or differs from that of {self.files[0]}")
        self._ends = np.cumsum([layout.count for layout in layouts])
        total = int(self._ends[-1])
        self.rows = (0, total) if rows is None else rows
        if not 0 <= self.rows[0] < self.rows[1] <= total:
            raise ValueError(f"rows: must be within 0 and {total} and not empty, got {self.rows[0]}:{self.rows[1]}")
        side = min(first.shape[1:])
        if size is not None and not 1 <= size <= side:
            raise ValueError(f"size: must be within 1 and {side}, the images' side, got {size}")
        self._height, self._width = (size, size) if size is not None else first.shape[1:]
        self._has_identity = all(first.columns.get(name) == () for name in IDENTITY)
        self._parts = _label_parts(first.columns)
        self.labels = {label: _meaning(column) for label, (column, _) in self._parts.items()}

    def __len__(self) -> int:
        """Number of rows."""
        return self.rows[1] - self.rows[0]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open file."""
        return {**self.__dict__, "_handle": None}

    def inputs(self) -> dict[str, str]:
        """The files (checksum of names, sizes and rows: tens of terabytes are not read twice)."""
        listing = [(n, f.stat().st_size, int(e)) for n, f, e in zip(self._names, self.files, self._ends, strict=True)]
        mark = hashlib.sha256(repr(listing).encode()).hexdigest()
        low, high = self.rows
        return {f"{len(self.files)} files from {self._names[0]}, rows {low}:{high}": f"listing-sha256:{mark}"}

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels; see `Described`. Columns are read in runs of rows, images not at all."""
        runs = list(self._runs(start + self.rows[0], stop + self.rows[0]))
        keys: list[str] = []
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in ("ra", "dec", *self.labels)}
        for number, low, high in runs:
            file = self._file(number)
            if self._has_identity:
                identity = zip(*(file[name][low:high].tolist() for name in IDENTITY), strict=True)
                keys += ["_".join(str(int(v)) for v in row) for row in identity]
            else:
                keys += [self._row_key(number, row) for row in range(low, high)]
            stored = {column: file[column][low:high] for column in {c for c, _ in self._parts.values()}}
            for name in ("ra", "dec"):
                pieces[name].append(np.asarray(file[name][low:high], np.float64))
            for label, (column, part) in self._parts.items():
                values = stored[column] if part is None else stored[column][:, part]
                pieces[label].append(_clean(column, values))
        columns: dict[str, np.ndarray | list[str]] = {}
        for name, piece in pieces.items():
            joined = np.concatenate(piece) if piece else np.zeros(0)
            columns[name] = [str(v) for v in joined] if joined.dtype == object else joined
        return Rows(keys, columns)

    def read(self, index: int) -> Sample:
        """Read one row.

        Raises:
            BadSample: The row cannot be read (a damaged file).
            IndexError: There is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}: this source has {len(self)}")
        number, row, _ = next(self._runs(self.rows[0] + index, self.rows[0] + index + 1))
        where = f"{self._names[number]}:{row}"
        try:
            file = self._file(number)
            image = centre_crop(np.asarray(file["images"][row], np.float32), self._height, self._width).copy()
            rows = self.describe(index, index + 1)
        except (OSError, RuntimeError) as error:  # h5py's ways to say that a chunk is damaged
            raise BadSample(f"{self.files[number]}: row {row}: not readable: {error}") from error
        valid = np.isfinite(image)
        if self.zero_is_missing:
            valid &= image != 0
        image[~valid] = 0
        labels: dict[str, float | str] = {}
        for name in self.labels:
            value = rows.columns[name][0]
            labels[name] = value if isinstance(value, str) else float(value)
        return Sample(
            key=rows.keys[0],
            image=image,
            valid=None if valid.all() else valid,
            ra=float(rows.columns["ra"][0]),
            dec=float(rows.columns["dec"][0]),
            labels=labels,
            source=where,
        )

    def _row_key(self, number: int, row: int) -> str:
        name = self._names[number].rsplit(".", 1)[0].replace("/", "_").replace(".", "_")
        return f"{name}-{row:07d}"

    def _runs(self, start: int, stop: int) -> Any:
        """(file number, first row, last row + 1) of global rows [start, stop)."""
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            before = int(self._ends[number - 1]) if number else 0
            end = min(stop, int(self._ends[number]))
            yield number, start - before, end - before
            start = end

    def _file(self, number: int) -> Any:
        """The open file. One is open at a time: readers come in the order of rows, and chunk caches add up."""
        if self._handle is None or self._handle[:2] != (os.getpid(), number):
            if self._handle is not None and self._handle[0] == os.getpid():
                self._handle[2].close()
            self._handle = (os.getpid(), number, h5py.File(self.files[number], "r", rdcc_nbytes=CHUNK_CACHE_BYTES))
        return self._handle[2]


class _Layout:
    """Shapes of a file's data sets."""

    def __init__(self, count: int, shape: tuple[int, ...], columns: dict[str, tuple[int, ...]]) -> None:
        self.count, self.shape, self.columns = count, shape, columns


def _find(path: Path | str | Sequence[Path | str]) -> tuple[list[Path], list[str]]:
    """Files, and short names for them that tell north from south."""
    if not isinstance(path, str | Path):
        files = [Path(p) for p in path]
    elif Path(path).is_dir():
        files = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in SUFFIXES)
    else:
        files = [Path(path)]
    if not files:
        raise ValueError(f"{path}: no HDF5 files in it (looked for {', '.join(SUFFIXES)})")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such HDF5 file")
    folder = Path(os.path.commonpath([f.resolve().parent for f in files]))
    return files, [f.resolve().relative_to(folder).as_posix() for f in files]


def _layout(path: Path) -> _Layout:
    try:
        with h5py.File(path, "r") as file:
            if "images" not in file:
                raise ValueError(f"{path}: no data set 'images'; it has {', '.join(sorted(file)) or 'none'}")
            images = file["images"].shape
            if len(images) != 4 or images[1] != len(BANDS):
                raise ValueError(f"{path}: 'images' is {images}, not rows x {len(BANDS)} bands x height x width")
            columns = {}
            for name in sorted(set(file) - {"images"}):
                shape = file[name].shape
                if len(shape) not in (1, 2) or shape[0] != images[0]:
                    raise ValueError(f"{path}: column {name!r} is {shape}, the images have {images[0]} rows")
                columns[name] = tuple(shape[1:])
    except OSError as error:
        raise ValueError(f"{path}: not a readable HDF5 file: {error}") from error
    for name in ("ra", "dec"):
        if columns.get(name) != ():
            raise ValueError(f"{path}: no column {name!r} with one value a row")
    return _Layout(images[0], tuple(images[1:]), columns)


def _label_parts(columns: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, int | None]]:
    """Label name -> (column, part of it or None)."""
    parts: dict[str, tuple[str, int | None]] = {}
    for column, shape in columns.items():
        if column in CATALOG_COLUMNS:
            continue  # ra and dec; no other of the published columns bears such a name
        if shape == ():
            parts[column] = (column, None)
        else:
            names = BANDS if shape[0] == len(BANDS) else tuple(str(k) for k in range(shape[0]))
            parts |= {f"{column}_{name}": (column, k) for k, name in enumerate(names)}
    return parts


def _meaning(column: str) -> str:
    return MEANING.get(column, f"{column.upper()} of the DR9 catalogues")


def _clean(column: str, values: np.ndarray) -> np.ndarray:
    """Float64, or objects of text; -99 redshifts as NaN."""
    if values.dtype.kind in "SOU":
        text = [v.decode("ascii", "replace") if isinstance(v, bytes) else str(v) for v in values.tolist()]
        return np.array([t.strip() for t in text], dtype=object)
    numbers = np.asarray(values, np.float64)
    return np.where(numbers == NO_REDSHIFT, np.nan, numbers) if column.startswith("z_") else numbers
