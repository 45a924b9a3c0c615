"""GalaxiesML (Do et al. 2024, arXiv 2410.00271) and GalaxiesML-Spectra: HSC PDR2 images with redshifts, and DESI spectra.

GalaxiesML: a file a size (64, 127) and split (`..._training_...`, `_validation_`, `_testing_`) with `image` (n, 5, H, W)
float32, bands g, r, i, z, y, and one data set of n values a column: `object_id` (64 bits), `specz_redshift`, `ra`, `dec`,
magnitudes and, for each band, structure (`g_sersic_index`, `r_half_light_radius`, ...).

GalaxiesML-Spectra (`DESI_HSC_64x64_v2.hdf5`): `image` (n, 5, 64, 64); `spectrum/flux`, `spectrum/ivar`, `spectrum/wave`
(n, 7783), 1e-17 erg/s/cm2/angstrom and angstrom; `targetid` as bytes; `DESI_fibermap/*` (with `DESI_redshift`) and
`HSC_metadata/*`. The wavelengths are stored with every row though all are the same; 7,783 is not DESI's own 7,781, so the
stored ones are used.

Pixels are in the unit of the HSC coadds: an AB magnitude m has a flux of 10^(-0.4 (m - 27)). 0.168 arcsec a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, WaveGrid
from armillary.engine.data.sources.files.hdf5 import (
    HDF5_SUFFIXES,
    checked,
    column_names,
    label_name,
    open_hdf5,
    opened,
    plain,
)
from armillary.engine.data.sources.files.parts import (
    Part,
    PartSource,
    central_size,
    refuse_differences,
    refuse_repeats,
    short_names,
)
from armillary.engine.data.sources.listing import find_files
from armillary.engine.data.sources.source import Rows, cut_out

__all__ = ["GalaxiesML", "GalaxiesMLSpectra", "authors_split", "bin_spectrum"]

BANDS = ("g", "r", "i", "z", "y")
PIXEL_SCALE_ARCSEC = 0.168
UNIT = "10^(-0.4 (AB - 27))"
FLUX_UNIT = "1e-17 erg/s/cm2/angstrom"
SPLIT_NAMES = ("train", "validation", "test")
SPLITS = {"train": "train", "valid": "validation", "test": "test"}
GROUPS = {"DESI_fibermap": "desi", "HSC_metadata": "hsc"}
WAVE = "spectrum/wave"
WAVE_TOLERANCE = 1e-3  # of a pixel
WAVE_ROWS = 64  # whose wavelengths are compared before work starts; the others are when they are read
MEANING = {
    "redshift": "spectroscopic redshift",
    "cmodel_mag": "cmodel magnitude, AB",
    "cmodel_magsigma": "uncertainty of the cmodel magnitude, mag",
    "ellipticity": "ellipticity of the isophotes",
    "half_light_radius": "radius of half the light, pixels",
    "isophotal_area": "area within the isophote, pixels",
    "major_axis": "major axis, pixels",
    "minor_axis": "minor axis, pixels",
    "peak_surface_brightness": "peak surface brightness",
    "petro_rad": "Petrosian radius, pixels",
    "pos_angle": "position angle, degrees",
    "sersic_index": "Sersic index",
    "specz_redshift_err": "uncertainty of the redshift",
    "object_id": "HSC object identifier, as text",
    "targetid": "DESI TARGETID, as text",
}


class _HscImages(PartSource):
    """Images and label columns, which both data sets have.

    `identity` is the column of the key, `redshift` the one that becomes the label `redshift`, `groups` are sub-groups
    with label columns, each with the prefix of a label whose name is taken.
    """

    bands = BANDS
    pixel_scale_arcsec: float | None = PIXEL_SCALE_ARCSEC
    unit = UNIT

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        size: int | None,
        zero_is_missing: bool,
        identity: str,
        redshift: str,
        groups: dict[str, str],
    ) -> None:
        files = find_files(path, HDF5_SUFFIXES, "HDF5 file")
        self.zero_is_missing = zero_is_missing
        self._identity = identity
        parts: list[Part] = []
        shapes: dict[tuple[int, ...], Path] = {}
        layouts: list[tuple[Path, dict[str, bool]]] = []
        identifiers: list[str] = []
        for file, name in zip(files, short_names(files), strict=True):
            with opened(file) as stored:
                images = checked(str(file), stored, "image", "f", len(BANDS), None, None)
                count = images.shape[0]
                checked(str(file), stored, redshift, "fiu", rows=count)
                ids = checked(str(file), stored, identity, "SOUiu", rows=count)
                columns = column_names(str(file), stored, count)
                for group in groups:
                    if not isinstance(stored.get(group), h5py.Group):
                        raise ValueError(f"{file}: group {group!r} is missing; there is {', '.join(sorted(stored))}")
                    columns |= column_names(str(file), stored[group], count, f"{group}/")
                self._look(file, stored, count)
                identifiers += plain(ids[:], True)
            shapes.setdefault(images.shape[2:], file)
            layouts.append((file, columns))
            parts.append(Part(file, name, count, split=_split(file.name)))
        if not identifiers:
            raise ValueError(f"{files[0]}: column 'image' has no rows")
        if len(shapes) > 1:
            (a, first), (b, second) = list(shapes.items())[:2]
            raise ValueError(f"{second}: column 'image' is of {b} pixels, that of {first} of {a}; read them apart")
        refuse_differences(layouts)
        columns = layouts[0][1]
        height, width = next(iter(shapes))
        self._height, self._width = central_size(size, height, width)
        super().__init__(parts, open_hdf5, refuse_repeats(identifiers, identity))
        found = {c.rsplit("/", 1)[-1].lower(): c for c in sorted(columns, reverse=True)}
        self._ra, self._dec = (
            next((found[n] for n in (axis, f"target_{axis}", f"desi_{axis}") if n in found), None)
            for axis in ("ra", "dec")
        )
        self._labels: dict[str, tuple[str, bool]] = {"redshift": (redshift, False)}
        for column, text in columns.items():
            if column in (redshift, self._ra, self._dec):
                continue
            name = label_name(column)
            prefix = groups.get(column.split("/", 1)[0], "file")
            self._labels[f"{prefix}_{name}" if name in self._labels else name] = (column, text)
        self.labels = {name: _meaning(name, column) for name, (column, _) in self._labels.items()}

    def _look(self, path: Path, file: Any, count: int) -> None:
        """Check what else a file must hold."""

    def _columns(self, part: Part, low: int, high: int) -> Rows:
        file = self._file(part)
        columns: dict[str, np.ndarray | list[str]] = {
            name: plain(file[column][low:high], text) for name, (column, text) in self._labels.items()
        }
        for axis, column in (("ra", self._ra), ("dec", self._dec)):
            columns[axis] = np.full(high - low, np.nan) if column is None else plain(file[column][low:high], False)
        return Rows(list(plain(file[self._identity][low:high], True)), columns)

    def _payload(self, part: Part, row: int) -> dict[str, Any]:
        stored = self._file(part)["image"][row]
        return cut_out(stored, self._height, self._width, zero_is_missing=self.zero_is_missing)


class GalaxiesML(_HscImages):
    """A `Source` of GalaxiesML; the key of a sample is its HSC object_id, its split that of the file's name.

    Every column with a value a row becomes a label; `specz_redshift` becomes `redshift`.

    Args:
        path: One file, several, or a folder: its files, sorted.
        size: Cut the central `size` x `size` pixels out of every image.
        zero_is_missing: Pixels of exactly 0 carry no data.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file is not of this layout, the files differ, or `size` does not fit them.
    """

    def __init__(
        self, path: Path | str | Sequence[Path | str], *, size: int | None = None, zero_is_missing: bool = True
    ) -> None:
        super().__init__(path, size, zero_is_missing, "object_id", "specz_redshift", {})


class GalaxiesMLSpectra(_HscImages):
    """A `Source` of GalaxiesML-Spectra; the key of a sample is its DESI TARGETID.

    Samples have the split of MMAE's authors (Himes et al. 2025): torch's `random_split` of all rows in the order of the
    file, with seed 0, into 70 % train, 15 % validation and the rest test.

    Pixels of a spectrum with ivar 0 or flux 0, or that are not finite, carry no data. `bin_pixels=30` gives the 259 bins
    that the authors train on, here as means weighted with ivar; theirs are unweighted, of spectra normalised before.

    Args:
        path: One file, several, or a folder of them.
        size: Cut the central `size` x `size` pixels out of every image.
        zero_is_missing: Pixels of exactly 0 of an image carry no data.
        bin_pixels: Pixels of a spectrum averaged into one; those left over at its red end are dropped.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file is not of this layout, wavelengths are not finite and increasing or differ, or an option does
            not fit.
    """

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        *,
        size: int | None = None,
        zero_is_missing: bool = True,
        bin_pixels: int = 1,
    ) -> None:
        self._wave: np.ndarray | None = None
        self._splits: np.ndarray | None = None
        super().__init__(path, size, zero_is_missing, "targetid", "DESI_fibermap/DESI_redshift", GROUPS)
        assert self._wave is not None
        if not 1 <= bin_pixels <= len(self._wave) // 2:
            raise ValueError(f"bin_pixels: must be within 1 and {len(self._wave) // 2}, got {bin_pixels}")
        self._bin: int = bin_pixels
        bins = len(self._wave) // bin_pixels
        centres = self._wave[: bins * bin_pixels].reshape(bins, bin_pixels).mean(axis=1)
        self.spectrum = SpectrumRecord(WaveGrid.of(centres), FLUX_UNIT)

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions, labels and the authors' splits; see `Described`."""
        if self._splits is None:
            self._splits = authors_split(len(self))
        rows = super().describe(start, stop)
        return replace(rows, splits=[SPLIT_NAMES[i] for i in self._splits[start:stop]])

    def _look(self, path: Path, file: Any, count: int) -> None:
        flux = checked(str(path), file, "spectrum/flux", "f", None, rows=count)
        checked(str(path), file, "spectrum/ivar", "f", flux.shape[1], rows=count)
        wave = checked(str(path), file, WAVE, "f", flux.shape[1], rows=count)
        for row in sorted({round(v) for v in np.linspace(0, count - 1, min(WAVE_ROWS, count))}):
            try:
                if self._wave is None:
                    self._wave = np.asarray(wave[row], np.float64)
                    WaveGrid.of(self._wave)
                self._compare(wave[row])
            except ValueError as error:
                raise ValueError(f"{path}: row {row}: column {WAVE!r}: {error}") from error

    def _compare(self, wave: np.ndarray) -> None:
        assert self._wave is not None
        if wave.shape != self._wave.shape:
            raise ValueError(f"{wave.shape[0]} wavelengths, the first row has {self._wave.shape[0]}")
        off = ~(np.abs(wave - self._wave) < WAVE_TOLERANCE * np.gradient(self._wave))
        if off.any():
            pixel = int(np.flatnonzero(off)[0])
            raise ValueError(
                f"pixel {pixel} is at {wave[pixel]} angstrom, that of the first row at {self._wave[pixel]}"
            )

    def _payload(self, part: Part, row: int) -> dict[str, Any]:
        group = self._file(part)["spectrum"]
        try:
            self._compare(group["wave"][row])
        except ValueError as error:
            raise ValueError(f"column {WAVE!r}: {error}") from error
        flux, ivar = (np.asarray(group[name][row], np.float32) for name in ("flux", "ivar"))
        if (ivar < 0).any():
            raise ValueError(f"column 'spectrum/ivar': pixel {int(np.flatnonzero(ivar < 0)[0])} is negative")
        seen = np.isfinite(flux) & np.isfinite(ivar) & (ivar > 0) & (flux != 0)
        if not seen.any():
            raise ValueError("column 'spectrum/ivar': no pixel carries data")
        flux, ivar = np.where(seen, flux, 0), np.where(seen, ivar, 0)
        if self._bin > 1:
            flux, ivar = bin_spectrum(flux, ivar, self._bin)
        return super()._payload(part, row) | {"spectrum": Spectrum(flux, ivar)}


def authors_split(count: int) -> np.ndarray:
    """[count] split of each row, as a number of `SPLIT_NAMES`: 94,173, 20,179 and 20,181 of the published 134,533."""
    import torch  # only to draw what `torch.utils.data.random_split` draws

    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    train, validation = int(0.7 * count), int(0.15 * count)
    found = np.full(count, 2, np.int8)
    found[order[:train]], found[order[train : train + validation]] = 0, 1
    return found


def bin_spectrum(flux: np.ndarray, ivar: np.ndarray, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of runs of pixels, weighted with ivar, and their inverse variance; 0 where no pixel carries data.

    Args:
        flux: [L].
        ivar: [L]; 0 where a pixel carries no data.
        pixels: Pixels of a bin; L mod `pixels` are dropped at the end.

    Returns:
        flux and ivar, each [L // pixels] float32.
    """
    bins = len(flux) // pixels
    weight = ivar[: bins * pixels].astype(np.float64).reshape(bins, pixels)
    total = weight.sum(axis=1)
    light = (weight * flux[: bins * pixels].reshape(bins, pixels)).sum(axis=1)
    return np.where(total > 0, light / np.where(total > 0, total, 1), 0).astype(np.float32), total.astype(np.float32)


def _split(name: str) -> str | None:
    found = {split for word, split in SPLITS.items() if word in name.lower()}
    return found.pop() if len(found) == 1 else None


def _meaning(name: str, column: str) -> str:
    bare = name[2:] if name[:2] in {f"{band}_" for band in BANDS} else name
    meaning = MEANING.get(bare, f"{column} of the file")
    return meaning if bare == name else f"{meaning}, band {name[0]}"
