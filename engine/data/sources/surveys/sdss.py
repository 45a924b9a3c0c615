"""Spectra of SDSS and BOSS, one file each, on one common grid.

Layout (SDSS data model, spec-PLATE-MJD-FIBER.fits, "lite" or full, also gzipped): HDU 1 (COADD) is a table with a row a
pixel: loglam (log10 of the vacuum wavelength in angstrom, float32), flux (1e-17 erg/s/cm2/angstrom), ivar, and_mask;
HDU 2 (SPECOBJ or SPALL) a table of one row: CLASS, Z, Z_ERR, ZWARNING, PLUG_RA, PLUG_DEC, ... Early releases spell
columns otherwise (upper case, ZERR, RA) and leave HDUs without a name; later HDUs are not read.

Quirks: every spectrum starts elsewhere (SDSS about 3,800 to 9,200 angstrom, BOSS 3,560 to 10,350), but all pixels are
those of one lattice, whole multiples of 1e-4 in log10(wavelength), which float32 rounds by up to 0.3 % of a pixel. On the
default grid, a piece of that lattice, spectra are therefore copied; onto other grids they are rebinned (`resample`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, WaveGrid
from armillary.engine.data.sources.files.fits_tables import (
    FLUX_UNIT,
    READ_ERRORS,
    Table,
    check_flux_unit,
    open_fits,
)
from armillary.engine.data.sources.listing import find_files
from armillary.engine.data.sources.resample import pixel_edges, rebin
from armillary.engine.data.sources.source import (
    BadSample,
    Rows,
    Sample,
    key_from_name,
    listing_mark,
    position_problem,
)

__all__ = ["SDSS_GRID", "SdssSpectra"]

LATTICE = 1e-4  # of log10(wavelength)
ON_LATTICE = 0.02  # of a pixel: well above the rounding of float32, well below what matters
SDSS_GRID = WaveGrid("log10", 3.55, LATTICE, 4701)
SUFFIXES = (".fits", ".fits.gz")
NAME = re.compile(r"spec-(\d{4,5})-(\d{5})-(\d{4})")
NO_DATA_BITS = (22, 24)  # NOSKY, NODATA
POSITION = {"ra": ("PLUG_RA", "RA"), "dec": ("PLUG_DEC", "DEC")}
NUMBERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "redshift": ("redshift of the best template (Z)", ("Z",)),
    "zerr": ("error of the redshift", ("Z_ERR", "ZERR")),
    "zwarning": ("bits of warnings of the redshift, 0 = good", ("ZWARNING", "ZWARN")),
    "z_noqso": ("redshift without quasar templates, to be preferred for BOSS galaxies", ("Z_NOQSO",)),
    "sn_median_all": ("median signal to noise of the pixels", ("SN_MEDIAN_ALL",)),
    "plate": ("plate", ("PLATE",)),
    "mjd": ("modified Julian date", ("MJD",)),
    "fiberid": ("fibre", ("FIBERID",)),
}
TEXTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "class": ("GALAXY, QSO or STAR", ("CLASS",)),
    "subclass": ("subclass", ("SUBCLASS",)),
    "specobjid": ("SDSS's identifier of the spectrum", ("SPECOBJID",)),
}
REQUIRED = ("redshift", "zerr", "zwarning", "class")


class SdssSpectra:
    """A `Source` of SDSS spectra. Files are listed when it is made, and opened when described or read.

    The key of a sample is its file's name without `spec-`: PLATE-MJD-FIBER. Pixels of ivar 0, those that are not finite
    and those with one of `mask_bits` set carry no data. Where a file lacks an optional column, the label is unknown.

    The default grid, 3.5500 to 4.0200 in steps of 1e-4 (3,548 to 10,471 angstrom, 4,701 pixels), holds all that SDSS and
    BOSS spectrographs recorded, so that models see one grid for any selection of spectra. Pixels that a file does not
    reach are masked.

    Args:
        path: A file, several, or a folder: all `spec-*.fits` and `.fits.gz` in it and its sub-folders, sorted.
        grid: The common grid; a `WaveGrid`, or its (kind, start, step, count).
        mask_bits: Bits of and_mask that mean "no data". By default NOSKY and NODATA; most others, such as BRIGHTSKY,
            warn of noise that ivar already tells.
        coverage: See `resample.rebin`.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There are no spectra, two files have one name, or an option is wrong.
    """

    bands: tuple[str, ...] = ()
    pixel_scale_arcsec: float | None = None
    unit = ""

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        *,
        grid: WaveGrid | tuple[Any, float, float, int] = SDSS_GRID,
        mask_bits: Sequence[int] = NO_DATA_BITS,
        coverage: float = 0.5,
    ) -> None:
        self.files = _find(path)
        chosen = grid if isinstance(grid, WaveGrid) else WaveGrid(*grid)
        self.spectrum = SpectrumRecord(chosen, FLUX_UNIT)
        if not all(0 <= bit < 32 for bit in mask_bits):
            raise ValueError(f"mask_bits: must be within 0 and 31, got {tuple(mask_bits)}")
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage: must be above 0 and at most 1, got {coverage}")
        self._mask = sum(1 << bit for bit in set(mask_bits))
        self._coverage = coverage
        self._edges = pixel_edges(chosen.angstrom(), log=chosen.kind == "log10")
        self.labels = {label: what for label, (what, _) in (NUMBERS | TEXTS).items()}
        self.labels["objid"] = "SDSS's identifier of the object in the images"

    def __len__(self) -> int:
        """Number of files."""
        return len(self.files)

    def inputs(self) -> dict[str, str]:
        """The files (checksum of names and sizes) and the options."""
        listing = [(f.name, f.stat().st_size) for f in self.files]
        mark = listing_mark((listing, self._mask, self._coverage))
        return {f"{len(self.files)} spectra from {self.files[0].name}": mark}

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels; see `Described`. Of each file the tables' headers and HDU 2 are read."""
        rows: list[dict[str, float | str]] = []
        bad: dict[int, str] = {}
        blank: dict[str, float | str] = {name: np.nan for name in ("ra", "dec", *NUMBERS)}
        blank |= {name: "" for name in (*TEXTS, "objid")}
        for index in range(start, stop):
            path = self.files[index]
            try:
                with open_fits(path) as hdus:
                    rows.append(_object(path, _tables(path, hdus)[1]))
            except READ_ERRORS as error:
                bad[index] = _named(path, error)
                rows.append(blank)
        columns: dict[str, np.ndarray | list[str]] = {}
        for name in ("ra", "dec", *self.labels):
            text = isinstance(blank[name], str)
            values = [row[name] for row in rows]
            columns[name] = [str(v) for v in values] if text else np.array(values, np.float64)
        return Rows([_key(self.files[i]) for i in range(start, stop)], columns, bad=bad)

    def read(self, index: int) -> Sample:
        """Read one file.

        Raises:
            BadSample: It is damaged or of another layout.
            IndexError: There is no such file.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"file {index}: this source has {len(self)}")
        path = self.files[index]
        try:
            with open_fits(path) as hdus:
                pixels, row = _tables(path, hdus)
                values = _object(path, row)
                spectrum = self._spectrum(path, pixels)
        except READ_ERRORS as error:
            raise BadSample(_named(path, error)) from error
        return Sample(
            key=_key(path),
            image=None,
            valid=None,
            ra=float(values.pop("ra")),
            dec=float(values.pop("dec")),
            labels=values,
            source=path.name,
            spectrum=spectrum,
        )

    def _spectrum(self, path: Path, table: Table) -> Spectrum:
        """Bring the pixels of a file onto the grid."""
        with np.errstate(invalid="ignore"):  # signalling NaN
            loglam = table.numbers("loglam").astype(np.float64)
            flux, ivar = (table.numbers(name).astype(np.float64) for name in ("flux", "ivar"))
        where = f"{path}: column 'loglam'"
        if not np.isfinite(loglam).all():
            raise ValueError(f"{where}: pixel {int(np.argmin(np.isfinite(loglam)))} is not finite")
        if not (np.diff(loglam) > 0).all():
            raise ValueError(f"{where}: must increase, and does not at pixel {int(np.argmin(np.diff(loglam) > 0)) + 1}")
        if not 3 < loglam[0] < loglam[-1] < 5:
            raise ValueError(f"{where}: {loglam[0]:g} to {loglam[-1]:g} is no log10 of optical wavelengths in angstrom")
        if (ivar < 0).any():
            pixel = int(np.argmax(ivar < 0))
            raise ValueError(f"{path}: column 'ivar': pixel {pixel} is {ivar[pixel]:g}, and must not be negative")
        if self._mask and "and_mask" in table:
            flagged = table.numbers("and_mask").astype(np.int64) & self._mask
            ivar[flagged != 0] = 0
        ivar[~(np.isfinite(ivar) & np.isfinite(flux))] = 0
        lattice = np.rint(loglam / LATTICE)
        if np.abs(loglam / LATTICE - lattice).max() < ON_LATTICE and (np.diff(lattice) > 0).all():
            place = (lattice - lattice[0]).astype(np.int64)
            whole = np.zeros((2, place[-1] + 1))  # with gaps where pixels are left out
            whole[:, place] = flux, ivar
            flux, ivar = whole
            loglam = (lattice[0] + np.arange(len(flux))) * LATTICE
        edges = pixel_edges(10.0**loglam, log=True)
        flux, ivar = rebin(flux, ivar, edges, self._edges, coverage=self._coverage)
        if not (ivar > 0).any():
            raise ValueError(f"{path}: no pixel carries data on the grid")
        return Spectrum(flux.astype(np.float32), ivar.astype(np.float32))


def _find(path: Path | str | Sequence[Path | str]) -> list[Path]:
    """The files; no two of one name."""
    files = find_files(path, SUFFIXES, "spectrum file", prefix="spec-")
    keys: dict[str, Path] = {}
    for file in files:
        if (other := keys.setdefault(_key(file), file)) is not file:
            raise ValueError(f"{file}: it is the same spectrum as {other}; keep one")
    return files


def _key(path: Path) -> str:
    return key_from_name(re.sub(r"\.fits(\.gz)?$", "", path.name, flags=re.IGNORECASE).removeprefix("spec-"))


def _named(path: Path, error: BaseException) -> str:
    """What is wrong with a file; file names are said once."""
    return str(error) if str(error).startswith(str(path)) else f"{path}: not readable: {error}"


def _tables(path: Path, hdus: Any) -> tuple[Table, Table]:
    """HDUs 1 and 2; files of another layout, unit or kind of wavelength are refused."""
    if len(hdus) < 3:
        names = ", ".join(hdu.name or "one without a name" for hdu in hdus)
        raise ValueError(
            f"{path}: {len(hdus)} HDUs ({names}); it must have COADD and SPECOBJ after the first, and may be truncated"
        )
    pixels, row = Table(path, hdus[1]), Table(path, hdus[2])
    for name in ("loglam", "flux", "ivar"):
        pixels.require(name)
    if pixels.count < 2:
        raise ValueError(f"{path}: HDU 1 (COADD): it has {pixels.count} rows, and must have one a pixel")
    if row.count != 1:
        raise ValueError(f"{path}: HDU 2 (SPECOBJ): it has {row.count} rows, and must have one")
    if hdus[0].header.get("VACUUM") is False:
        raise ValueError(f"{path}: its wavelengths are those of air (VACUUM = F), and must be those of vacuum")
    check_flux_unit(path, "BUNIT", hdus[0].header.get("BUNIT"))
    return pixels, row


def _object(path: Path, table: Table) -> dict[str, float | str]:
    """Position and labels of a file."""
    values: dict[str, float | str] = {}
    for axis, columns in POSITION.items():
        value = float(table.numbers(*columns)[0])
        if why := position_problem(axis, value):
            raise ValueError(f"{path}: column {table.require(*columns)!r}: {why}")
        values[axis] = value
    for label, (_, names) in NUMBERS.items():
        there = label in REQUIRED or any(name in table for name in names)
        values[label] = float(table.numbers(*names)[0]) if there else np.nan
    for label, (_, names) in TEXTS.items():
        there = label in REQUIRED or any(name in table for name in names)
        values[label] = str(table.texts(*names)[0]) if there else ""
    if "CLASS_NOQSO" in table and not table.texts("CLASS_NOQSO")[0]:
        values["z_noqso"] = np.nan  # SDSS galaxies have 0 there
    photometric = [name for name in ("BESTOBJID", "OBJID") if table.has_value(name)]  # SDSS's own OBJID has five parts
    values["objid"] = next((str(text) for name in photometric if (text := table.texts(name)[0])), "")
    named = NAME.match(path.name)
    if named and all(name in table for name in ("PLATE", "MJD", "FIBERID")):
        told = tuple(int(values[name]) for name in ("plate", "mjd", "fiberid"))
        if told != tuple(int(part) for part in named.groups()):
            raise ValueError(f"{path}: columns PLATE, MJD and FIBERID say {told}, the file's name says otherwise")
    return values
