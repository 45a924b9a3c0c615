"""Files and projections of the bricks of the DESI Legacy Surveys."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales, wcs_to_celestial_frame

from armillary.engine.data.sources.files.fits_headers import DAMAGED, flux_unit, image_hdu
from armillary.engine.data.sources.files.fits_tables import damage_of, open_fits
from armillary.engine.data.sources.listing import list_folder

__all__ = ["Brick", "find_bricks"]

NAME = re.compile(r"legacysurvey-(\d{4}[pm]\d{3})-(?:(image|invvar)-([A-Za-z0-9]+)|(maskbits))\.fits(?:\.fz|\.gz)?")
SCALE_TOLERANCE = 0.01  # relative difference of pixel scales
SAME_PLACE = 0.01  # pixels by which the projections of a brick's files may differ


@dataclass(frozen=True)
class Brick:
    """One brick's files and geometry."""

    name: str
    files: dict[tuple[str, str], Path]  # by ("image", band), ("invvar", band) and ("maskbits", "")
    height: int
    width: int
    scale: float  # arcsec a pixel
    ra: float  # of the centre, degrees
    dec: float
    header: str  # of the projection

    def pixels(self, ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x and y, from 0 at the centre of the first pixel; NaN on the other side of the sky."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x, y = WCS(fits.Header.fromstring(self.header)).wcs_world2pix(ra, dec, 0)
        return x, y


def find_bricks(path: Path | str | Sequence[Path | str], bands: tuple[str, ...], mask_bits: int) -> list[Brick]:
    """All bricks with at least one of the bands; those of different folders (north and south) are kept apart.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: A header is unreadable, a brick's files differ, or a band is nowhere.
    """
    given = [Path(p) for p in ([path] if isinstance(path, str | Path) else path)]
    files: list[Path] = []
    for one in given:
        if not one.exists():
            raise FileNotFoundError(f"{one}: no such folder or file of bricks")
        if one.is_dir():
            listing = list_folder(one)
            listing.tell(one)
            files += listing.files
        else:
            files.append(one)
    groups: dict[tuple[Path, str], dict[tuple[str, str], Path]] = {}
    for file in files:
        found = NAME.fullmatch(file.name)
        if found and (found[4] or found[3] in bands):
            parts = groups.setdefault((file.parent, found[1]), {})
            what = ("maskbits", "") if found[4] else (found[2], found[3])
            if what in parts:
                raise ValueError(f"{file}: brick {found[1]} has this image twice, also as {parts[what].name}")
            parts[what] = file
    groups = {k: parts for k, parts in groups.items() if any(kind == "image" for kind, _ in parts)}
    have = {band for parts in groups.values() for kind, band in parts if kind == "image"}
    if missing := [band for band in bands if band not in have]:
        raise ValueError(f"{given[0]}: none of {len(files)} files is a legacysurvey-<brick>-image-{missing[0]}.fits.fz")
    bricks = [_brick(name, parts) for (_, name), parts in groups.items()]
    for brick in bricks:
        where = next(iter(brick.files.values()))
        if abs(brick.scale - bricks[0].scale) > SCALE_TOLERANCE * bricks[0].scale:
            raise ValueError(f"{where}: {brick.scale:.4g} arcsec a pixel, other bricks have {bricks[0].scale:.4g}")
        if mask_bits and ("maskbits", "") not in brick.files:
            raise ValueError(f"{where}: mask_bits needs legacysurvey-{brick.name}-maskbits.fits.fz beside it")
    return bricks


def _brick(name: str, files: dict[tuple[str, str], Path]) -> Brick:
    """Read the headers of a brick's files."""
    first: Brick | None = None
    for (kind, band), path in sorted(files.items()):
        try:
            brick = _header(name, files, path, band if kind == "image" else "")
        except DAMAGED as error:
            raise ValueError(f"{path}: not a readable brick image: {damage_of(path, error)}") from error
        first = first or brick
        if (brick.height, brick.width) != (first.height, first.width):
            raise ValueError(
                f"{path}: {brick.width}x{brick.height} pixels, the brick's other images have {first.width}x{first.height}"
            )
        corners = [np.array([0.0, first.width - 1.0]), np.array([0.0, first.height - 1.0])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sky = WCS(fits.Header.fromstring(first.header)).wcs_pix2world(*corners, 0)
        if not np.abs(np.stack(brick.pixels(*sky)) - np.stack(corners)).max() < SAME_PLACE:
            raise ValueError(f"{path}: its projection (WCS) is not that of the brick's other images")
    assert first is not None
    return first


def _header(name: str, files: dict[tuple[str, str], Path], path: Path, band: str) -> Brick:
    with open_fits(path) as hdus:
        header = image_hdu(hdus, axes=(2,)).header
    filtered, unit = str(header.get("FILTER") or band).strip(), flux_unit(header)
    if band and not _is_filter(filtered, band):
        raise ValueError(f"its FILTER is {filtered!r}, its name says {band!r}")
    if band and unit not in ("", "nanomaggy"):
        raise ValueError(f"its unit is {unit!r}, not nanomaggy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wcs = WCS(header)
    if not wcs.has_celestial or not all(t.endswith("TAN") for t in wcs.wcs.ctype):
        raise ValueError(f"it has no tangential projection (CTYPE {header.get('CTYPE1')!r}, {header.get('CTYPE2')!r})")
    frame = wcs_to_celestial_frame(wcs).name
    if wcs.wcs.lng != 0 or frame not in ("icrs", "fk5"):
        raise ValueError(f"its axes are {tuple(wcs.wcs.ctype)} in the frame {frame}, and must be RA and Dec in ICRS")
    height, width = int(header["NAXIS2"]), int(header["NAXIS1"])
    scale = float(np.sqrt(np.prod(proj_plane_pixel_scales(wcs)))) * 3600
    ra, dec = (float(v) for v in wcs.wcs_pix2world((width - 1) / 2, (height - 1) / 2, 0))
    return Brick(name, files, height, width, scale, ra % 360, dec, wcs.to_header().tostring())


def _is_filter(text: str, band: str) -> bool:
    """Whether a FILTER is that of a band: "g", "g DECam SDSS c0001 4720.0 1520.0", or "bokg", "bokr", "mosz", "zd"."""
    name = text.split(" ")[0].lower()
    return name == band.lower() or (name[0] if name[1:] == "d" else name[-1:]) == band.lower()
