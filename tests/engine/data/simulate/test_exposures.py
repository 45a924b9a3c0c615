import numpy as np
import pytest

from armillary.engine.data.simulate.exposures import Exposure
from armillary.engine.data.sources.files.desi_coadd import DESI_GRID

WAVE = DESI_GRID.angstrom()


def test_exposure_is_worst_in_the_blue_between_arms_and_on_sky_lines():
    exposure = Exposure.of(WAVE)
    variance = exposure.sky / exposure.electrons
    level = {name: np.median(variance[np.abs(WAVE - at) < 10]) for name, at in (("blue", 3700), ("red", 6500))}
    assert level["blue"] > 4 * level["red"]
    assert np.median(exposure.electrons[np.abs(WAVE - 5780) < 10]) < np.interp(5600, WAVE, exposure.electrons)
    assert exposure.sky[np.argmin(np.abs(WAVE - 5578.89))] > 5 * np.median(exposure.sky)
    forest = exposure.sky[WAVE > 7700]
    assert np.percentile(forest, 90) > 1.5 * np.median(forest)


def test_noise_of_an_empty_fibre_is_sky_and_read_noise():
    exposure = Exposure.of(WAVE)
    rng = np.random.default_rng(0)
    seen = [exposure.observe(np.zeros(len(WAVE)), rng) for _ in range(40)]
    pull = np.stack([s.flux * np.sqrt(s.ivar) for s in seen])
    assert (pull**2).mean() == pytest.approx(1, abs=0.02)
    bright = exposure.observe(np.full(len(WAVE), 300.0), rng)
    assert np.median(bright.ivar) < 0.2 * np.median(seen[0].ivar)


def test_lost_pixels_are_short_runs_or_the_oxygen_line():
    exposure = Exposure.of(WAVE)
    for k in range(40):
        spectrum = exposure.observe(np.full(len(WAVE), 2.0), np.random.default_rng(k))
        lost = np.flatnonzero(spectrum.ivar == 0)
        assert len(lost) <= 3 * 5 + 7
        assert (spectrum.flux[lost] == 0).all()
        away = lost[np.abs(WAVE[lost] - 5578.89) > 8]
        runs = np.split(away, np.flatnonzero(np.diff(away) > 1) + 1) if len(away) else []
        assert len(runs) <= 3


def test_same_generator_gives_the_same_exposure():
    exposure, flux = Exposure.of(WAVE), np.linspace(1, 3, len(WAVE))
    first, second = (exposure.observe(flux, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first.flux, second.flux)
    np.testing.assert_array_equal(Exposure.of(WAVE).sky, exposure.sky)
