"""Binary tables in FITS."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from armillary.engine.data.sources.files.fits_tables import is_plain
from armillary.engine.data.sources.hdus import all_hdus
from armillary.engine.data.sources.tables.columns import Column, Table, Values

__all__ = ["FitsTable"]


class FitsTable(Table):
    """A binary table extension of a FITS file, big-endian; mapped unless it is compressed."""

    def __init__(self, path: Path, table: int | str | None) -> None:
        super().__init__(path)
        self._table = table
        with self._hdu() as hdu:
            if twice := [name for name, n in Counter(hdu.columns.names).items() if n > 1]:
                raise ValueError(f"column {twice[0]!r} occurs twice")
            self.count = int(hdu.header["NAXIS2"])
            self._place, self._dtype = hdu.fileinfo()["datLoc"], hdu.columns.dtype.newbyteorder(">")
            self.columns = {c.name: found for c in hdu.columns if (found := _fits_column(c)) is not None}
            self.unread = {c.name: str(c.format) for c in hdu.columns if c.name not in self.columns}
            self._scales = {c.name: (c.format.format, c.bscale or 1, c.bzero or 0, c.null) for c in hdu.columns}
        self._file: Any = self._data() if self.count else None

    @contextmanager
    def _hdu(self) -> Iterator[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a truncated file shows when its data are mapped
            with fits.open(self.path, memmap=False) as hdus:
                every = list(all_hdus(hdus))
                chosen = every if self._table is None else [hdus[self._table]]
                found = next((h for h in chosen if isinstance(h, fits.BinTableHDU)), None)
                if found is None:
                    raise ValueError(f"no binary table{'' if self._table is None else f' {self._table!r}'}")
                yield found

    def _data(self) -> np.ndarray:
        if is_plain(self.path):
            return np.memmap(self.path, self._dtype, "r", self._place, (self.count,))
        with self._hdu() as hdu:
            return np.asarray(hdu.data)

    def _load(self, name: str) -> Values:
        if self._file is None:
            self._file = self._data()
        raw = self._file[name]
        code, scale, zero, null = self._scales[name]
        null = null if isinstance(null, int) else None
        if code == "L":
            return Values(np.select([raw == ord("T"), raw == ord("F")], [1.0, 0.0], np.nan).astype(np.float32))
        if self.columns[name].kind != "int" and (scale != 1 or zero != 0):
            scaled = raw.astype(np.float64) * scale + zero
            return Values(scaled if null is None else np.where(raw == null, np.nan, scaled))
        if zero == 0:
            return Values(raw, null)
        shifted = raw.astype(np.int64)  # unsigned integers are stored less half of their range
        whole = shifted.view(np.uint64) ^ np.uint64(2**63) if zero == 2**63 else shifted + int(zero)
        return Values(whole, None if null is None else null + int(zero))


def _fits_column(column: Any) -> Column | None:
    code, repeat = column.format.format, column.format.repeat
    unit = str(column.unit or "")
    if code == "A":
        return Column("text", None, unit) if repeat and not column.dim else None
    if code not in "LBIJKED" or repeat < 1 or (column.dim and "," in str(column.dim)):
        return None
    whole = (
        code in "BIJK" and column.bscale in (None, "", 1) and column.bzero in (None, "", 0, 2**15, 2**31, 2**63, -128)
    )
    kind: Any = "bool" if code == "L" else "int" if whole else "float"
    return Column(kind, None if repeat == 1 else repeat, unit)
