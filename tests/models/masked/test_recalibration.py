"""Corrected probabilities: what is too narrow becomes as wide as it should be, what is right stays as it is."""

import math

import pytest
import torch

from armillary.models.masked.gaussian_mixture import GaussianMixture
from armillary.models.masked.recalibration import RecalibratedDensity, coupled, recalibration


def gaussians(mean, std):
    return GaussianMixture(torch.zeros_like(mean)[..., None], mean[..., None], torch.full_like(mean, std)[..., None])


@pytest.fixture(scope="module")
def too_narrow():
    """Distributions half as wide as the noise of the first number, and right for the second; and truths."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.randn(8000, 2, generator=draw, dtype=torch.float64)
    true = mean + torch.randn(8000, 2, generator=draw, dtype=torch.float64)
    std = torch.tensor([0.5, 1.0], dtype=torch.float64).expand_as(mean)
    return GaussianMixture(torch.zeros_like(mean)[..., None], mean[..., None], std[..., None].clone()), true


def test_coverage_of_samples_that_were_not_fitted_on(too_narrow):
    density, true = too_narrow
    fitted = recalibration(density.pit(true)[:4000])
    pit = RecalibratedDensity(density, fitted).pit(true)[4000:]
    inside = ((pit - 0.5).abs() <= 0.34).double().mean(0)
    assert (density.pit(true)[:, 0] - 0.5).abs().le(0.34).double().mean() < 0.4
    # Two binomial errors of .0074, that of the fit and that of the count; four times their sum in quadrature.
    assert (inside - 0.68).abs().max() < 0.042


def test_it_is_a_distribution(too_narrow):
    density, true = too_narrow
    one = RecalibratedDensity(
        gaussians(torch.zeros(1, dtype=torch.float64), 0.5), recalibration(density.pit(true)[:, 0])
    )
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)[None]
    middle = (x[:, 1:] + x[:, :-1]) / 2
    total = (one.pdf(middle) * x.diff()).cumsum(1)
    assert (total - one.cdf(x)[:, 1:]).abs().max() < 1e-3  # the largest density times one cell, and jumps at K steps
    u = torch.rand(1, 500, dtype=torch.float64)
    torch.testing.assert_close(one.cdf(one.quantile(u)), u)
    integral = ((one.cdf(middle) - (middle >= 0.7).double()).square() * x.diff()).sum(1)
    torch.testing.assert_close(one.crps(torch.tensor([0.7], dtype=torch.float64)), integral, rtol=5e-3, atol=0)
    assert one.crps(torch.tensor([math.nan])).isnan().all()


def test_a_better_score(too_narrow):
    density, true = too_narrow
    better = RecalibratedDensity(density, recalibration(density.pit(true)[:4000]))
    assert better.score(true)[4000:].mean() < density.crps(true)[4000:].mean()


def test_points_stay_finite():
    """PIT values of 0 and 1 only: the truth always lay outside, and draws are as far out as single precision goes."""
    one = RecalibratedDensity(gaussians(torch.zeros(3), 1.0), recalibration(torch.tensor([0.0, 1.0]).repeat(50)))
    draws = one.draw(torch.rand(3, 1000, dtype=torch.float64))
    assert draws.isfinite().all() and (draws.abs() > 4).double().mean() > 0.85  # two of 20 steps lead from 0 to 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_probabilities_give_finite_numbers(dtype):
    """A draw may lie where a distribution's cumulative probability is 0 or 1 to the last bit."""
    pit = torch.rand(400, generator=torch.Generator().manual_seed(0)).to(dtype)
    density = GaussianMixture(
        torch.zeros(3, 1, dtype=dtype), torch.zeros(3, 1, dtype=dtype), torch.zeros(3, 1, dtype=dtype)
    )
    corrected = RecalibratedDensity(density, recalibration(pit))
    probability = torch.tensor([0.0, 1e-30, 1.0], dtype=dtype).expand(3, -1)
    assert bool(corrected.quantile(probability).isfinite().all())


def test_needs_enough_truths():
    pit = torch.rand(60, 2)
    pit[:30, 1] = math.nan
    with pytest.raises(ValueError, match="20 steps need 40 or more known truths, got 30"):
        recalibration(pit)
    assert recalibration(pit, 10).shape == (2, 11)


def test_draws_take_corrected_values_and_keep_their_order():
    """Two components that belong together, drawn half as wide as the truths scatter, and the joint draws off by one."""
    draw = torch.Generator().manual_seed(1)
    true = 2 * torch.randn(4000, 2, generator=draw, dtype=torch.float64)
    margin = torch.randn(4000, 2, 256, generator=draw, dtype=torch.float64)
    steps = recalibration((margin < true[..., None]).double().mean(-1))
    shared = torch.randn(4000, 1, 40, generator=draw, dtype=torch.float64)
    joint = 1 + shared.repeat(1, 2, 1)
    found = coupled(joint, margin, steps)
    assert found.gather(-1, joint.argsort(-1)).diff(dim=-1).min() >= 0  # 0 beyond the outermost draw
    rank = ((found < true[..., None]).sum(-1) + 0.5) / 41
    # Fitted and counted on the same: one binomial error of .0074, and steps of 1/41.
    assert ((rank - 0.5).abs() <= 0.34).double().mean() == pytest.approx(0.68, abs=0.05)
    assert ((joint[..., :1] < true[..., None]).double().mean() - 0.5).abs() > 0.1  # they were off
    assert coupled(joint[..., :1], margin, steps).mean().abs() < 0.05  # .02 for the step that holds the median
