from dataclasses import replace

import numpy as np
import pytest
import torch

from armillary.engine.data.format.survey import Statistics, Survey
from armillary.engine.data.views.stretch import AsinhScale, AsinhWhiten, Identity, ToRGB, ZScore

CPU = torch.device("cpu")


def survey(bands=("g", "r", "z"), unit="nanomaggy", sky=None, covariance=None):
    c = len(bands)
    covariance = np.eye(c) * 0.5 + 0.3 if covariance is None else covariance
    statistics = Statistics(
        mean=tuple(0.01 * (i + 1) for i in range(c)),
        std=tuple(0.1 * (i + 1) for i in range(c)),
        asinh_mean=tuple(0.2 * (i + 1) for i in range(c)),
        asinh_covariance=tuple(tuple(float(v) for v in row) for row in covariance),
        samples=10,
    )
    sky = tuple(0.002 * (i + 1) for i in range(c)) if sky is None else sky
    return Survey("s", tuple(bands), 12, 12, 0.262, unit, "bitplane", sky, sky, (), statistics)


def pixel(*flux):
    return torch.tensor(flux, dtype=torch.float32).view(1, -1, 1, 1)


def test_rgb_of_the_reference_pixel():
    out = ToRGB().build(survey(), CPU)(pixel(0.01, 0.05, 0.02))
    assert out.flatten().tolist() == pytest.approx([0.22088017, 0.5969734, 0.26863804], rel=2e-7)


def test_rgb_against_its_formula_in_float64():
    flux = torch.cat([torch.randn(4, 3, 9, 7) * s for s in (1e-3, 0.03, 1.0, 100.0)])
    y = flux.double() * torch.tensor([6.0, 3.4, 2.2], dtype=torch.float64).view(1, 3, 1, 1) + 0.03
    intensity = y.clamp_min(0).mean(1, keepdim=True)
    expected = (y * torch.asinh(20 * intensity) / 20**0.5 / (intensity + 1e-6 * (intensity == 0))).clamp(0, 1).flip(1)
    out = ToRGB().build(survey(), CPU)(flux)
    assert (out - expected).abs().max() < 1e-6


def test_rgb_of_sky_far_below_zero_is_black():
    out = ToRGB().build(survey(), CPU)(pixel(-1.0, -1.0, -1.0))
    assert torch.equal(out, torch.zeros(1, 3, 1, 1))


def test_rgb_finds_its_bands_by_name():
    flux = torch.randn(2, 3, 5, 5) * 0.1
    expected = ToRGB().build(survey(), CPU)(flux.clone())
    wide = torch.stack([flux[:, 2], torch.full((2, 5, 5), 9.0), flux[:, 0], flux[:, 1]], dim=1)
    out = ToRGB().build(survey(("z", "i", "g", "r")), CPU)(wide)
    assert torch.equal(out, expected)
    assert ToRGB().channels(survey(("z", "i", "g", "r"))) == 3


@pytest.mark.parametrize("bands", [("r",), ("u", "g", "r", "i", "z")], ids=["one band", "five bands"])
def test_rgb_of_any_number_of_bands(bands):
    stretch = ToRGB(bands=bands, scales=(2.0,) * len(bands))
    assert stretch.problems(survey(bands)) == []
    out = stretch.build(survey(bands), CPU)(torch.rand(2, len(bands), 4, 4))
    assert out.shape == (2, len(bands), 4, 4) and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("bands", [("r",), ("g", "r", "z"), ("u", "g", "r", "i", "z")], ids=len)
def test_whitening_whitens(bands):
    c = len(bands)
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(c, c)) * 0.7
    covariance, mean = factor @ factor.T, 0.2 * (np.arange(c) + 1)
    s = survey(bands, covariance=covariance)
    a = rng.normal(size=(40_000, c)) @ factor.T + mean
    flux = np.sinh(a) * 3 * np.array(s.sky_sigma)
    out = AsinhWhiten(ridge=1e-9).build(s, CPU)(torch.tensor(flux.T.reshape(1, c, 200, 200), dtype=torch.float32))
    flat = out.double().flatten(2)[0]
    np.testing.assert_allclose(flat.mean(1), 0, atol=0.03)
    np.testing.assert_allclose(np.atleast_2d(np.cov(flat.numpy())), np.eye(c), atol=0.06)


def test_whitening_is_symmetric_and_bounded_by_its_ridge():
    s = survey(covariance=np.ones((3, 3)))  # rank one: two directions without variance
    matrix = AsinhWhiten(ridge=0.03).matrix(s)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert np.linalg.eigvalsh(matrix) == pytest.approx([3.03**-0.5, 0.03**-0.5, 0.03**-0.5])


GIVEN = AsinhScale(bands=("g", "r", "z"), scale=(0.1, 0.2, 0.5), mean=(1.0, 0.0, -1.0), std=(1.0, 2.0, 0.5))


def test_asinh_with_given_scales():
    flux = torch.randn(2, 3, 4, 4)
    scale, mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (GIVEN.scale, GIVEN.mean, GIVEN.std))
    torch.testing.assert_close(GIVEN.build(survey(), CPU)(flux.clone()), ((flux / scale).asinh() - mean) / std)
    assert GIVEN.problems(survey()) == []


def test_zscore_of_the_survey_and_of_given_numbers():
    s, flux = survey(), torch.randn(2, 3, 4, 4)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (s.statistics.mean, s.statistics.std))
    torch.testing.assert_close(ZScore().build(s, CPU)(flux.clone()), (flux - mean) / std)
    own = ZScore(mean=(1.0, 2.0, 3.0), std=(2.0, 2.0, 2.0))
    assert own.build(s, CPU)(pixel(3.0, 2.0, 1.0)).flatten().tolist() == [1.0, 0.0, -1.0]


def test_identity_and_display_pictures():
    flux = torch.rand(1, 3, 2, 2) * 255
    assert torch.equal(Identity().build(survey(), CPU)(flux.clone()), flux)
    assert torch.equal(Identity(divide_by=255.0).build(survey(unit="count"), CPU)(flux.clone()), flux / 255)


@pytest.mark.parametrize(
    "stretch, changes, message",
    [
        (ToRGB(), {"bands": ("g", "r", "i")}, "stretch.bands: must be distinct bands of the survey"),
        (ToRGB(bands=("g", "g", "r")), {}, "stretch.bands: must be distinct"),
        (ToRGB(bands=(), scales=()), {}, "stretch.bands"),
        (ToRGB(scales=(1.0,)), {}, "stretch.scales: must be one positive number"),
        (ToRGB(Q=0.0), {}, "stretch.Q: must be > 0, got 0.0"),
        (ToRGB(m=-1.0), {}, "stretch.m: must be >= 0, got -1.0"),
        (ToRGB(), {"unit": "count"}, 'made for fluxes in "nanomaggy", got a survey in "count"'),
        (AsinhWhiten(ridge=0.0), {}, "stretch.ridge: must be > 0, got 0.0"),
        (AsinhWhiten(), {"sky": (0.1, 0.0, 0.1)}, "needs the survey's sky noise in every band"),
        (
            GIVEN,
            {"bands": ("g", "z", "r")},
            "stretch.bands: must be the survey's, in its order, ('g', 'z', 'r'), got ('g', 'r', 'z')",
        ),
        (replace(GIVEN, scale=(0.1, 0.2)), {}, "stretch.scale: must be one positive number a band"),
        (replace(GIVEN, mean=(0.0, float("nan"), 0.0)), {}, "stretch.mean: must be one finite number a band"),
        (ZScore(mean=(1.0,)), {}, "stretch.mean: must be one finite number a band"),
        (ZScore(std=(1.0, 0.0, 1.0)), {}, "stretch.std: must be one positive number a band"),
        (Identity(divide_by=-1.0), {}, "stretch.divide_by: must be > 0, got -1.0"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_problems_name_field_rule_and_value(stretch, changes, message):
    found = stretch.problems(survey(**changes))
    assert len(found) == 1 and message in found[0]


def test_a_constant_band_is_a_problem_of_the_zscore():
    s = survey()
    s = replace(s, statistics=replace(s.statistics, std=(0.0, 1.0, 1.0)))
    assert ZScore().problems(s) == [
        "stretch.std: must be one positive number a band ('g', 'r', 'z'), got (0.0, 1.0, 1.0)"
    ]
