"""One coadd file of DESI with its redshifts, opened and found to be of the right layout; see `surveys.desi`."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import WaveGrid
from armillary.engine.data.sources.files.fits_tables import (
    READ_ERRORS,
    Table,
    check_flux_unit,
    is_plain,
    open_fits,
)
from armillary.engine.data.sources.source import position_problem

__all__ = ["DESI_GRID", "LABELS", "UNNAMED", "CoaddFile"]

DESI_GRID = WaveGrid("linear", 3600.0, 0.8, 7781)
ON_GRID = 1e-3  # of a pixel
FLUXES = [f"{kind}_{b}" for b in "GRZ" for kind in ("FLUX", "FLUX_IVAR", "FIBERFLUX")] + ["FLUX_W1", "FLUX_W2"]
TARGET_BITS = [f"{survey}{name}_TARGET" for survey in ("", "SV1_", "SV2_", "SV3_") for name in ("DESI", "BGS", "MWS")]
NUMBERS = {
    "COADD_FIBERSTATUS": "bits of the fibre's status, 0 = good",
    **{name: f"{name}, nanomaggy" + ("^-2" if "IVAR" in name else "") for name in FLUXES},
    "EBV": "Galactic reddening E(B-V), mag",
    "RELEASE": "Legacy Survey release; with brickid and brick_objid names the object",
    "BRICKID": "Legacy Survey brick",
    "BRICK_OBJID": "Legacy Survey object within the brick",
    "COADD_NUMEXP": "exposures in the coadd",
    "COADD_EXPTIME": "exposure time, s",
}
TEXTS = {
    "OBJTYPE": "TGT = target, SKY = blank sky",
    "MORPHTYPE": "Legacy Survey morphological type",
    "PHOTSYS": "N = BASS/MzLS, S = DECam",
    **{name: "target bits, as decimal text (64 bits)" for name in TARGET_BITS},
}
REDSHIFT_NUMBERS = {
    "Z": "redshift (Redrock)",
    "ZERR": "error of the redshift",
    "ZWARN": "bits of warnings of the redshift, 0 = good",
    "CHI2": "chi^2 of the best fit",
    "DELTACHI2": "chi^2 of the next best fit less that of the best",
}
REDSHIFT_TEXTS = {"SPECTYPE": "GALAXY, QSO or STAR (Redrock)", "SUBTYPE": "subtype (Redrock)"}
OPTIONAL = ("CHI2", "DELTACHI2", "SUBTYPE")
LABELS = {
    "targetid": ("DESI's identifier of the target", True),
    "redshift": (REDSHIFT_NUMBERS["Z"], False),
    **{name.lower(): (what, False) for name, what in REDSHIFT_NUMBERS.items() if name != "Z"},
    **{name.lower(): (what, True) for name, what in REDSHIFT_TEXTS.items()},
    **{name.lower(): (what, False) for name, what in NUMBERS.items()},
    **{name.lower(): (what, True) for name, what in TEXTS.items()},
}
"""Meaning of every label that a file may have, and whether it is text."""

UNNAMED = np.iinfo(np.int64).min
"""TARGETID of a row of a file without FIBERMAP."""


class CoaddFile:
    """One open coadd file, found to be of the right layout, and its redshifts."""

    def __init__(self, path: Path, redrock: Path | None, need_fibermap: bool) -> None:
        self.path, self.redrock = path, redrock
        self._hdus = open_fits(path)
        self._plain = is_plain(path)
        self._close = weakref.finalize(self, self._hdus.close)
        try:
            self._named = {hdu.name: hdu for hdu in self._hdus}  # astropy reads all headers to find one by name
            arms = ("BRZ",) if "BRZ_FLUX" in self._named else ("B", "R", "Z")
            first = self._hdu(f"{arms[0]}_FLUX").shape
            self.count = first[0] if len(first) == 2 else 0
            if not self.count:
                raise ValueError(f"{path}: {arms[0]}_FLUX is {first}, not rows x pixels with at least one row")
            self._first = {arm: self._check_arm(arm) for arm in arms}
            self._read_tables(need_fibermap)
        except READ_ERRORS as error:
            self.close()
            if isinstance(error, ValueError) and str(error).startswith((str(path), str(redrock))):
                raise
            raise ValueError(f"{path}: not readable: {error}") from error

    def __enter__(self) -> CoaddFile:
        """Itself; it is closed on leaving."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; garbage collection does so too."""
        self._close()

    @property
    def labels(self) -> list[str]:
        """Labels that this file has."""
        return [name for name in self._columns if name not in ("ra", "dec")]

    def keep(self, good_fibers: bool, targets_only: bool) -> np.ndarray:
        """Rows that satisfy the cuts."""
        kept = np.ones(self.count, bool)
        if "ra" in self._columns:
            if good_fibers and "coadd_fiberstatus" not in self._columns:
                raise ValueError(
                    f"{self.path}: column 'COADD_FIBERSTATUS' of HDU FIBERMAP: missing; good_fibers=False reads all rows"
                )
            if good_fibers:
                kept &= self._columns["coadd_fiberstatus"] == 0
            if targets_only and "objtype" in self._columns:
                kept &= self._columns["objtype"] == "TGT"
        return np.flatnonzero(kept)

    def values(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Position or label of some rows; NaN or "" where this file has none."""
        if name in self._columns:
            return self._columns[name][rows]
        text = name not in ("ra", "dec") and LABELS[name][1]
        return np.full(len(rows), "" if text else np.nan)

    def problem(self, row: int) -> str | None:
        """Why a row is unusable, as far as the tables tell."""
        for axis in ("ra", "dec"):
            if axis in self._columns and (why := position_problem(axis, float(self._columns[axis][row]))):
                return f"column 'TARGET_{axis.upper()}': {why}"
        if self.redrock is not None and self._redshift_row[row] < 0:
            return f"TARGETID {self.targets[row]} has no row in {self.redrock}"
        return None

    def spectrum(self, row: int) -> Spectrum:
        """Read a row of every arm and join them."""
        flux, ivar = np.zeros(DESI_GRID.count), np.zeros(DESI_GRID.count)
        for arm, first in self._first.items():
            with np.errstate(invalid="ignore"):  # signalling NaN
                values, weights = (np.asarray(self._row_of(f"{arm}_{x}", row), np.float64) for x in ("FLUX", "IVAR"))
            if (weights < 0).any():
                pixel = int(np.argmax(weights < 0))
                raise ValueError(f"{arm}_IVAR: pixel {pixel} is {weights[pixel]:g}, and must not be negative")
            good = np.isfinite(values) & np.isfinite(weights) & (weights > 0)
            if f"{arm}_MASK" in self._named:
                good &= self._row_of(f"{arm}_MASK", row) == 0
            place = slice(first, first + len(values))
            weights[~good] = 0
            flux[place] += np.where(good, values, 0.0) * weights
            ivar[place] += weights
        seen = ivar > 0
        if not seen.any():
            raise ValueError("no pixel carries data")
        flux[seen] /= ivar[seen]
        return Spectrum(flux.astype(np.float32), ivar.astype(np.float32))

    def _hdu(self, name: str) -> Any:
        if name not in self._named:
            there = ", ".join(sorted(set(self._named) - {"", "PRIMARY"})) or "none"
            raise ValueError(f"{self.path}: no HDU {name}; it has {there}")
        return self._named[name]

    def _row_of(self, name: str, row: int) -> np.ndarray:
        hdu = self._named[name]
        return hdu.section[row] if self._plain else hdu.data[row]  # gzip cannot be read in part

    def _check_arm(self, arm: str) -> int:
        """Place of an arm's first pixel on the grid."""
        name = f"{arm}_WAVELENGTH"
        wave = np.asarray(self._hdu(name).data, np.float64)
        if str(unit := self._hdu(name).header.get("BUNIT", "Angstrom")).strip().lower() != "angstrom":
            raise ValueError(f"{self.path}: {name}: its unit is {unit!r}, and must be Angstrom")
        where = f"{self.path}: {name}"
        if wave.ndim != 1 or not np.isfinite(wave).all():
            raise ValueError(f"{where}: must be a vector of finite wavelengths")
        if not (np.diff(wave) > 0).all():
            raise ValueError(f"{where}: must increase, and does not at pixel {int(np.argmin(np.diff(wave) > 0)) + 1}")
        pixel = (wave - DESI_GRID.start) / DESI_GRID.step
        first = int(np.rint(pixel[0]))
        off = np.abs(pixel - (first + np.arange(len(wave)))) > ON_GRID
        if off.any() or first < 0 or first + len(wave) > DESI_GRID.count:
            wrong = wave[np.argmax(off)] if off.any() else wave[0 if first < 0 else -1]
            raise ValueError(f"{where}: {wrong:g} is no pixel of the grid 3600 + 0.8 i angstrom to 9824")
        for kind in ("FLUX", "IVAR", "MASK"):
            if kind == "MASK" and f"{arm}_MASK" not in self._named:
                continue
            hdu = self._hdu(f"{arm}_{kind}")
            if tuple(hdu.shape) != (self.count, len(wave)):
                raise ValueError(
                    f"{self.path}: {arm}_{kind} is {tuple(hdu.shape)}, and must be {self.count} rows of {len(wave)} pixels"
                )
        check_flux_unit(self.path, f"{arm}_FLUX", self._hdu(f"{arm}_FLUX").header.get("BUNIT"))
        return first

    def _read_tables(self, need_fibermap: bool) -> None:
        """Target identifiers, positions and labels of all rows."""
        self._columns: dict[str, np.ndarray] = {}
        self.targets = np.full(self.count, UNNAMED)
        self._redshift_row = np.full(self.count, -1)
        if "FIBERMAP" in self._named or need_fibermap:
            table = Table(self.path, self._hdu("FIBERMAP"))
            if table.count != self.count:
                raise ValueError(f"{self.path}: FIBERMAP has {table.count} rows, the spectra {self.count}")
            self.targets = _identifiers(table)
            for axis in ("ra", "dec"):
                self._columns[axis] = table.numbers(f"TARGET_{axis.upper()}").astype(np.float64)
            self._columns["targetid"] = self.targets.astype(str)
            self._take(table, {n: n.lower() for n in NUMBERS}, {n: n.lower() for n in TEXTS}, None)
        if self.redrock is not None:
            self._read_redshifts(self.redrock)

    def _read_redshifts(self, path: Path) -> None:
        if "targetid" not in self._columns:
            raise ValueError(
                f"{self.path}: no HDU FIBERMAP, so redshifts cannot be matched to it; redrock=False reads without"
            )
        with open_fits(path) as hdus:
            names = {hdu.name for hdu in hdus}
            if "REDSHIFTS" not in names and "ZBEST" not in names:
                raise ValueError(
                    f"{path}: no HDU REDSHIFTS; it has {', '.join(sorted(names - {'', 'PRIMARY'})) or 'none'}"
                )
            table = Table(path, hdus["REDSHIFTS" if "REDSHIFTS" in names else "ZBEST"])
        for name in (*REDSHIFT_NUMBERS, *REDSHIFT_TEXTS):
            if name not in OPTIONAL:
                table.require(name)
        known = _identifiers(table)
        order = np.argsort(known)
        place = np.clip(np.searchsorted(known, self.targets, sorter=order), 0, max(len(known) - 1, 0))
        if len(known):
            self._redshift_row = np.where(known[order[place]] == self.targets, order[place], -1)
        numbers = {name: "redshift" if name == "Z" else name.lower() for name in REDSHIFT_NUMBERS}
        self._take(table, numbers, {n: n.lower() for n in REDSHIFT_TEXTS}, self._redshift_row)

    def _take(self, table: Table, numbers: dict[str, str], texts: dict[str, str], rows: np.ndarray | None) -> None:
        """Take those columns that are there as labels; `rows` are those of the table for each row, -1 where none."""
        for text, names in ((False, numbers), (True, texts)):
            for name, label in names.items():
                if name in table:
                    values = table.texts(name) if text else table.numbers(name).astype(np.float64)
                    self._columns[label] = values if rows is None else np.append(values, "" if text else np.nan)[rows]


def _identifiers(table: Table) -> np.ndarray:
    """TARGETID of every row; no target may have two rows (negative ones are fibres without a target)."""
    values = table.numbers("TARGETID")
    where = f"{table.path}: column 'TARGETID' of HDU {table.name}"
    if values.dtype.kind not in "iu":
        raise ValueError(f"{where}: holds {values.dtype}, not whole numbers")
    order = np.argsort(values, kind="stable")
    twice = np.flatnonzero((values[order[1:]] == values[order[:-1]]) & (values[order[1:]] >= 0))
    if twice.size:
        first, second = order[twice[0]], order[twice[0] + 1]
        raise ValueError(f"{where}: {values[first]} at rows {first} and {second}; a target has one row in a coadd")
    return values.astype(np.int64)
