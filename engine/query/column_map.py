"""Which columns of a table hold a quantity, its errors and what it is sorted along.

By default a quantity is looked for under its own name: one number a row for a scalar; for a vector one column with as many
numbers, or a column a component called NAME_COMPONENT, NAME.COMPONENT or as the component. Case does not matter, nor
whether a name has a dot or a line. Errors are in columns called as those of the values with `_err` behind, or in one of the
other usual ways (`ERRORS`).

Shape legend: n components of a quantity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from armillary.engine.data.sources.sentinels import MARKS, find_marks, mask_marks
from armillary.engine.data.sources.tables.catalogue import Catalogue
from armillary.engine.query.units import Conversion, unit_conversion
from armillary.models.quantities import Quantity

__all__ = ["SCANNED", "QuantityColumns", "find_columns", "some"]

ERRORS = ("{}_err", "{}_error", "{}err", "e_{}", "err_{}")
"""How columns of errors are called."""

AXES = ("_axis", "_wave", "_wavelength")
"""Endings of a column that states, row by row, what a vector is sorted along."""

SCANNED = 1 << 16
"""Rows looked through at a time."""

SAME_AXIS = 1e-3
"""Relative difference up to which two axes are the same."""


@dataclass(frozen=True)
class QuantityColumns:
    """Where a quantity lies in a table.

    Attributes:
        quantity: What is read.
        values: One column with n numbers a row, or n columns; None for a component without one.
        errors: Likewise; None where no error is stated.
        conversions: From each column's unit to the quantity's.
        unstated: Columns without a unit, taken to be in the quantity's.
        missing: Numbers that mean "no value", by column.
    """

    quantity: Quantity
    values: tuple[str | None, ...]
    errors: tuple[str | None, ...]
    conversions: tuple[Conversion, ...]
    unstated: tuple[str, ...]
    missing: Mapping[str, tuple[float, ...]]

    def read(self, table: Catalogue, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and errors [rows, n] float64 in the quantity's unit, NaN where unknown; a negative error is unknown."""
        values, errors = [], []
        for name, error, conversion in zip(self.values, self.errors, self.conversions, strict=True):
            raw = self._numbers(table, name, start, stop)
            wide = self._numbers(table, error, start, stop)
            values.append(conversion.values(raw))
            errors.append(conversion.errors(raw, np.where(wide < 0, np.nan, wide)))
        return np.concatenate(values, axis=1), np.concatenate(errors, axis=1)

    def _numbers(self, table: Catalogue, name: str | None, start: int, stop: int) -> np.ndarray:
        if name is None:
            return np.full((stop - start, self.quantity.size if len(self.values) == 1 else 1), np.nan)
        numbers = table.numbers_between(name, start, stop).reshape(stop - start, -1)
        mask_marks(numbers, self.missing[name])
        return numbers


def find_columns(
    quantity: Quantity,
    table: Catalogue,
    declared: Mapping[str, Sequence[str]],
    units: Mapping[str, str],
    missing: Sequence[float] | None = None,
) -> QuantityColumns:
    """Find a quantity in a table.

    Args:
        quantity: What is wanted.
        table: The table.
        declared: Columns by name of a quantity, of its errors (NAME_err) or of its axis (NAME_axis).
        units: Units by column, in place of the file's.
        missing: Numbers that mean "no value"; None: found by the rule of `sentinels`.

    Raises:
        ValueError: It is not there; there are too few or too many columns or numbers, or they are in another order; an
            axis does not ascend or is another one; units do not convert.
    """
    where = f"{table.files[0]}: {quantity.name!r}"
    named = declared.get(quantity.name)
    values = _declared(quantity, table, named, where) if named else _by_name(quantity, table, where)
    _check_size(quantity, table, values, where)
    errors = tuple(_errors(quantity, table, values, declared.get(quantity.name + "_err"), where))
    _check_axis(quantity, table, values, declared, where)
    conversions, unstated = [], []
    for column, error in zip(values, errors, strict=True):
        unit = "" if column is None else units.get(column, table.columns[column].unit)
        if column is not None and not unit and quantity.unit:
            unstated.append(column)
        try:
            conversions.append(unit_conversion(unit, quantity.unit))
        except ValueError as problem:
            raise ValueError(f"{where}: column {column!r}: {problem} (--unit COLUMN=UNIT states another)") from problem
        theirs = "" if error is None else units.get(error, table.columns[error].unit)
        if theirs and unit and theirs != unit and not (theirs == "mag" and "mag" in unit.lower()):
            raise ValueError(f"{where}: column {error!r} is in {theirs!r}, but the values {column!r} are in {unit!r}")
    marks = {
        name: _marks(table, name) if missing is None else tuple(missing)
        for name in (*values, *errors)
        if name is not None
    }
    return QuantityColumns(quantity, values, errors, tuple(conversions), tuple(unstated), marks)


def some(names: Sequence[str], most: int = 12) -> str:
    """Names for a message, the first ones of many."""
    return ", ".join(names[:most]) + (f", ... ({len(names)})" if len(names) > most else "")


def _marks(table: Catalogue, column: str) -> tuple[float, ...]:
    """Numbers that mean "no value" in a column, which is read some rows at a time."""
    told = []  # of each run of rows the marks and the extremes of the rest, which is all that the rule looks at
    for start in range(0, table.count, SCANNED):
        values = table.numbers_between(column, start, min(start + SCANNED, table.count))
        others = values[np.isfinite(values) & ~np.isin(values, MARKS)]
        told.append(np.unique(values[np.isin(values, MARKS)]))
        told.append(np.array([others.min(), others.max()] if others.size else []))
    return tuple(find_marks(np.concatenate(told)))


def _declared(quantity: Quantity, table: Catalogue, named: Sequence[str], where: str) -> tuple[str | None, ...]:
    for column in named:
        table.column(column, f"declared as {quantity.name!r}")
    if len(named) not in (1, quantity.size):
        raise ValueError(
            f"{where}: has {quantity.size} components ({some(quantity.components)}), got {len(named)} columns: {some(named)}"
        )
    if quantity.size > 1 and len(named) == quantity.size:
        meant = [_component(column, quantity.components) for column in named]
        if None not in meant and sorted(set(meant)) == list(range(quantity.size)) and meant != sorted(meant):  # type: ignore[type-var]
            raise ValueError(
                f"{where}: columns are in another order, {some(named)}, than its components, {some(quantity.components)}"
            )
    return tuple(named)


def _component(column: str, components: Sequence[str]) -> int | None:
    """The component that a column's name tells of; None where it tells of none or of several."""
    words = {column.lower(), *re.split(r"[_.\-\s]+", column.lower())}
    found = [place for place, name in enumerate(components) if name.lower() in words]
    return found[0] if len(found) == 1 else None


def _by_name(quantity: Quantity, table: Catalogue, where: str) -> tuple[str | None, ...]:
    scalar = quantity.size == 1
    own = [quantity.name, *(quantity.components if scalar and quantity.components != ("value",) else ())]
    if column := next((c for name in own if (c := _like(name, table, where))), None):
        return (column,)
    patterns = () if scalar else (f"{quantity.name}_{{}}", f"{quantity.name}.{{}}", "{}")
    tried = [tuple(_like(p.format(c), table, where) for c in quantity.components) for p in patterns]
    best = max(tried, key=lambda columns: sum(c is not None for c in columns), default=())
    if any(best):
        return best
    wanted = "" if scalar else f", nor of its components {some(quantity.components)}"
    raise ValueError(
        f"{where}: no column has this name{wanted}; name one with --column {quantity.name}=COLUMN"
        f"{'' if scalar else ',COLUMN,...'}; there are {some(list(table.columns), 20)}"
    )


def _like(name: str, table: Catalogue, where: str) -> str | None:
    """The column of that name, without regard to case and dots."""
    if name in table.columns:
        return name
    found = [c for c in table.columns if c.lower().replace(".", "_") == name.lower().replace(".", "_")]
    if len(found) > 1:
        raise ValueError(f"{where}: columns {' and '.join(map(repr, found))} could both be {name!r}; use --column")
    return found[0] if found else None


def _check_size(quantity: Quantity, table: Catalogue, values: Sequence[str | None], where: str) -> None:
    expected = quantity.size if len(values) == 1 else 1
    for column in values:
        if column is None:
            continue
        found = table.columns[column]
        if found.kind == "text":
            raise ValueError(f"{where}: column {column!r} is text, not numbers")
        if (found.size or 1) != expected:
            raise ValueError(
                f"{where}: column {column!r} has {found.size or 1} numbers a row, but the method was trained on "
                f"{expected}: {some(quantity.components)}"
            )


def _errors(
    quantity: Quantity, table: Catalogue, values: Sequence[str | None], named: Sequence[str] | None, where: str
) -> list[str | None]:
    if named:
        if len(named) != len(values):
            raise ValueError(f"{where}: {len(values)} columns of values, but {len(named)} of errors: {some(named)}")
        for column in named:
            table.column(column, f"errors of {quantity.name!r}")
        errors: list[str | None] = list(named)
    else:
        errors = [None if c is None else _error_of(c, table, where) for c in values]
        if len(values) == 1 and errors == [None]:
            errors = [_error_of(quantity.name, table, where)]
    _check_size(quantity, table, errors, where)
    return errors


def _error_of(name: str, table: Catalogue, where: str) -> str | None:
    return next((c for form in ERRORS if (c := _like(form.format(name), table, where)) is not None), None)


def _check_axis(
    quantity: Quantity,
    table: Catalogue,
    values: Sequence[str | None],
    declared: Mapping[str, Sequence[str]],
    where: str,
) -> None:
    """Refuse a vector whose stated axis is not the one that the method was trained on."""
    if not quantity.axis or len(values) != 1:
        return
    names = [str(values[0]) + ending for ending in AXES] + [quantity.name + ending for ending in AXES]
    stated = declared.get(quantity.name + AXES[0])
    column = stated[0] if stated else next((c for name in names if (c := _like(name, table, where))), None)
    if column is None:
        return
    table.column(column, f"axis of {quantity.name!r}")
    _check_size(quantity, table, (column,), where)
    axis, mine = table.numbers_between(column, 0, 1)[0], np.asarray(quantity.axis)
    if not (np.diff(axis) > 0).all():
        raise ValueError(f"{where}: column {column!r} does not ascend; sort it, and {values[0]!r} likewise")
    if not np.allclose(axis, mine, rtol=SAME_AXIS, atol=0):
        raise ValueError(
            f"{where}: column {column!r} goes from {axis[0]:g} to {axis[-1]:g}, but the method was trained on "
            f"{mine[0]:g} to {mine[-1]:g}; resample {values[0]!r} to its {len(mine)} places"
        )
