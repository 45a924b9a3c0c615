"""Rest-frame spectra: shifted by hand, in every precision, and what draws of the redshift make of a line."""

import numpy as np
import pytest
import torch

from armillary.models.mmae.rest_frame import RestFrameDecoder

WAVE = torch.linspace(3600, 9800, 259, dtype=torch.float64)
LINE = 5000.0


def decoder(points=2000, highest=1.0):
    torch.manual_seed(0)
    return RestFrameDecoder(WAVE, highest, points, 6, 16)


def with_a_line(width):
    """A decoder of one line of a width in ln(wavelength), whatever its input."""
    made = decoder()
    at = made.first + made.step * torch.arange(2000, dtype=torch.float64)
    with torch.no_grad():
        made.mlp[-1].weight.zero_()
        made.mlp[-1].bias.copy_(torch.exp(-0.5 * ((at - np.log(LINE)) / width) ** 2))
    return made


def width(spectrum):
    """Standard deviation of a line in ln(wavelength)."""
    x, w = WAVE.log(), spectrum / spectrum.sum()
    return ((w * (x - (w * x).sum()).square()).sum()).sqrt().item()


def test_spectra_are_read_where_the_bins_came_from():
    made = decoder(points=37).double()
    x, z = torch.randn(3, 6, dtype=torch.float64), torch.tensor([[0.0, 0.3], [1.0, 0.7], [2.0, -0.2]]).double()
    seen = []
    made.mlp.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    got = made(x, z).detach()
    at = made.first + made.step * np.arange(37)
    assert at[-1] == pytest.approx(np.log(9800)) and at[0] == pytest.approx(np.log(3600 / 2))
    for i in range(3):
        for j in range(2):
            expected = np.interp(np.log(WAVE.numpy() / (1 + z[i, j].item())), at, seen[0][i, j].numpy())
            np.testing.assert_allclose(got[i, j].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_a_line_moves_with_the_redshift_and_keeps_its_width():
    made = with_a_line(0.01)
    z = torch.tensor([[0.0, 0.2, 0.6]])
    spectra = made(torch.randn(1, 6), z)[0].detach().double()
    for spectrum, redshift in zip(spectra, z[0].tolist(), strict=True):
        centre = (WAVE.log() * spectrum / spectrum.sum()).sum().exp().item()
        assert centre == pytest.approx(LINE * (1 + redshift), abs=12)  # half a bin
        assert width(spectrum) == pytest.approx(0.01, rel=0.05)


def test_draws_are_sharp_where_their_mean_is_blurred():
    """Redshifts known to .03 (1 + z): the mean of the draws has that width, each draw the line's own."""
    made = with_a_line(0.004)
    z = 0.3 + 0.03 * 1.3 * torch.randn(1, 400)
    spectra = made(torch.randn(1, 6), z)[0].detach().double()
    assert width(spectra.mean(0)) == pytest.approx(0.03, rel=0.15)  # 4 standard errors of 400 draws
    assert np.median([width(s) for s in spectra]) == pytest.approx(0.004, rel=0.1)


def test_gradients_and_precision():
    made = RestFrameDecoder(WAVE[::40], 1.0, 11, 3, 4).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: made(x, torch.tensor([[0.1], [0.5]])), (x,))
    half = decoder().bfloat16()
    z = torch.tensor([[0.1234]])
    found = half(torch.randn(1, 6).bfloat16(), z)
    assert found.dtype == torch.float32 and found.isfinite().all()
