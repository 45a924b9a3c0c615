import numpy as np
import pytest
import torch

from armillary.kernels.pixels.blur import blur_, blur_reference

SIGMA = torch.tensor([[0.5, 0.0, 2.3], [0.1, 6.0, 1.1]], dtype=torch.float64)


def scipy_blur(image):
    from scipy.ndimage import gaussian_filter  # not where the GPU's tests of this file run without it

    planes = [
        gaussian_filter(p.double().numpy(), s.item()) for p, s in zip(image.flatten(0, 1), SIGMA.flatten(), strict=True)
    ]
    return torch.from_numpy(np.stack(planes)).view(image.shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (33, 32), (20, 13), (60, 60)], ids=str)
def test_every_path_matches_scipy(shape, device):
    image = torch.randn(2, 3, *shape)
    expected = scipy_blur(image)
    assert (blur_reference(image.double(), SIGMA) - expected).abs().max() < 1e-12
    assert (blur_(image.clone(), SIGMA, "cpp") - expected).abs().max() < 1e-6
    assert (blur_(image.clone().to(device), SIGMA, "triton").cpu() - expected).abs().max() < 1e-6


def test_planes_without_width_are_left_alone():
    image = torch.randn(2, 3, 8, 8)
    out = blur_(image.clone(), SIGMA)
    assert torch.equal(out[0, 1], image[0, 1]) and torch.equal(out[1, 0], image[1, 0])  # 0 and radius 0
    assert torch.equal(blur_(image.clone(), torch.zeros(2, 3), "triton"), image)
    assert torch.equal(blur_(torch.ones(2, 3, 8, 8), SIGMA, threads=3).round(decimals=6), torch.ones(2, 3, 8, 8))
    assert blur_(torch.zeros(0, 3, 8, 8), SIGMA[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_widths_are_refused(bad):
    with pytest.raises(ValueError, match="finite and >= 0"):
        blur_(torch.zeros(1, 1, 4, 4), torch.full((1, 1), bad))


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"sigma must be \[1, 2\]"):
        blur_(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="float32"):
        blur_(torch.zeros(1, 1, 4, 4, dtype=torch.float16), torch.zeros(1, 1))
