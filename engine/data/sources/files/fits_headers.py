"""What headers of FITS images say, for all readers of images: which HDU, where on the sky, in which unit.

Positions come out in ICRS, whatever the frame and the order of the axes (Calabretta & Greisen 2002). Units are read
(FITS Standard 4.0, section 4.3); a flux is converted only where a factor is known.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy as np
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales, wcs_to_celestial_frame

from armillary.engine.data.sources.hdus import all_hdus

__all__ = ["DAMAGED", "conversion", "flux_unit", "image_hdu", "place_on_sky"]

DAMAGED = (OSError, ValueError, TypeError, IndexError, EOFError, KeyError, fits.VerifyError)
"""What astropy raises for damaged images."""

WCS_NUMBER = re.compile(r"(CRVAL|CRPIX|CDELT|CROTA)[12]|(CD|PC)[12]_[12]")
NANOMAGGY = ("nanomaggy", "nanomaggies", "nanomaggys", "nmgy", "nmaggy", "nanomgy")
COUNTS = ("count", "counts", "ct", "cts")
AB_ZERO = 3631 * units.Jy  # of a maggy (Oke & Gunn 1983)


def image_hdu(hdus: Any, axes: tuple[int, ...] = (2, 3, 4)) -> Any:
    """The first HDU with an image of so many axes.

    Raises:
        ValueError: There is none, or the file is truncated before it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="File may have been truncated")
        try:
            for hdu in all_hdus(hdus):
                if hdu.is_image and hdu.header.get("NAXIS", 0) in axes:
                    return hdu
        except Warning as warning:
            raise ValueError(str(warning)) from warning
    raise ValueError(f"it has no image of {' or '.join(map(str, axes))} axes")


def place_on_sky(header: Any, height: int, width: int) -> tuple[float, float, float]:
    """Where an image is.

    Returns:
        RA and Dec of its centre (degrees, ICRS) and arcseconds a pixel; NaN where the header has none.

    Raises:
        ValueError: The position is in a frame that is not one of the sky seen from Earth.
    """
    for card, value in header.items():
        if WCS_NUMBER.fullmatch(card) and not isinstance(value, int | float):
            raise ValueError(f"its card {card} is {value!r}, and must be a number")  # astropy would take 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # astropy reports every repair of a sloppy header
        if all(card in header for card in ("CTYPE1", "CRVAL1", "CRVAL2")):
            wcs = WCS(header, naxis=2)
            if wcs.has_celestial:
                frame = wcs_to_celestial_frame(wcs)
                scale = float(np.sqrt(np.prod(proj_plane_pixel_scales(wcs)))) * 3600
                try:
                    centre = SkyCoord(wcs.pixel_to_world((width - 1) / 2, (height - 1) / 2)).icrs
                except (ValueError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"its position is in the frame {frame.name!r}, which is not that of the sky"
                    ) from error
                return float(centre.ra.deg) % 360.0, float(centre.dec.deg), scale
        ra, dec = _pointing(header)
    scale = header.get("PIXSCALE", math.nan)
    return ra, dec, float(scale) if isinstance(scale, int | float) else math.nan


def _pointing(header: Any) -> tuple[float, float]:
    """The cards RA and DEC: degrees, or hours and degrees as 10:20:30.5 and -1:02:03."""
    values = header.get("RA"), header.get("DEC")
    if all(isinstance(v, str) and ":" in v for v in values):
        try:
            point = SkyCoord(*values, unit=(units.hourangle, units.deg))
        except ValueError:
            return math.nan, math.nan
        return float(point.ra.deg), float(point.dec.deg)
    try:
        ra, dec = (math.nan if isinstance(v, bool) or v is None else float(v) for v in values)
    except ValueError:
        return math.nan, math.nan
    return ra, dec


def flux_unit(header: Any) -> str:
    """The unit of an image's pixels as the header has it (BUNIT), spelled one way; "" where it has none."""
    text = str(header.get("BUNIT") or "").strip()
    if text.lower() in NANOMAGGY:
        return "nanomaggy"
    return "counts" if text.lower() in COUNTS else text  # "count" is the unit of display images


def conversion(have: str, want: str, pixel_scale_arcsec: float = math.nan) -> float | None:
    """What fluxes in one unit are multiplied by to be in another; None where that is not known.

    Args:
        have: A unit, such as "nJy" or "MJy/sr".
        want: Another.
        pixel_scale_arcsec: Side of a pixel, for surface brightness to flux and back.
    """
    if have == want:
        return 1.0
    old, new = _parsed(have), _parsed(want)
    if old is None or new is None:
        return None
    pixel = (pixel_scale_arcsec * units.arcsec) ** 2
    for ratio in (old / new, old * pixel / new, old / pixel / new):
        try:
            factor = float((1 * ratio).to_value(units.dimensionless_unscaled))
        except units.UnitConversionError:
            continue
        return factor if math.isfinite(factor) and factor > 0 else None
    return None


def _parsed(text: str) -> Any:
    """A unit with maggies as Jy; None where it is unintelligible."""
    if text == "nanomaggy":
        return 1e-9 * AB_ZERO
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unit = units.Unit(text)
    except (ValueError, TypeError):
        return None
    maggies = [power for base, power in zip(unit.bases, unit.powers, strict=True) if base == units.mgy]
    quantity = 1 * unit
    return quantity * (AB_ZERO / units.mgy) ** maggies[0] if maggies else quantity
