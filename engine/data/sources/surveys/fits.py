"""FITS cutouts as the Legacy Survey's cutout service writes them, one file each, with an optional CSV of labels.

A file holds one image of bands x height x width float32 nanomaggies, in its first HDU with data (also compressed: .gz,
.fz). The header names the bands (`BANDS = 'grz'`, or `BAND0`, `BAND1`, ...) and gives the position and scale (WCS).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales

from armillary.engine.data.sources.files.image_files import ImageFiles, ImageHeader
from armillary.engine.data.sources.source import listing_mark

__all__ = ["FitsCutouts"]

CUTOUTS = (".fits", ".fit", ".fits.gz", ".fits.fz", ".fz")
SCALE_TOLERANCE = 0.01  # relative difference of pixel scales within a survey


@dataclass(frozen=True)
class _Header(ImageHeader):
    bands: tuple[str, ...]
    scale: float  # arcsec a pixel; NaN where unknown
    ra: float
    dec: float


class FitsCutouts(ImageFiles):
    """A `Source` of FITS cutouts; see `ImageFiles`.

    Bands and pixel scale of the survey are those that most files have. Pixels that are not finite, or exactly zero where
    `zero_is_missing`, carry no data: the cutout service writes 0 where a band was not observed, and a measured flux is
    never exactly 0.

    Args:
        path: Folder (searched recursively) or one file.
        labels: CSV of labels (see `labels.read_labels`); defaults to `labels.csv` in the folder. Its ra and dec
            replace those of the header.
        size: Cut the central `size` x `size` pixels out of every file; smaller files are unusable.
        bands: Band names, for files whose header has none.
        pixel_scale_arcsec: Arcseconds a pixel, for files whose header has none.
        unit: Flux unit of the pixels.
        zero_is_missing: Pixels of exactly 0 carry no data.

    Raises:
        FileNotFoundError: There is no such folder, file or labels file.
        ValueError: There are no FITS files, none is readable, or the labels do not fit them.
    """

    damage = (OSError, ValueError, TypeError, IndexError, EOFError, fits.VerifyError)  # astropy's variety
    what = "FITS file"

    def __init__(
        self,
        path: Path | str,
        *,
        labels: Path | str | None = None,
        size: int | None = None,
        bands: tuple[str, ...] | None = None,
        pixel_scale_arcsec: float | None = None,
        unit: str = "nanomaggy",
        zero_is_missing: bool = True,
    ) -> None:
        root = Path(path)
        self.unit = unit
        self.zero_is_missing = zero_is_missing
        if not root.exists():
            raise FileNotFoundError(f"{path}: no such folder or file of FITS cutouts")
        self._folder, found = root.parent, [root]
        if root.is_dir():
            self._folder = root
            found = sorted(p for p in root.rglob("*") if p.name.lower().endswith(CUTOUTS) and p.is_file())
        if not found:
            raise ValueError(f"{path}: no FITS files in it (looked for {', '.join(CUTOUTS)})")
        files = [p.relative_to(self._folder).as_posix() for p in found]
        listing = [(name, p.stat().st_size) for name, p in zip(files, found, strict=True)]
        self._given = (bands, math.nan if pixel_scale_arcsec is None else pixel_scale_arcsec)
        super().__init__(root, files, listing_mark(listing), labels, size)

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
        for axis in ("ra", "dec"):
            said = np.full(len(self.files), np.nan)
            for i, h in headers.items():
                said[i] = getattr(h, axis)
            given = np.asarray(self._table.columns[axis])
            self._table.columns[axis] = np.where(np.isnan(given), said, given)

    def _decode(self, name: str) -> np.ndarray:
        with _open(self._folder / name) as hdus:
            data = _image_hdu(hdus).data
        return data.reshape(len(self.bands), *data.shape[-2:])


def _same_scale(a: float, b: float) -> bool:
    return math.isnan(a) == math.isnan(b) and not abs(a - b) > SCALE_TOLERANCE * b


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a FITS file without astropy's warnings: what is wrong with it shows as an error where it matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fits.open(path, memmap=False) as hdus:
            yield hdus


def _image_hdu(hdus: Any) -> Any:
    """The first HDU with an image."""
    for hdu in hdus:
        if hdu.is_image and hdu.header.get("NAXIS", 0) >= 2:
            return hdu
    raise ValueError("it has no image")


def _read_header(path: Path, bands: tuple[str, ...] | None, scale: float) -> _Header:
    """Read a file's header; `bands` and `scale` fill in where it has none."""
    with _open(path) as hdus:
        header = _image_hdu(hdus).header
    axes = [int(header[f"NAXIS{k + 1}"]) for k in range(header["NAXIS"])]
    width, height, channels = axes[0], axes[1], math.prod(axes[2:])
    if len(axes) > 3:
        raise ValueError(f"{len(axes)} axes; a cutout has two or three (bands, height, width)")
    named = str(header.get("BANDS", "")).strip()
    listed = tuple(str(header[f"BAND{k}"]).strip() for k in range(channels) if f"BAND{k}" in header)
    found = listed if len(listed) == channels else tuple(named) or (bands or ())
    if len(found) != channels:
        raise ValueError(f"{channels} bands in the image, {len(found)} band names in the header; give the bands")
    ra, dec, header_scale = _astrometry(header, height, width)
    return _Header(height, width, found, scale if math.isnan(header_scale) else header_scale, ra, dec)


def _astrometry(header: Any, height: int, width: int) -> tuple[float, float, float]:
    """RA and Dec (degrees) of the image's centre and arcseconds a pixel; NaN where the header has none."""
    if "CTYPE1" in header:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # astropy reports every repair of a sloppy header
            wcs = WCS(header, naxis=2)
            if wcs.has_celestial:
                ra, dec = wcs.all_pix2world([[(width + 1) / 2, (height + 1) / 2]], 1)[0]
                return float(ra) % 360.0, float(dec), float(np.sqrt(np.prod(proj_plane_pixel_scales(wcs)))) * 3600
    values = [header.get("RA", math.nan), header.get("DEC", math.nan), header.get("PIXSCALE", math.nan)]
    ra, dec, scale = (float(v) if isinstance(v, int | float) else math.nan for v in values)
    return ra, dec, scale
