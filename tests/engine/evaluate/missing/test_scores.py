"""Measures of redshifts by hand, their intervals, and bins."""

import numpy as np
import pytest

from armillary.engine.evaluate.missing.scores import METRICS, difference_of_nmad, redshift_bins, redshift_scores


def test_measures_by_hand():
    true = np.zeros(5)
    dz = np.array([0.01, 0.03, 0.02, 0.06, 1.2])
    found = redshift_scores(true, dz, resamples=10)
    assert list(found) == list(METRICS)
    assert found["bias"].value == pytest.approx(0.03)
    assert found["nmad"].value == pytest.approx(1.4826 * 0.02)  # of .02, .0, .01, .03, 1.17
    assert found["nmad_about_zero"].value == pytest.approx(1.4826 * 0.03)
    assert found["outliers"].value == found["catastrophic"].value == pytest.approx(0.2)
    assert found["rms"].value == pytest.approx(np.sqrt((dz**2).mean()))
    scaled = (dz / 0.15) ** 2
    assert found["loss"].value == pytest.approx((1 - 1 / (1 + scaled)).mean())


def test_a_shift_is_bias_and_not_scatter():
    rng = np.random.default_rng(0)
    true = rng.uniform(0, 1, 4000)
    said = true + (1 + true) * rng.normal(0, 0.02, 4000)
    found, shifted = (redshift_scores(true, s, resamples=200) for s in (said, said + 0.05 * (1 + true)))
    assert shifted["nmad"].value == pytest.approx(found["nmad"].value)
    assert shifted["bias"].value == pytest.approx(found["bias"].value + 0.05)
    assert shifted["nmad_about_zero"].value > 2 * found["nmad"].value
    # A Gaussian's NMAD is its sigma; its standard error is 1.166 sigma / sqrt(n) (Rousseeuw and Croux 1993).
    assert found["nmad"].value == pytest.approx(0.02, abs=4 * 1.166 * 0.02 / 4000**0.5)
    assert found["nmad"].error == pytest.approx(1.166 * 0.02 / 4000**0.5, rel=0.3)
    assert found["nmad"].low < found["nmad"].value < found["nmad"].high


def test_intervals_hold_95_percent():
    rng = np.random.default_rng(0)
    true = rng.uniform(0, 1, 500)
    found = redshift_scores(true, true + (1 + true) * rng.normal(0, 0.02, 500), resamples=2000)["rms"]
    # 1.96 standard errors on either side, with a spread of 1.1 % over 30 seeds; an interval of 90 % has 1.645.
    assert (found.high - found.low) / (2 * found.error) == pytest.approx(1.96, rel=0.1)


def test_differences_are_paired():
    rng = np.random.default_rng(1)
    true = rng.uniform(0, 1, 2000)
    said = true + rng.normal(0, 0.03, 2000)
    same = difference_of_nmad(true, said, said, resamples=50)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    worse = difference_of_nmad(true, said + rng.normal(0, 0.03, 2000), said, resamples=200)
    assert worse.low > 0 and worse.value == pytest.approx(
        redshift_scores(true, said, resamples=2)["nmad"].value * (2**0.5 - 1), rel=0.25
    )


def test_bins_are_closed_on_the_right_and_hold_enough():
    true = np.concatenate([np.full(30, 0.2), np.full(25, 0.21), np.full(3, 0.5), np.full(40, 0.8)])
    bins = redshift_bins(true)
    assert [(b.low, b.high, int(b.inside.sum())) for b in bins] == [
        (0.0, 0.2, 30), (0.2, 0.4, 25), (pytest.approx(0.6), pytest.approx(0.8), 40),
    ]  # fmt: skip


@pytest.mark.parametrize("said", [np.zeros(0), np.zeros(3), np.array([0.1, np.nan])])
def test_bad_redshifts_are_refused(said):
    with pytest.raises(ValueError, match="redshifts: need two equal, non-empty rows of finite numbers"):
        redshift_scores(np.zeros(len(said) if len(said) != 3 else 2), said)
