import numpy as np
import pytest
import torch

from armillary.kernels.pixels.crop import crop, crop_reference


@pytest.mark.parametrize("path", [crop, crop_reference], ids=["cpp", "reference"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_all_sixteen_orientations_against_slicing(size, path):
    image = torch.randn(2, 3, 7, 9)
    code = np.arange(16)
    rng = np.random.default_rng(0)
    origin = np.stack([rng.integers(0, 8 - size, 16), rng.integers(0, 10 - size, 16)], axis=1)
    origin[:2] = (0, 0), (7 - size, 9 - size)
    got = path(image, origin, code, size)
    for n in range(16):
        top, left = origin[n]
        expected = image[n % 2, :, top : top + size, left : left + size]
        expected = expected.flip(2) if n & 1 else expected
        expected = expected.flip(1) if n & 2 else expected
        assert torch.equal(got[n], torch.rot90(expected, n >> 2, (1, 2))), n


def test_threads_and_empty_batches():
    image, origin, code = torch.randn(3, 5, 6, 6), np.zeros((9, 2), np.int64), np.arange(9)
    assert torch.equal(crop(image, origin, code, 6, threads=1), crop(image, origin, code, 6, threads=4))
    assert crop(image, origin[:0], code[:0], 4).shape == (0, 5, 4, 4)
    assert crop(image[:0], origin[:0], code[:0], 4).shape == (0, 5, 4, 4)


@pytest.mark.parametrize("place", [(-1, 0), (0, -1), (3, 0), (0, 3)], ids=str)
def test_a_crop_that_leaves_its_image_is_refused(place):
    with pytest.raises(ValueError, match="leaves its image"):
        crop(torch.zeros(1, 1, 6, 6), np.array([place]), np.zeros(1, np.int64), 4)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="float32"):
        crop(torch.zeros(1, 1, 6, 6, dtype=torch.float64), np.zeros((1, 2), np.int64), np.zeros(1, np.int64), 4)
    with pytest.raises(ValueError, match="origin must be"):
        crop(torch.zeros(0, 1, 6, 6), np.zeros((1, 2), np.int64), np.zeros(1, np.int64), 4)
