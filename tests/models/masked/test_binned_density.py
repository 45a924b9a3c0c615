"""Binned distributions: against numerical integration, limits by hand, gradients and calibration."""

import pytest
import torch

from armillary.models.masked.binned_density import BinnedDensity, edge_problems

EDGES = torch.tensor([0.0, 0.1, 0.4, 0.5, 1.5, 2.0], dtype=torch.float64)


def density(size=7, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return BinnedDensity(EDGES, (2 * torch.randn(size, 5, generator=draw, dtype=torch.float64)).to(dtype))


def fine(points=200_001, low=-1.0, high=3.0):
    """Midpoints of a fine grid and their spacing."""
    step = (high - low) / points
    return low + step * (torch.arange(points, dtype=torch.float64) + 0.5), step


def test_density_integrates_to_the_cumulative_distribution():
    d = density()
    x, step = fine()
    grid = x.expand(7, -1)
    total = (d.pdf(grid) * step).cumsum(1)
    torch.testing.assert_close(total[:, -1], torch.ones(7, dtype=torch.float64), rtol=1e-4, atol=0)
    assert (total - d.cdf(grid)).abs().max() < 2e-4  # a step times the largest density, some 10
    torch.testing.assert_close(d.cdf(EDGES.expand(7, -1))[:, 1:], d.probability.cumsum(1))
    beyond = d.cdf(torch.tensor([[-5.0, 9.0]]).expand(7, -1).double())
    torch.testing.assert_close(beyond, torch.tensor([[0.0, 1.0]]).expand(7, -1).double())
    assert not d.pdf(torch.tensor([[-0.1, 2.1]]).expand(7, -1).double()).any()


@pytest.mark.parametrize("true", [-0.5, 0.0, 0.05, 0.4, 0.9, 2.0, 2.7])
def test_score_equals_its_integral(true):
    d = density()
    x, step = fine(low=-1, high=3)
    expected = ((d.cdf(x.expand(7, -1)) - (x >= true).double()).square() * step).sum(1)
    torch.testing.assert_close(d.crps(torch.full((7,), true)), expected, rtol=1e-4, atol=2e-5)


def test_score_of_one_bin_and_gradients():
    uniform = BinnedDensity(torch.tensor([0.0, 1.0]), torch.zeros(1, 1))
    assert uniform.crps(torch.tensor([0.5])).item() == pytest.approx(1 / 12)  # of U(0, 1) at its middle
    true = torch.tensor([-0.5, 0.05, 0.45, 0.9, 1.7, 2.5, 0.2], dtype=torch.float64)
    logits = density().logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: BinnedDensity(EDGES, x).crps(true), (logits,))
    extreme = torch.tensor([[1e4, 0.0, 0.0, 0.0, -1e4]], requires_grad=True)
    score = BinnedDensity(EDGES, extreme).crps(torch.tensor([1.8]))
    score.backward()
    assert score.isfinite() and extreme.grad.isfinite().all()


def test_score_is_proper():
    """The truth's own distribution scores best; any step away from it scores worse on its draws."""
    d = density(1)
    draws = d.quantile((torch.arange(20_000, dtype=torch.float64)[None] + 0.5) / 20_000)[0]

    def score(logits):
        return BinnedDensity(EDGES, logits.expand(len(draws), -1)).crps(draws).mean()

    best = score(d.logits)
    for step in torch.eye(5, dtype=torch.float64):
        assert score(d.logits + 0.3 * step) > best < score(d.logits - 0.3 * step)


def test_quantiles_invert_the_cumulative_distribution():
    d = density()
    u = torch.rand(7, 1000, dtype=torch.float64)
    torch.testing.assert_close(d.cdf(d.quantile(u)), u)
    ends = d.quantile(torch.tensor([[0.0, 1.0]]).expand(7, -1).double())
    assert (ends >= 0).all() and (ends <= 2).all()
    torch.testing.assert_close(d.cdf(d.median()[:, None])[:, 0], torch.full((7,), 0.5, dtype=torch.float64))
    certain = BinnedDensity(EDGES, torch.tensor([[-1e4, -1e4, 1e4, -1e4, -1e4]]))  # bins without probability
    x = certain.quantile(torch.rand(1, 1000))
    assert (x >= 0.4 - 1e-6).all() and (x <= 0.5 + 1e-6).all()


def test_draws_are_uniform_in_pit():
    """Largest distance of the PIT of 20,000 draws from uniform: 1.95 / sqrt(n) is passed once in 1,000."""
    d = density(1)
    draws = d.quantile(torch.rand(1, 20_000, dtype=torch.float64))[0]
    pit = BinnedDensity(EDGES, d.logits.expand(20_000, -1)).pit(draws).sort().values
    assert (pit - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 1.95 / 20_000**0.5


def test_half_precision_and_unknown_truths():
    half, whole = density(dtype=torch.bfloat16), density()
    true = torch.tensor([0.1, 0.3, float("nan"), 0.6, 1.0, 1.6, 0.0])
    score = half.crps(true)
    assert score.dtype == torch.float32 and score.isnan().tolist() == true.isnan().tolist()
    torch.testing.assert_close(score.double(), whole.crps(true), rtol=0.05, atol=2e-3, equal_nan=True)


def test_edges_must_increase():
    assert edge_problems("bins", EDGES.tolist()) == []
    for edges in ((0.0,), (0.0, 0.0), (1.0, 0.5), (0.0, float("nan"), 1.0), (0.0, float("inf"))):
        assert edge_problems("bins", edges)[0].startswith("bins: must be two or more finite, increasing numbers")
