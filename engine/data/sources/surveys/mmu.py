"""The Multimodal Universe (Angeloudi et al. 2024, arXiv 2412.02527): one survey of it, in HDF5 or Parquet.

HDF5 (`.../healpix=NNN/001-of-001.hdf5`): data sets of n rows. Images: `image_array` or `image_flux` (n, bands, H, W)
float32, `image_band` (n, bands) text such as `des-g` or `hsc-g`, `image_ivar` like the images, `image_mask` bool like the
images or (n, H, W), true = good, `image_scale` (n, bands), arcsec a pixel. Spectra: `spectrum_flux`, `spectrum_ivar`,
`spectrum_lambda` (angstrom), `spectrum_mask` (true = bad), each (n, pixels). Then `object_id` (whole numbers or text),
`ra`, `dec` (degrees) and the catalogue, one data set a column.

Parquet (Hugging Face, HATS `Norder=K/Dir=D/Npix=N.parquet`): the same as nested lists in the columns `image` (a list of
structs, or a struct of lists, with band, flux or array, ivar, mask, scale) and `spectrum` (a struct of lists with flux,
ivar, lambda, mask); beside them `object_id`, often written as b'...', and the catalogue. Warning flags (ZWARN,
ZWARNING) are truth values there, true where there is no warning; their labels are 0 there, as in the HDF5 files.

Surveys that have a grid for each object (SDSS) pad spectra at the red end with wavelengths that are not positive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, WaveGrid
from armillary.engine.data.sources.files.hdf5 import HDF5_SUFFIXES, label_name, open_hdf5, plain
from armillary.engine.data.sources.files.mmu_files import (
    hdf5_arrays,
    look_into_hdf5,
    look_into_parquet,
    parquet_arrays,
    scalars,
)
from armillary.engine.data.sources.files.nested_parquet import open_parquet
from armillary.engine.data.sources.files.parts import (
    Part,
    PartSource,
    central_size,
    refuse_differences,
    short_names,
)
from armillary.engine.data.sources.listing import find_files
from armillary.engine.data.sources.source import Rows, cut_out, key_from_name

__all__ = ["SDSS_GRID", "MultimodalUniverse", "place_on_grid"]

SDSS_GRID = WaveGrid("log10", 3.54, 1e-4, 4901)  # 3,467 to 10,715 angstrom: holds the spectra of both spectrographs
GRID_TOLERANCE = 0.01  # of a pixel
UNITS = {"des": "nanomaggy", "hsc": "10^(-0.4 (AB - 27))"}  # by what bands begin with
FLUX_UNIT = "1e-17 erg/s/cm2/angstrom"
REDSHIFTS = (
    "redshift",
    "z_spec",
    "z",
    "Z",
    "Z_SPEC",
    "Z_HP",
    "REDSHIFT",
)  # the first one there is becomes the label `redshift`


class MultimodalUniverse(PartSource):
    """A `Source` of one survey of the Multimodal Universe; the key of a sample is its object_id.

    Image pixels that are masked, of ivar 0, or not finite carry no data; likewise those of spectra. Spectra are put on
    the grid of the first one, or on `SDSS_GRID` where that one's pixels are some of its. Columns of the catalogue with
    one value a row become labels, the others are left out.

    Args:
        path: One file, several, or a folder: its files or those of its sub-folders, sorted.
        size: Cut the central `size` x `size` pixels out of every image.
        unit: Flux unit of the images; known for bands `des-*` and `hsc-*`.
        spectrum_unit: Flux unit of the spectra.
        mask_is_good: Whether true in an image's mask means a good pixel, as in the Legacy Survey's files, or a bad one.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file is not of this layout, the files differ, wavelengths are not finite and increasing, or the
            unit of the images is not known.
    """

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        *,
        size: int | None = None,
        unit: str | None = None,
        spectrum_unit: str = FLUX_UNIT,
        mask_is_good: bool = True,
    ) -> None:
        found = find_files(path, (*HDF5_SUFFIXES, ".parquet"), "HDF5 or Parquet file")
        self._is_parquet = found[0].suffix.lower() == ".parquet"
        self._mask_is_good = mask_is_good
        look = look_into_parquet if self._is_parquet else look_into_hdf5
        self._arrays: Callable[..., dict[str, Any]] = parquet_arrays if self._is_parquet else hdf5_arrays
        self._height, self._width = 0, 0
        parts, layouts = [], []
        for file, name in zip(found, short_names(found), strict=True):
            if (file.suffix.lower() == ".parquet") != self._is_parquet:
                raise ValueError(f"{file}: a folder must hold either HDF5 or Parquet files, {found[0]} is not alike")
            count, columns = look(file)
            parts.append(Part(file, name, count))
            layouts.append((file, columns))
        refuse_differences(layouts)
        reference = layouts[0][1]
        super().__init__(parts, open_parquet if self._is_parquet else open_hdf5)
        if not self.parts:
            raise ValueError(f"{found[0]}: column 'object_id' has no rows")
        self._stored = reference
        self._has = {kind: any(c.startswith(kind) for c in reference) for kind in ("image", "spectrum")}
        if not any(self._has.values()):
            raise ValueError(f"{found[0]}: neither images nor spectra in it; there is {', '.join(reference)}")
        scalars = {column: kind for column, kind in reference.items() if kind in ("text", "number", "inverted")}
        self._inverted = {column for column, kind in scalars.items() if kind == "inverted"}
        redshift = next((c for c in REDSHIFTS if scalars.get(c) == "number"), None)
        self._labels = {} if redshift is None else {"redshift": (redshift, False)}
        for column, kind in scalars.items():
            if column not in ("ra", "dec", redshift):
                name = label_name(column)
                self._labels[f"file_{name}" if name in self._labels else name] = (column, kind == "text")
        self.labels = {name: f"{column} of the catalogue" for name, (column, _) in self._labels.items()}
        self._first_row(size, unit, spectrum_unit)
        self._handle = None

    def _first_row(self, size: int | None, unit: str | None, spectrum_unit: str) -> None:
        """Bands, unit, sizes and grid, from the first row."""
        part = self.parts[0]
        self.bands: tuple[str, ...] = ()
        self.pixel_scale_arcsec: float | None = None
        self.unit = unit or "nanomaggy"
        self.spectrum: SpectrumRecord | None = None
        place = f"{part.path}: row {part.first}"
        try:
            stored = self._arrays(self._file(part), part.first, self._has)
            if self._has["image"]:
                image, bands, scale = (stored[f"image_{name}"] for name in ("flux", "band", "scale"))
                self.bands = _bands(bands, image.shape[0])
                prefix = self.bands[0].split("-", 1)[0]
                if unit is None and prefix not in UNITS:
                    raise ValueError(
                        f"column 'image_band': bands {', '.join(self.bands)} are not known, so neither is the unit of "
                        "the flux; give it: unit"
                    )
                self.unit = unit or UNITS[prefix]
                if scale is not None:
                    if not np.isfinite(scale).all() or np.ptp(scale) > 1e-3 * scale[0] or scale[0] <= 0:
                        raise ValueError(
                            f"column 'image_scale': {scale.tolist()}, must be positive and one for all bands"
                        )
                    self.pixel_scale_arcsec = round(float(scale[0]), 6)
                self._shape = image.shape
                self._height, self._width = central_size(size, *image.shape[1:])
            if self._has["spectrum"]:
                wave = stored["spectrum_lambda"]
                grid = _grid(wave[: len(wave) - _padding(wave)])
                self.spectrum = SpectrumRecord(grid, spectrum_unit)
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith("size") else f"{place}: {error}") from error
        except (OSError, RuntimeError, pa.ArrowException) as error:
            raise ValueError(f"{place}: not readable: {error}") from error

    def _columns(self, part: Part, low: int, high: int) -> Rows:
        file = self._file(part)
        wanted = {column for column, _ in self._labels.values()} | {c for c in ("ra", "dec") if c in self._stored}
        if self._is_parquet:
            table = file.rows(low, high, sorted(wanted))
            stored = {name: scalars(table[name]) for name in wanted}
            stored |= {name: 1 - stored[name].astype(np.float64) for name in self._inverted & wanted}
        else:
            stored = {name: file[name][low:high] for name in wanted}
        columns: dict[str, np.ndarray | list[str]] = {
            name: plain(stored[column], text) for name, (column, text) in self._labels.items()
        }
        columns |= {a: plain(stored[a], False) if a in stored else np.full(high - low, np.nan) for a in ("ra", "dec")}
        identity = next(name for name, (column, _) in self._labels.items() if column == "object_id")
        columns[identity] = [_unquoted(str(v)) for v in plain(stored["object_id"], True)]
        return Rows([key_from_name(v) if v else "" for v in columns[identity]], columns)

    def _payload(self, part: Part, row: int) -> dict[str, Any]:
        stored = self._arrays(self._file(part), row, self._has)
        payload: dict[str, Any] = {}
        flux = stored.get("image_flux")
        if flux is not None:
            bands = _bands(stored["image_band"], flux.shape[0])
            if bands != self.bands:
                raise ValueError(f"column 'image_band': {' '.join(bands)}, the survey has {' '.join(self.bands)}")
            if flux.shape != self._shape:
                raise ValueError(f"column 'image_flux': {flux.shape}, those of the first row are {self._shape}")
            valid = np.ones(flux.shape, bool)
            if (ivar := stored["image_ivar"]) is not None:
                valid &= np.isfinite(ivar) & (ivar > 0)
            if (mask := stored["image_mask"]) is not None:
                valid &= (mask != 0) == self._mask_is_good
            payload |= cut_out(flux, self._height, self._width, valid)
        if (wave := stored.get("spectrum_lambda")) is not None:
            assert self.spectrum is not None
            flux, ivar, mask = (stored[f"spectrum_{name}"] for name in ("flux", "ivar", "mask"))
            if not flux.shape == ivar.shape == wave.shape:
                raise ValueError(
                    f"columns 'spectrum_*': {len(flux)} fluxes, {len(ivar)} ivars, {len(wave)} wavelengths"
                )
            seen = np.isfinite(flux) & np.isfinite(ivar) & (ivar > 0)
            if mask is not None:
                seen &= mask == 0
            pixels = len(wave) - _padding(wave)
            if not seen[:pixels].any():
                raise ValueError("column 'spectrum_ivar': no pixel carries data")
            flux, ivar = np.where(seen, flux, 0)[:pixels], np.where(seen, ivar, 0)[:pixels]
            try:
                payload["spectrum"] = Spectrum(*place_on_grid(flux, ivar, wave[:pixels], self.spectrum.grid))
            except ValueError as error:
                raise ValueError(f"column 'spectrum_lambda': {error}") from error
        if not payload:
            raise ValueError("columns 'image' and 'spectrum': both are missing")
        return payload


def place_on_grid(
    flux: np.ndarray, ivar: np.ndarray, wave: np.ndarray, grid: WaveGrid
) -> tuple[np.ndarray, np.ndarray]:
    """A spectrum whose pixels are some of a grid's, on the whole grid; nothing is interpolated.

    Args:
        flux: [n].
        ivar: [n].
        wave: [n] angstrom.
        grid: The grid of L pixels.

    Returns:
        flux and ivar, each [L] float32, 0 where the spectrum has no pixel.

    Raises:
        ValueError: A wavelength is not finite, does not increase, or is not on the grid.
    """
    wave = np.asarray(wave, np.float64)
    wrong = ~np.isfinite(wave)
    wrong[1:] |= ~(np.diff(wave) > 0)
    if wrong.any():
        pixel = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"pixel {pixel} is at {wave[pixel]:g} angstrom; wavelengths must be finite and increase")
    if grid.kind == "table":
        place = np.interp(wave, grid.table, np.arange(grid.count), -1, grid.count)
    else:
        place = ((np.log10(wave) if grid.kind == "log10" else wave) - grid.start) / grid.step
    index = np.rint(place).astype(np.int64)
    off = (np.abs(place - index) > GRID_TOLERANCE) | (index < 0) | (index >= grid.count)
    if off.any():
        pixel = int(np.flatnonzero(off)[0])
        low, high = grid.angstrom()[[0, -1]]
        raise ValueError(
            f"pixel {pixel} at {wave[pixel]:.3f} angstrom is not on the survey's grid of {grid.count} pixels from "
            f"{low:.2f} to {high:.2f}"
        )
    placed = np.zeros((2, grid.count), np.float32)
    placed[:, index] = flux, ivar
    return placed[0], placed[1]


def _grid(wave: np.ndarray) -> WaveGrid:
    """SDSS's grid where the wavelengths are on it, else their own."""
    try:
        place_on_grid(np.zeros(len(wave)), np.zeros(len(wave)), wave, SDSS_GRID)
    except ValueError:
        try:
            return WaveGrid.of(wave)
        except ValueError as error:
            raise ValueError(f"column 'spectrum_lambda': {error}") from error
    return SDSS_GRID


def _padding(wave: np.ndarray) -> int:
    """Pixels at the end that are none: their wavelengths are not positive."""
    real = np.flatnonzero(~(wave <= 0))
    return len(wave) - (int(real[-1]) + 1 if real.size else 0)


def _bands(stored: np.ndarray | None, count: int) -> tuple[str, ...]:
    if stored is None:
        raise ValueError("column 'image_band': missing")
    names = tuple(v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in stored.tolist())
    names = tuple(name.strip().lower() for name in names)
    if len(names) != count or len(set(names)) != count or "" in names:
        raise ValueError(f"column 'image_band': {names}, must be {count} different names")
    return names


def _unquoted(text: str) -> str:
    return text[2:-1] if text[:2] in ("b'", 'b"') and text[-1:] == text[1] else text
