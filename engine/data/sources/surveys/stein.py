"""The DESI Legacy Survey cutouts of Stein et al. (2021), in HDF5: 76 million galaxies, grz, 152 x 152 pixels.

Each file (`north/images_npix152_*.h5`, `south/...`) holds a data set `images` of rows x bands x height x width float32
nanomaggies and one data set a catalogue column with as many rows. Columns with a value a band become one label a band.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from armillary.engine.data.format.survey import CATALOG_COLUMNS
from armillary.engine.data.sources.files.hdf5 import open_hdf5, plain
from armillary.engine.data.sources.files.parts import (
    Part,
    PartSource,
    central_size,
    refuse_differences,
    short_names,
)
from armillary.engine.data.sources.listing import find_files
from armillary.engine.data.sources.source import Rows, cut_out, listing_mark

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


class SteinSurvey(PartSource):
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
        files = find_files(path, SUFFIXES, "HDF5 file")
        self.zero_is_missing = zero_is_missing
        layouts = [(file, *_layout(file)) for file in files]
        for file, shape, _ in layouts:
            if shape[1:] != layouts[0][1][1:]:
                raise ValueError(f"{file}: images of {shape[1:]}, those of {files[0]} are {layouts[0][1][1:]}")
        refuse_differences([(file, columns) for file, _, columns in layouts])
        _, (_, _, height, width), columns = layouts[0]
        ends = np.cumsum([shape[0] for _, shape, _ in layouts]).tolist()
        low, high = (0, ends[-1]) if rows is None else rows
        if not 0 <= low < high <= ends[-1]:
            raise ValueError(f"rows: must be within 0 and {ends[-1]} and not empty, got {low}:{high}")
        self._height, self._width = central_size(size, height, width)
        names = short_names(files)
        listing = [(name, file.stat().st_size, end) for name, file, end in zip(names, files, ends, strict=True)]
        self._inputs = {f"{len(files)} files from {names[0]}, rows {low}:{high}": listing_mark(listing)}
        self._has_identity = all(columns.get(name) == () for name in IDENTITY)
        self._label_parts = _label_parts(columns)
        self.labels = {label: _meaning(column) for label, (column, _) in self._label_parts.items()}
        parts = []
        for file, name, begin, end in zip(files, names, [0, *ends], ends, strict=False):
            first, last = max(low, begin), min(high, end)
            parts.append(Part(file, name, max(last - first, 0), first - begin))
        super().__init__(parts, open_hdf5)

    def inputs(self) -> dict[str, str]:
        """The files (checksum of names, sizes and rows: tens of terabytes are not read twice)."""
        return self._inputs

    def _columns(self, part: Part, low: int, high: int) -> Rows:
        file = self._file(part)
        if self._has_identity:
            identity = zip(*(file[name][low:high].tolist() for name in IDENTITY), strict=True)
            keys = ["_".join(str(int(v)) for v in row) for row in identity]
        else:
            stem = part.name.rsplit(".", 1)[0].replace("/", "_").replace(".", "_")
            keys = [f"{stem}-{row:07d}" for row in range(low, high)]
        stored = {column: file[column][low:high] for column in {c for c, _ in self._label_parts.values()}}
        columns = {name: _clean(name, file[name][low:high]) for name in ("ra", "dec")}
        for label, (column, k) in self._label_parts.items():
            columns[label] = _clean(column, stored[column] if k is None else stored[column][:, k])
        return Rows(keys, columns)

    def _payload(self, part: Part, row: int) -> dict[str, Any]:
        stored = self._file(part)["images"][row]
        return cut_out(stored, self._height, self._width, zero_is_missing=self.zero_is_missing)


def _layout(path: Path) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Shapes of the images, and of a row of every column."""
    try:
        with h5py.File(path, "r") as file:
            if "images" not in file:
                raise ValueError(f"{path}: no data set 'images'; it has {', '.join(sorted(file)) or 'none'}")
            images = file["images"].shape
            if len(images) != 4 or images[1] != len(BANDS):
                raise ValueError(
                    f"{path}: 'images' is {images}, not rows x {len(BANDS)} bands x height x width; --kind stack reads others"
                )
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
    return images, columns


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


def _clean(column: str, values: np.ndarray) -> np.ndarray | list[str]:
    """Float64, with -99 redshifts as NaN, or a list of text."""
    if values.dtype.kind in "SOU":
        return plain(values, True)
    numbers = np.asarray(values, np.float64)
    return np.where(numbers == NO_REDSHIFT, np.nan, numbers) if column.startswith("z_") else numbers
