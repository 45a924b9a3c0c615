import numpy as np
import pytest

from armillary.engine.evaluate.probes.bins import quantile_strata, score_strata
from armillary.engine.evaluate.probes.scores import score


def test_bins_hold_equally_many_and_leave_unknown_out():
    values = np.random.default_rng(0).permutation(np.r_[np.arange(120.0), [np.nan] * 7])
    strata = quantile_strata("mag_r", values, 4)
    assert [len(s.rows) for s in strata] == [30, 30, 30, 30]
    assert [(s.low, s.high, s.middle) for s in strata][1] == (30, 59, 44.5)
    together = np.concatenate([s.rows for s in strata])
    assert len(np.unique(together)) == 120
    assert np.isfinite(values[together]).all()
    assert strata[0].name == "mag_r 0 to 29"


def test_fewer_bins_where_samples_are_few():
    values = np.arange(70.0)
    assert [len(s.rows) for s in quantile_strata("z", values, 6)] == [23, 23, 24]
    assert quantile_strata("z", values[:39], 6) == ()
    assert quantile_strata("z", np.full(100, np.nan), 6) == ()


def test_equal_values_stay_together():
    values = np.r_[np.zeros(60), np.arange(1.0, 41)]
    strata = quantile_strata("z", values, 4)
    assert [(s.low, s.high, len(s.rows)) for s in strata] == [(0, 15, 75), (16, 40, 25)]
    assert quantile_strata("z", np.zeros(100), 4) == ()


def test_a_bin_that_equal_values_leave_too_small_is_left_out():
    values = np.r_[np.arange(10.0), np.full(60, 20.0), np.arange(30.0, 60)]
    strata = quantile_strata("z", values, 4)  # edges at 20 and 35: 10 values, 65 and 25
    assert [(s.low, s.high, len(s.rows)) for s in strata] == [(20, 34, 65), (35, 59, 25)]
    assert [len(s.rows) for s in quantile_strata("z", values, 4, least=10)] == [10, 65, 25]


def test_scores_of_a_bin_are_those_of_its_samples():
    rng = np.random.default_rng(0)
    true = rng.uniform(0, 1, 200)
    predicted = true + np.where(true > 0.5, 0.1, 0.01) * rng.normal(size=200)
    strata = quantile_strata("redshift", true, 2)
    near, far = score_strata(strata, true, predicted, redshift=True, resamples=50)
    rows = strata[1].rows
    assert far == score(true[rows], predicted[rows], resamples=50)
    assert far.nmad > 4 * near.nmad


def test_bad_bins():
    with pytest.raises(ValueError, match="must be 1 or more, got 0 and 20"):
        quantile_strata("z", np.arange(100.0), 0)
