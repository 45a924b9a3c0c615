"""Units of a table's columns turned into those that a method was trained on, magnitudes and logarithms included.

Astropy reads the names. A unit that it does not know is taken only where the method's has the same name. "mag" alone says
nothing of a zero point and converts to nothing: say "mag(AB)".

Shape legend: values of any shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["Conversion", "unit_conversion"]

AB = {"abmag": "mag(AB)", "ab mag": "mag(AB)", "mag_ab": "mag(AB)"}
"""Common names of AB magnitudes, which astropy writes in one way only."""

STEP = 1e-4
"""Relative step over which a slope is taken: rounding and curvature both change it by a few parts in a million at most."""


@dataclass(frozen=True)
class Conversion:
    """From one unit to another.

    Attributes:
        values: Converts numbers, NaN to NaN; what has no value in the other unit (magnitudes of negative fluxes) is NaN.
        linear: Whether it is a factor.
    """

    values: Callable[[np.ndarray], np.ndarray]
    linear: bool

    def errors(self, values: np.ndarray, errors: np.ndarray) -> np.ndarray:
        """Errors of the converted values, to first order, of errors of the values."""
        if self.linear:
            return np.abs(self.values(errors))
        step = STEP * np.where(values == 0, 1.0, np.abs(values))
        return errors * np.abs(self.values(values + step) - self.values(values - step)) / (2 * step)


def unit_conversion(given: str, wanted: str) -> Conversion:
    """How to get from one unit to another.

    Args:
        given: The column's unit; "" is taken for the wanted one.
        wanted: The method's; "" for a pure number, or for one whose unit nobody stated.

    Raises:
        ValueError: One is not a unit, or they measure different things.
    """
    if not given or given == wanted:
        return Conversion(lambda x: x, linear=True)
    from astropy import units

    parsed = []
    for name in (given, wanted):
        try:
            parsed.append(units.Unit(AB.get(name.lower(), name)))
        except ValueError as error:
            raise ValueError(f"{given!r} cannot be converted to {wanted!r}: {name!r} is not a unit") from error
    first, second = parsed
    try:
        _ = (1.0 * first).to(second)
    except units.UnitConversionError as error:
        hint = (
            "; 'mag' states no zero point: say 'mag(AB)' if they are AB magnitudes" if "mag" in (given, wanted) else ""
        )
        raise ValueError(f"{given!r} cannot be converted to {wanted or 'a pure number'!r}{hint}") from error
    if not any(isinstance(unit, units.function.FunctionUnitBase) for unit in parsed):
        factor = float(first.to(second))
        return Conversion(lambda x: factor * x, linear=True)

    def convert(x: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):  # a magnitude of what is not positive
            found = np.asarray((x * first).to_value(second), np.float64)
        return np.where(np.isfinite(found), found, np.nan)

    return Conversion(convert, linear=False)
