"""Make the edges of a sky graph from positions.

Three modes. "published": every row may be everybody's neighbour, as in Galaxy-Walker, whose training and test galaxies share
one graph. "leak-free": only rows of the split train may be seen, by themselves and by the others: new galaxies on a sky that
has been surveyed; in the middle of a tile that was set aside the nearest of them are far. "inductive": rows see rows of their
own split: a new piece of sky, of which the galaxies are known and no labels. With a buffer, rows of train that lie that near to a
row of another split (`border` is none) are left out, so that a cluster that the border of two tiles of the sky cuts is not in both (`--split
healpix` of `armillary data build` makes the tiles).

The control of either is the same graph with shuffled neighbours: in every split the rows change places as neighbours, so that
the number of neighbours and their splits stay, and where they lie does not. What a model gains from true neighbours over
shuffled ones comes from the sky.

Shape legend: N rows, M rows that may be seen.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from armillary.engine.data.format.survey import BORDER
from armillary.engine.data.sky_graph.graph import GraphOptions
from armillary.engine.data.sky_graph.neighbours import nearest, within
from armillary.engine.data.sky_graph.spaces import check_positions, comoving_mpc, points
from armillary.engine.data.sources.match import unit_vectors
from armillary.kernels.pixels.philox import Purpose, streams, words

__all__ = ["connect"]


def connect(
    ra: np.ndarray,
    dec: np.ndarray,
    options: GraphOptions,
    *,
    split: np.ndarray | None = None,
    redshift: np.ndarray | None = None,
    threads: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """The arrays of a `SkyGraph`, from positions in memory.

    Args:
        ra: [N] degrees.
        dec: [N] degrees.
        options: Which rows become neighbours.
        split: [N] names of splits; None: all rows are of train.
        redshift: [N]; for the comoving space alone.
        threads: Threads of the k-d tree.

    Returns:
        indptr [N + 1], indices [E], left_out [N].

    Raises:
        ValueError: Positions or redshifts are unknown or out of range, or too few rows may be seen.
    """
    check_positions(ra, dec)
    n = len(ra)
    split = np.full(n, "train") if split is None else split
    train = split == "train"
    left_out = np.zeros(n, bool)
    if options.buffer_arcmin:
        left_out = _near_others(ra, dec, train, ~train & (split != BORDER), options.buffer_arcmin, threads)
    kept = ~left_out
    if options.mode == "inductive":
        own = {str(name): kept & (split == name) for name in np.unique(split) if name != BORDER}
        groups = [(f"rows of the split {name} that may be seen", rows, rows) for name, rows in own.items()]
    elif options.mode == "leak-free":
        groups = [("rows of the split train that may be seen", kept, train & kept)]
    else:
        groups = [("rows", kept, kept)]
    where = _places(ra, dec, options, redshift)
    edges = _matrix(np.zeros(n, np.int64), np.empty(0, np.int32))
    seen = np.zeros(n, bool)
    for what, asking, shown in groups:
        edges = edges + _found(where, np.flatnonzero(asking), np.flatnonzero(shown), options, what, threads)
        seen |= shown
    if options.symmetrise:
        edges, counts = edges.tocsr(), np.diff(edges.indptr)
        edges = edges + _matrix(np.where(seen, counts, 0), edges.indices[np.repeat(seen, counts)]).T
    if options.shuffle_seed is not None:
        edges = edges.tocsr()
        edges = _matrix(np.diff(edges.indptr), _moved(split, left_out, options.shuffle_seed)[edges.indices])
    edges = (edges + scipy.sparse.eye_array(n, dtype=bool, format="csr")).tocsr()
    return edges.indptr.astype(np.int64), edges.indices.astype(np.int32), left_out


def _places(ra: np.ndarray, dec: np.ndarray, options: GraphOptions, redshift: np.ndarray | None) -> np.ndarray:
    """[N, D] points in the space of the options."""
    if options.linking_length_mpc is None:
        return points(ra, dec, options.space)
    if redshift is None:
        raise ValueError("redshift: must be given in the comoving space")
    return comoving_mpc(ra, dec, redshift)


def _found(
    where: np.ndarray, queries: np.ndarray, visible: np.ndarray, options: GraphOptions, what: str, threads: int
) -> scipy.sparse.csr_array:
    """[N, N] bool: the neighbours of some rows among those that may be seen, which are `what`."""
    n = len(where)
    if not visible.size:
        raise ValueError(f"mode {options.mode}: needs {what}, there are none")
    place = np.full(n, -1)
    place[visible] = np.arange(len(visible))
    counts = np.zeros(n, np.int64)
    own = place[queries]
    if options.linking_length_mpc is not None:
        found = list(within(where[queries], where[visible], own, options.linking_length_mpc, threads=threads))
        counts[queries] = np.concatenate([few for few, _ in found])
        rows = np.concatenate([few for _, few in found])
    else:
        if not options.k < len(visible):
            raise ValueError(f"k: must be below the number of {what}, {len(visible)}, got {options.k}")
        counts[queries] = options.k
        rows = nearest(where[queries], where[visible], own, options.k, options.space, threads=threads).ravel()
    return _matrix(counts, visible.astype(np.int32)[rows])


def _near_others(
    ra: np.ndarray, dec: np.ndarray, train: np.ndarray, others: np.ndarray, arcmin: float, threads: int
) -> np.ndarray:
    """[N] bool: rows of train that lie within the buffer of a row of another split."""
    near = np.zeros(len(ra), bool)
    if others.any():
        vectors = unit_vectors(ra, dec)
        chord = 2 * np.sin(np.deg2rad(arcmin / 60) / 2)
        distance, _ = cKDTree(vectors[others]).query(vectors[train], distance_upper_bound=chord, workers=threads)
        near[train] = np.isfinite(distance)
    return near


def _matrix(counts: np.ndarray, indices: np.ndarray) -> scipy.sparse.csr_array:
    """[N, N] bool matrix of edges from the number of neighbours of each row and their rows; each edge once."""
    indptr = np.concatenate([[0], np.cumsum(counts)])
    matrix = scipy.sparse.csr_array((np.ones(len(indices), bool), indices, indptr), shape=(len(counts), len(counts)))
    matrix.sum_duplicates()
    return matrix


def _moved(split: np.ndarray, left_out: np.ndarray, seed: int) -> np.ndarray:
    """[N] int32: the row that each row's place as a neighbour goes to, one of the same split."""
    moved = np.arange(len(split), dtype=np.int32)
    draws = words(streams(Purpose.NEIGHBOUR_SHUFFLE, 0, np.arange(len(split)), 0), seed, 1)[:, 0]
    for name in set(split.tolist()):
        rows = np.flatnonzero((split == name) & ~left_out)
        moved[rows] = rows[np.argsort(draws[rows], kind="stable")]
    return moved
