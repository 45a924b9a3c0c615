"""What a batch sees of a sky graph: sampled neighbours and random walks.

Both are functions of (seed, epoch, position), as every draw of the data path is, and so depend neither on the batch that a
sample falls into nor on the number of ranks.

Galaxy-Walker speaks of walks, but neither its method nor its code takes any; here they can take the place of evenly drawn
neighbours, which then are the rows that walks come to most often, as in PinSage (Ying et al. 2018, arXiv:1806.01973).

Shape legend: B samples, f neighbours of a node, W walks of L steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from armillary import _C
from armillary.engine.data.sky_graph.graph import SkyGraph
from armillary.kernels.pixels.philox import Purpose, check_seed, streams, uniforms

__all__ = ["random_walks", "sample_neighbours", "walked_neighbours"]

STREAMS = 2**16
"""Streams of draws that one sample has for one purpose."""

Rows = NDArray[np.int64]


def sample_neighbours(
    graph: SkyGraph, rows: Rows, fan_outs: Sequence[int], *, position: Rows, seed: int, epoch: int
) -> tuple[Rows, ...]:
    """Neighbours of rows, neighbours of those, and so on: at most f of each node, without replacement, all alike.

    A row is its own neighbour in a graph, and may be sampled as such.

    Args:
        graph: The graph.
        rows: [B] rows of the catalogue.
        fan_outs: f of each hop, at least 1.
        position: [B] places in the epoch's global order.
        seed: The run's seed.
        epoch: Which pass over the survey.

    Returns:
        For each hop the rows: [B, f1], [B, f1, f2], ...; those of a node ascend, -1 fills up where there are fewer.

    Raises:
        ValueError: A row is none of the graph's, or a fan-out is not positive, or they are too many.
    """
    _check(graph, rows, seed)

    def drawn(parents: Rows, slots: Rows, f: int) -> Rows:
        keys = streams(Purpose.NEIGHBOURS, np.tile(slots, len(rows)), np.repeat(position, len(slots)), epoch)
        return _some(graph, parents.ravel(), f, uniforms(keys, seed, f))

    return _hops(rows, fan_outs, drawn, 1)


def walked_neighbours(
    graph: SkyGraph,
    rows: Rows,
    fan_outs: Sequence[int],
    *,
    walks: int,
    length: int,
    position: Rows,
    seed: int,
    epoch: int,
    threads: int = 1,
) -> tuple[Rows, ...]:
    """The rows that random walks from rows come to most often, those that walks from these do, and so on.

    A walk may lead further than an edge of the graph. Where it starts does not count; of rows that are met equally often, those
    come first that were met first.

    Args:
        graph: The graph.
        rows: [B] rows of the catalogue.
        fan_outs: Rows f of each hop, at least 1.
        walks: Walks W of each node.
        length: Their steps L.
        position: [B] places in the epoch's global order.
        seed: The run's seed.
        epoch: Which pass over the survey.
        threads: Threads; the walks do not depend on them.

    Returns:
        As `sample_neighbours`.

    Raises:
        ValueError: A row is none of the graph's, a fan-out is not positive, there are no walks or steps, or they are too many.
    """
    _check(graph, rows, seed)
    _check_walks(walks, length)

    def met(parents: Rows, slots: Rows, f: int) -> Rows:
        slots = np.repeat(slots * walks, walks) + np.tile(np.arange(walks), len(slots))
        nodes = np.maximum(parents.ravel(), 0)  # none has walks, which are left out again
        keys = streams(Purpose.WALK, np.tile(slots, len(rows)), np.repeat(position, len(slots)), epoch)
        found = _C.random_walks(graph.indptr, graph.indices, np.repeat(nodes, walks), keys, seed, length, threads)
        seen = found.reshape(len(nodes), walks, length + 1)[:, :, 1:].reshape(len(nodes), walks * length)
        return np.where(parents.reshape(-1, 1) < 0, -1, _most_met(nodes, seen, f))

    return _hops(rows, fan_outs, met, walks)


def _hops(
    rows: Rows, fan_outs: Sequence[int], choose: Callable[[Rows, Rows, int], Rows], draws: int
) -> tuple[Rows, ...]:
    """[B, f1], [B, f1, f2], ...: `choose` gives [B n, f] neighbours of nodes [B, n], whose draws have numbers [n] of their own."""
    nodes = sum(int(np.prod(fan_outs[:hop])) for hop in range(len(fan_outs)))
    if not fan_outs or min(fan_outs) < 1 or nodes * draws > STREAMS:
        raise ValueError(
            f"fan_outs: must be at least 1 each and ask for the neighbours of at most {STREAMS // draws} nodes, got {fan_outs}"
        )
    out: list[Rows] = []
    first, parents = 0, np.asarray(rows, np.int64)[:, None]
    for f in fan_outs:
        slots = first + np.arange(parents.shape[1])
        chosen = choose(parents, slots, f)
        out.append(chosen.reshape(len(rows), *fan_outs[: len(out)], f))
        first, parents = first + len(slots), chosen.reshape(len(rows), -1)
    return tuple(out)


def _most_met(starts: Rows, seen: Rows, f: int) -> Rows:
    """[M, f] the most frequent of rows [M, V] without the start of each; ascending, -1 where there are fewer."""
    order = seen.argsort(1, kind="stable")
    ascending = np.take_along_axis(seen, order, 1)
    new = np.ones(seen.shape, bool)
    new[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    run = np.cumsum(new.ravel()) - 1
    times = np.bincount(run)[run].reshape(seen.shape)
    counts = new & (ascending >= 0) & (ascending != starts[:, None])
    # The first of a run was met first: the sort is stable.
    rank = np.where(counts, times * seen.shape[1] - order, -seen.shape[1])
    best = rank.argsort(1)[:, ::-1][:, :f]
    last = np.iinfo(np.int64).max
    found = np.full((len(seen), f), last)
    found[:, : best.shape[1]] = np.where(
        np.take_along_axis(counts, best, 1), np.take_along_axis(ascending, best, 1), last
    )
    found.sort(1)
    return np.where(found == last, -1, found)


def _some(graph: SkyGraph, nodes: Rows, f: int, u: NDArray[np.float64]) -> Rows:
    """[M, f] neighbours of each node by Floyd's sampling: of the first j + 1 one is drawn, or the j-th if that is taken."""
    start, degree = graph.indptr[nodes], graph.indptr[nodes + 1] - graph.indptr[nodes]
    degree[nodes < 0] = 0
    places = np.full((len(nodes), f), np.iinfo(np.int64).max)
    for i in range(f):
        j = np.maximum(degree - f, 0) + i
        drawn = (u[:, i] * (j + 1)).astype(np.int64)
        drawn = np.where((places == drawn[:, None]).any(1), j, drawn)
        places[:, i] = np.where(degree <= f, j, drawn)
    places.sort(1)
    known = places < degree[:, None]
    return np.where(known, graph.indices[np.where(known, start[:, None] + places, 0)], -1).astype(np.int64)


def random_walks(
    graph: SkyGraph,
    rows: Rows,
    walks: int,
    length: int,
    *,
    position: Rows,
    seed: int,
    epoch: int,
    threads: int = 1,
) -> Rows:
    """Walks that take each neighbour but the node itself with the same probability.

    Args:
        graph: The graph.
        rows: [B] rows of the catalogue.
        walks: Walks W of each row, 1 to 65,536.
        length: Steps L, at least 1.
        position: [B] places in the epoch's global order.
        seed: The run's seed.
        epoch: Which pass over the survey.
        threads: Threads; the walks do not depend on them.

    Returns:
        [B, W, L + 1] int64 rows, the first of each walk being where it starts; all -1 behind a node without neighbours.

    Raises:
        ValueError: A row is none of the graph's, or there are no walks or steps.
    """
    _check(graph, rows, seed)
    _check_walks(walks, length)
    keys = streams(Purpose.WALK, np.tile(np.arange(walks), len(rows)), np.repeat(position, walks), epoch)
    starts = np.repeat(np.asarray(rows, np.int64), walks)
    out = _C.random_walks(graph.indptr, graph.indices, starts, keys, seed, length, threads)
    return out.reshape(len(rows), walks, length + 1)


def _check(graph: SkyGraph, rows: Rows, seed: int) -> None:
    check_seed(seed)
    bad = np.flatnonzero((np.asarray(rows) < 0) | (np.asarray(rows) >= graph.nodes))
    if bad.size:
        raise ValueError(f"rows: must be rows of the graph, 0 to {graph.nodes - 1}, got {rows[bad[0]]}")


def _check_walks(walks: int, length: int) -> None:
    if not 1 <= walks <= STREAMS or length < 1:
        raise ValueError(f"walks and length: must be 1 to {STREAMS} and at least 1, got {walks} and {length}")
