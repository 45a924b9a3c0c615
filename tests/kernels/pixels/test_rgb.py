import numpy as np
import pytest
import torch

from armillary.kernels.pixels.rgb import rgb, rgb_reference

RULE = ((2, 1, 0), (2.2, 3.4, 6.0), 0.03, 20.0)


@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (16, 32), (31, 33)], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 0.03, 1.0, 1e4])
def test_cpp_matches_the_reference_in_float64(scale, shape):
    flux = torch.randn(3, 3, *shape) * scale
    assert (rgb(flux, *RULE, threads=2) - rgb_reference(flux.double(), *RULE)).abs().max() < 1e-6


def test_some_bands_one_band_and_no_images():
    flux = torch.rand(2, 5, 6, 6)
    assert torch.equal(rgb(flux, *RULE), rgb(flux[:, :3].contiguous(), *RULE))
    torch.testing.assert_close(rgb(flux, (4,), (1.0,), 0.0, 8.0), rgb_reference(flux, (4,), (1.0,), 0.0, 8.0))
    assert rgb(flux[:0], *RULE).shape == (0, 3, 6, 6)


def test_black_sky_and_bad_pixels():
    flux = torch.full((1, 3, 1, 4), -1.0)
    flux[0, 0, 0, 1] = torch.nan
    out = rgb(flux, *RULE)
    assert torch.equal(out[..., [0, 2, 3]], torch.zeros(1, 3, 1, 3))
    assert out[0, :, 0, 1].isnan().all()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="float32"):
        rgb(torch.zeros(1, 3, 2, 2, dtype=torch.float64), *RULE)
    with pytest.raises(ValueError, match="no such band"):
        rgb(torch.zeros(1, 2, 2, 2), *RULE)
    with pytest.raises(ValueError, match="bands"):
        rgb(torch.zeros(1, 3, 2, 2), (0, 1), (1.0,), 0.0, 1.0)
    assert np.isfinite(rgb(torch.zeros(1, 3, 2, 2), *RULE).numpy()).all()
