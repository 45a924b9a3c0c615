import pytest
import torch
from ball import scalar, unit
from float64 import assert_as_good_as_eager, evaluate

from armillary.kernels.geometry.curvature import A_MAX
from armillary.kernels.geometry.radial_map import KINDS, ball_limit, radial_map

BALL = ("exp0", "log0", "project")


def op(kind):
    return lambda x, p, impl: radial_map(x, p, kind, impl=impl)


def rows(lengths, width, dtype=torch.float32, device="cpu"):
    """Rows of random directions and the given lengths, and a cotangent that leans along them."""
    direction = unit(len(lengths), width)
    x = direction * torch.tensor(lengths, dtype=torch.float64)[:, None]
    cotangent = direction + 0.3 * torch.randn_like(direction)
    return x.to(dtype).to(device), cotangent.to(dtype).to(device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [1e-6, 1e-2, 1.0, 1e2])
def test_fifteen_decades_of_length(kind, c, device):
    for decade in range(-12, 4):
        x, cotangent = rows([10.0**decade, 3 * 10.0**decade], 13, device=device)
        assert_as_good_as_eager(op(kind), (x, scalar(c, device=device)), cotangent, ("x", "p"))


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_every_switch(kind, device):
    near = [s**0.5 * (1 + e) for s in (0.1, 0.2, 0.25) for e in (-1e-6, 0.0, 1e-6)]
    x, cotangent = rows(near, 5, device=device)
    assert_as_good_as_eager(op(kind), (x, scalar(1.0, device=device)), cotangent, ("x", "p"))


@pytest.mark.parametrize("kind", BALL)
@pytest.mark.parametrize("radius", [0.9, 0.999, A_MAX - 2**-20, A_MAX, A_MAX + 2**-20, 1.0, 1 + 1e-6, 1.5, 30.0, 1e3])
def test_at_the_boundary_and_beyond(kind, radius, device):
    # Rows along an axis and powers of four for c: a is exact, so float32 and float64 agree on the side a row lies on.
    gap = max(1 - radius**2, 1 - A_MAX**2) if radius < A_MAX else 1.0
    for c in (2.0**-20, 0.25, 1.0, 64.0):
        x = torch.tensor([[radius, 0, 0], [0, 0, -radius]], device=device) / c**0.5
        cotangent = torch.tensor([[1.0, 0.5, -0.7], [2.0, 0.0, -1.0]], device=device)
        # The derivative of artanh turns one rounding of a^2 into 1 / (1 - a^2) of them, in any float32 formula.
        floor = 5e-7 + (1.2e-7 / gap if kind == "log0" else 0.0)
        assert_as_good_as_eager(op(kind), (x, scalar(c, device=device)), cotangent, ("x", "p"), floor)


@pytest.mark.parametrize("width", [1, 9])
@pytest.mark.parametrize("kind", ["log0", "project", "sphere"])
def test_no_radial_gradient_outside_the_ball_and_to_the_sphere(kind, width, device):
    x, _ = rows([1.5, 3.0, 100.0], width, device=device)
    for impl in ("reference", "triton"):
        y, dx, _ = evaluate(op(kind), (x, scalar(1.0, device=device)), x / x.norm(dim=1, keepdim=True), impl)
        assert (dx.norm(dim=1) <= 1e-6 * y.norm(dim=1) / x.norm(dim=1)).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_rows(impl, dtype, device):
    x = torch.zeros(3, 6, dtype=dtype, device=device)
    cotangent = torch.randn(3, 6, device=device).to(dtype)
    for kind in BALL:
        y, dx, dc = evaluate(op(kind), (x, scalar(0.7, device=device)), cotangent, impl)
        assert torch.equal(y, x) and torch.equal(dx, cotangent) and dc == 0  # the identity, to first order
    for gradient in evaluate(op("sphere"), (x, scalar(0.7, device=device)), cotangent, impl):
        assert not gradient.any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_too_short_for_a_direction(impl, device):
    x = torch.tensor([[1e-16, 0.0], [0.0, 2e-15]], device=device)
    y, dx, _ = evaluate(op("sphere"), (x, scalar(3.0, device=device)), torch.ones_like(x), impl)
    assert not y[0].any() and not dx[0].any()
    assert y[1].tolist() == pytest.approx([0, 3]) and dx[1].tolist() == pytest.approx([1.5e15, 0.0])


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_projected_rows_lie_inside_even_when_rounded(impl, dtype, device):
    for c in (1.0, 0.37):
        x, _ = rows([0.5, 0.99, 1.0, 1.01, 3.0, 1e3], 77, dtype, device)
        y = radial_map(x, c, "project", impl=impl)
        radius = c**0.5 * y.double().norm(dim=1)
        assert (radius < 1).all() and (radius[2:] / (c**0.5 * x.double().norm(dim=1)[2:]).clamp_max(1) > 0.98).all()
        assert torch.equal(y[0], x[0])
        again = radial_map(y, c, "project", impl=impl)
        assert ((again - y).abs() <= torch.finfo(dtype).eps * y.abs()).all()
        assert radial_map(y, c, "log0", impl=impl).isfinite().all()
    assert 1 - ball_limit(dtype) >= torch.finfo(dtype).eps
