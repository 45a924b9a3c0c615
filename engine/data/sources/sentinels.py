"""Numbers that stand for "no value": one rule for all labels and magnitudes.

Catalogues write -99, 99, -999 or -9999 where nothing was measured. Such a value is unknown where every other value of its
column lies less than half as far from zero on that side: 99 among magnitudes of 18 to 27 is unknown, 99 among counts from 0
to 150 is a count. What is treated so is counted and named; whoever knows better says which numbers mean it, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

__all__ = ["MARKS", "find_marks", "mask_marks", "place_marks", "told"]

MARKS = (-99.0, 99.0, -999.0, -9999.0)
PLACE_MARKS = {"ra": (-99.0, -999.0, -9999.0), "dec": MARKS}
"""Marks that are no coordinates."""


def _equal(values: np.ndarray, mark: float) -> np.ndarray:
    """Where values are a mark, compared in the column's own precision, float32 included."""
    return (values == mark) | (values == float(np.float32(mark)))


def find_marks(values: np.ndarray) -> dict[float, int]:
    """Marks that mean "unknown" in a column, and how often each occurs.

    Args:
        values: Numbers of any shape; NaN where unknown.
    """
    counts = {mark: int(_equal(values, mark).sum()) for mark in MARKS}
    counts = {mark: count for mark, count in counts.items() if count}
    if not counts:
        return {}
    others = values[np.isfinite(values) & ~np.isin(values, MARKS)]
    low, high = (float(others.min()), float(others.max())) if others.size else (0.0, 0.0)
    return {mark: n for mark, n in counts.items() if (high < mark / 2 if mark > 0 else low > mark / 2)}


def mask_marks(values: np.ndarray, marks: Iterable[float]) -> np.ndarray:
    """Set marks to NaN, in place.

    Args:
        values: Floats.
        marks: Numbers that mean "unknown".
    """
    for mark in marks:
        values[_equal(values, mark)] = np.nan
    return values


def place_marks(axis: str, values: np.ndarray) -> np.ndarray:
    """Coordinates (`ra` or `dec`) with marks that are no coordinates as NaN, in place."""
    return mask_marks(values, PLACE_MARKS[axis])


def told(marks: Mapping[float, int]) -> str:
    """Marks and counts in words, such as "-99 in 12 rows"; empty where there is none."""
    return ", ".join(f"{mark:g} in {count:,} {'rows' if count > 1 else 'row'}" for mark, count in marks.items())
