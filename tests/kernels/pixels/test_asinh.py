import pytest
import torch

from armillary.kernels.pixels.asinh import asinh_


def test_two_units_in_the_last_place_over_all_magnitudes():
    x = torch.cat([torch.logspace(-37, 18.9, 100_003, dtype=torch.float64), torch.linspace(0, 3, 50_000)]).float()
    x = torch.cat([x, -x])
    exact = torch.asinh(x.double())
    got = asinh_(x.clone(), threads=2)
    assert ((got.double() - exact).abs() <= 2.0 * 2.0**-23 * exact.abs()).all()
    assert torch.equal(got, asinh_(x.clone(), threads=1))


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 32769])
def test_any_length(count):
    x = torch.randn(count)
    torch.testing.assert_close(asinh_(x.clone()), torch.asinh(x))


def test_special_values():
    out = asinh_(torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")]))
    assert out[:2].tolist() == [0.0, 0.0] and out[:2].signbit().tolist() == [False, True]
    assert out[2:].isnan().all()


def test_bad_tensors_are_refused():
    with pytest.raises(ValueError, match="float32"):
        asinh_(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        asinh_(torch.zeros(4, 3).T)
