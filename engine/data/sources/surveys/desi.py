"""Coadded spectra of DESI (EDR, DR1), with the redshifts of Redrock.

Layout (desidatamodel, DESI_SPECTRO_REDUX/SPECPROD/healpix and tiles): `coadd-*.fits` holds a table FIBERMAP, a row a
target, and for each arm X = B, R, Z the images X_WAVELENGTH [n] (float64, vacuum angstrom), X_FLUX, X_IVAR [rows, n]
(float32, 1e-17 erg/s/cm2/angstrom) and X_MASK [rows, n] (uint32 as int32 with BZERO, 0 = good); files coadded across
arms have one arm BRZ instead. EXP_FIBERMAP, SCORES and X_RESOLUTION are not read. `redrock-*.fits` beside it has a table
REDSHIFTS, matched by TARGETID: its rows may be fewer or in another order.

All arms sample one grid, 3600 + 0.8 i angstrom up to 9824. Where two overlap, they are joined by weighting with inverse
variance. Pixels of a non-zero mask, of ivar 0 or that are not finite carry no data.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from armillary.engine.data.format.survey import SpectrumRecord
from armillary.engine.data.sources.files.desi_coadd import DESI_GRID, LABELS, UNNAMED, CoaddFile
from armillary.engine.data.sources.files.fits_tables import FLUX_UNIT, READ_ERRORS
from armillary.engine.data.sources.files.parts import short_names
from armillary.engine.data.sources.listing import find_files
from armillary.engine.data.sources.source import BadSample, Rows, Sample, key_from_name, listing_mark

__all__ = ["DESI_GRID", "DesiCoadds"]

SUFFIXES = (".fits.gz", ".fits")

log = logging.getLogger("armillary.data")


class DesiCoadds:
    """A `Source` of coadded DESI spectra.

    The key of a sample is its TARGETID. A target that occurs in several files (observed by several programs, or in
    several tiles) has the file's name after its TARGETID in each: they are different spectra of one object, so split
    such surveys by position. Labels are the columns of Redrock (`redshift`, `zwarn`, ...) and of FIBERMAP; where a file
    lacks a column that others have, it is unknown.

    Args:
        path: A coadd file, several, or a folder: all `coadd-*.fits` in it and its sub-folders, sorted.
        redrock: True for the `redrock-*.fits` beside every coadd, False for none (and no redshifts), or the folder or
            file that has them.
        good_fibers: Only rows of COADD_FIBERSTATUS 0.
        targets_only: Only rows of OBJTYPE TGT, where there is such a column; tiles have rows of blank sky as well.
        need_fibermap: False accepts files without FIBERMAP: all their rows, keyed by file and row, without labels.

    Raises:
        FileNotFoundError: There is no such file or folder, or a coadd's redrock file is missing.
        ValueError: A file is damaged or not of this layout, a TARGETID occurs twice in it, or no row is left.
    """

    bands: tuple[str, ...] = ()
    pixel_scale_arcsec: float | None = None
    unit = ""
    spectrum = SpectrumRecord(DESI_GRID, FLUX_UNIT)

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        *,
        redrock: bool | Path | str = True,
        good_fibers: bool = True,
        targets_only: bool = True,
        need_fibermap: bool = True,
    ) -> None:
        self.files, self._names = _find(path)
        self._redrock = [None if redrock is False else _redrock_of(f, redrock) for f in self.files]
        self._cuts = (good_fibers, targets_only, need_fibermap)
        self._open: tuple[int, int, CoaddFile] | None = None
        numbers, rows, targets = [], [], []
        have: set[str] = set()
        total = 0
        for number in range(len(self.files)):
            with CoaddFile(self.files[number], self._redrock[number], need_fibermap) as coadd:
                kept = coadd.keep(good_fibers, targets_only)
                have |= set(coadd.labels)
                total += coadd.count
                numbers.append(np.full(len(kept), number, np.int32))
                rows.append(kept.astype(np.int32))
                targets.append(coadd.targets[kept])
        self._number, self._row, self._target = (np.concatenate(parts) for parts in (numbers, rows, targets))
        if not len(self._row):
            raise ValueError(f"{path}: none of {total} rows is left after the cuts on fibres and targets")
        if total > len(self._row):
            log.info("%s: %d of %d rows are left after the cuts", path, len(self._row), total)
        self._repeats = _repeats(self._target)
        self.labels = {label: what for label, (what, _) in LABELS.items() if label in have}

    def __len__(self) -> int:
        """Number of rows that are left after the cuts."""
        return len(self._row)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open file."""
        return {**self.__dict__, "_open": None}

    def inputs(self) -> dict[str, str]:
        """The files (checksum of names and sizes: terabytes are not read twice) and the cuts."""
        listing: list[Any] = [(n, f.stat().st_size) for n, f in zip(self._names, self.files, strict=True)]
        listing += [(r.name, r.stat().st_size) for r in self._redrock if r is not None]
        return {f"{len(self.files)} coadds from {self._names[0]}": listing_mark((listing, self._cuts))}

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels; see `Described`. Spectra are not read."""
        keys: list[str] = []
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in ("ra", "dec", *self.labels)}
        bad: dict[int, str] = {}
        for number, low, high in self._runs(start, stop):
            coadd = self._file(number)
            rows = self._row[low:high]
            keys += [self._key(i) for i in range(low, high)]
            for name, column_pieces in pieces.items():
                column_pieces.append(coadd.values(name, rows))
            for i, row in enumerate(rows.tolist()):
                if why := coadd.problem(row):
                    bad[low + i] = f"{self.files[number]}: row {row}: {why}"
        columns: dict[str, np.ndarray | list[str]] = {}
        for name, parts in pieces.items():
            if name in self.labels and LABELS[name][1]:
                columns[name] = [text for part in parts for text in part.tolist()]
            else:
                columns[name] = np.concatenate(parts) if parts else np.zeros(0)
        return Rows(keys, columns, bad=bad)

    def read(self, index: int) -> Sample:
        """Read one spectrum.

        Raises:
            BadSample: The row is damaged, its position impossible, Redrock lacks it, or no pixel carries data.
            IndexError: There is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}: this source has {len(self)}")
        number, row = int(self._number[index]), int(self._row[index])
        described = self.describe(index, index + 1)
        if described.bad:
            raise BadSample(described.bad[index])
        try:
            spectrum = self._file(number).spectrum(row)
        except READ_ERRORS as error:
            raise BadSample(f"{self.files[number]}: row {row}: {error}") from error
        return described.sample(0, self.labels, f"{self._names[number]}:{row}", spectrum=spectrum)

    def _key(self, index: int) -> str:
        target, number = int(self._target[index]), int(self._number[index])
        stem = key_from_name(_stem(self._names[number])).replace("coadd-", "", 1)
        if target == UNNAMED:
            return f"{stem}-{self._row[index]:05d}"
        place = int(np.searchsorted(self._repeats, target))
        repeats = place < len(self._repeats) and self._repeats[place] == target
        return f"{target}-{stem}" if repeats else str(target)

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(file number, first, last + 1) of the samples [start, stop)."""
        while start < stop:
            number = int(self._number[start])
            end = min(stop, int(np.searchsorted(self._number, number, side="right")))
            yield number, start, end
            start = end

    def _file(self, number: int) -> CoaddFile:
        """The open file. One is open at a time: the builder reads in the order of rows."""
        if self._open is None or self._open[:2] != (os.getpid(), number):
            if self._open is not None and self._open[0] == os.getpid():
                self._open[2].close()
            coadd = CoaddFile(self.files[number], self._redrock[number], self._cuts[2])
            self._open = (os.getpid(), number, coadd)
        return self._open[2]


def _find(path: Path | str | Sequence[Path | str]) -> tuple[list[Path], list[str]]:
    """Coadd files, and the shortest names that tell them apart: their own, or with folders where those repeat."""
    files = find_files(path, SUFFIXES, "coadd file", prefix="coadd-", companions=("redrock-", "labels.csv"))
    names = [f.name for f in files]
    if len({_stem(name) for name in names}) < len(names):
        names = short_names(files)
    twice = [name for name, n in Counter(_stem(name) for name in names).items() if n > 1]
    if twice:
        raise ValueError(f"{path}: {twice[0]} is there twice, compressed and not; keep one")
    return files, names


def _redrock_of(coadd: Path, where: bool | Path | str) -> Path:
    """The redrock file of a coadd: beside it, in a folder, or the file that is given."""
    if not isinstance(where, bool) and Path(where).is_file():
        return Path(where)
    folder = coadd.parent if isinstance(where, bool) else Path(where)
    stem = _stem(coadd.name).replace("coadd", "redrock", 1)
    for suffix in SUFFIXES[::-1]:
        if coadd.name.startswith("coadd") and (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    name = f"{stem}.fits" if coadd.name.startswith("coadd") else "file of redshifts"
    raise FileNotFoundError(
        f"{coadd}: no {name} in {folder}; give the folder or file that has it (redrock=PATH), or read without redshifts "
        "(redrock=False)"
    )


def _stem(name: str) -> str:
    """A name without the extension of a FITS file."""
    return next((name[: -len(s)] for s in SUFFIXES if name.lower().endswith(s)), name)


def _repeats(targets: np.ndarray) -> np.ndarray:
    """Sorted TARGETIDs that occur more than once."""
    values, counts = np.unique(targets, return_counts=True)
    return values[counts > 1]
