"""Cross-matching catalogues, by identifier or by position on the sky.

Positions are compared as unit vectors in a k-d tree, so the poles and the meridian 0 need no care. A separation d of
vectors is the angle 2 arcsin(d / 2), which keeps its digits at arcseconds where the cosine loses them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.spatial import cKDTree

from armillary.engine.choices import check_choice

__all__ = ["SAME_OBJECT_ARCSEC", "Matches", "match_keys", "match_sky", "near", "overlap_arcsec", "unit_vectors"]

MatchMode = Literal["one_to_one", "nearest"]

SAME_OBJECT_ARCSEC = 2.0
"""Detections closer than this are taken for one object."""

NAMED = 3  # repeated identifiers that an error names
ROUNDING = 1e-14  # of separations as lengths: sines and cosines of one angle differ by 1e-16 between processors


@dataclass(frozen=True)
class Matches:
    """Pairs of rows of two catalogues, in the order of the left one; no row is in two pairs unless `shared` says so.

    Attributes:
        left: [M] rows of the left catalogue, ascending.
        right: [M] rows of the right one.
        separation_arcsec: [M] angles; empty for a match by identifier.
        candidates: Left rows that had more than one candidate.
        shared: Right rows that more than one left row had as its nearest.
    """

    left: np.ndarray
    right: np.ndarray
    separation_arcsec: np.ndarray
    candidates: int
    shared: int


def unit_vectors(ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
    """[N, 3] vectors of positions.

    Args:
        ra: [N] degrees.
        dec: [N] degrees.
    """
    ra, dec = np.deg2rad(np.asarray(ra, np.float64)), np.deg2rad(np.asarray(dec, np.float64))
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)


def match_keys(left: Sequence[object], right: Sequence[object], *, what: str = "identifier") -> Matches:
    """Pair rows with equal identifiers; rows without one (None, "" or NaN) stay alone.

    Args:
        left: Identifiers of the left catalogue.
        right: Of the right one; each at most once.
        what: Name of the identifier, for errors.

    Raises:
        ValueError: An identifier of the right catalogue occurs twice: which row is meant is not known.
    """
    place: dict[object, int] = {}
    repeated: list[object] = []
    for row, key in enumerate(right):
        if _missing(key):
            continue
        if key in place:
            repeated.append(key)
        place[key] = row
    if repeated:
        few = ", ".join(map(str, repeated[:NAMED]))
        raise ValueError(
            f"{what}: {len(repeated)} values of the catalogue to match occur more than once, first {few}; drop the "
            "repetitions before matching"
        )
    pairs = [(i, place[key]) for i, key in enumerate(left) if not _missing(key) and key in place]
    rows = np.array(pairs, np.int64).reshape(-1, 2)
    shared = int((np.bincount(rows[:, 1]) > 1).sum()) if len(rows) else 0
    return Matches(rows[:, 0], rows[:, 1], np.empty(0), 0, shared)


def _missing(key: object) -> bool:
    return key is None or key == "" or key != key


def match_sky(
    ra: np.ndarray,
    dec: np.ndarray,
    other_ra: np.ndarray,
    other_dec: np.ndarray,
    radius_arcsec: float,
    mode: MatchMode = "one_to_one",
) -> Matches:
    """Pair positions that lie within a radius.

    "one_to_one" takes pairs by increasing separation and uses every row at most once, so of two left rows that claim one
    right row the nearer gets it and the other its next candidate, if it has one. "nearest" gives every left row its
    nearest right row, shared or not. Of pairs whose separations agree within 2e-9 arcsec the one of the lower rows comes first. Rows without a position stay alone.

    Args:
        ra: [N] degrees, NaN where unknown.
        dec: [N] degrees.
        other_ra: [K] degrees of the right catalogue.
        other_dec: [K] degrees.
        radius_arcsec: Greatest separation.
        mode: See above.

    Raises:
        ValueError: The radius is not within 0 .. 3,600 arcsec, or a position is outside the sky.
    """
    if not 0 < radius_arcsec <= 3600:
        raise ValueError(f"radius_arcsec: must be above 0 and at most 3600, got {radius_arcsec}")
    check_choice("mode", mode, MatchMode)
    mine, theirs = _placed("left", ra, dec), _placed("right", other_ra, other_dec)
    if not (mine.size and theirs.size):
        empty = np.empty(0, np.int64)
        return Matches(empty, empty, np.empty(0), 0, 0)
    points = unit_vectors(np.asarray(ra)[mine], np.asarray(dec)[mine])
    tree = cKDTree(unit_vectors(np.asarray(other_ra)[theirs], np.asarray(other_dec)[theirs]))
    chord = 2 * np.sin(np.deg2rad(radius_arcsec / 3600) / 2)
    near = tree.query_ball_point(points, chord, return_sorted=True)
    left = np.repeat(np.arange(mine.size), [len(n) for n in near])
    right = np.fromiter((j for n in near for j in n), np.int64, len(left))
    distance = np.linalg.norm(points[left] - tree.data[right], axis=1)
    order = np.argsort(distance)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.cumsum(np.diff(distance[order], prepend=0) > ROUNDING)  # equal for what is tied
    order = np.lexsort((right, left, rank))
    left, right, distance = left[order], right[order], distance[order]
    first = np.unique(left, return_index=True)[1]  # the nearest candidate of each left row
    nearest = right[first]
    chosen = first if mode == "nearest" else _greedy(left, right)
    chosen = chosen[np.argsort(left[chosen])]
    return Matches(
        left=mine[left[chosen]],
        right=theirs[right[chosen]],
        separation_arcsec=np.rad2deg(2 * np.arcsin(np.minimum(distance[chosen] / 2, 1))) * 3600,
        candidates=int((np.bincount(left) > 1).sum()) if left.size else 0,
        shared=int((np.bincount(nearest) > 1).sum()) if nearest.size else 0,
    )


def _greedy(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Indices of pairs, in their order, that use every row once."""
    taken_left, taken_right = set[int](), set[int]()
    chosen = []
    for index, (i, j) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
        if i not in taken_left and j not in taken_right:
            taken_left.add(i)
            taken_right.add(j)
            chosen.append(index)
    return np.array(chosen, np.int64)


def _placed(side: str, ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
    """Rows with a position."""
    ra, dec = np.asarray(ra, np.float64), np.asarray(dec, np.float64)
    known = ~(np.isnan(ra) | np.isnan(dec))
    for name, values, low, high in (("ra", ra, 0, 360), ("dec", dec, -90, 90)):
        wrong = known & ~((values >= low) & (values <= high))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"{side} catalogue, row {row}: {name} {values[row]} is outside [{low}, {high}] degrees")
    return np.flatnonzero(known)


def overlap_arcsec(height: int, width: int, pixel_scale_arcsec: float | None) -> float:
    """How far apart two objects must be so that their cutouts share no pixel, however they lie: the cutout's diagonal.

    Without images, or where their scale is unknown, the distance within which two detections are taken for one object.
    """
    return max(SAME_OBJECT_ARCSEC, math.hypot(height, width) * (pixel_scale_arcsec or 0.0))


def near(ra: np.ndarray, dec: np.ndarray, mine: np.ndarray, theirs: np.ndarray, radius: float) -> np.ndarray:
    """Neighbours on the sky among two groups of rows.

    Args:
        ra: [N] degrees, NaN where unknown.
        dec: [N] degrees.
        mine: Rows whose neighbours are looked for.
        theirs: Rows that are looked at.
        radius: Arcseconds.

    Returns:
        [M, 2] rows: each of `mine` that has one of `theirs` within the radius, and the nearest.
    """
    placed = ~(np.isnan(ra) | np.isnan(dec))
    mine, theirs = mine[placed[mine]], theirs[placed[theirs]]
    if not (mine.size and theirs.size):
        return np.empty((0, 2), np.int64)
    tree = cKDTree(unit_vectors(ra[theirs], dec[theirs]))
    chord = 2 * np.sin(np.deg2rad(radius / 3600) / 2)
    distance, nearest = tree.query(unit_vectors(ra[mine], dec[mine]), distance_upper_bound=chord)
    close = np.isfinite(distance)
    return np.stack([mine[close], theirs[nearest[close]]], axis=1)
