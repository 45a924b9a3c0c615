"""Distances in products: closed forms, isometries, the flat limit, gradients at 0 and far out."""

import math

import pytest
import torch

from armillary.models.galaxy_walker.geometry_prompt.layers import Chart
from armillary.models.geometry.manifolds import Curvature, exp0, mobius_add
from armillary.models.geometry.product_space import factor_distance, product_distance
from armillary.models.geometry.sphere import exp_pole

SPACES = ("euclidean", "spherical", "hyperbolic")


def point(u, space, c):
    return exp0(u, c) if space == "hyperbolic" else exp_pole(u, c) if space == "spherical" else u


def tangents(count, width, seed=0, scale=0.5):
    return scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
def test_distance_from_the_origin_is_the_length(space, c):
    u = tangents(20, 4)
    origin = point(torch.zeros(1, 4, dtype=torch.float64), space, c)
    torch.testing.assert_close(factor_distance(point(u, space, c), origin, space, c), u.norm(dim=1))


@pytest.mark.parametrize("space", SPACES)
def test_flat_limit(space):
    u, v = tangents(20, 4), tangents(20, 4, 1)
    got = factor_distance(point(u, space, 1e-8), point(v, space, 1e-8), space, 1e-8)
    torch.testing.assert_close(got, (u - v).norm(dim=1), rtol=1e-6, atol=1e-6)


def test_isometries():
    u, v = tangents(20, 3), tangents(20, 3, 1)
    turn = torch.linalg.qr(tangents(3, 3, 2)).Q
    for space in SPACES:
        x, y = point(u, space, 1.0), point(v, space, 1.0)
        turned = factor_distance(point(u @ turn, space, 1.0), point(v @ turn, space, 1.0), space)
        torch.testing.assert_close(turned, factor_distance(x, y, space))
    big = torch.linalg.qr(tangents(4, 4, 3)).Q  # of all coordinates of the sphere
    x, y = (point(w, "spherical", 1.0) for w in (u, v))
    torch.testing.assert_close(factor_distance(x @ big, y @ big, "spherical"), factor_distance(x, y, "spherical"))
    x, y = (point(w, "hyperbolic", 1.0) for w in (u, v))
    shift = point(tangents(1, 3, 4), "hyperbolic", 1.0)
    moved = factor_distance(mobius_add(shift, x, 1.0), mobius_add(shift, y, 1.0), "hyperbolic")
    torch.testing.assert_close(moved, factor_distance(x, y, "hyperbolic"))


def test_antipodes_and_equal_points():
    x = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    assert factor_distance(x, -x.detach(), "spherical").item() == pytest.approx(math.pi)
    for space in SPACES:
        z = torch.full((1, 3), 0.5, dtype=torch.float64, requires_grad=True)
        d = factor_distance(z, z.detach(), space)
        d.sum().backward()
        assert d.item() == 0 and torch.equal(z.grad, torch.zeros_like(z))


def test_product_is_the_root_of_squares_and_broadcasts():
    u, v = [tangents(5, 2, s) for s in range(3)], [tangents(4, 2, s + 3) for s in range(3)]
    x, y = ([point(t, s, 1.0) for t, s in zip(ts, SPACES, strict=True)] for ts in (u, v))
    got = product_distance([a[:, None] for a in x], [b[None] for b in y], SPACES, (1.0,) * 3)
    assert got.shape == (5, 4)
    parts = [factor_distance(a[3], b[2], s) for a, b, s in zip(x, y, SPACES, strict=True)]
    assert got[3, 2].item() == pytest.approx(math.hypot(*(p.item() for p in parts)))


@pytest.mark.parametrize("space", SPACES)
def test_a_thousand_steps_at_a_high_rate_stay_finite(space):
    """Points that are to be farther apart than their space or its arithmetic allows, with a learnt curvature."""
    curvature = Curvature(1.0, 0.01, 2.0)
    u = tangents(4, 3).float().requires_grad_()
    optimizer = torch.optim.Adam([u, *curvature.parameters()], lr=0.5)
    for _ in range(1000):
        c = curvature()
        x = Chart(space, c, "reference").exp(u)
        loss = (factor_distance(x, x.roll(1, 0), space, c, impl="reference") - 50).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert math.isfinite(loss.item()) and bool(u.isfinite().all()) and 0.01 <= curvature().item() <= 2


def test_unknown_space():
    with pytest.raises(ValueError, match="space: must be euclidean, spherical or hyperbolic, got 'flat'"):
        factor_distance(torch.zeros(1, 2), torch.zeros(1, 2), "flat")
