"""Histories: shares that add up, haloes that the history tells of, galaxies in the mean where papers have them."""

import numpy as np
import pytest

from armillary.engine.data.simulate.population import keyed_generator
from armillary.engine.data.simulate.populations.histories import FINE_BINS, cosmology, draw_histories, mean_halo_mass


@pytest.fixture(scope="module")
def drawn():
    return draw_histories(3000, keyed_generator(7, 0, 0), 21.5)


def test_shares_add_to_one_and_nothing_is_negative(drawn):
    assert drawn.formed.shape == (3000, FINE_BINS) and (drawn.formed >= 0).all()
    np.testing.assert_allclose(drawn.formed.sum(1), 1)
    before = drawn.formed_before(np.array([0.0, 0.05, 0.5, 2.0, 20.0]))
    np.testing.assert_allclose(before[:, 0], 1)
    np.testing.assert_allclose(before[:, -1], 0)
    assert (np.diff(before, axis=1) <= 1e-12).all()


def test_times_lie_between_the_beginning_and_the_observation(drawn):
    assert (drawn.age > drawn.half_mass_time).all() and (drawn.half_mass_time > 0).all()
    assert (drawn.mean_age() > 0).all() and (drawn.mean_age() < drawn.age).all()
    assert cosmology().age_at(np.array([0.0202]))[0] == pytest.approx(13.5, abs=0.1)


@pytest.mark.parametrize(
    ("redshift", "log_halo", "log_star"), [(0.0, 12.0, 10.535), (0.0, 14.0, 11.381), (2.0, 12.0, 10.162)]
)
def test_halo_mass_inverts_the_published_relation(redshift, log_halo, log_star):
    """Values of Moster, Naab & White (2013), equation 2, worked out by hand."""
    found = mean_halo_mass(np.array([log_star]), np.array([redshift]))[0]
    assert found == pytest.approx(log_halo, abs=0.02)


def test_the_history_tells_of_the_halo_beyond_mass_and_redshift(drawn):
    """Correlation of what mass and redshift leave of log halo mass and of the age by the universe's age."""
    log_mass = np.log10(drawn.stellar_mass)
    known = np.column_stack([np.ones(3000), log_mass, log_mass**2, log_mass**3, drawn.redshift, drawn.redshift**2])
    young = drawn.mean_age() / drawn.age
    halo = np.log10(drawn.halo_mass)
    left = [y - known @ np.linalg.lstsq(known, y, rcond=None)[0] for y in (halo, young)]
    assert np.corrcoef(*left)[0, 1] < -0.25  # eight seeds: -.36 to -.40


def test_massive_galaxies_are_more_often_quenched(drawn):
    quiet = drawn.recent_share() < 1e-3
    massive = drawn.stellar_mass > 10**10.8
    assert quiet[massive].mean() > 2 * quiet[~massive].mean()  # eight seeds: 3.6 to 5.7 times


def test_a_limit_that_nothing_reaches_is_refused():
    with pytest.raises(ValueError, match="no galaxy is brighter than 2"):
        draw_histories(10, keyed_generator(7, 0, 0), 2.0)
