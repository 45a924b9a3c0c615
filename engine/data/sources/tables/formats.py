"""Opening a table: its first bytes tell the format."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Literal

import h5py

from armillary.engine.data.sources.tables.arrow_tables import ArrowTable
from armillary.engine.data.sources.tables.astropy_tables import AstropyTable
from armillary.engine.data.sources.tables.columns import UNREADABLE, Table
from armillary.engine.data.sources.tables.fits_tables import FitsTable
from armillary.engine.data.sources.tables.hdf5_tables import Hdf5Table

__all__ = ["SUFFIXES", "open_table"]

SUFFIXES = (
    ".parquet",
    ".pq",
    ".csv",
    ".csv.gz",
    ".ecsv",
    ".vot",
    ".votable",
    ".fits",
    ".fits.gz",
    ".fit",
    ".h5",
    ".hdf5",
)
"""Endings of the names that are taken from a folder."""

ASTROPY: dict[str, Literal["ascii.ecsv", "votable"]] = {"ECSV": "ascii.ecsv", "VOTable": "votable"}
"""Astropy's names of formats that it reads."""

log = logging.getLogger("armillary.data")


def open_table(path: Path, table: int | str | None) -> Table:
    """Open a file; its first bytes say what it is, whatever its name.

    Args:
        path: The file.
        table: Number or name of a FITS HDU, path of an HDF5 group or data set; None for the only one or the first.

    Raises:
        ValueError: It is unreadable, or the table has no rows or no columns that can be read.
    """
    found: Table
    try:
        kind = _kind(path)
        if kind == "FITS":
            found = FitsTable(path, table)
        elif kind == "HDF5":
            found = Hdf5Table(path, None if table is None else str(table))
        elif kind in ASTROPY:
            found = AstropyTable(path, table, ASTROPY[kind])
        else:
            found = ArrowTable(path, csv=kind == "CSV")
    except UNREADABLE as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(f"{path}: not readable as a table: {reason}") from error
    if not found.columns:
        raise ValueError(f"{path}: no column holds numbers or text{found.told_unread()}")
    if not found.count:
        raise ValueError(f"{path}: the table has no rows")
    if found.unread:
        log.warning("%s: left out %d columns%s", path, len(found.unread), found.told_unread())
    return found


def _kind(path: Path) -> str:
    """Format of a file, from its first bytes."""
    with open(path, "rb") as file:
        head = file.read(512)
    if head[:2] == b"\x1f\x8b":
        with gzip.open(path) as unpacked:
            head = unpacked.read(512)
    if head[:6] == b"SIMPLE":
        return "FITS"
    if head[:4] == b"PAR1":
        return "Parquet"
    if h5py.is_hdf5(path):
        return "HDF5"
    if head[:2] == b"PK":
        raise ValueError("it is a zip archive or a file of NumPy (npz); write Parquet, FITS, HDF5 or CSV")
    if head[:6] == b"\x93NUMPY":
        raise ValueError("it is a file of NumPy; write Parquet, FITS, HDF5 or CSV")
    if head.startswith(b"# %ECSV"):
        return "ECSV"
    if b"<VOTABLE" in head.upper():
        return "VOTable"
    return "CSV"
