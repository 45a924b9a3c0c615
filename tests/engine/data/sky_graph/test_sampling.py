"""Sampled neighbours and walks against plain Python with the same draws, and their frequencies."""

import numpy as np
import pytest
from toy_sky import sky

from armillary import _C
from armillary.engine.data.sky_graph.build import connect
from armillary.engine.data.sky_graph.graph import GraphOptions, GraphRecord, SkyGraph
from armillary.engine.data.sky_graph.sampling import random_walks, sample_neighbours, walked_neighbours
from armillary.kernels.pixels.philox import Purpose, streams, uniforms

KEY = {"seed": 2**63 + 5, "epoch": 3}


def graph_of(indptr, indices):
    rows = len(indptr) - 1
    record = GraphRecord("toy", "0", rows, GraphOptions())
    return SkyGraph(np.asarray(indptr, np.int64), np.asarray(indices, np.int32), np.zeros(rows, bool), record)


@pytest.fixture(scope="module")
def graph():
    """With isolated nodes."""
    ra, dec = sky(300)
    split = np.where(np.arange(300) % 3, "train", "test")
    made = graph_of(*connect(ra, dec, GraphOptions(mode="leak-free", buffer_arcmin=1), split=split)[:2])
    assert made.isolated > 10
    return made


def oracle_walk(graph, row, walk, length, position, seed, epoch):
    u = uniforms(streams(Purpose.WALK, walk, position, epoch), seed, length)[0]
    out = [row] + [-1] * length
    for step in range(length):
        others = [n for n in graph.neighbours(out[step]).tolist() if n != out[step]]
        if not others:
            break
        out[step + 1] = others[int(u[step] * len(others))]
    return out


def oracle_sample(graph, node, f, slot, position, seed, epoch):
    if node < 0:
        return [-1] * f
    u = uniforms(streams(Purpose.NEIGHBOURS, slot, position, epoch), seed, f)[0]
    have = graph.neighbours(node).tolist()
    if len(have) <= f:
        return have + [-1] * (f - len(have))
    chosen = set()
    for i, j in enumerate(range(len(have) - f, len(have))):
        drawn = int(u[i] * (j + 1))
        chosen.add(j if drawn in chosen else drawn)
    return [have[place] for place in sorted(chosen)]


@pytest.mark.parametrize("threads", [1, 3])
def test_walks(graph, threads):
    rows, position = np.arange(300), np.arange(300)[::-1] + 2**31
    got = random_walks(graph, rows, 3, 7, position=position, threads=threads, **KEY)
    assert got.shape == (300, 3, 8) and got.dtype == np.int64
    for row in range(0, 300, 7):
        assert got[row].tolist() == [oracle_walk(graph, row, w, 7, position[row], **KEY) for w in range(3)]
    assert (got[:, :, 1] == -1).all(1).sum() == graph.isolated


def test_samples(graph):
    rows, position = np.arange(300), np.arange(300) + 1000
    first, second = sample_neighbours(graph, rows, (3, 2), position=position, **KEY)
    assert first.shape == (300, 3) and second.shape == (300, 3, 2) and (first == -1).any() and (second == -1).any()
    for row in range(0, 300, 7):
        assert first[row].tolist() == oracle_sample(graph, row, 3, 0, position[row], **KEY)
        wanted = [oracle_sample(graph, int(n), 2, 1 + slot, position[row], **KEY) for slot, n in enumerate(first[row])]
        assert second[row].tolist() == wanted


def oracle_met(graph, node, f, slot, position, seed, epoch, walks=4, length=5):
    """The rows that walks come to most often, by counting."""
    if node < 0:
        return [-1] * f
    numbers = range(slot * walks, (slot + 1) * walks)
    met = [n for w in numbers for n in oracle_walk(graph, node, w, length, position, seed, epoch)[1:]]
    rows = sorted({n for n in met if n not in (-1, node)}, key=lambda n: (-met.count(n), met.index(n)))[:f]
    return sorted(rows) + [-1] * (f - len(rows))


def test_neighbours_by_walks(graph):
    rows, position = np.arange(300), np.arange(300) + 1000
    options = {"walks": 4, "length": 5, "position": position, **KEY}
    first, second = walked_neighbours(graph, rows, (3, 30), **options)
    assert first.shape == (300, 3) and second.shape == (300, 3, 30) and (first == -1).any()
    for row in range(0, 300, 7):
        assert first[row].tolist() == oracle_met(graph, row, 3, 0, position[row], **KEY)
        wanted = [oracle_met(graph, int(n), 30, 1 + slot, position[row], **KEY) for slot, n in enumerate(first[row])]
        assert second[row].tolist() == wanted
    again = walked_neighbours(graph, rows[40:60], (3, 30), threads=3, **{**options, "position": position[40:60]})
    assert all((a == b[40:60]).all() for a, b in zip(again, (first, second), strict=True))
    further = [n for row in rows for n in first[row].tolist() if n >= 0 and n not in graph.neighbours(row)]
    assert further  # a walk leads beyond the neighbours


def test_draws_belong_to_the_position(graph):
    rows, position = np.array([5, 17, 40, 41, 250]), np.array([9, 2, 70, 71, 8])
    whole = sample_neighbours(graph, rows, (2, 2), position=position, **KEY)
    walks = random_walks(graph, rows, 2, 5, position=position, **KEY)
    for part in ([0, 2], [4, 3, 1]):  # as two ranks would have them
        mine = sample_neighbours(graph, rows[part], (2, 2), position=position[part], **KEY)
        assert all((a == b[part]).all() for a, b in zip(mine, whole, strict=True))
        assert (random_walks(graph, rows[part], 2, 5, position=position[part], **KEY) == walks[part]).all()
    other = sample_neighbours(graph, rows, (2, 2), position=position, seed=KEY["seed"], epoch=4)
    assert any((a != b).any() for a, b in zip(other, whole, strict=True))


def test_every_neighbour_is_as_likely():
    """A star of six: 20,000 draws, of which each is within five standard deviations of its share."""
    star = graph_of([0, 6, 8, 10, 12, 14, 16], [0, 1, 2, 3, 4, 5, *(n for i in range(1, 6) for n in (0, i))])
    n = 20_000
    (got,) = sample_neighbours(star, np.zeros(n, np.int64), (2,), position=np.arange(n), **KEY)
    shares = np.bincount(got.ravel(), minlength=6) / n
    assert np.abs(shares - 2 / 6).max() < 5 * (2 / 6 * 4 / 6 / n) ** 0.5
    pairs = np.unique(got, axis=0, return_counts=True)[1] / n
    assert len(pairs) == 15 and np.abs(pairs - 1 / 15).max() < 5 * (1 / 15 / n) ** 0.5
    steps = random_walks(star, np.zeros(n, np.int64), 1, 2, position=np.arange(n), **KEY)[:, 0]
    shares = np.bincount(steps[:, 1], minlength=6) / n
    assert shares[0] == 0 and np.abs(shares[1:] - 1 / 5).max() < 5 * (0.16 / n) ** 0.5 and (steps[:, 2] == 0).all()


def test_bad_input(graph):
    for rows in ([300], [-1]):
        with pytest.raises(ValueError, match=rf"rows: must be rows of the graph, 0 to 299, got {rows[0]}"):
            sample_neighbours(graph, np.array(rows), (2,), position=np.zeros(1, np.int64), **KEY)
    for fan_outs in ((), (0,), (3, -1), (300, 300, 1)):
        with pytest.raises(ValueError, match="fan_outs: must be at least 1 each"):
            sample_neighbours(graph, np.zeros(1, np.int64), fan_outs, position=np.zeros(1, np.int64), **KEY)
    for walks, length in ((0, 3), (2**16 + 1, 3), (2, 0)):
        with pytest.raises(ValueError, match="walks and length: must be 1 to 65536 and at least 1"):
            random_walks(graph, np.zeros(1, np.int64), walks, length, position=np.zeros(1, np.int64), **KEY)
    with pytest.raises(ValueError, match="the neighbours of at most 655 nodes"):
        walked_neighbours(
            graph, np.zeros(1, np.int64), (700, 2), walks=100, length=2, position=np.zeros(1, np.int64), **KEY
        )


@pytest.mark.parametrize(
    ("indptr", "indices", "row"),
    [
        ([0, 1, 2], [1, 5], 0),
        ([0, 1, 2], [-1, 0], 0),
        ([0, 9, 2], [1, 0], 0),
        ([1, 0, 2], [1, 0], 0),
        ([0, 1, 2], [1, 0], 2),
    ],
    ids=["node too large", "node negative", "indptr too large", "indptr falls", "row"],
)
def test_the_extension_stays_in_the_graph(indptr, indices, row):
    with pytest.raises(ValueError, match="a row or an edge lies outside of the graph"):
        _C.random_walks(
            np.array(indptr, np.int64),
            np.array(indices, np.int32),
            np.array([row], np.int64),
            streams(Purpose.WALK, 0, 0, 0),
            0,
            4,
        )
