import numpy as np
import pytest

from armillary.engine.evaluate.probes.distinct import distinct


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 5])
def test_equal_rows_are_found_once(dtype, width):
    rng = np.random.default_rng(width)
    vectors = rng.integers(-2, 3, (200, width)).astype(dtype)
    vectors[vectors == 0] *= rng.choice([-1, 1], (vectors == 0).sum())  # zeros of both signs
    found = distinct(vectors)
    expected, count = np.unique(vectors, axis=0, return_counts=True)
    np.testing.assert_array_equal(found.vectors[found.of], vectors)
    assert len(found.vectors) == len(expected) and sorted(found.copies) == sorted(count)
    np.testing.assert_array_equal(np.bincount(found.of), found.copies)


def test_their_order_does_not_depend_on_that_of_the_rows():
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    vectors[10:20] = vectors[3]
    order = np.random.default_rng(1).permutation(50)
    one, other = distinct(vectors), distinct(vectors[order])
    np.testing.assert_array_equal(one.vectors, other.vectors)
    np.testing.assert_array_equal(one.of[order], other.of)


def test_means_over_equal_rows():
    found = distinct(np.array([[1.0], [2.0], [1.0]]))
    np.testing.assert_allclose(
        found.mean(np.array([[1.0, 5.0], [7.0, 8.0], [3.0, 5.0]]))[found.of], [[2, 5], [7, 8], [2, 5]]
    )
