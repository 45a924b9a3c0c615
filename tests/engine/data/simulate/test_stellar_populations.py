from dataclasses import fields, replace

import numpy as np
import pytest

pytest.importorskip("galsim", reason="the simulation needs GalSim")
pytest.importorskip("speclite", reason="the simulation needs filter curves")

from armillary.engine.data.simulate.population import Population, draw_population
from armillary.engine.data.simulate.stellar_populations import (
    STELLAR_LABELS,
    age_of_universe,
    luminosity_distance_cm,
    stars_of,
)
from armillary.engine.data.simulate.survey import LEGACY


class Silent:
    """A generator whose normal numbers are all the same."""

    def __init__(self, value=0.0):
        self.value = value

    def standard_normal(self, shape):
        return np.full(shape, self.value)


@pytest.fixture(scope="module")
def population():
    return draw_population(200, 5, filters=tuple(b.filter for b in LEGACY), magnitude_limit=19.5)


def one(population, **changes):
    """The first galaxy with some of its properties replaced."""
    first = Population(**{f.name: getattr(population, f.name)[:1] for f in fields(Population)})
    return replace(first, **{name: np.array([value]) for name, value in changes.items()})


def labels(population, value=0.0, **changes):
    return stars_of(one(population, **changes), 0, Silent(value)).labels()


def test_labels_are_the_masses_means(population):
    stars = stars_of(population, 3, np.random.default_rng(0))
    found = stars.labels()
    assert list(found) == list(STELLAR_LABELS)
    assert 10 ** found["log_mstar"] == pytest.approx(stars.mass.sum())
    assert 10 ** (found["log_ssfr"] + found["log_mstar"]) == pytest.approx((stars.mass * stars.ssfr).sum())
    assert stars.age.min() <= found["tage_mw"] <= stars.age.max()
    assert np.exp(found["ln_z_mw"]) == pytest.approx(
        0.02 * (stars.mass * 10**stars.metallicity).sum() / stars.mass.sum()
    )


def test_mass_is_light_times_bells_ratio(population):
    plain = {"type_bulge": 0.0, "slope_bulge": 0.0, "slope_disk": 0.0, "share_bulge": 1.0}
    found = labels(population, absolute=-22.5, **plain)
    colour = 0.78  # g - r of the elliptical template (see the test of the colour table)
    assert found["log_mstar"] == pytest.approx(0.4 * (22.5 + 4.50) - 0.373 + 0.689 * colour, abs=0.05)
    brighter = labels(population, absolute=-23.5, **plain)
    assert brighter["log_mstar"] - found["log_mstar"] == pytest.approx(0.4)


def test_later_types_are_younger_and_form_more_stars(population):
    found = [labels(population, share_bulge=0.0, type_disk=t, slope_disk=0.0) for t in (0.0, 1.0, 2.0, 3.0)]
    assert (np.diff([f["log_ssfr"] for f in found]) > 0).all()
    assert (np.diff([f["tage_mw"] for f in found]) < 0).all()
    assert (np.diff([f["log_mstar"] for f in found]) < 0).all()  # bluer light weighs less


def test_massive_galaxies_are_metal_rich(population):
    found = [labels(population, absolute=m, share_bulge=1.0, slope_bulge=0.0) for m in (-18.5, -20.5, -22.5, -24.5)]
    metals = [f["ln_z_mw"] for f in found]
    assert (np.diff(metals) > 0).all()
    assert np.log(0.02) - 1.7 < metals[0] < metals[-1] < np.log(0.02) + 0.6


def test_redder_spectra_are_older_and_richer(population):
    red, blue = (labels(population, share_bulge=1.0, slope_bulge=s) for s in (0.06, -0.06))
    assert red["tage_mw"] > blue["tage_mw"]
    assert red["ln_z_mw"] > blue["ln_z_mw"]


@pytest.mark.parametrize("draw", [-40.0, 40.0])
def test_extreme_draws_stay_physical(population, draw):
    found = labels(population, draw)
    assert 0 < found["tage_mw"] <= 0.95 * age_of_universe(float(population.redshift[0])) + 1e-9
    assert 0.02 * 10**-1.5 - 1e-9 <= np.exp(found["ln_z_mw"]) <= 0.02 * 10**0.4 + 1e-9


def test_cosmology():
    assert age_of_universe(0.1) == pytest.approx(12.17, abs=0.05)  # H0 70, Omega_m 0.3
    assert luminosity_distance_cm(0.1) == pytest.approx(460.3 * 3.0857e24, rel=2e-3)
