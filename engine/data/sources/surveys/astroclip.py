"""The paired images and spectra of AstroCLIP (Parker et al. 2024): Legacy Survey DR9 cutouts and DESI EDR spectra.

HDF5 (`astroclip_desi.1.1.5.h5`): groups "0" to "9", each with `images` (n, 152, 152, 3) float32 in nanomaggies, bands g,
r, z, stored as width x height x band (the transpose of band x height x width); `spectra` (n, 7781, 1) float32 in 1e-17
erg/s/cm2/angstrom on 3600 + 0.8 i angstrom; `redshifts` and `targetids` (n). Of each group the first int(0.8 n) rows are
the train split, the rest is the test split.

Parquet (`EiffL/AstroCLIP` at Hugging Face): shards `train-*.parquet` and `test-*.parquet`, the same arrays as nested
lists in the columns `image`, `spectrum`, `redshift`, `targetid`. A row group must be read for any of its rows.

There is no inverse variance in either. It is estimated, one value a spectrum, from the scatter of the flux about the
mean of the pixels two to either side (DER_SNR, Stoehr et al. 2008, ASPC 394, 505), and 0 where the flux is not finite or
exactly 0. So it tells noisy spectra from clean ones, but not sky lines from the continuum between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, WaveGrid
from armillary.engine.data.sources.files.hdf5 import HDF5_SUFFIXES, checked, open_hdf5, opened, plain
from armillary.engine.data.sources.files.nested_parquet import dense, open_parquet
from armillary.engine.data.sources.files.parts import (
    Part,
    PartSource,
    central_size,
    refuse_repeats,
    short_names,
)
from armillary.engine.data.sources.listing import find_files
from armillary.engine.data.sources.source import Rows, cut_out

__all__ = ["AstroClipPairs", "constant_ivar"]

BANDS = ("g", "r", "z")
PIXEL_SCALE_ARCSEC = 0.262
GRID = WaveGrid("linear", 3600.0, 0.8, 7781)
SPECTRUM = SpectrumRecord(GRID, "1e-17 erg/s/cm2/angstrom")
TRAIN_SHARE = 0.8
SPLITS = ("train", "test")
COLUMNS = ("image", "spectrum", "redshift", "targetid")


class AstroClipPairs(PartSource):
    """A `Source` of the pairs; the key of a sample is its DESI TARGETID.

    A TARGETID that occurred before makes an unusable sample. Positions are not in the files: join a DESI catalogue by
    `targetid` for them.

    Args:
        path: The HDF5 file, or a Parquet shard, or a folder of either.
        size: Cut the central `size` x `size` pixels out of every image.
        zero_is_missing: Pixels of exactly 0 carry no data.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file is not of this layout, or `size` does not fit the images.
    """

    bands = BANDS
    pixel_scale_arcsec: float | None = PIXEL_SCALE_ARCSEC
    unit = "nanomaggy"
    spectrum = SPECTRUM
    labels = {"redshift": "spectroscopic redshift (DESI EDR)", "targetid": "DESI TARGETID, as text"}

    def __init__(
        self, path: Path | str | Sequence[Path | str], *, size: int | None = None, zero_is_missing: bool = True
    ) -> None:
        files = find_files(path, (*HDF5_SUFFIXES, ".parquet"), "HDF5 or Parquet file")
        self.zero_is_missing = zero_is_missing
        self._is_parquet = files[0].suffix.lower() == ".parquet"
        parts: list[Part] = []
        sides: set[tuple[int, int]] = set()
        identifiers: list[str] = []
        for file, name in zip(files, short_names(files), strict=True):
            if (file.suffix.lower() == ".parquet") != self._is_parquet:
                raise ValueError(
                    f"{file}: a folder must hold either HDF5 or Parquet files, {files[0]} is of the other kind"
                )
            look = _look_into_parquet if self._is_parquet else _look_into_hdf5
            found, shape, ids = look(file, name)
            parts += found
            sides |= shape
            identifiers += ids
        if not sides:
            raise ValueError(f"{path}: no rows in it")
        if len(sides) > 1:
            raise ValueError(f"{path}: images of different sizes (width, height): {sorted(sides)}")
        width, height = next(iter(sides))
        self._height, self._width = central_size(size, height, width)
        repeats = refuse_repeats(identifiers, "targetid" if self._is_parquet else "targetids")
        super().__init__(parts, open_parquet if self._is_parquet else open_hdf5, repeats)

    def _columns(self, part: Part, low: int, high: int) -> Rows:
        file = self._file(part)
        if self._is_parquet:
            table = file.rows(low, high, COLUMNS[2:])
            redshift, targetid = (table[name].to_numpy() for name in COLUMNS[2:])
        else:
            redshift, targetid = (file[part.group][name][low:high] for name in ("redshifts", "targetids"))
        ids = [str(v) for v in targetid.tolist()]
        unknown = np.full(len(ids), np.nan)
        return Rows(ids, {"ra": unknown, "dec": unknown, "redshift": plain(redshift, False), "targetid": ids})

    def _payload(self, part: Part, row: int) -> dict[str, Any]:
        file = self._file(part)
        if self._is_parquet:
            stored = file.row(row, COLUMNS[:2])
            pixels, flux = (_dense(name, stored[name]) for name in COLUMNS[:2])
        else:
            group = file[part.group]
            pixels, flux = group["images"][row], group["spectra"][row]
        if pixels.ndim != 3 or pixels.shape[2] != len(BANDS):
            raise ValueError(f"column 'image': {pixels.shape}, must be width x height x {len(BANDS)} bands")
        if flux.shape != (GRID.count, 1):
            raise ValueError(f"column 'spectrum': {flux.shape}, must be {(GRID.count, 1)}")
        flux = np.array(flux[:, 0], np.float32)
        seen = np.isfinite(flux) & (flux != 0)
        if not seen.any():
            raise ValueError(f"column '{'spectrum' if self._is_parquet else 'spectra'}': no pixel carries data")
        flux[~seen] = 0
        image = cut_out(pixels.T, self._height, self._width, zero_is_missing=self.zero_is_missing)
        return {**image, "spectrum": Spectrum(flux, constant_ivar(flux, seen))}


def constant_ivar(flux: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Inverse variance [L] float32 from the scatter of neighbouring pixels (DER_SNR); 1 where there is no scatter.

    Args:
        flux: [L].
        seen: [L] bool, pixels that carry data; the others get 0.
    """
    whole = seen[2:-2] & seen[:-4] & seen[4:]
    values = flux.astype(np.float64)
    scatter = np.abs(2 * values[2:-2] - values[:-4] - values[4:])[whole]
    sigma = 1.482602 / np.sqrt(6) * float(np.median(scatter)) if scatter.size else 0.0
    ivar = 1 / sigma**2 if sigma > 0 else 1.0
    return np.where(seen, np.float32(min(ivar, 1e30)), np.float32(0))


def _dense(name: str, array: Any) -> np.ndarray:
    try:
        return dense(array)[0]
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from error


def _look_into_hdf5(path: Path, name: str) -> tuple[list[Part], set[tuple[int, int]], list[str]]:
    """Parts, (width, height) of images and TARGETIDs of an HDF5 file."""
    parts: list[Part] = []
    sides = set()
    identifiers: list[str] = []
    with opened(path) as file:
        groups = sorted((g for g in file if g.isdecimal()), key=int)
        if not groups:
            raise ValueError(f"{path}: no groups '0', '1', ...; it has {', '.join(sorted(file)) or 'nothing'}")
        if missing := sorted(set(range(len(groups))) - {int(g) for g in groups}):
            raise ValueError(f"{path}: group '{missing[0]}' is missing; it has {', '.join(groups)}")
        for group in groups:
            place = f"{path}: group {group!r}"
            images = checked(place, file[group], "images", "f", None, None, len(BANDS))
            count = images.shape[0]
            checked(place, file[group], "spectra", "f", GRID.count, 1, rows=count)
            checked(place, file[group], "redshifts", "f", rows=count)
            ids = checked(place, file[group], "targetids", "iu", rows=count)
            identifiers += [str(v) for v in ids[:].tolist()]
            if count:
                sides.add((images.shape[1], images.shape[2]))
            train = int(TRAIN_SHARE * count)
            parts.append(Part(path, name, train, 0, group, "train"))
            parts.append(Part(path, name, count - train, train, group, "test"))
    return parts, sides, identifiers


def _look_into_parquet(path: Path, name: str) -> tuple[list[Part], set[tuple[int, int]], list[str]]:
    """Part, (width, height) of images and TARGETIDs of a Parquet shard."""
    split = path.name.split("-", 1)[0]
    if split not in SPLITS:
        raise ValueError(f"{path}: the name of a shard must begin with train- or test-")
    file = open_parquet(path)
    try:
        for column in COLUMNS:
            if column not in file.schema.names:
                raise ValueError(f"{path}: column {column!r} is missing; there is {', '.join(file.schema.names)}")
            kind = file.schema.field(column).type
            right = {"redshift": pa.types.is_floating(kind), "targetid": pa.types.is_integer(kind)}
            if not right.get(column, True):
                raise ValueError(f"{path}: column {column!r} is of type {kind}")
        if file.count == 0:
            return [], set(), []
        identifiers = [str(v) for v in file.rows(0, file.count, ["targetid"])["targetid"].to_pylist()]
        shape = _dense("image", file.row(0, COLUMNS[:2])["image"]).shape
        flux = _dense("spectrum", file.row(0, COLUMNS[:2])["spectrum"]).shape
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: row 0: {error}") from error
    finally:
        file.close()
    if len(shape) != 3 or shape[2] != len(BANDS):
        raise ValueError(f"{path}: column 'image' is {shape}, must be width x height x {len(BANDS)} bands")
    if flux != (GRID.count, 1):
        raise ValueError(f"{path}: column 'spectrum' is {flux}, must be {(GRID.count, 1)}")
    return [Part(path, name, file.count, split=split)], {(shape[0], shape[1])}, identifiers
