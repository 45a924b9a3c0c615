import math
from dataclasses import replace

import numpy as np
import pytest

galsim = pytest.importorskip("galsim", reason="the simulation needs GalSim")
pytest.importorskip("speclite", reason="the simulation needs filter curves")

from armillary.engine.data.format.survey import WaveGrid  # noqa: E402
from armillary.engine.data.simulate.spectra import (  # noqa: E402
    EMISSION,
    Motion,
    SpectrumModel,
    emission_fluxes,
    fibre_share,
    resolution,
)
from armillary.engine.data.simulate.stellar_populations import Stars, luminosity_distance_cm  # noqa: E402
from armillary.engine.data.sources.files.desi_coadd import DESI_GRID  # noqa: E402

WAVE = DESI_GRID.angstrom()
BOTH = np.ones(2)


def stars(**changes):
    """A spiral of 2 x 10^10 solar masses that forms two a year, without dust."""
    basic = Stars(
        redshift=0.1,
        kind=np.array([0.1, 2.0]),
        slope=np.zeros(2),
        ebv=np.zeros(2),
        mass=np.array([1e10, 1e10]),
        ssfr=np.array([1e-12, 2e-10]),
        age=np.array([9.0, 4.0]),
        metallicity=np.array([0.0, -0.2]),
    )
    return replace(basic, **changes)


@pytest.fixture(scope="module")
def model():
    return SpectrumModel(DESI_GRID)


@pytest.mark.parametrize("redshift", [0.02, 0.1, 0.31])
def test_lines_are_at_their_redshifted_wavelengths(model, redshift):
    for k, rest in enumerate(EMISSION.values()):
        at = rest * (1 + redshift)
        if not WAVE[0] + 40 < at < WAVE[-1] - 40:
            continue
        line = model.lines(redshift, np.eye(len(EMISSION))[k] * 7, 120.0)
        assert line.sum() * 0.8 == pytest.approx(7, rel=1e-5)
        assert (line * WAVE).sum() / line.sum() == pytest.approx(at, abs=0.01)
        sigma = math.sqrt((line * (WAVE - at) ** 2).sum() / line.sum())
        blur = math.hypot(at * 120 / 299_792.458, at / resolution(at) / 2.3548)
        assert sigma == pytest.approx(math.hypot(blur, 0.8 / math.sqrt(12)), rel=0.01)


def test_measured_lines_have_the_drawn_fluxes(model):
    galaxy, fibre = stars(), np.array([0.5, 0.3])
    spectrum = model(galaxy, np.array([20.0, 30.0]), fibre, Motion(150.0, 60.0), 1.0)
    drawn = emission_fluxes(galaxy, fibre)
    for name in ("[O II] 3729", "[O III] 5007", "[O III] 4959", "[N II] 6583", "[S II] 6731"):
        quiet = model(replace(galaxy, ssfr=np.full(2, 1e-30)), np.array([20.0, 30.0]), fibre, Motion(150.0, 60.0), 1.0)
        near = np.abs(WAVE - EMISSION[name] * 1.1) < (1.3 if name == "[O II] 3729" else 6)
        measured = (spectrum - quiet)[near].sum() * 0.8
        assert measured == pytest.approx(drawn[name], rel=0.5 if name == "[O II] 3729" else 0.02)


def test_ratios_of_doublets_and_balmer_lines():
    flux = emission_fluxes(stars(), BOTH)
    assert flux["[O III] 5007"] / flux["[O III] 4959"] == pytest.approx(2.98)
    assert flux["[N II] 6583"] / flux["[N II] 6548"] == pytest.approx(2.95)
    assert flux["H alpha"] / flux["H beta"] == pytest.approx(2.86)
    assert flux["H gamma"] / flux["H beta"] == pytest.approx(0.469)


def test_h_alpha_is_kennicutts():
    galaxy = stars()
    rate = float((galaxy.mass * galaxy.ssfr).sum()) * 1.6
    luminosity = emission_fluxes(galaxy, BOTH)["H alpha"] * 1e-17 * 4 * math.pi * luminosity_distance_cm(0.1) ** 2
    assert luminosity * 7.9e-42 == pytest.approx(rate)


def test_nitrogen_is_pettini_and_pagels():
    galaxy = stars(metallicity=np.full(2, -0.3))
    flux = emission_fluxes(galaxy, BOTH)
    oxygen = 8.90 + 0.57 * math.log10(flux["[N II] 6583"] / flux["H alpha"])
    assert oxygen == pytest.approx(8.69 - 0.6 * 0.3)
    o3n2 = math.log10(flux["[O III] 5007"] / flux["H beta"] / (flux["[N II] 6583"] / flux["H alpha"]))
    assert 8.73 - 0.32 * o3n2 == pytest.approx(oxygen)


def test_dust_steepens_the_balmer_decrement():
    clear, dusty = emission_fluxes(stars(), BOTH), emission_fluxes(stars(ebv=np.full(2, 0.2)), BOTH)
    assert dusty["H alpha"] < clear["H alpha"]
    assert dusty["H alpha"] / dusty["H beta"] > 3.5


def depth(model, galaxy, rest, half=6.0):
    """Mean depth of the bulge's absorption around a wavelength."""
    only_bulge = model(galaxy, np.array([50.0, 0.0]), np.array([1.0, 0.0]), Motion(180.0, 60.0), 0.0)
    near = np.abs(WAVE / 1.1 - rest) < half
    return 1 - (only_bulge / (50.0 * model.continuum(galaxy, 0)))[near].mean()


def test_absorption_tells_age_and_metallicity(model):
    young, old = stars(age=np.full(2, 2.0)), stars(age=np.full(2, 10.0))
    assert depth(model, young, 4102.892) > depth(model, old, 4102.892) + 0.05
    assert depth(model, old, 3934.777) > depth(model, young, 3934.777) + 0.05
    poor, rich = stars(metallicity=np.full(2, -0.6)), stars(metallicity=np.full(2, 0.2))
    for line in (5175.0, 5894.0):
        assert depth(model, rich, line) > 1.5 * depth(model, poor, line)
    assert depth(model, old, 6900.0) == pytest.approx(0, abs=0.01)


def test_flux_in_the_fibre_scales_the_spectrum(model):
    galaxy = stars(ssfr=np.full(2, 1e-30))
    motion = Motion(100.0, 50.0)
    whole = model(galaxy, np.array([10.0, 20.0]), BOTH, motion, 1.0)
    half = model(galaxy, np.array([10.0, 20.0]), BOTH / 2, motion, 1.0)
    np.testing.assert_allclose(half, whole / 2, rtol=1e-9)


@pytest.mark.parametrize(("sersic", "radius", "axis"), [(1.0, 1.2, 0.4), (4.0, 0.6, 0.9), (2.0, 0.2, 0.7)])
def test_fibre_share_is_that_of_an_image(sersic, radius, axis):
    scale = 0.05
    galaxy = galsim.Sersic(sersic, half_light_radius=radius).shear(q=axis, beta=20 * galsim.degrees)
    seen = galsim.Convolve(galaxy, galsim.Gaussian(fwhm=1.1)).drawImage(nx=401, ny=401, scale=scale).array
    y, x = np.indices(seen.shape) - 200
    inside = np.clip((0.75 - np.hypot(x, y) * scale) / scale + 0.5, 0, 1)
    assert fibre_share(sersic, radius, axis) == pytest.approx((seen * inside).sum(), abs=0.015)


def test_resolution_is_that_of_the_arms():
    np.testing.assert_allclose(resolution(np.array([3600.0, 5900.0, 9800.0])), [2000, 3113, 5000], atol=1)


def test_disks_seen_edge_on_have_wider_lines():
    assert Motion.of(stars(), 0.2).disk > Motion.of(stars(), 0.95).disk + 30
    assert Motion.of(stars(mass=np.array([1e11, 1e10])), 0.5).bulge > Motion.of(stars(), 0.5).bulge


def test_grid_must_be_linear():
    with pytest.raises(ValueError, match="grid: must be linear, got log10"):
        SpectrumModel(WaveGrid("log10", 3.56, 1e-4, 4000))
