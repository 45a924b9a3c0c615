"""Lines of made spectra: fluxes, errors and widths are found, on fine and on coarse bins."""

import pytest
import torch

from armillary.engine.evaluate.lines.fits import BLEND, H_ALPHA, H_BETA, fit_lines


def made(step, z, fluxes, sigma, noise=0.0):
    """Spectra [K, L] with a sloping continuum and lines averaged over bins."""
    wave = torch.arange(3600, 9824, step, dtype=torch.float64)
    y = 2 + 1e-4 * wave.expand(len(z), -1)
    for at, flux in fluxes.items():
        offset = wave - at * (1 + z[:, None])
        upper, lower = (torch.special.ndtr((offset + side * step / 2) / sigma) for side in (1, -1))
        y = y + flux * (upper - lower) / step
    return wave, y + noise * torch.randn(y.shape, dtype=torch.float64)


ALPHA = {6564.614: 10.0, 6585.27: 4.0, 6549.86: 4 / 2.96, 6718.294: 2.0, 6732.674: 1.5}
REDSHIFTS = torch.linspace(0.01, 0.4, 60, dtype=torch.float64)


@pytest.mark.parametrize("step", [2.0, 4.8, 24.0])
def test_fluxes_and_widths_are_found(step):
    """To 6 % of the flux of H alpha, because a grid of widths holds the true one to 6 %."""
    fit = fit_lines(*made(step, REDSHIFTS, ALPHA, 5.0), REDSHIFTS, H_ALPHA)
    for name, flux in (("Halpha", 10), ("[N II]", 4), ("[S II]", 2)):
        torch.testing.assert_close(fit.flux[name], torch.full_like(REDSHIFTS, flux), rtol=0, atol=0.6)
    assert ((fit.fwhm / (2.3548 * 5) - 1).abs() < 0.13).all()


def test_errors_are_those_of_the_noise():
    torch.manual_seed(0)
    z = REDSHIFTS.repeat(5)
    wave, y = made(4.0, z, ALPHA, 5.0, noise=0.05)
    fit = fit_lines(wave, y, z, H_ALPHA, torch.full_like(y, 400.0))
    without = fit_lines(wave, y, z, H_ALPHA)  # from the residuals
    for name, flux in (("Halpha", 10), ("[N II]", 4)):
        pull = (fit.flux[name] - flux) / fit.error[name]
        assert abs(pull.mean()) < 0.35 and 0.8 < pull.std() < 1.4, name
        assert (without.error[name] / fit.error[name]).median() == pytest.approx(1, abs=0.15)


def test_a_blend_is_as_wide_as_it_is_smeared():
    for sigma, low, high in ((4.0, 20, 45), (100.0, 220, 260)):
        wave, y = made(24.0, REDSHIFTS, {6564.614: 10.0, 6585.27: 4.0}, sigma)
        width = fit_lines(wave, y, REDSHIFTS, BLEND).fwhm.median()
        assert low < width < high, sigma


def test_hidden_bins_do_not_count_and_lines_beyond_the_spectrum_are_not_fitted():
    wave, y = made(4.0, REDSHIFTS, ALPHA, 5.0)
    ivar = torch.full_like(y, 100.0)
    y[:, ::7], ivar[:, ::7] = 1e6, 0.0
    fit = fit_lines(wave, y, REDSHIFTS, H_ALPHA, ivar)
    torch.testing.assert_close(fit.flux["Halpha"], torch.full_like(REDSHIFTS, 10), rtol=0, atol=0.6)
    far = torch.tensor([0.1, 0.6, 1.5], dtype=torch.float64)
    gone = fit_lines(*made(4.0, far, ALPHA, 5.0), far, H_ALPHA)
    assert gone.fwhm.isfinite().tolist() == [True, False, False]
    assert gone.flux["Halpha"].isfinite().tolist() == [True, False, False]
    assert fit_lines(*made(4.0, far, ALPHA, 5.0), far, H_BETA).fwhm.isfinite().tolist() == [True, True, False]
