import numpy as np
import pytest
from sklearn.metrics import r2_score

from armillary.engine.evaluate.photoz import paired_difference, r2, residuals, score

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


def test_same_seed_same_errors():
    rng = np.random.default_rng(0)
    true, predicted = rng.normal(size=(2, 50))
    assert score(true, predicted, redshift=False, seed=1) == score(true, predicted, redshift=False, seed=1)
    assert score(true, predicted, redshift=False, seed=1).r2_se != score(true, predicted, redshift=False, seed=2).r2_se


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
    apart = np.hypot(
        score(true, first, redshift=False).r2_se,
        score(true, second, redshift=False).r2_se,
    )
    assert d.value == pytest.approx(r2(true, first) - r2(true, second))
    assert d.se < 0.4 * apart
    assert d.low <= d.value <= d.high


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
