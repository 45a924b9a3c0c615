"""Writes DESI coadds and their Redrock files in the published layout."""

import numpy as np
from astropy.io import fits
from astropy.table import Table

ARMS = {"B": (0, 2751), "R": (2700, 2326), "Z": (4900, 2881)}


FIRST = 39633000000000001  # beyond 2^53: does not survive float64


def fibermap(count, first=FIRST, **changes):
    rows = np.arange(count)
    columns = {
        "TARGETID": (first + rows).astype(np.int64),
        "COADD_FIBERSTATUS": np.zeros(count, np.int32),
        "TARGET_RA": 150.0 + rows,
        "TARGET_DEC": 2.0 - rows,
        "OBJTYPE": np.full(count, "TGT", "U3"),
        "RELEASE": np.full(count, 9010, np.int16),
        "BRICKID": (500000 + rows).astype(np.int32),
        "BRICK_OBJID": rows.astype(np.int32),
        "MORPHTYPE": np.resize(["DEV", "SER", "", "REX"], count),
        "FLUX_G": np.linspace(1, 2, count).astype(np.float32),
        "FLUX_R": np.linspace(2, 3, count).astype(np.float32),
        "FLUX_Z": np.linspace(3, 4, count).astype(np.float32),
        "EBV": np.full(count, 0.02, np.float32),
        "DESI_TARGET": np.full(count, 2**60 + 1, np.int64),
        "COADD_EXPTIME": np.full(count, 900, np.float32),
    } | changes
    return {name: values for name, values in columns.items() if values is not None}


def redshifts(count, first=FIRST, **changes):
    rows = np.arange(count)
    columns = {
        "TARGETID": (first + rows).astype(np.int64),
        "CHI2": 8000.0 + rows,
        "COEFF": np.ones((count, 10)),
        "Z": 0.1 + 0.01 * rows,
        "ZERR": np.full(count, 1e-5),
        "ZWARN": np.full(count, 4, np.int64),
        "SPECTYPE": np.resize(["GALAXY", "QSO", "STAR"], count),
        "SUBTYPE": np.resize(["", "", "K"], count),
        "DELTACHI2": 50.0 - rows,
    } | changes
    return {name: values for name, values in columns.items() if values is not None}


def table(columns, name):
    hdu = fits.table_to_hdu(Table(columns))
    hdu.name = name
    return hdu


def write(path, count, *, first=FIRST, seed=0, tables=None, redrock=None, images=None, units=True, compressed=False):
    """A coadd and its redrock file in the published layout; `images` replaces HDUs (None leaves one out)."""
    rng = np.random.default_rng(seed)
    truth = {}
    hdus = {"FIBERMAP": table(fibermap(count, first, **(tables or {})), "FIBERMAP")}
    hdus["EXP_FIBERMAP"] = table(
        {"TARGETID": np.repeat(first + np.arange(count), 2), "EXPID": np.arange(2 * count)}, "EXP_FIBERMAP"
    )
    for arm, (start, pixels) in ARMS.items():
        flux = rng.normal(2, 1, (count, pixels)).astype(np.float32)
        ivar = rng.uniform(0.5, 2, (count, pixels)).astype(np.float32)
        mask = np.zeros((count, pixels), np.uint32)
        ivar[:, 100:103] = 0
        mask[:, 200] = 1 << 31
        flux[:, 100], flux[:, 300] = np.nan, np.inf
        truth[arm] = flux, ivar, mask
        named = {"WAVELENGTH": 3600 + 0.8 * (start + np.arange(pixels)), "FLUX": flux, "IVAR": ivar, "MASK": mask}
        named["RESOLUTION"] = np.ones((count, 3, 5), np.float32)
        for kind, values in named.items():
            kinds = fits.CompImageHDU if compressed and kind == "MASK" else fits.ImageHDU
            hdus[f"{arm}_{kind}"] = kinds(values, name=f"{arm}_{kind}")
        if units:
            hdus[f"{arm}_WAVELENGTH"].header["BUNIT"] = "Angstrom"
            hdus[f"{arm}_FLUX"].header["BUNIT"] = "10**-17 erg/(s cm2 Angstrom)"
            hdus[f"{arm}_IVAR"].header["BUNIT"] = "10**+34 (s2 cm4 Angstrom2) / erg2"
    for name, values in (images or {}).items():
        if values is None:
            del hdus[name]
        elif isinstance(values, np.ndarray):
            hdus[name] = fits.ImageHDU(values, name=name)
        else:
            hdus[name].header.update(values)
    hdus["SCORES"] = table({"TARGETID": first + np.arange(count)}, "SCORES")
    path.parent.mkdir(parents=True, exist_ok=True)
    fits.HDUList([fits.PrimaryHDU(), *hdus.values()]).writeto(path, overwrite=True)
    if redrock is not False:
        there = redshifts(count, first, **(redrock or {}))
        parts = [fits.PrimaryHDU(), table(there, "REDSHIFTS"), table(fibermap(count, first), "FIBERMAP")]
        fits.HDUList(parts).writeto(path.with_name(path.name.replace("coadd", "redrock")), overwrite=True)
    return truth
