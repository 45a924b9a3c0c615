import hashlib
from fractions import Fraction

import numpy as np
import pytest

from armillary.engine.evaluate.probes.similarity import GRID, on_grid, within_nearest
from armillary.engine.evaluate.search.vectors import unit


def plain(count, width, seed=0):
    """Vectors of multiples of 1/8, which any arithmetic makes alike."""
    return np.random.default_rng(seed).integers(-40, 40, (count, width)).astype(np.float32) / 8 + 1 / 16


@pytest.mark.parametrize("width", [1, 2, 7, 64, 1023])
def test_products_have_no_rounding_error(width):
    left, right = (on_grid(unit(plain(5, width, seed))) for seed in (0, 1))
    steps = [[[int(x * GRID) for x in row] for row in side] for side in (left, right)]
    expected = [[Fraction(sum(a * b for a, b in zip(x, y, strict=True)), int(GRID) ** 2) for y in steps[1]] for x in steps[0]]  # fmt: skip
    assert [[Fraction(x) for x in row] for row in left @ right.T] == expected
    np.testing.assert_allclose(left @ right.T, unit(plain(5, width)) @ unit(plain(5, width, 1)).T, atol=1e-5)


@pytest.mark.parametrize("width", [3, 96, 1024])
def test_products_do_not_depend_on_place_number_or_memory_order(width):
    left, right = on_grid(unit(plain(67, width))), on_grid(unit(plain(131, width, 1)))
    whole = left @ right.T
    order = np.random.default_rng(2).permutation(131)
    np.testing.assert_array_equal(left @ right[order].T, whole[:, order])
    np.testing.assert_array_equal(left[:1] @ right[-3:].T, whole[:1, -3:])
    np.testing.assert_array_equal([[np.sum(a * b) for b in right[:9]] for a in left[:9]], whole[:9, :9])
    np.testing.assert_array_equal(np.asfortranarray(left) @ right.T, whole)
    np.testing.assert_array_equal(on_grid(unit(np.asfortranarray(plain(67, width)))), left)


def test_the_same_bits_on_every_machine():
    vectors = on_grid(unit(plain(40, 384)))
    digest = hashlib.sha256((vectors @ vectors.T).tobytes()).hexdigest()
    assert digest == "ce424970a3f1b7398280082831c74c8ed8082c738ec5c9869ba640d55c082017"


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_distances_are_those_of_float64_and_equal_vectors_are_at_0(metric):
    train, query = 100 * plain(50, 12), 100 * plain(9, 12, 1)
    query[4] = train[17]
    got = np.empty((9, 50))
    for piece, row, sample, distance in within_nearest(train, query, 50, metric):
        got[piece][row, sample] = distance
    if metric == "cosine":
        a, b = (
            v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True) for v in (train, query)
        )
        expected = 1 - b @ a.T
    else:
        expected = np.linalg.norm(query[:, None].astype(np.float64) - train, axis=2)
    assert got[4, 17] == 0
    np.testing.assert_allclose(got, expected, atol=1e-6 * expected.max())


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_vectors_of_zeros_and_extreme_lengths(metric):
    vectors = np.array([[0, 0], [3e18, 4e18], [3e-18, 4e-18]])
    ((_, _, _, distance),) = within_nearest(vectors, vectors, 3, metric)
    expected = [0, 0.5, 0.5, 0.5, 0, 0, 0.5, 0, 0] if metric == "cosine" else [0, 5e18, 0, 5e18, 0, 5e18, 0, 5e18, 0]
    np.testing.assert_allclose(distance, expected, atol=1e-6 * max(expected))
    ((_, _, _, nothing),) = within_nearest(np.zeros((2, 3)), np.zeros((1, 3)), 1, metric)
    assert nothing.tolist() == [0, 0]
