import numpy as np
import pytest
from sklearn.metrics import r2_score

from armillary.engine.evaluate.probes import scores
from armillary.engine.evaluate.probes.scores import (
    paired_difference,
    r2,
    r2_with_error,
    residuals,
    score,
    tomographic_bias,
)

TRUE = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
PREDICTED = np.array([0.0, 0.1, 0.2, 0.3, 0.54])


def test_fixed_vector():
    s = score(TRUE, PREDICTED, outlier_threshold=0.05)
    assert s.r2 == pytest.approx(1 - 0.14**2 / 0.1)
    assert s.nmad == 0  # four of five residuals are 0
    assert s.bias == 0
    assert s.outliers == pytest.approx(0.2)
    assert s.samples == 5


def test_residuals_are_over_one_plus_z_for_redshifts_only():
    np.testing.assert_allclose(residuals(TRUE, PREDICTED, redshift=True)[-1], 0.14 / 1.4)
    np.testing.assert_allclose(residuals(TRUE, PREDICTED, redshift=False)[-1], 0.14)
    assert score(TRUE, PREDICTED, outlier_threshold=0.12).outliers == 0
    assert score(TRUE, PREDICTED, outlier_threshold=0.12, redshift=False).outliers == pytest.approx(0.2)


def test_r2_is_scikit_learns():
    rng = np.random.default_rng(0)
    true = rng.normal(size=200)
    for spread in (0.1, 1.0, 3.0):
        predicted = true + spread * rng.normal(size=200)
        assert r2(true, predicted) == pytest.approx(r2_score(true, predicted))


def test_nmad_is_the_standard_deviation_of_normal_residuals():
    rng = np.random.default_rng(0)
    true = rng.uniform(0, 1, 20_000)
    s = score(true, true + 0.03 * rng.normal(size=20_000) * (1 + true) + 0.01 * (1 + true), resamples=20)
    assert s.nmad == pytest.approx(0.03, rel=0.03)
    assert s.bias == pytest.approx(0.01, abs=0.001)


def test_bootstrap_error_of_the_outlier_fraction_is_binomial():
    rng = np.random.default_rng(0)
    true = np.zeros(400)
    true[:200] = 1
    s = score(true, true + np.where(rng.random(400) < 0.2, 0.5, 0.0), resamples=2000)
    assert s.outliers_se == pytest.approx(np.sqrt(0.2 * 0.8 / 400), rel=0.15)


def test_bootstrap_error_of_the_nmad_is_that_of_normal_residuals_whatever_their_bias():
    rng = np.random.default_rng(0)
    true = np.zeros(1000)
    noise = 0.02 * rng.normal(size=1000)
    plain, biased = (score(true, noise + bias, redshift=False, resamples=500) for bias in (0.0, 0.5))
    assert biased.nmad_se == pytest.approx(plain.nmad_se, rel=1e-6)
    # 1.167 sigma / sqrt(M) for normal residuals, with a spread of 10 % over 30 seeds: five spreads are left.
    assert plain.nmad_se == pytest.approx(1.167 * 0.02 / np.sqrt(1000), rel=0.5)


def test_the_interval_of_a_difference_holds_95_percent():
    rng = np.random.default_rng(0)
    true = rng.normal(size=500)
    first, second = (true + s * rng.normal(size=500) for s in (0.3, 0.35))
    d = paired_difference(true, first, second, resamples=4000)
    # 1.96 standard errors on either side, with a spread of 0.9 % over 30 seeds; an interval of 90 % has 1.645.
    assert (d.high - d.low) / (2 * d.se) == pytest.approx(1.96, rel=0.08)


def test_same_seed_same_errors():
    rng = np.random.default_rng(0)
    true, predicted = rng.uniform(0, 1, size=(2, 50))
    assert score(true, predicted, seed=1) == score(true, predicted, seed=1)
    assert score(true, predicted, seed=1).r2_se != score(true, predicted, seed=2).r2_se


def test_constant_label_leaves_r2_undefined_and_says_so():
    s = score(np.full(10, 0.3), np.linspace(0.2, 0.4, 10))
    assert np.isnan(s.r2)
    assert np.isnan(s.r2_se)
    assert "all 10 test labels equal 0.3" in s.note
    assert np.isfinite(s.nmad)
    assert np.isnan(paired_difference(np.full(4, 0.3), np.zeros(4), np.ones(4)).value)


def test_one_sample():
    s = score(np.array([0.3]), np.array([0.31]))
    assert np.isnan(s.r2)
    assert s.outliers == 0
    assert s.bias == pytest.approx(0.01 / 1.3)


def test_no_threshold_no_outliers():
    s = score(TRUE, PREDICTED, outlier_threshold=None)
    assert np.isnan(s.outliers)
    assert np.isnan(s.outliers_se)


def test_pairing_removes_what_both_methods_share():
    rng = np.random.default_rng(0)
    true = rng.normal(size=300)
    shared = rng.normal(size=300)
    first, second = true + 0.8 * shared, true + 0.8 * shared + 0.1 * rng.normal(size=300)
    d = paired_difference(true, first, second)
    apart = np.hypot(score(true, first, redshift=False).r2_se, score(true, second, redshift=False).r2_se)
    assert d.value == pytest.approx(r2(true, first) - r2(true, second))
    assert d.se < 0.4 * apart
    assert d.low <= d.value <= d.high


def test_mean_bias_and_catastrophic_rate_by_hand():
    true = np.array([0.0, 0.0, 1.0, 1.0])
    predicted = np.array([0.15, 0.16, 1.0, 0.6])  # dz = 0.15, 0.16, 0, -0.2
    s = score(true, predicted)
    assert s.mean_bias == pytest.approx((0.15 + 0.16 - 0.2) / 4)
    assert s.bias == pytest.approx(0.075)
    assert s.catastrophic == 0.5  # |dz| > 0.15, and 0.15 is not
    assert s.outliers == 0.75


def test_bootstrap_error_of_the_mean_bias_is_the_standard_error():
    rng = np.random.default_rng(0)
    true = np.linspace(0, 1, 400)
    s = score(true, true + 0.02 * rng.normal(size=400) * (1 + true), resamples=2000)
    assert s.mean_bias_se == pytest.approx(0.02 / 20, rel=0.1)


def test_only_redshifts_have_catastrophic_errors():
    s = score(TRUE, PREDICTED + 1, redshift=False)
    assert np.isnan(s.catastrophic)
    assert np.isnan(s.catastrophic_se)
    assert score(TRUE, PREDICTED + 1).catastrophic == 1


def test_tomographic_bins_are_of_predicted_redshift():
    true = np.array([0.1, 0.1, 0.1, 0.3, 0.1, 0.3])
    predicted = np.array([0.3, 0.12, 0.1, 0.31, 0.14, 0.29])
    low, high = tomographic_bias(true, predicted, bins=2)
    assert (low.low, low.high, low.samples) == (0.1, 0.14, 3)
    assert (high.low, high.high, high.samples) == (0.29, 0.31, 3)
    assert low.predicted == pytest.approx(0.12)
    assert low.bias == pytest.approx((0.02 + 0 + 0.04) / 3 / 1.1)
    assert low.error == pytest.approx(0.02 / 1.1 / np.sqrt(3))  # 0, 0.02, 0.04 spread by 0.02
    assert high.bias == pytest.approx((0.2 / 1.1 + 0.01 / 1.3 - 0.01 / 1.3) / 3)


def test_a_predictor_that_gives_the_mean_has_no_bias_of_predicted_but_one_bin():
    true = np.random.default_rng(0).uniform(0.1, 0.5, 1000)
    (only,) = tomographic_bias(true, np.full(1000, 0.3))
    assert only.samples == 1000
    assert only.bias == pytest.approx(np.mean((0.3 - true) / (1 + true)))


def test_regression_to_the_mean_is_no_bias_in_bins_of_predicted_redshift():
    rng = np.random.default_rng(0)
    true = rng.normal(1, 0.1, 200_000)
    best = 1 + 0.5 * (true + 0.1 * rng.normal(size=200_000) - 1)  # mean of the posterior
    assert all(abs((1 + b.predicted) * b.bias) < 0.01 for b in tomographic_bias(true, best))
    below = true < 0.9
    assert residuals(true[below], best[below], redshift=True).mean() > 0.03  # as it is in bins of true redshift


@pytest.mark.parametrize(
    ("true", "predicted", "bins", "message"),
    [
        ([0.1, 0.2], [0.1, 0.2], 0, "bins: must lie between 1 and the 2 samples, got 0"),
        ([0.1, 0.2], [0.1, 0.2], 3, "got 3"),
        ([0.1, -1.0], [0.1, 0.2], 1, "greater than -1"),
        ([0.1, 0.2], [0.1, np.nan], 1, "predictions: 1 of 2"),
    ],
    ids=["no-bins", "too-many-bins", "below-minus-one", "not-finite"],
)
def test_bad_tomography(true, predicted, bins, message):
    with pytest.raises(ValueError, match=message):
        tomographic_bias(np.array(true), np.array(predicted), bins=bins)


def test_r2_with_error_is_that_of_score():
    rng = np.random.default_rng(0)
    true = rng.normal(size=100)
    predicted = true + 0.5 * rng.normal(size=100)
    s = score(true, predicted, redshift=False, resamples=200, seed=3)
    assert r2_with_error(true, predicted, resamples=200, seed=3) == (s.r2, pytest.approx(s.r2_se))
    assert np.isnan(r2_with_error(np.ones(3), np.zeros(3))).all()


def test_bootstrap_in_blocks_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    true, predicted = rng.uniform(0, 1, size=(2, 50))
    whole = score(true, predicted, resamples=100)
    monkeypatch.setattr(scores, "BLOCK", 350)  # 7 resamples at a time
    assert score(true, predicted, resamples=100) == whole


@pytest.mark.parametrize(
    ("true", "predicted", "options", "message"),
    [
        ([], [], {}, "non-empty"),
        ([1.0], [1.0, 2.0], {}, "two equal"),
        ([0.1, np.nan], [0.1, 0.2], {}, "labels: 1 of 2 are not finite"),
        ([0.1, 0.2], [0.1, np.inf], {}, "predictions: 1 of 2"),
        ([0.1, -1.0], [0.1, 0.2], {}, "greater than -1"),
        ([0.1, 0.2], [0.1, 0.2], {"outlier_threshold": 0.0}, "outlier_threshold: must be positive"),
        ([0.1, 0.2], [0.1, 0.2], {"resamples": 0}, "resamples: must be at least 1"),
    ],
)
def test_bad_input(true, predicted, options, message):
    with pytest.raises(ValueError, match=message):
        score(np.array(true), np.array(predicted), **options)
