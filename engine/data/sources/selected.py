"""A source with cuts: only the rows that satisfy every condition, and none twice.

A condition is `COLUMN OP VALUE`, such as `z < 0.6`, `type != PSF` or `mag(flux_z) <= 20`; `mag(f)` is
22.5 - 2.5 log10(f), the AB magnitude of a flux in nanomaggies. A number that is unknown (NaN) satisfies no condition.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from armillary.engine.data.format.survey import SpectrumRecord, VectorRecord
from armillary.engine.data.sources.match import unit_vectors
from armillary.engine.data.sources.source import (
    Rows,
    Sample,
    Source,
    describe,
    inputs,
    lossless_step_of,
    sky_sigma_of,
    spectrum_of,
    vectors_of,
)

__all__ = ["Condition", "Selected"]

ROWS = 16384
FORM = re.compile(r"\s*(?:(mag)\(\s*([^()\s]+)\s*\)|([^\s<>=!()]+))\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        column: `ra`, `dec` or a label.
        magnitude: Whether the magnitude of the column is meant.
        operator: <, <=, >, >=, == or !=.
        value: A number, or a text for == and !=.
    """

    column: str
    magnitude: bool
    operator: str
    value: float | str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition.

        Raises:
            ValueError: It has another form.
        """
        found = FORM.fullmatch(text)
        if not found:
            raise ValueError(f"cut {text!r}: must be COLUMN OP VALUE, such as 'z < 0.6' or 'mag(flux_z) <= 20'")
        _, inside, plain, operator, right = found.groups()
        value: float | str
        try:
            value = float(right)
        except ValueError:
            value = right.strip("'\"")
            if operator not in ("==", "!=") or inside:
                raise ValueError(f"cut {text!r}: {operator} needs a number, got {right!r}") from None
        return cls(inside or plain, inside is not None, operator, value)

    def __str__(self) -> str:
        """As it is written."""
        column = f"mag({self.column})" if self.magnitude else self.column
        return f"{column} {self.operator} {self.value}"

    def holds(self, rows: Rows) -> np.ndarray:
        """[N] bool.

        Raises:
            ValueError: There is no such column, or it is of another type than the value.
        """
        if self.column not in rows.columns:
            raise ValueError(f"cut '{self}': no column {self.column!r}; there are {', '.join(rows.columns)}")
        values = rows.columns[self.column]
        if isinstance(values, list) != isinstance(self.value, str):
            kind = "text" if isinstance(values, list) else "numbers"
            raise ValueError(f"cut '{self}': column {self.column!r} holds {kind}, {self.value!r} does not fit")
        if isinstance(values, list):
            equal = np.array([v == self.value for v in values], bool)
            return equal if self.operator == "==" else ~equal
        if self.magnitude:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.where(values > 0, 22.5 - 2.5 * np.log10(values), np.nan)
        compare = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
        compare |= {"==": np.equal, "!=": np.not_equal}
        return compare[self.operator](values, self.value) & ~np.isnan(values)


class Selected:
    """A `Source` of some rows of another.

    Args:
        source: The other.
        cuts: Conditions; all must hold.
        drop_duplicates_arcsec: Of objects closer than this, in chains of such, only the first is kept.

    Attributes:
        removed: How many rows each cut, in turn, and the duplicates took away.

    Raises:
        ValueError: A cut is malformed or does not fit the source, or nothing is left.
    """

    def __init__(
        self, source: Source, cuts: Sequence[str] = (), *, drop_duplicates_arcsec: float | None = None
    ) -> None:
        if drop_duplicates_arcsec is not None and not 0 < drop_duplicates_arcsec <= 3600:
            raise ValueError(f"drop_duplicates_arcsec: must be above 0 and at most 3600, got {drop_duplicates_arcsec}")
        self.source = source
        self.bands, self.pixel_scale_arcsec, self.unit = source.bands, source.pixel_scale_arcsec, source.unit
        self.labels = source.labels
        self.spectrum: SpectrumRecord | None = spectrum_of(source)
        self.vectors: tuple[VectorRecord, ...] = vectors_of(source)
        self.lossless_step, self.sky_sigma = lossless_step_of(source), sky_sigma_of(source)
        conditions = [Condition.parse(cut) for cut in cuts]
        self.removed: dict[str, int] = {str(c): 0 for c in conditions}
        rows, places = [], []
        for start in range(0, len(source), ROWS):
            piece = describe(source, start, min(start + ROWS, len(source)))
            keep = np.ones(len(piece.keys), bool)
            for condition in conditions:
                holds = condition.holds(piece)
                holds[[i - start for i in piece.bad]] = True  # the builder decides what becomes of unusable rows
                self.removed[str(condition)] += int((keep & ~holds).sum())
                keep &= holds
            rows.append(start + np.flatnonzero(keep))
            if drop_duplicates_arcsec is not None:
                places.append(np.stack([np.asarray(piece.columns[n], np.float64)[keep] for n in ("ra", "dec")]))
        self._rows = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        if drop_duplicates_arcsec is not None and self._rows.size:
            first = _first_of_each(np.concatenate(places, axis=1), drop_duplicates_arcsec)
            self.removed[f"within {drop_duplicates_arcsec} arcsec of an earlier row"] = int((~first).sum())
            self._rows = self._rows[first]
        if not self._rows.size:
            taken = "; ".join(f"{cut} removed {n:,}" for cut, n in self.removed.items())
            raise ValueError(f"cuts: none of {len(source):,} rows is left ({taken})")

    def __len__(self) -> int:
        """Rows that are left."""
        return len(self._rows)

    def inputs(self) -> dict[str, str]:
        """What the source reads, and what was cut."""
        cuts = {f"cut: {cut}": f"removed {count} rows" for cut, count in self.removed.items()}
        return inputs(self.source) | cuts

    def describe(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) of those that are left."""
        wanted = self._rows[start:stop]
        keys: list[str] = []
        splits: list[str | None] = []
        bad: dict[int, str] = {}
        pieces: dict[str, list[np.ndarray | list[str]]] = {}
        # Rows that lie close together are described together.
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > ROWS) + 1) if wanted.size else []:
            low = int(run[0])
            found = describe(self.source, low, int(run[-1]) + 1)
            places = (run - low).tolist()
            bad |= {start + len(keys) + i: found.bad[int(r)] for i, r in enumerate(run) if int(r) in found.bad}
            keys += [found.keys[p] for p in places]
            splits += [None if found.splits is None else found.splits[p] for p in places]
            for name, values in found.columns.items():
                taken = [values[p] for p in places] if isinstance(values, list) else values[places]
                pieces.setdefault(name, []).append(taken)
        columns: dict[str, np.ndarray | list[str]] = {}
        for name, parts in pieces.items():
            text = isinstance(parts[0], list)
            columns[name] = [v for part in parts for v in part] if text else np.concatenate(parts)
        return Rows(keys, columns, splits if any(s is not None for s in splits) else None, bad)

    def read(self, index: int) -> Sample:
        """Read one row; errors are the source's.

        Raises:
            BadSample: The row is unusable.
            IndexError: There is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}: {len(self)} rows are left")
        return self.source.read(int(self._rows[index]))


def _first_of_each(places: np.ndarray, radius_arcsec: float) -> np.ndarray:
    """[N] bool: rows without an earlier row within the radius; rows without a position are kept."""
    keep = np.ones(places.shape[1], bool)
    known = np.flatnonzero(~np.isnan(places).any(axis=0))
    tree = cKDTree(unit_vectors(*places[:, known]))
    pairs = tree.query_pairs(2 * np.sin(np.deg2rad(radius_arcsec / 3600) / 2), output_type="ndarray")
    keep[known[pairs.max(axis=1)]] = False
    return keep
