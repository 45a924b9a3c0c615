"""Light: mass, dust, lines and redshift act on it as they must."""

from dataclasses import replace

import numpy as np
import pytest

from armillary.engine.data.simulate.population import keyed_generator
from armillary.engine.data.simulate.populations.histories import cosmology, draw_histories
from armillary.engine.data.simulate.populations.light import LOG_STEP, REST_WAVE, CompositeLight
from armillary.engine.data.simulate.populations.photometry import (
    CALIBRATION,
    OBSERVED_WAVE,
    channels,
    measure,
    observe,
    sed_bins,
    sky_errors,
)
from armillary.engine.data.simulate.populations.smooth_ssp import smooth_ssp


@pytest.fixture(scope="module")
def light():
    return CompositeLight(smooth_ssp())


@pytest.fixture(scope="module")
def galaxies():
    return draw_histories(200, keyed_generator(3, 0, 0), 22.0)


def near(micron):
    return int(np.argmin(np.abs(REST_WAVE - micron * 1e4)))


def test_twice_the_mass_is_twice_the_light(light, galaxies):
    twice = replace(galaxies, stellar_mass=2 * galaxies.stellar_mass)
    np.testing.assert_allclose(light(twice), 2 * light(galaxies), rtol=1e-5)


def test_more_mass_forms_than_is_alive(light, galaxies):
    ratio = galaxies.stellar_mass / light.formed_mass(galaxies)
    assert (ratio > 0.4).all() and (ratio < 1).all()


def test_dust_dims_the_blue_more_and_v_by_its_magnitudes(light, galaxies):
    clear, dusty = (light(replace(galaxies, dust=np.full(200, a)))[:, near(0.2) :] for a in (0.0, 1.0))
    magnitudes = -2.5 * np.log10(dusty / clear)
    ultraviolet, visual, infrared = (magnitudes[:, near(w) - near(0.2)] for w in (0.25, 0.55, 2.2))
    np.testing.assert_allclose(visual, 1.0, atol=0.03)
    assert (ultraviolet > 1.5).all() and (infrared < 0.2).all()


def test_lines_follow_the_young_stars_in_the_ratio_of_case_b(light, galaxies):
    clear = replace(galaxies, dust=np.zeros(200), redshift=np.full(200, 0.1))
    flux = light(clear).astype(np.float64)
    excess = {}
    for name, wave in {"H alpha": 0.65646, "H beta": 0.48627}.items():
        i = near(wave)
        continuum = (flux[:, i - 4] + flux[:, i + 4]) / 2
        excess[name] = (flux[:, i] - continuum) / REST_WAVE[i]  # f_nu dnu = f_nu c dlog(lambda) / lambda
    young = clear.recent_share() > 0.003
    ratio = excess["H alpha"][young] / excess["H beta"][young]
    assert np.median(ratio) == pytest.approx(2.86, rel=0.25)  # the continuum's slope is in it
    assert (
        np.corrcoef(np.log(excess["H alpha"][young]), np.log((galaxies.stellar_mass * clear.recent_share())[young]))[
            0, 1
        ]
        > 0.9
    )


def test_light_fades_with_distance_and_hydrogen_takes_the_far_blue(light, galaxies):
    near_by, far = (replace(galaxies, redshift=np.full(200, z)) for z in (0.5, 2.5))
    i = near(0.6)
    distance = [cosmology().distance_cm(np.array([z]))[0] for z in (0.5, 2.5)]
    expected = (distance[0] / distance[1]) ** 2 * 3.5 / 1.5
    np.testing.assert_allclose(light(far)[:, i] / light(near_by)[:, i], expected, rtol=1e-3)
    assert (light(far)[:, REST_WAVE < 911] == 0).all()
    forest = light(far)[:, near(0.11)] / light(near_by)[:, near(0.11)]
    assert (forest < 0.9 * expected).all()


def test_channels_are_lsst_then_102_in_order_of_wavelength():
    weights, wave = channels()
    assert weights.shape[0] == 108
    np.testing.assert_allclose(weights.sum(1), 1)
    assert (np.diff(wave[:6]) > 0).all() and (np.diff(wave[6:]) > 0).all()
    assert wave[3] == pytest.approx(0.755, abs=0.01) and 0.75 < wave[6] < 0.77 and 4.95 < wave[-1] < 5.0


@pytest.mark.parametrize("redshift", [0.02, 0.777, 3.0])
def test_redshifting_moves_a_step_to_where_it_belongs(redshift):
    rest = np.repeat((REST_WAVE > 4000).astype(np.float32)[None], 2, 0)
    seen = observe(rest, np.full(2, redshift))
    edge = OBSERVED_WAVE[np.argmax(seen[0] > 0.5)]
    assert abs(np.log(edge / (4000 * (1 + redshift)))) < 1.5 * LOG_STEP
    assert set(np.unique(seen[0]).round(3)[[0, -1]]) == {0.0, 1.0}


@pytest.mark.parametrize("frame", ["rest", "observed"])
def test_energy_distributions_are_means_over_bins(frame):
    weights, wave = sed_bins(frame)
    assert weights.shape[0] == 120
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(np.diff(np.log(wave)), np.log(wave[-1] / wave[0]) / 119)


def test_noise_has_the_stated_size_and_stated_errors_know_no_truth():
    rng = keyed_generator(1, 0, 0)
    flux = np.full((4000, 108), 50.0)
    sky = sky_errors(4000, rng)
    measured, error = measure(flux, sky, rng)
    pull = (measured - flux) / np.hypot(sky, CALIBRATION * flux)
    np.testing.assert_allclose(pull.std(0), 1, atol=0.06)  # 4,000 numbers: 1.1 % a channel, 108 channels
    np.testing.assert_allclose(error, np.hypot(sky, CALIBRATION * measured))
