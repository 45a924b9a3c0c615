"""Tables in ECSV and VOTable, which are text and read as a whole by astropy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from armillary.engine.data.sources.tables.columns import Column, Table, Values, decoded

__all__ = ["AstropyTable"]


class AstropyTable(Table):
    """ECSV or VOTable.

    Args:
        path: The file.
        table: Number or identifier of the table in a VOTable; None for the only one.
        form: Astropy's name of the format.
    """

    def __init__(self, path: Path, table: int | str | None, form: Literal["ascii.ecsv", "votable"]) -> None:
        super().__init__(path)
        self._table, self._form = table, form
        self._file: Any = self._open()
        self.count = len(self._file)
        described = {name: self._file[name] for name in self._file.colnames}
        found = {name: _column(c.dtype, c.shape[1:], str(c.unit or "")) for name, c in described.items()}
        self.columns = {name: column for name, column in found.items() if column is not None}
        self.unread = {name: str(described[name].dtype) for name, column in found.items() if column is None}

    def _open(self) -> Any:
        from astropy.table import Table as Astropy  # here, since it takes half a second and few files are these

        chosen = {} if self._table is None or self._form != "votable" else {"table_id": self._table}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # small breaches of the standard
            return Astropy.read(self.path, format=self._form, **chosen)

    def _load(self, name: str) -> Values:
        if self._file is None:
            self._file = self._open()
        column = self._file[name]
        values, hidden = np.asarray(column), np.ma.getmaskarray(np.ma.asarray(column))
        if self.columns[name].kind == "text":
            texts = [None if m else decoded(v) for v, m in zip(values.tolist(), hidden.tolist(), strict=True)]
            return Values(pa.array(texts, pa.large_string()))
        if not hidden.any():
            return Values(values)
        if values.ndim == 1:
            return Values(pa.array(values, mask=hidden))
        return Values(np.where(hidden, np.nan, values.astype(np.float64)))


def _column(dtype: np.dtype, shape: tuple[int, ...], unit: str) -> Column | None:
    """What a column of astropy's holds; None for what is neither numbers nor text."""
    if len(shape) > 1:
        return None
    size = shape[0] if shape else None
    if dtype.kind in "OSU":
        return None if size is not None else Column("text", None, unit)
    kinds: dict[str, Literal["float", "int", "bool"]] = {"f": "float", "i": "int", "u": "int", "b": "bool"}
    return Column(kinds[dtype.kind], size, unit) if dtype.kind in kinds else None
