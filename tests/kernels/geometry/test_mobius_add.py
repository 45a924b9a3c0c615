import mpmath
import pytest
import torch
from ball import scalar, unit
from float64 import assert_as_good_as_eager, evaluate

from armillary.kernels.geometry.mobius_add import mobius_add, mobius_add_reference

mpmath.mp.dps = 60
NAMES = ("x", "y", "c")


def op(x, y, c, impl):
    return mobius_add(x, y, c, impl=impl)


def textbook(x, y, c):
    """Equation 4 of Ganea et al. to 60 figures; x and y are lists of floats."""
    x, y = (mpmath.matrix([mpmath.mpf(v) for v in values]) for values in (x, y))
    xy, x2, y2 = (mpmath.fdot(a, b) for a, b in ((x, y), (x, x), (y, y)))
    total = (1 + 2 * c * xy + c * y2) * x + (1 - c * x2) * y
    return total / (1 + 2 * c * xy + c**2 * x2 * y2)


@pytest.mark.parametrize("c", [1e-6, 0.3, 1e2])
def test_oracle_is_the_textbook_form(c):
    x, y = unit(6, 4) / c**0.5, unit(6, 4) / c**0.5
    radii = [(0.3, 0.6), (1e-8, 0.5), (0.999, 0.999), (0.9999, 1e-6), (0.0, 0.7), (0.4, 0.0)]
    for i, (a, b) in enumerate(radii):
        p, q = a * x[i], b * y[i]
        for second in (q, -p, -p * (1 - 1e-3)):
            true = textbook(p.tolist(), second.tolist(), mpmath.mpf(c))
            got = mobius_add_reference(p, second, scalar(c, torch.float64))
            size = max(float(mpmath.norm(true)), float((p + second).norm()))
            gap = min(1 - a * a, 1 - float(c * second.square().sum()))
            assert float(mpmath.norm(mpmath.matrix(got.tolist()) - true)) <= 1e-14 / gap * size + 1e-40


@pytest.mark.parametrize("c", [1e-6, 1e-2, 1.0, 1e2])
def test_fifteen_decades_of_length(c, device):
    for i in range(-12, 4):
        for j in (-12, i, 0):
            x, y = (10.0**i * unit(2, 5)).float().to(device), (10.0**j * unit(2, 5)).float().to(device)
            inputs, cotangent = (x, y, scalar(c, device=device)), unit(2, 5).to(device)
            if c * 10.0 ** (2 * max(i, j)) > 1e3:  # far outside: the oracle's own derivatives cancel
                got, true = (evaluate(op, inputs, cotangent, impl) for impl in ("triton", "reference"))
                torch.testing.assert_close(got[0], true[0])
                assert all(gradient.isfinite().all() for gradient in got)
                continue
            # For |x| << |y| dL/dc is the small rest of terms |G| |f| (|x|^2 + |y|^2) in size.
            f = mobius_add(x.double(), y.double(), c).norm(dim=-1)
            squares = x.double().square().sum(-1) + y.double().square().sum(-1)
            scale = (cotangent.norm(dim=-1) * f * squares.clamp_max(1 / c)).sum()
            assert_as_good_as_eager(op, inputs, cotangent, NAMES, scales={"c": scale})


@pytest.mark.parametrize("gap", [0.1, 1e-2, 1e-3, 1e-4])
def test_opposite_points_near_the_boundary(gap, device):
    # The textbook denominator is gap^2 there, invisible beside 1 in float32 for the last two.
    x = ((1 - gap) * unit(4, 6)).float()
    for y in (-x, -x * (1 - gap), x, -x + gap * unit(4, 6).float() * 0.3):
        inputs = (x.to(device), y.to(device), scalar(1.0, device=device))
        assert_as_good_as_eager(op, inputs, unit(4, 6).to(device), NAMES, floor=1e-6 + 5e-7 / gap)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_zero_rows(impl, device):
    x, y, g = (unit(3, 4).float().to(device) * 0.6 for _ in range(3))
    zero = torch.zeros_like(x)
    torch.testing.assert_close(mobius_add(x, zero, 0.8, impl=impl), x)
    torch.testing.assert_close(mobius_add(zero, y, 0.8, impl=impl), y)
    f, dx, dy, dc = evaluate(op, (zero, zero, scalar(0.8, device=device)), g, impl)
    assert not f.any() and torch.equal(dx, g) and torch.equal(dy, g) and dc == 0
