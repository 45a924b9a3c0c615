import numpy as np
import pytest
from scipy.stats import norm

from armillary.engine.evaluate.posterior import calibration

SAMPLES, DRAWS = 700, 199


def posterior_of(kind, *, samples=SAMPLES, draws=DRAWS, parameters=3, seed=0):
    """Draws and truths of a Gaussian whose mean and covariance depend on the context; `kind` spoils it."""
    rng = np.random.default_rng(seed)
    context = rng.standard_normal((samples, parameters))
    mean = 3 * context + 1
    factor = np.eye(parameters) + 0.6 * np.tril(context[:, :, None] * context[:, None], -1)
    factor = factor * np.exp(0.4 * context[:, :1, None])
    truth = mean + np.einsum("mij,mj->mi", factor, rng.standard_normal((samples, parameters)))
    width = {"too narrow": 0.5, "too wide": 2.0}.get(kind, 1.0)
    shift = factor.diagonal(axis1=1, axis2=2) * (1.5 if kind == "biased" else 0.0)
    noise = rng.standard_normal((samples, draws, parameters))
    return (mean + shift)[:, None] + width * np.einsum("mij,msj->msi", factor, noise), truth


@pytest.mark.parametrize("parameters", [1, 3])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_true_posterior_passes(parameters, seed):
    draws, truth = posterior_of("true", parameters=parameters, seed=seed)
    coverage = calibration.tarp(draws, truth, np.random.default_rng(seed))
    bound = calibration.chance_deviation(SAMPLES, 0.999)
    assert coverage.test.deviation < bound and coverage.test.p_value > 0.001
    for values in calibration.pit(draws, truth, np.random.default_rng(seed)).T:
        assert calibration.uniformity(values).deviation < bound
        for level in (0.68, 0.95):
            inside, error = calibration.interval_coverage(values, level)
            assert abs(inside - level) < 3.3 * error
    inner = slice(5, -5)
    held = (coverage.low <= coverage.credibility + 0.02) & (coverage.credibility - 0.02 <= coverage.high)
    assert held[inner].all()


@pytest.mark.parametrize("kind", ["too narrow", "too wide", "biased"])
@pytest.mark.parametrize("parameters", [1, 3])
def test_a_wrong_posterior_fails(kind, parameters):
    draws, truth = posterior_of(kind, parameters=parameters)
    coverage = calibration.tarp(draws, truth, np.random.default_rng(0))
    bound = calibration.chance_deviation(SAMPLES, 0.999)
    assert coverage.test.deviation > bound and coverage.test.p_value < 0.001
    for values in calibration.pit(draws, truth, np.random.default_rng(0)).T:
        assert calibration.uniformity(values).deviation > bound
        assert calibration.uniformity(values).p_value < 0.001


def test_interval_coverage_tells_narrow_from_wide():
    inside = {}
    for kind in ("too narrow", "true", "too wide"):
        values = calibration.pit(*posterior_of(kind), np.random.default_rng(0))
        inside[kind] = calibration.interval_coverage(values[:, 0], 0.68)[0]
    assert inside["too narrow"] < 0.5 < 0.63 < inside["true"] < 0.73 < 0.9 < inside["too wide"]


def test_pit_sees_a_shift_that_coverage_may_miss():
    draws, truth = posterior_of("true", parameters=5)
    shifted = draws + 0.3
    rng = np.random.default_rng(0)
    bound = calibration.chance_deviation(SAMPLES, 0.999)
    assert calibration.tarp(shifted, truth, rng).test.deviation < bound
    assert all(calibration.uniformity(v).deviation > bound for v in calibration.pit(shifted, truth, rng).T)


def test_the_prior_in_place_of_the_posterior_passes_coverage():
    """It is calibrated, only uninformative: coverage alone must not be read as quality."""
    rng = np.random.default_rng(0)
    truth, draws = rng.standard_normal((SAMPLES, 2)), rng.standard_normal((SAMPLES, DRAWS, 2))
    assert calibration.tarp(draws, truth, rng).test.p_value > 0.01


def test_coverage_ignores_units():
    draws, truth = posterior_of("true")
    scale, shift = np.array([1e-3, 1.0, 1e6]), np.array([5.0, -3.0, 1e6])
    one = calibration.tarp(draws, truth, np.random.default_rng(4))
    two = calibration.tarp(draws * scale + shift, truth * scale + shift, np.random.default_rng(4))
    np.testing.assert_allclose(one.expected, two.expected, atol=2 / SAMPLES)


def test_coverage_starts_at_zero_and_ends_at_one():
    coverage = calibration.tarp(*posterior_of("true"), np.random.default_rng(0))
    assert coverage.expected[0] == 0 and coverage.expected[-1] == 1
    assert (np.diff(coverage.expected) >= 0).all()
    assert (coverage.low <= coverage.expected + 1e-12).all() and (coverage.expected <= coverage.high + 1e-12).all()


def test_ranks_are_exactly_uniform_for_few_draws():
    rng = np.random.default_rng(0)
    draws, truth = rng.standard_normal((20000, 3, 1)), rng.standard_normal((20000, 1))
    assert calibration.uniformity(calibration.pit(draws, truth, rng)[:, 0]).p_value > 0.01


def test_ties_are_tossed():
    rng = np.random.default_rng(0)
    values = calibration.pit(np.zeros((5000, 9, 1)), np.zeros((5000, 1)), rng)[:, 0]
    assert calibration.uniformity(values).p_value > 0.01


def test_pit_of_draws_nears_the_analytic_one():
    rng = np.random.default_rng(0)
    draws, truth = rng.standard_normal((20, 40000, 1)), rng.standard_normal((20, 1))
    np.testing.assert_allclose(calibration.pit(draws, truth, rng), norm.cdf(truth), atol=0.015)


def test_pit_on_a_grid():
    grid = np.linspace(-6, 6, 2001)
    truth = np.array([-7.0, -1.0, 0.3, 2.0, 9.0])
    cdf = np.broadcast_to(norm.cdf(grid), (5, 2001))
    np.testing.assert_allclose(calibration.pit_on_grid(grid, cdf, truth), norm.cdf(truth), atol=1e-5)


def test_crps_agrees_with_the_gaussians():
    rng = np.random.default_rng(0)
    mean, sigma, truth = np.array([0.0, 2.0, -1.0]), np.array([1.0, 0.3, 4.0]), np.array([0.4, 1.0, -1.0])
    z = (truth - mean) / sigma
    exact = sigma * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    draws = mean[:, None, None] + sigma[:, None, None] * rng.standard_normal((3, 200000, 1))
    np.testing.assert_allclose(calibration.crps(draws, truth[:, None])[:, 0], exact, rtol=0.02)


def test_crps_is_unbiased_for_two_draws():
    rng = np.random.default_rng(0)
    truth = np.full((400000, 1), 0.7)
    exact = 0.7 * (2 * norm.cdf(0.7) - 1) + 2 * norm.pdf(0.7) - 1 / np.sqrt(np.pi)
    scores = calibration.crps(rng.standard_normal((400000, 2, 1)), truth)
    assert abs(scores.mean() - exact) < 4 * scores.std() / np.sqrt(len(scores))


def test_crps_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    draws, truth = rng.standard_normal((4, 7, 2)), rng.standard_normal((4, 2))
    pairs = np.abs(draws[:, :, None] - draws[:, None]).sum((1, 2)) / (7 * 6)
    expected = np.abs(draws - truth[:, None]).mean(1) - pairs / 2
    np.testing.assert_allclose(calibration.crps(draws, truth), expected, rtol=1e-12)


def test_crps_of_a_point_is_the_absolute_error():
    np.testing.assert_allclose(calibration.crps(np.full((1, 5, 1), 2.0), np.array([[3.5]])), 1.5)


def test_energy_score_in_one_dimension_is_the_crps():
    rng = np.random.default_rng(0)
    draws, truth = rng.standard_normal((6, 30, 1)), rng.standard_normal((6, 1))
    np.testing.assert_allclose(calibration.energy_score(draws, truth), calibration.crps(draws, truth)[:, 0], rtol=1e-12)


@pytest.mark.parametrize("kind", ["too narrow", "too wide", "biased"])
def test_scores_prefer_the_true_posterior(kind):
    right, wrong = posterior_of("true"), posterior_of(kind)
    assert (calibration.crps(*wrong).mean(0) > calibration.crps(*right).mean(0)).all()
    assert calibration.energy_score(*wrong).mean() > calibration.energy_score(*right).mean()


def test_chance_deviation_is_kolmogorovs():
    assert calibration.chance_deviation(10000) == pytest.approx(1.3581 / 100, rel=0.01)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: calibration.crps(np.zeros((2, 1, 1)), np.zeros((2, 1))), "need 2 or more"),
        (lambda: calibration.crps(np.zeros((2, 3)), np.zeros((2, 1))), "need draws"),
        (lambda: calibration.pit(np.zeros((2, 3, 1)), np.zeros((3, 1)), np.random.default_rng(0)), "need draws"),
        (lambda: calibration.crps(np.full((2, 3, 1), np.nan), np.zeros((2, 1))), "6 of 6 numbers are not finite"),
        (lambda: calibration.tarp(np.zeros((2, 3, 1)), np.zeros((2, 1)), np.random.default_rng(0)), "parameter 0"),
        (
            lambda: calibration.tarp(np.zeros((2, 3, 1)), np.eye(2)[:, :1], np.random.default_rng(0), bootstraps=0),
            "bootstraps",
        ),
        (lambda: calibration.uniformity(np.array([])), "one or more"),
        (lambda: calibration.chance_deviation(0), "samples"),
        (lambda: calibration.interval_coverage(np.ones(3), 1.0), "level"),
        (lambda: calibration.interval_coverage(np.ones(0), 0.5), "got none"),
        (lambda: calibration.pit_on_grid(np.zeros(3), np.zeros((2, 3)), np.zeros(2)), "ascend"),
        (lambda: calibration.pit_on_grid(np.arange(3), np.zeros((2, 4)), np.zeros(2)), "shapes"),
    ],
    ids=[
        "one-draw",
        "no-parameter-axis",
        "lengths",
        "not-finite",
        "constant-truth",
        "no-bootstraps",
        "no-values",
        "no-samples",
        "level",
        "no-pit",
        "grid-not-ascending",
        "grid-shape",
    ],
)
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
