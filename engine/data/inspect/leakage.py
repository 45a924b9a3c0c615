"""Does the test split share objects, or near neighbours on the sky, with the other splits?

A galaxy that was observed twice, or that lies on two overlapping cutouts, makes a test look better than it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.survey import BORDER, Survey
from armillary.engine.data.sources.match import SAME_OBJECT_ARCSEC, near, overlap_arcsec

__all__ = ["Leak", "find_leaks"]

NAMED = 5


@dataclass(frozen=True)
class Leak:
    """What two splits share.

    Attributes:
        splits: The two.
        what: "position", or the label whose values are shared.
        count: Samples of the first split that have a counterpart in the second.
        examples: Some pairs of keys.
    """

    splits: tuple[str, str]
    what: str
    count: int
    examples: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """One line."""
        pairs = ", ".join(f"{a} and {b}" for a, b in self.examples)
        return f"{self.count:,} samples of {self.splits[0]} share {self.what} with {self.splits[1]}: {pairs}"


def find_leaks(
    folder: Path | str, *, radius_arcsec: float | None = None, identifiers: tuple[str, ...] = ()
) -> list[Leak]:
    """Compare every two splits of a survey, but `border`, which nothing is trained or tested on.

    Args:
        folder: The survey.
        radius_arcsec: Samples closer than this are named; by default those within 2 arcsec, which are taken for one object, and
            those whose cutouts may overlap.
        identifiers: Labels whose values name objects; unknown values (NaN, "") name none.

    Returns:
        What is shared; empty where nothing is.

    Raises:
        ValueError: The radius is not positive, there is no such label, or nothing can be compared: one split only, or no
            positions and no identifiers.
    """
    if radius_arcsec is not None and not 0 < radius_arcsec <= 3600:
        raise ValueError(f"radius_arcsec: must be above 0 and at most 3600, got {radius_arcsec}")
    survey = Survey.load(folder)
    for name in identifiers:
        if name not in survey.labels:
            raise ValueError(f"identifiers: no label {name!r}; the survey has {', '.join(survey.labels) or 'none'}")
    table = read_catalog(survey, columns=["key", "split", "ra", "dec", *identifiers])
    split = table["split"].to_numpy(zero_copy_only=False)
    keys = table["key"].to_numpy(zero_copy_only=False)
    names = sorted(set(split.tolist()) - {BORDER}, key=lambda s: (s == "train", s))
    rows = {name: np.flatnonzero(split == name) for name in names}
    ra, dec = table["ra"].to_numpy(), table["dec"].to_numpy()
    if len(names) < 2:
        raise ValueError(f"{folder}: nothing to compare, its only split is {names[0]!r}")
    if not identifiers and not sum(bool((~np.isnan(ra[r] + dec[r])).any()) for r in rows.values()) > 1:
        raise ValueError(
            f"{folder}: nothing to compare, no two of its splits have positions; name labels that identify objects "
            "(--identifiers)"
        )
    found = []
    reach = overlap_arcsec(survey.height, survey.width, survey.pixel_scale_arcsec)
    radii = dict.fromkeys((SAME_OBJECT_ARCSEC, reach) if radius_arcsec is None else (radius_arcsec,))
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            for radius in radii:
                pairs = near(ra, dec, rows[first], rows[second], radius)
                what = "a position" if radius_arcsec is not None or radius == SAME_OBJECT_ARCSEC else "parts of cutouts"
                found.append(_leak((first, second), f"{what} (within {radius:.3g} arcsec)", pairs, keys))
            for name in identifiers:
                pairs = _equal(table[name].to_numpy(zero_copy_only=False), rows[first], rows[second])
                found.append(_leak((first, second), f"a value of {name!r}", pairs, keys))
    return [leak for leak in found if leak.count]


def _leak(splits: tuple[str, str], what: str, pairs: np.ndarray, keys: np.ndarray) -> Leak:
    examples = tuple((str(keys[a]), str(keys[b])) for a, b in pairs[:NAMED].tolist())
    return Leak(splits, what, len(pairs), examples)


def _equal(values: np.ndarray, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """[M, 2] rows: each of `mine` whose value one of `theirs` has, and the first such."""
    place: dict[object, int] = {}
    for row in reversed(theirs.tolist()):
        place[values[row]] = row
    pairs = [(row, place[v]) for row in mine.tolist() if (v := values[row]) == v and v != "" and v in place]
    return np.array(pairs, np.int64).reshape(-1, 2)
