"""Scores of filled gaps by hand, and what the pictures of spectra say."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from armillary.engine.evaluate.spectra.figures import (
    LINES,
    attention_over_wavelength,
    fill_scores,
    interpolate,
    mask_filling,
    token_wavelengths,
)

WAVE = 3600 + 0.8 * np.arange(7781)


@pytest.fixture
def spectra():
    rng = np.random.default_rng(0)
    flux = 5 + 2 * np.sin(WAVE / 150) + rng.normal(0, 0.5, (3, 7781))
    ivar = np.full(flux.shape, 4.0)
    ivar[:, 2000:2040] = 0
    flux[:, 2000:2040] = np.nan  # anything may stand there
    hidden = np.zeros(flux.shape, bool)
    hidden[:, 500:900], hidden[:, 1990:2050], hidden[:, -300:] = True, True, True
    filled = np.where(hidden, 5 + 2 * np.sin(WAVE / 150), np.nan)
    return flux, ivar, filled, hidden


def svgs(fragment):
    """The charts, parsed: a broken one raises."""
    return [ET.fromstring(part) for part in re.findall(r"<svg.*?</svg>", fragment, re.DOTALL)]


def words(chart):
    return [text.strip() for element in chart.iter() if element.tag.endswith("text") and (text := element.text or "")]


def test_scores_equal_their_definitions():
    flux = np.array([[1.0, 2, 3, 9, 5, 6, 7, 8], [4.0, 4, 4, 4, 4, 4, 4, 4.2]])
    ivar = np.array([[1.0, 1, 1, 4, 0, 1, 1, 1], [25.0] * 8])
    flux[0, 4] = np.nan
    hidden = np.zeros((2, 8), bool)
    hidden[:, 3:5] = True
    filled = np.where(hidden, 4.5, np.nan)
    scores = {m.model: m for m in fill_scores(flux, ivar, filled, hidden, features="f", edge=2)}
    assert list(scores) == ["model", "mean", "interpolation", "noise"]
    assert {(m.task, m.features, m.target, m.metric, m.samples) for m in scores.values()} == {
        ("masking", "f", "flux", "mse", 2)
    }
    mean = 36 / 7
    variance = np.var([1, 2, 3, 9, mean, 6, 7, 8], ddof=1)
    # pixel 3 is the only hidden one with data; its line goes from 2.5 at 1.5 to 6.5 at 5.5
    expected = {"model": 4.5**2, "mean": (9 - mean) ** 2, "interpolation": (9 - 4.0) ** 2, "noise": 0.25}
    flat = {"model": 0.25, "mean": 0.025**2, "interpolation": 0.0, "noise": 0.04}  # of variance clipped at 0.2^2
    for name, squared in expected.items():
        one, two = squared / variance, flat[name] / 0.04
        assert scores[name].value == pytest.approx((one + two) / 2), name
        assert scores[name].error == pytest.approx(abs(one - two) / 2), name


def test_a_perfect_model_scores_the_noise(spectra):
    scores = {m.model: m.value for m in fill_scores(*spectra)}
    assert scores["model"] == pytest.approx(scores["noise"], rel=0.1)
    assert scores["noise"] < scores["interpolation"] < scores["mean"]


def test_one_spectrum_has_no_error_and_none_no_score(spectra):
    one = [x[:1] for x in spectra]
    assert all(np.isnan(m.error) and m.samples == 1 for m in fill_scores(*one))
    flux, ivar, filled, _ = spectra
    with pytest.raises(ValueError, match="hidden: no hidden pixel of 3 spectra carries data"):
        fill_scores(flux, ivar, filled, ivar == 0)
    with pytest.raises(ValueError, match=r"must all be \[spectra, pixels\], got flux \(3, 7781\), ivar \(3, 9\)"):
        fill_scores(flux, ivar[:, :9], filled, ivar > 0)


def test_lines_join_both_sides_of_a_gap():
    flux, seen = np.array([0.0, 2, 9, 9, 6, 8, 9, 9]), np.ones(8, bool)
    hidden = np.array([0, 0, 1, 1, 0, 0, 1, 1], bool)
    np.testing.assert_allclose(interpolate(flux, seen, hidden, 1), [0, 2, 2 + 4 / 3, 2 + 8 / 3, 6, 8, 8, 8])
    np.testing.assert_allclose(interpolate(flux, seen, hidden, 2)[2:4], [1 + 1.5 * 1.5, 1 + 2.5 * 1.5])
    seen[1] = False
    np.testing.assert_allclose(interpolate(flux, seen, hidden, 1)[2:4], [3, 4.5])  # pixel 1 has no data
    assert not interpolate(flux, ~hidden, np.ones(8, bool)).any()


def test_filled_gaps_are_drawn_with_the_lines_in_reach(spectra):
    flux, ivar, filled, hidden = spectra
    redshift = np.array([0.1, 0.55, np.nan])
    fragment = mask_filling(WAVE, flux, ivar, filled, hidden, redshift, unit="nJy")
    charts = svgs(fragment)
    assert len(charts) == 3 and fragment.count('class="card"') == 3 and len(fragment) < 250_000
    assert "z = 0.1000" in fragment and "redshift unknown" in fragment
    near, far, unknown = (" ".join(words(chart)) for chart in charts)
    for name in ("[O II]", "Ca K, H", "Hβ", "[O III]", "Mg b", "Na D", "[O I]", "Hα", "[S II]"):
        assert name in near, name
    assert "Hα" not in far and "Na D" in far and "[O II]" in far  # 6564.6 x 1.55 lies beyond 9824
    assert "Hβ" not in unknown and "Flux in nJy." in fragment
    for attribute in re.findall(r' d="([^"]*)"', fragment):
        assert not re.search(r"\.\d\d", attribute)


def test_titles_replace_redshifts_and_are_escaped(spectra):
    fragment = mask_filling(WAVE, *(x[:1] for x in spectra), np.array([0.2]), titles=["a < b"])
    assert "<h3>a &lt; b</h3>" in fragment and "z = 0.2000" not in fragment


def test_attention_is_drawn_over_the_windows(spectra):
    flux, ivar, _, _ = spectra
    weights = np.full((3, 2, 778), 1 / 778)
    weights[0, 1] = 0
    weights[0, 1, 0], weights[0, 1, 400] = 0.25, 0.75
    fragment = attention_over_wavelength(WAVE, flux, ivar, weights, np.array([0.1, 0.2, 0.3]), window=20, step=10)
    charts = svgs(fragment)
    said = words(charts[0])
    assert len(charts) == 3 and {"head 1", "head 2", "mean and deviation: 0.1%", "mean and deviation: 25.0%"} <= set(
        said
    )
    assert len(fragment) < 600_000


def test_windows_lie_where_their_pixels_are():
    middle = token_wavelengths(WAVE, 778, window=20, step=10)
    assert middle.shape == (777,)
    np.testing.assert_allclose(middle[[0, 1, -1]], [WAVE[:20].mean(), WAVE[10:30].mean(), WAVE[7760:7780].mean()])
    with pytest.raises(
        ValueError, match="tokens: windows of 20 pixels every 10 in 7781 pixels give at most 778, got 779"
    ):
        token_wavelengths(WAVE, 779, window=20, step=10)
    with pytest.raises(ValueError, match="got 1"):
        token_wavelengths(WAVE, 1, window=20, step=10)


def test_weights_of_other_spectra_are_refused(spectra):
    flux, ivar, _, _ = spectra
    with pytest.raises(ValueError, match=r"weights: must be \[3, heads, tokens\], got \(2, 4, 778\)"):
        attention_over_wavelength(WAVE, flux, ivar, np.ones((2, 4, 778)), np.zeros(3), window=20, step=10)


def test_lines_are_the_usual_ones_in_vacuum():
    assert list(LINES.values()) == sorted(LINES.values()) and len(LINES) == 17
    # NIST's wavelengths in air, times the refractive index of air there (Ciddor 1996)
    for name, air, index in (("Hα", 6562.79, 1.000276), ("Hβ", 4861.35, 1.000279), ("[O III] 5007", 5006.84, 1.000279)):
        assert LINES[name] == pytest.approx(air * index, abs=0.1)
