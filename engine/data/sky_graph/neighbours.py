"""Exact nearest neighbours in the spaces of a sky graph, by k-d trees, in blocks of bounded memory.

In the plane, in comoving space and on the sphere (whose chords order as its arcs) the tree's own order is the answer. In the
Poincare ball it is not; but a hyperbolic ball is a Euclidean one with another centre. With t = tanh(d / 2), that of radius d
about x has

    centre  (1 - t^2) / (1 - t^2 |x|^2) x        radius  t (1 - |x|^2) / (1 - t^2 |x|^2)

The nearest points in the Euclidean sense bound d from above; the hyperbolic neighbours then lie within that radius of that
centre. The tree is asked again around it, for more and more points until the farthest is not inside: what it gave holds all
neighbours, and the closed form of the distance ranks them.

Shape legend: Q queries, M points that can be neighbours, k neighbours, D coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial import cKDTree

from armillary.engine.data.sky_graph.spaces import Space

__all__ = ["BLOCK", "nearest", "within"]

BLOCK = 65_536
"""Queries at a time."""

MARGIN = 1 + 1e-9  # of the radius that holds all neighbours, for the rounding of points


def nearest(
    queries: np.ndarray, points: np.ndarray, self_row: np.ndarray, k: int, space: Space, *, threads: int = 1
) -> np.ndarray:
    """Rows of the k nearest points of every query, itself left out.

    Args:
        queries: [Q, D] float64, of `spaces.points`.
        points: [M, D] float64, likewise.
        self_row: [Q] row of each query among the points; -1 where it is none of them.
        k: Neighbours; below M.
        space: Whose distance is compared.
        threads: Threads of the tree.

    Returns:
        [Q, k] int32, the nearest first. Of points at exactly equal distances any may come first.
    """
    tree = cKDTree(points)
    # Catalogues are in random order: queries that follow their neighbours find the tree's leaves in the processor's cache.
    order = cKDTree(queries, balanced_tree=False, compact_nodes=False).indices
    out = np.empty((len(queries), k), np.int32)
    for start in range(0, len(queries), BLOCK):
        asked = order[start : start + BLOCK]
        block, own = queries[asked], self_row[asked, None]
        _, rows = tree.query(block, k + 1, workers=threads)
        if space == "hyperbolic":
            rows = _nearest_in_ball(tree, block, rows, threads)
        # Of k + 1 rows one goes: the query itself, or the farthest where it is not among them.
        gone = rows == own
        gone[:, -1] |= ~gone.any(1)
        out[asked] = rows[~gone].reshape(-1, k)
    return out


def _nearest_in_ball(tree: cKDTree, queries: np.ndarray, guess: np.ndarray, threads: int) -> np.ndarray:
    """[Q, K] rows of the K nearest points in the hyperbolic distance, from any K rows that are near."""
    points, wanted = tree.data, guess.shape[1]
    out = np.empty_like(guess)
    found = _distance(queries, points[guess]).max(1)
    t2 = np.tanh(found / 2) ** 2
    inside = 1 - (queries**2).sum(1)
    shrink = 1 - t2 * (1 - inside)
    centres = ((1 - t2) / shrink)[:, None] * queries
    radius = np.sqrt(t2) * inside / shrink * MARGIN
    open_ = np.arange(len(queries))
    count = wanted + 3
    while open_.size:
        count = min(2 * count, len(points))
        away, rows = tree.query(centres[open_], count, workers=threads)
        done = (away[:, -1] >= radius[open_]) | (count == len(points))
        rows, ready = rows[done], open_[done]
        order = np.argsort(_distance(queries[ready], points[rows]), axis=1, kind="stable")[:, :wanted]
        out[ready] = np.take_along_axis(rows, order, 1)
        open_ = open_[~done]
    return out


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[Q, K] hyperbolic distances of x [Q, D] to y [Q, K, D]: 2 arsinh(|x - y| / sqrt((1 - |x|^2) (1 - |y|^2)))."""
    apart = ((x[:, None] - y) ** 2).sum(-1)
    return 2 * np.arcsinh(np.sqrt(apart / ((1 - (x**2).sum(-1))[:, None] * (1 - (y**2).sum(-1)))))


def within(
    queries: np.ndarray, points: np.ndarray, self_row: np.ndarray, length: float, *, threads: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All points within a distance of every query, itself left out, a block of queries at a time.

    Args:
        queries: [Q, D] float64.
        points: [M, D] float64.
        self_row: [Q] row of each query among the points; -1 where it is none of them.
        length: Greatest distance.
        threads: Threads of the tree.

    Yields:
        Of a block: the number of points of each query, and their rows, one query behind the other.
    """
    tree = cKDTree(points)
    for start in range(0, len(queries), BLOCK):
        found = tree.query_ball_point(queries[start : start + BLOCK], length, workers=threads)
        counts = np.fromiter(map(len, found), np.int64, len(found))
        rows = np.fromiter((row for few in found for row in few), np.int32, counts.sum())
        asked = np.repeat(np.arange(len(found)), counts)
        others = rows != self_row[start : start + BLOCK][asked]
        yield np.bincount(asked[others], minlength=len(found)), rows[others]
