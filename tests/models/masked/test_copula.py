"""Copulas of low rank: densities against the plain formula, draws against their correlations, unknown entries."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from armillary.models.masked.copula import copula_score, correlated, normal_scores


def some_loadings(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlation(loadings):
    g = loadings * (1 + loadings.square().sum(-1)).rsqrt()[..., None]
    found = g @ g.mT
    found.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return found


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_scores_are_those_of_the_plain_formula(rank):
    loadings, z = some_loadings(6, 5, rank), some_loadings(6, 5, seed=1)
    joint = MultivariateNormal(torch.zeros(5, dtype=torch.float64), correlation(loadings)).log_prob(z)
    own = torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
    torch.testing.assert_close(copula_score(loadings, z), -(joint - own) / 5)
    assert torch.equal(copula_score(torch.zeros_like(loadings), z), torch.zeros(6, dtype=torch.float64))


def test_unknown_entries_are_left_out():
    loadings, z = some_loadings(3, 5, 2), some_loadings(3, 5, seed=1)
    z[0, [1, 4]] = torch.nan
    z[1, 1:] = torch.nan
    loadings.requires_grad_()
    found = copula_score(loadings, z)
    kept = [0, 2, 3]
    torch.testing.assert_close(found[0], copula_score(loadings[0, kept], z[0, kept]))
    assert found[1].isnan() and not found[2].isnan()
    found.nansum().backward()
    assert loadings.grad.isfinite().all() and not loadings.grad[0, 1].any() and not loadings.grad[1].any()


def test_gradients():
    z = some_loadings(2, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: copula_score(x, z), some_loadings(2, 4, 2).requires_grad_())


def test_draws_have_the_correlations():
    loadings = some_loadings(5, 2)
    count = 40_000
    z = correlated(loadings, some_loadings(count, 2, seed=2), some_loadings(count, 5, seed=3))
    found = torch.corrcoef(z.T)
    assert (found - correlation(loadings)).abs().max() < 0.025  # 5 sigma of 1 / sqrt(40,000)
    assert (z.std(0) - 1).abs().max() < 0.02


def test_normal_scores_stay_finite():
    p = torch.tensor([0.0, 1e-12, 0.5, 1.0, torch.nan])
    found = normal_scores(p)
    assert found[2] == 0 and found[:4].isfinite().all() and found[4].isnan()
