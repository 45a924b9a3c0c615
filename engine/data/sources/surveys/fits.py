"""FITS cutouts as the Legacy Survey's cutout service writes them, one file each, with an optional CSV of labels.

A file holds one image of bands x height x width, in its first HDU with data (also compressed: .gz, .fz). The header names
the bands (`BANDS = 'grz'`, or `BAND0`, `BAND1`, ...) and gives position and scale (WCS in any frame of the sky) and the unit
(`BUNIT`; files of the service, which have bands and no unit, are in nanomaggies).
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from armillary.engine.data.sources.files.fits_headers import DAMAGED, conversion, flux_unit, image_hdu, place_on_sky
from armillary.engine.data.sources.files.fits_tables import open_fits
from armillary.engine.data.sources.files.image_files import ImageFiles, ImageHeader
from armillary.engine.data.sources.listing import find_files
from armillary.engine.data.sources.source import listing_mark

__all__ = ["FitsCutouts"]

CUTOUTS = (".fits", ".fit", ".fits.gz", ".fits.fz", ".fz")
SCALE_TOLERANCE = 0.01  # relative difference of pixel scales within a survey

log = logging.getLogger("armillary.data")


@dataclass(frozen=True)
class _Header(ImageHeader):
    bands: tuple[str, ...]
    scale: float  # arcsec a pixel; NaN where unknown
    ra: float
    dec: float
    unit: str
    zero_is_missing: bool


class FitsCutouts(ImageFiles):
    """A `Source` of FITS cutouts; see `ImageFiles`.

    Bands, pixel scale and unit of the survey are those that most files have; files in another unit are converted where
    the factor is known, and unusable where it is not. Pixels that are not finite or BLANK, or exactly zero where
    `zero_is_missing`, carry no data: the cutout service writes 0 where a band was not observed, and a measured flux is
    never exactly 0. Exports of armillary, whose zeros are measured, say so (`ZEROMISS = F`).

    Args:
        path: Folder (searched recursively) or one file.
        labels: CSV of labels (see `labels.read_labels`); defaults to `labels.csv` in the folder. Its ra and dec
            replace those of the header.
        size: Cut the central `size` x `size` pixels out of every file; smaller files are unusable.
        bands: Band names, for files whose header has none that fit.
        pixel_scale_arcsec: Arcseconds a pixel, for files whose header has none.
        unit: Flux unit of the survey, to which files in other units are converted; that of files whose header has none.
        zero_is_missing: Pixels of exactly 0 carry no data; by default as the header says, and true where it is silent.
        missing: Numbers that mean "unknown" in labels; by default those of `sentinels`.
        on_bad: "skip" leaves out rows of the labels that name no file.

    Raises:
        FileNotFoundError: There is no such folder, file or labels file.
        ValueError: There are no FITS files, none is readable, or the labels do not fit them.
    """

    damage = DAMAGED
    what = "FITS file"

    def __init__(
        self,
        path: Path | str,
        *,
        labels: Path | str | None = None,
        size: int | None = None,
        bands: tuple[str, ...] | None = None,
        pixel_scale_arcsec: float | None = None,
        unit: str | None = None,
        zero_is_missing: bool | None = None,
        missing: Sequence[float] | None = None,
        on_bad: str = "error",
    ) -> None:
        root = Path(path)
        self._zeros = zero_is_missing
        if not root.exists():
            raise FileNotFoundError(f"{path}: no such folder or file of FITS cutouts")
        self._folder = root if root.is_dir() else root.parent
        found = find_files(root, CUTOUTS, "FITS file")
        files = [p.relative_to(self._folder).as_posix() for p in found]
        listing = [(name, p.stat().st_size) for name, p in zip(files, found, strict=True)]
        self._given = (bands, math.nan if pixel_scale_arcsec is None else pixel_scale_arcsec, unit)
        self._factors: dict[str, float] = {}
        self._keep_zeros: set[str] = set()
        super().__init__(root, files, listing_mark(listing), labels, size, missing, on_bad)

    def _where(self, name: str) -> str:
        return str(self._folder / name)

    def _header(self, name: str) -> _Header:
        return _read_header(self._folder / name, *self._given)

    def _agree(self, headers: Mapping[int, Any]) -> None:
        """The survey's bands and scale; positions of the headers, where the labels have none."""
        self.bands = Counter(h.bands for h in headers.values()).most_common(1)[0][0]
        like = [h for h in headers.values() if h.bands == self.bands]
        rounded = Counter(round(h.scale, 3) for h in like if not math.isnan(h.scale)).most_common(1)
        scale = next((h.scale for h in like if round(h.scale, 3) == rounded[0][0]), math.nan) if rounded else math.nan
        self.pixel_scale_arcsec = None if math.isnan(scale) else round(scale, 6)
        for i, h in headers.items():
            if h.bands != self.bands:
                self._refuse(i, f"bands {' '.join(h.bands)}, the survey has {' '.join(self.bands)}")
            elif not _same_scale(h.scale, scale):
                self._refuse(i, f"pixel scale {h.scale:.4g} arcsec, the survey has {scale:.4g}")
        self._agree_on_units(headers, scale)
        self._keep_zeros = {self.files[i] for i, h in headers.items() if self._zeros is None and not h.zero_is_missing}
        for axis in ("ra", "dec"):
            said = np.full(len(self.files), np.nan)
            for i, h in headers.items():
                said[i] = getattr(h, axis)
            given = np.asarray(self._table.columns[axis])
            self._table.columns[axis] = np.where(np.isnan(given), said, given)

    def _agree_on_units(self, headers: Mapping[int, Any], scale: float) -> None:
        """The survey's unit, and the factors of files in others."""
        self.unit = self._given[2] or Counter(h.unit for h in headers.values()).most_common(1)[0][0]
        converted = Counter[str]()
        for i, h in headers.items():
            factor = conversion(h.unit, self.unit, scale if math.isnan(h.scale) else h.scale)
            if factor is None:
                self._refuse(i, f"its unit is {h.unit!r}, which cannot be converted to the survey's, {self.unit!r}")
            elif factor != 1:
                self._factors[self.files[i]] = factor
                converted[h.unit] += 1
        for unit, count in converted.items():
            log.warning("%s: %d files converted from %s to %s", self.path, count, unit, self.unit)

    def _decode(self, name: str) -> np.ndarray:
        with open_fits(self._folder / name, unsigned=False) as hdus:
            data = image_hdu(hdus, axes=tuple(range(2, 10))).data
        pixels = np.asarray(data).reshape(len(self.bands), *data.shape[-2:])
        return pixels * self._factors[name] if name in self._factors else pixels

    def _zero_is_missing(self, name: str) -> bool:
        return name not in self._keep_zeros if self._zeros is None else self._zeros


def _same_scale(a: float, b: float) -> bool:
    return math.isnan(a) == math.isnan(b) and not abs(a - b) > SCALE_TOLERANCE * b


def _read_header(path: Path, bands: tuple[str, ...] | None, scale: float, unit: str | None) -> _Header:
    """Read a file's header; `bands`, `scale` and `unit` fill in where it has none."""
    with open_fits(path) as hdus:
        header = image_hdu(hdus, axes=tuple(range(2, 10))).header
    axes = [int(header[f"NAXIS{k + 1}"]) for k in range(header["NAXIS"])]
    width, height, channels = axes[0], axes[1], math.prod(axes[2:])
    if sum(n > 1 for n in axes[2:]) > 1:
        raise ValueError(f"{len(axes)} axes; a cutout has two or three (bands, height, width)")
    named = _band_names(header, channels)
    found = named if len(named) == channels else bands or named
    if len(found) != channels:
        raise ValueError(f"{channels} bands in the image, {len(found)} band names in the header; give the bands")
    if len(set(found)) < channels:
        raise ValueError(f"bands {' '.join(found)}: two of one name")
    stored = flux_unit(header) or ("nanomaggy" if named else unit or "")  # headers with bands are the service's
    if not stored:
        raise ValueError("its header has no unit (BUNIT); give it: unit (--option unit=nanomaggy)")
    ra, dec, own_scale = place_on_sky(header, height, width)
    scale = scale if math.isnan(own_scale) else own_scale
    return _Header(height, width, found, scale, ra, dec, stored, header.get("ZEROMISS", True) is not False)


def _band_names(header: Any, channels: int) -> tuple[str, ...]:
    """Names in `BAND0`, `BAND1`, ..., or in `BANDS`: a letter each, or with commas or blanks between them."""
    listed = tuple(str(header[f"BAND{k}"]).strip() for k in range(channels) if f"BAND{k}" in header)
    if len(listed) == channels:
        return listed
    text = str(header.get("BANDS", "")).strip()
    return tuple(re.split(r"[,;\s]+", text)) if re.search(r"[,;\s]", text) else tuple(text)
