"""FITS cutouts as the Legacy Survey's cutout service writes them, one file each, with an optional CSV of labels.

A file holds one image of bands x height x width float32 nanomaggies, in its first HDU with data (also compressed: .gz,
.fz). The header names the bands (`BANDS = 'grz'`, or `BAND0`, `BAND1`, ...) and gives the position and scale (WCS).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales

from armillary.engine.data.sources.files.labels import beside, read_labels, stem
from armillary.engine.data.sources.source import BadSample, Rows, Sample, centre_crop, digest, key_from_name

__all__ = ["FitsCutouts"]

CUTOUTS = (".fits", ".fit", ".fits.gz", ".fits.fz", ".fz")
SCALE_TOLERANCE = 0.01  # relative difference of pixel scales within a survey


@dataclass(frozen=True)
class _Header:
    """What a file's header says."""

    bands: tuple[str, ...]
    height: int
    width: int
    scale: float  # arcsec a pixel; NaN where unknown
    ra: float
    dec: float


class FitsCutouts:
    """A `Source` of FITS cutouts. All headers are read when it is made.

    Bands, pixel scale and (unless `size` is given) size of the survey are those that most files have; other files are
    unusable samples, reported by name. Pixels that are not finite, or exactly zero where `zero_is_missing`, carry no
    data: the cutout service writes 0 where a band was not observed, and a measured flux is never exactly 0.

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
        self.path = Path(path)
        self.unit = unit
        self.zero_is_missing = zero_is_missing
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such folder or file of FITS cutouts")
        if size is not None and size < 1:
            raise ValueError(f"size: must be at least 1, got {size}")
        if self.path.is_file():
            self._folder, found = self.path.parent, [self.path]
        else:
            self._folder = self.path
            found = sorted(p for p in self.path.rglob("*") if p.name.lower().endswith(CUTOUTS) and p.is_file())
        if not found:
            raise ValueError(f"{path}: no FITS files in it (looked for {', '.join(CUTOUTS)})")
        self.files = [p.relative_to(self._folder).as_posix() for p in found]
        listing = [(name, p.stat().st_size) for name, p in zip(self.files, found, strict=True)]
        self._mark = f"listing-sha256:{hashlib.sha256(repr(listing).encode()).hexdigest()}"
        self._labels_path = Path(labels) if labels is not None else beside(self._folder)
        self._table = read_labels(self._labels_path, self.files)
        self.labels = self._table.labels
        self._given = (bands, math.nan if pixel_scale_arcsec is None else pixel_scale_arcsec)
        self._survey_shape(size)

    def __len__(self) -> int:
        """Number of files."""
        return len(self.files)

    def inputs(self) -> dict[str, str]:
        """The folder (checksum of names and sizes) and the labels file."""
        marks = {self.path.resolve().name: self._mark}
        if self._labels_path is not None:
            marks[self._labels_path.name] = f"sha256:{digest(self._labels_path)}"
        return marks

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels; see `Described`."""
        columns = {name: values[start:stop] for name, values in self._table.columns.items()}
        columns["ra"], columns["dec"] = self._positions[start:stop, 0], self._positions[start:stop, 1]
        splits = self._table.splits[start:stop] if self._table.splits is not None else None
        bad = {i: self._bad[i] for i in range(start, stop) if i in self._bad}
        return Rows([key_from_name(stem(f)) for f in self.files[start:stop]], columns, splits, bad)

    def read(self, index: int) -> Sample:
        """Read one file.

        Raises:
            BadSample: It is damaged, or unlike the others in bands, scale or size.
        """
        if index in self._bad:
            raise BadSample(self._bad[index])
        name = self.files[index]
        try:
            with _open(self._folder / name) as hdus:
                data = _image_hdu(hdus).data
        except (OSError, ValueError, TypeError, IndexError, EOFError, fits.VerifyError) as error:  # astropy's variety
            raise BadSample(f"{self._folder / name}: not readable as FITS: {error}") from error
        data = centre_crop(data.reshape(len(self.bands), *data.shape[-2:]), self._height, self._width)
        image = np.array(data, dtype=np.float32, order="C")  # FITS is big-endian
        valid = np.isfinite(image)
        if self.zero_is_missing:
            valid &= image != 0
        image[~valid] = 0
        return Sample(
            key=key_from_name(stem(name)),
            image=image,
            valid=None if valid.all() else valid,
            ra=float(self._positions[index, 0]),
            dec=float(self._positions[index, 1]),
            labels=self._table.row(index),
            source=name,
            split=self._table.splits[index] if self._table.splits is not None else None,
        )

    def _survey_shape(self, size: int | None) -> None:
        """Decide the survey's bands, scale and size; the files that do not fit go to `_bad`."""
        self._bad: dict[int, str] = {}
        headers: dict[int, _Header] = {}
        for i, name in enumerate(self.files):
            try:
                headers[i] = _read_header(self._folder / name, *self._given)
            except (OSError, ValueError, TypeError, IndexError, EOFError, fits.VerifyError) as error:
                self._bad[i] = f"{self._folder / name}: not a readable cutout: {error}"
        if not headers:
            raise ValueError(f"{self.path}: none of its {len(self.files)} FITS files is usable; {self._bad[0]}")
        everything = list(headers.values())
        self.bands = Counter(h.bands for h in everything).most_common(1)[0][0]
        like = [h for h in everything if h.bands == self.bands]
        rounded = Counter(round(h.scale, 3) for h in like if not math.isnan(h.scale)).most_common(1)
        scale = next((h.scale for h in like if round(h.scale, 3) == rounded[0][0]), math.nan) if rounded else math.nan
        self.pixel_scale_arcsec = None if math.isnan(scale) else round(scale, 6)
        like = [h for h in like if _same_scale(h.scale, scale)]
        (height, width), count = Counter((h.height, h.width) for h in like).most_common(1)[0]
        self._height, self._width = (size, size) if size is not None else (height, width)
        for i, h in headers.items():
            if h.bands != self.bands:
                why = f"bands {' '.join(h.bands)}, the survey has {' '.join(self.bands)}"
            elif not _same_scale(h.scale, scale):
                why = f"pixel scale {h.scale:.4g} arcsec, the survey has {scale:.4g}"
            elif size is None and (h.height, h.width) != (height, width):
                why = (
                    f"{h.width}x{h.height} pixels, the survey has {width}x{height} ({count} of {len(self.files)} "
                    "files); a size cuts all of them to one"
                )
            elif size is not None and min(h.height, h.width) < size:
                why = f"{h.width}x{h.height} pixels, smaller than the size {size}"
            else:
                continue
            self._bad[i] = f"{self._folder / self.files[i]}: {why}"
        self._positions = np.full((len(self.files), 2), np.nan)
        for i, h in headers.items():
            self._positions[i] = h.ra, h.dec
        for axis, name in enumerate(("ra", "dec")):
            given = np.asarray(self._table.columns[name])
            self._positions[:, axis] = np.where(np.isnan(given), self._positions[:, axis], given)


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
    """Read a file's header; `bands` and `scale` fill in for one that has none.

    Raises:
        ValueError: The image is not bands x height x width, or the bands are unknown.
    """
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
    return _Header(found, height, width, scale if math.isnan(header_scale) else header_scale, ra, dec)


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
