import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ball import scalar, unit
from float64 import assert_as_good_as_eager, evaluate

from armillary.kernels.geometry.poincare_distance import (
    _arsinh_coefficients,
    _arsinh_ratio,
    poincare_distance,
    poincare_distance_reference,
)

mpmath.mp.dps = 60
NAMES = ("x", "y", "c")


def op(x, y, c, impl):
    return poincare_distance(x, y, c, impl=impl)


def definition(x, y, c):
    """(2 / sqrt(c)) artanh(sqrt(c) |(-x) (+) y|) with the textbook Moebius addition, to 60 figures."""
    x, y = (mpmath.matrix([mpmath.mpf(v) for v in values]) for values in (x, y))
    xy, x2, y2 = (mpmath.fdot(a, b) for a, b in ((x, y), (x, x), (y, y)))
    total = -(1 - 2 * c * xy + c * y2) * x + (1 - c * x2) * y
    length = mpmath.norm(total) / (1 - 2 * c * xy + c**2 * x2 * y2)
    return 2 / mpmath.sqrt(c) * mpmath.atanh(mpmath.sqrt(c) * length)


@triton.jit
def _coefficients_kernel(z2_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    k, h = _arsinh_coefficients(tl.load(z2_ptr + i, mask=i < n, other=0.0))
    tl.store(out_ptr + i, k, mask=i < n)
    tl.store(out_ptr + n + i, h, mask=i < n)


def test_arsinh_coefficients(device):
    switches = [f(np.float32(s)) for s in (0.1, 0.3) for f in (lambda v: np.nextafter(v, np.float32(0)), lambda v: v)]
    z2 = torch.tensor([1e-30, 1e-12, 1e-3, *switches, *np.linspace(0.02, 2, 40).tolist(), 10.0, 1e4, 1e9])
    out = torch.full((2, len(z2)), float("nan"), device=device)
    _coefficients_kernel[(1,)](z2.to(device), out, len(z2), BLOCK=triton.next_power_of_2(len(z2)))
    exact = z2.double().requires_grad_()
    ratio = _arsinh_ratio(exact)
    (slope,) = torch.autograd.grad(ratio.sum(), exact)
    for i, value in enumerate(z2.tolist()):
        z = mpmath.sqrt(mpmath.mpf(value))
        k = mpmath.asinh(z) / z
        h = 1 / mpmath.sqrt(1 + z * z) - k
        assert abs(out[0, i].item() / k - 1) < 5e-7 and abs(out[1, i].item() / h - 1) < 3e-6, value
        assert abs(ratio[i].item() / k - 1) < 2e-15 and abs(2 * value * slope[i].item() / h - 1) < 3e-14, value


@pytest.mark.parametrize("c", [1e-6, 0.3, 1e2])
def test_oracle_is_the_definition(c):
    x, y = unit(6, 4) / c**0.5, unit(6, 4) / c**0.5
    for i, (a, b) in enumerate([(0.3, 0.6), (1e-8, 0.5), (0.999, 0.999), (0.9999, 1e-6), (0.0, 0.7), (0.4, 0.0)]):
        p = a * x[i]
        for q in (b * y[i], -p, p + 1e-9 * y[i], p * (1 - 1e-3)):
            true = definition(p.tolist(), q.tolist(), mpmath.mpf(c))
            got = poincare_distance_reference(p, q, scalar(c, torch.float64)).item()
            gap = 1 - max(float(c * p.square().sum()), float(c * q.square().sum()))
            assert abs(got - true) <= 3e-15 / gap * true


@pytest.mark.parametrize("c", [1e-6, 1e-2, 1.0, 1e2])
def test_fifteen_decades_of_length(c, device):
    for i in range(-12, 4):
        for j in (-12, i, 0):
            x, y = (10.0**i * unit(2, 5)).float().to(device), (10.0**j * unit(2, 5)).float().to(device)
            inputs, cotangent = (x, y, scalar(c, device=device)), torch.tensor([1.0, 0.4], device=device)
            assert_as_good_as_eager(op, inputs, cotangent, NAMES, floor=1e-6)


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("gap", [0.5, 1e-2, 1e-3, 1e-4])
def test_near_points_and_points_near_the_boundary(apart, gap, device):
    # Differences of float32 coordinates are exact enough for any distance; 1 - c |x|^2 loses 1 / gap roundings.
    x = ((1 - gap) * unit(4, 6)).float()
    y = (x + apart * gap * unit(4, 6)).float()
    for second in (y, -y, (1 - gap) * unit(4, 6).float()):
        inputs = (x.to(device), second.to(device), scalar(1.0, device=device))
        assert_as_good_as_eager(op, inputs, torch.ones(4, device=device), NAMES, floor=1e-6 + 5e-7 / gap)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("radius", [0.0, 0.3, 0.999, 1.0, 4.0])
def test_equal_points(radius, dtype, impl, device):
    x = (radius * unit(3, 7)).to(dtype).to(device)
    for result in evaluate(op, (x, x, scalar(0.9, device=device)), torch.ones(3, device=device), impl):
        assert not result.any()  # the kink: value 0, gradient chosen 0


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_points_closer_than_a_distance_can_be(impl, device):
    x = torch.tensor([[0.0], [0.0]], device=device)
    y = torch.tensor([[9e-16], [2e-15]], device=device)
    d, dx, _, _ = evaluate(op, (x, y, scalar(1.0, device=device)), torch.ones(2, device=device), impl)
    assert d[0] == 0 and dx[0] == 0
    assert d[1].item() == pytest.approx(4e-15) and dx[1].item() == pytest.approx(-2.0)
