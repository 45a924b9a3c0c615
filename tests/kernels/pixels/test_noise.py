import numpy as np
import pytest
import torch

from armillary.kernels.pixels.noise import add_noise_, noise_reference
from armillary.kernels.pixels.philox import Purpose, streams

SHAPES = [(1, 1), (1, 2), (3, 1), (7, 9), (16, 16), (45, 51)]


def names(n, epoch=3):
    return streams(Purpose.PIXEL_NOISE, np.arange(n), np.arange(n) * 1000 + 2**32 - 5000, epoch)


@pytest.mark.parametrize("seed", [0, 1, 2**40, 2**64 - 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpp_and_triton_give_the_same_bits_near_float64(shape, seed, device):
    sigma = torch.tensor([[1.0, 0.0, 2.5], [0.5, 1e-6, 1.0]])
    image = torch.randn(2, 3, *shape)
    triton = add_noise_(image.clone().to(device), sigma, names(2), seed, "triton").cpu()
    cpp = add_noise_(image.clone(), sigma, names(2), seed, "cpp")
    assert torch.equal(cpp, triton)
    assert torch.equal(cpp[0, 1], image[0, 1])  # sigma 0: not touched
    noise = noise_reference(names(2), seed, 3, *shape)
    # Radius and direction are good to about 1.5e-7 each, the sum to half a unit in the last place of the result.
    bound = 2e-6 * sigma[:, :, None, None] + 6e-8 * cpp.abs()
    assert ((cpp - (image + noise * sigma[:, :, None, None])).abs() <= bound).all()


def test_normal_and_uncorrelated():
    z = add_noise_(torch.zeros(4, 3, 120, 120), torch.ones(4, 3), names(4), 7).double()
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert abs((z**3).mean()) < 0.03 and abs((z**4).mean() - 3) < 0.06 and z.abs().max() < 5.78
    planes = z.flatten(2).flatten(0, 1)
    assert (torch.corrcoef(planes) - torch.eye(12)).abs().max() < 0.05
    for shift in (1, 30, 3600):  # neighbours, lines, quarters of a plane (lanes of one counter)
        assert abs((planes[:, shift:] * planes[:, :-shift]).mean()) < 0.02


def test_noise_belongs_to_the_stream_not_to_its_place_in_the_batch():
    sigma = torch.rand(5, 2) + 0.1
    whole = add_noise_(torch.zeros(5, 2, 9, 9), sigma, names(5), 1)
    one = add_noise_(torch.zeros(1, 2, 9, 9), sigma[3:4], names(5)[3:4], 1, threads=3)
    assert torch.equal(whole[3:4], one)
    assert not torch.equal(whole, add_noise_(torch.zeros(5, 2, 9, 9), sigma, names(5), 2))
    assert not torch.equal(whole, add_noise_(torch.zeros(5, 2, 9, 9), sigma, names(5, epoch=4), 1))


def test_empty_batch():
    assert add_noise_(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3), names(0), 0).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    "image, sigma, seed, message",
    [
        (torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.ones(1, 1), 0, "float32"),
        (torch.zeros(1, 1, 2, 3).transpose(2, 3), torch.ones(1, 1), 0, "not contiguous"),
        (torch.zeros(1, 1, 2, 2), torch.ones(1, 2), 0, r"sigma must be \[1, 1\]"),
        (torch.zeros(1, 1, 2, 2), -torch.ones(1, 1), 0, "sigma must be >= 0"),
        (torch.zeros(1, 1, 2, 2), torch.full((1, 1), float("nan")), 0, "sigma must be >= 0"),
        (torch.zeros(1, 1, 2, 2), torch.ones(1, 1), -1, "seed: must be"),
    ],
    ids=["dtype", "layout", "shape", "negative", "nan", "seed"],
)
def test_bad_input_is_refused(image, sigma, seed, message):
    with pytest.raises(ValueError, match=message):
        add_noise_(image, sigma, names(1), seed)
