import numpy as np
import pytest

from armillary.engine.evaluate.pictures.sections import Gallery, layout_map


@pytest.mark.parametrize("count", [1, 2, 10, 60])
def test_map_of_any_number(count):
    points, method = layout_map(np.random.default_rng(0).normal(size=(count, 5)).astype(np.float32))
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()
    assert method == ("t-SNE" if count == 60 else "principal components")


def test_map_of_equal_embeddings():
    points, _ = layout_map(np.ones((60, 5), np.float32))
    assert np.isfinite(points).all()


def test_gallery_checks_lengths():
    picture = [np.zeros((4, 4, 3), np.uint8)] * 2
    with pytest.raises(ValueError, match="as many embeddings as pictures"):
        Gallery("test", np.zeros((3, 2)), None, picture)
    with pytest.raises(ValueError, match="one or more"):
        Gallery("test", np.zeros((0, 2)), None, [])
