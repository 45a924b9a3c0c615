"""All kinds of predicted distributions: one set of properties for every one, and what is particular to each."""

import math

import pytest
import torch

from armillary.models.masked.density import PointDensity, known_mean
from armillary.models.masked.gaussian_mixture import GaussianMixture
from armillary.models.masked.heads import DensityHead, HeadConfig
from armillary.models.masked.quantile_density import QuantileDensity

HEADS = {
    "gaussian": HeadConfig("mixture", 1),
    "mixture": HeadConfig("mixture", 3),
    "quantile": HeadConfig("quantile", 9),
    "binned": HeadConfig("binned", 12, reach=4.0),
    "point": HeadConfig("point", 1),
}
WITH_WIDTH = [name for name in HEADS if name != "point"]
SHAPE = (4, 2)
"""Samples, and entries of a vector."""

FINE = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
"""Ends of cells 0.002 wide; the widest tail holds exp(-30) of the probability beyond them."""


def numbers(kind, shape=SHAPE, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HEADS[kind].numbers, generator=draw, dtype=torch.float64).to(dtype)


def density(kind, **options):
    return HEADS[kind].density(numbers(kind, **options))


def everywhere(x):
    return x.expand(*SHAPE, -1)


@pytest.mark.parametrize("kind", WITH_WIDTH)
def test_cumulative_distribution_is_the_integral_of_the_density(kind):
    d = density(kind)
    middle = (FINE[1:] + FINE[:-1]) / 2
    total = (d.pdf(everywhere(middle)) * FINE.diff()).cumsum(-1)
    found = d.cdf(everywhere(FINE))
    assert (total - (found[..., 1:] - found[..., :1])).abs().max() < 6e-3  # the largest density, 3, in one cell
    assert (found.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(
        found[..., -1] - found[..., 0], torch.ones(SHAPE, dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kind", WITH_WIDTH)
def test_quantiles_invert_the_cumulative_distribution(kind):
    d = density(kind)
    u = torch.cat([torch.rand(500, dtype=torch.float64), torch.tensor([1e-9, 0.5, 1 - 1e-9])])
    torch.testing.assert_close(d.cdf(d.quantile(everywhere(u))), everywhere(u), atol=1e-9, rtol=0)
    torch.testing.assert_close(d.pit(d.median()), torch.full(SHAPE, 0.5, dtype=torch.float64))


@pytest.mark.parametrize("kind", WITH_WIDTH)
def test_ends_of_the_quantiles(kind):
    ends = density(kind).quantile(everywhere(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    expected = math.inf if kind != "binned" else 4.0
    assert (ends == torch.tensor([-expected, expected])).all()


@pytest.mark.parametrize("kind", WITH_WIDTH)
def test_draws_are_uniform_in_pit(kind):
    """Largest distance of the PIT of 20,000 draws from uniform: 1.95 / sqrt(n) is passed once in 1,000."""
    d = density(kind, seed=1)
    draws = d.draw(torch.rand(*SHAPE, 20_000, dtype=torch.float64))
    pit = d.cdf(draws).sort(-1).values
    assert (pit - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 1.95 / 20_000**0.5


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("true", [-7.0, -0.6, 0.3, 5.5])
def test_crps_equals_its_integral(kind, true):
    d = density(kind)
    x = (FINE[1:] + FINE[:-1]) / 2
    expected = ((d.cdf(everywhere(x)) - (x >= true).double()).square() * FINE.diff()).sum(-1)
    torch.testing.assert_close(d.crps(torch.full(SHAPE, true, dtype=torch.float64)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", list(HEADS))
def test_score_is_proper(kind):
    """A step away from the truth's own numbers scores worse on its draws, whichever number takes it."""
    own = numbers(kind, shape=(), seed=2)
    # Draws at even probabilities: the mean over them is an integral with an error of 1 / 20,000. Those of a point are of
    # what it is the median of.
    even = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    draws = own + even - 0.5 if kind == "point" else HEADS[kind].density(own).quantile(even)

    def score(moved):
        return HEADS[kind].density(moved.expand(len(draws), -1)).score(draws).mean()

    best = score(own)
    for step in 0.2 * torch.eye(len(own), dtype=torch.float64):
        if kind == "gaussian" and step[0] != 0:
            continue  # the weight of the only Gaussian
        assert score(own + step) > best < score(own - step)


@pytest.mark.parametrize("kind", list(HEADS))
def test_loss_is_the_mean_over_known_truths_and_its_gradient_is_right(kind):
    x = numbers(kind).requires_grad_()
    true = torch.tensor([[0.1, math.nan], [2.0, -1.5], [math.nan, 0.4], [-6.0, 8.0]], dtype=torch.float64)
    d = HEADS[kind].density(x)
    assert d.loss(true).item() == pytest.approx(d.score(true)[~true.isnan()].mean().item())
    assert torch.autograd.gradcheck(lambda n: HEADS[kind].density(n).loss(true), (x,))
    if kind != "point":  # whose score it is
        assert torch.autograd.gradcheck(lambda n: known_mean(HEADS[kind].density(n).crps(true)), (x,))
    (gradient,) = torch.autograd.grad(d.loss(true), x)
    assert not gradient[true.isnan()].any()
    nothing = HEADS[kind].density(x).loss(torch.full(SHAPE, math.nan, dtype=torch.float64))
    nothing.backward()
    assert nothing == 0 and not x.grad.any()


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_bfloat16_and_extreme_numbers_stay_finite(kind, size):
    """A network that is far off, and truths that are: scores and gradients are finite, in float32."""
    x = (size * numbers(kind)).to(torch.bfloat16).requires_grad_()
    d = HEADS[kind].density(x)
    for true in (0.0, 30.0, -3e3):
        truth = torch.full(SHAPE, true)
        loss = d.loss(truth)
        assert loss.dtype == torch.float32 and loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert gradient.isfinite().all()
        assert d.crps(truth).isfinite().all() and d.cdf(truth[..., None]).isfinite().all()
    draws = d.draw(everywhere(torch.tensor([2**-33, 0.3, 1 - 2**-33], dtype=torch.float64)))
    assert draws.isfinite().all()


@pytest.mark.parametrize("kind", list(HEADS))
def test_scalars_and_vectors_are_one_code(kind):
    """Distributions of a batch of vectors are those of each entry alone."""
    x, u = numbers(kind), torch.rand(*SHAPE, 5, dtype=torch.float64)
    whole, one = HEADS[kind].density(x), HEADS[kind].density(x[2, 1])
    for name in ("quantile", "draw", "cdf"):
        torch.testing.assert_close(getattr(whole, name)(u)[2, 1], getattr(one, name)(u[2, 1]))
    torch.testing.assert_close(whole.median()[2, 1], one.median())
    torch.testing.assert_close(whole.score(u[..., 0])[2, 1], one.score(u[2, 1, 0]))


def test_a_mixture_of_equals_is_a_gaussian():
    mean, std = torch.tensor([0.7, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    one = GaussianMixture(torch.zeros(2, 1), mean[:, None], std[:, None])
    three = GaussianMixture(torch.randn(2, 3), mean[:, None].expand(-1, 3), std[:, None].expand(-1, 3))
    normal = torch.distributions.Normal(mean, std)
    x = torch.tensor([[-3.0, 0.7, 9.0]], dtype=torch.float64).expand(2, -1)
    p = torch.tensor([[0.01, 0.5, 0.84]], dtype=torch.float64).expand(2, -1)
    for d in (one, three):
        torch.testing.assert_close(d.pdf(x), normal.log_prob(x.T).exp().T, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(d.cdf(x), normal.cdf(x.T).T, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(d.quantile(p), normal.icdf(p.T).T, rtol=1e-6, atol=1e-7)
        # At its mean the score of a Gaussian is its standard deviation times (sqrt 2 - 1) / sqrt pi.
        torch.testing.assert_close(d.crps(mean), std * (2**0.5 - 1) / math.pi**0.5, rtol=1e-6, atol=1e-7)


def test_a_mixture_with_a_gaussian_without_weight():
    d = GaussianMixture(torch.tensor([0.0, -1e4]), torch.tensor([1.0, 50.0]), torch.tensor([0.1, 0.1]))
    u = torch.tensor([1e-9, 0.5, 1 - 1e-9], dtype=torch.float64)
    for draws in (d.draw(u), d.quantile(u)):
        assert (draws > 0).all() and (draws < 2).all()


def test_quantiles_are_what_they_say():
    q = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    d = QuantileDensity(q)
    torch.testing.assert_close(d.quantile(d.levels), q)
    assert d.levels.tolist() == [0.125, 0.375, 0.625, 0.875]
    just_beyond, just_within = (
        torch.tensor([-1 - 1e-9, 2 + 1e-9]).double(),
        torch.tensor([-1 + 1e-9, 2 - 1e-9]).double(),
    )
    torch.testing.assert_close(d.pdf(just_beyond), d.pdf(just_within))  # tails begin with the density beside them


def test_a_point_has_no_width():
    d = PointDensity(torch.tensor([1.0, 2.0]))
    assert d.median().tolist() == [1.0, 2.0] and d.crps(torch.tensor([0.0, 5.0])).tolist() == [1.0, 3.0]
    assert d.draw(torch.rand(2, 3)).tolist() == [[1.0] * 3, [2.0] * 3]
    assert d.cdf(torch.tensor([[0.9, 1.0], [math.nan, 3.0]])).nan_to_num(9).tolist() == [[0, 1], [9, 1]]
    assert d.pdf(torch.tensor([[0.0, 1.0]]).expand(2, -1)).tolist() == [[0, math.inf], [0, 0]]


@pytest.mark.parametrize("kind", WITH_WIDTH)
def test_a_head_learns_a_distribution(kind):
    """Numbers that follow y = x with noise of .2: the mean score of 512 others comes near that of the truth."""
    torch.manual_seed(0)
    head = DensityHead(HEADS[kind], dim=1, entries=1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    x = torch.rand(1024, 1) * 2 - 1
    y = x + 0.2 * torch.randn(1024, 1)
    for _ in range(100):
        optimizer.zero_grad()
        head.density(head(x[:512])).loss(y[:512]).backward()
        optimizer.step()
    d = head.density(head(x[512:]).detach())
    # The truth scores .2 / sqrt(pi) = .113, one that ignores x some .35; five seeds: .111 to
    # .118, widths .38 to .43. Bins here are .67 wide: .136 to .149, .88 to 1.01.
    assert d.crps(y[512:]).mean() < (0.19 if kind == "binned" else 0.13)
    assert (d.quantile(torch.tensor([0.16, 0.84]).expand(512, 1, 2)).diff(dim=-1).mean() - 0.4).abs() < (
        0.67 if kind == "binned" else 0.1
    )


def test_rules_of_heads():
    assert all(head.problems("head") == [] for head in HEADS.values())
    assert HeadConfig("quantile", 1).problems("redshift") == [
        "redshift.size: must be at least 2 with kind quantile, got 1"
    ]
    assert HeadConfig("point", 2).problems("z") == ["z.size: must be 1 with kind point, got 2"]
    assert "must be one of" in HeadConfig("flow", 4).problems("z")[0]  # type: ignore[arg-type]
    assert "reach: must be positive" in HeadConfig("binned", 4, reach=0).problems("z")[0]
