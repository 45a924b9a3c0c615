import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from armillary.kernels.geometry.curvature import (
    A_MAX,
    EDGE,
    conformal,
    exp_coefficients,
    exp_scale_reference,
    log_coefficients,
    log_scale_reference,
    sech_squared,
)

mpmath.mp.dps = 60
CURVATURES = (1e-6, 0.3, 1.0, 1e2)
ABOUT_ZERO = [0.0, 1e-30, 1e-24, 1e-12, 1e-6, 1e-3, 0.01, 0.05]
SWITCHES = [0.1, 0.2, 0.25]


@triton.jit
def _device_kernel(r2_ptr, c_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    r2 = tl.load(r2_ptr + i, mask=i < n, other=0.0)
    c = tl.load(c_ptr)
    t, q = exp_coefficients(r2, c)
    s, p = log_coefficients(r2, c)
    gap, free = conformal(r2, c)
    tl.store(out_ptr + i, t, mask=i < n)
    tl.store(out_ptr + n + i, q, mask=i < n)
    tl.store(out_ptr + 2 * n + i, s, mask=i < n)
    tl.store(out_ptr + 3 * n + i, p, mask=i < n)
    tl.store(out_ptr + 4 * n + i, sech_squared(r2, c), mask=i < n)
    tl.store(out_ptr + 5 * n + i, gap, mask=i < n)
    tl.store(out_ptr + 6 * n + i, free, mask=i < n)


def device_functions(r2: torch.Tensor, c: float, device: str) -> dict[str, list[float]]:
    out = torch.full((7, len(r2)), float("nan"), device=device)
    block = triton.next_power_of_2(len(r2))
    at = torch.tensor(c, dtype=torch.float32, device=device)
    _device_kernel[(1,)](r2.float().to(device), at, out, len(r2), BLOCK=block)
    return dict(zip(("t", "q", "s", "p", "sech2", "gap", "free"), out.tolist(), strict=True))


def truth(a2: mpmath.mpf) -> dict[str, mpmath.mpf]:
    """t, q, s, p, sech^2 to 50 figures."""
    if a2 == 0:
        return {"t": mpmath.mpf(1), "q": a2, "s": mpmath.mpf(1), "p": a2, "sech2": mpmath.mpf(1)}
    a = mpmath.sqrt(a2)
    inside = min(a, mpmath.mpf(A_MAX))
    t, s, sech2 = mpmath.tanh(a) / a, mpmath.atanh(inside) / a, mpmath.sech(a) ** 2
    return {"t": t, "q": sech2 - t, "s": s, "p": (1 / (1 - a2) if a < A_MAX else 0) - s, "sech2": sech2}


def relative(got: float, true: mpmath.mpf) -> float:
    return abs(got) if true == 0 else float(abs(mpmath.mpf(got) / true - 1))


def straddled(values: list[float], dtype: type) -> list[float]:
    """Each value with its two neighbours."""
    exact = [dtype(v) for v in values]
    return [float(x) for v in exact for x in (np.nextafter(v, dtype(0)), v, np.nextafter(v, dtype(9)))]


def a2_of(r2: float, c: float) -> mpmath.mpf:
    return mpmath.mpf(float(np.float32(r2))) * mpmath.mpf(float(np.float32(c)))


@pytest.mark.parametrize("c", CURVATURES)
def test_device_functions_to_two_millionths_away_from_the_boundary(c, device):
    a2 = ABOUT_ZERO + straddled(SWITCHES, np.float32) + np.linspace(0.02, 0.75, 60).tolist()
    r2 = torch.tensor([x / c for x in a2])
    got = device_functions(r2, c, device)
    worst = {name: 0.0 for name in ("t", "q", "s", "p", "sech2")}
    for i, length in enumerate(r2.tolist()):
        true = truth(a2_of(length, c))
        for name in worst:
            worst[name] = max(worst[name], relative(got[name][i], true[name]))
    assert max(worst["t"], worst["s"], worst["sech2"]) < 5e-7, worst
    assert max(worst["q"], worst["p"]) < 2e-6, worst


@pytest.mark.parametrize("a", [1.0, 2.0, 5.0, 9.0, 20.0, 100.0, 1e4])
def test_exponential_saturates(a, device):
    got = device_functions(torch.tensor([a * a]), 1.0, device)
    true = truth(mpmath.mpf(a) ** 2)
    assert relative(got["t"][0], true["t"]) < 5e-7 and relative(got["q"][0], true["q"]) < 2e-6
    assert abs(got["sech2"][0] - true["sech2"]) <= 1e-5 * true["sech2"] + 1e-38


@pytest.mark.parametrize("steps", [0, 1, 2, 16, 128, 1024, 2**16])
def test_logarithm_up_to_the_boundary(steps, device):
    # Near the boundary an error of one rounding of a^2 grows by 1 / (1 - a^2): no float32 formula can do better.
    a2 = np.float32(1.0 - steps * 2.0**-17)
    got = device_functions(torch.tensor([a2]), 1.0, device)
    true = truth(mpmath.mpf(float(a2)))
    gap = max(1 - float(a2), EDGE)
    assert relative(got["s"][0], true["s"]) < 5e-7 + 1.2e-7 / gap / 5
    assert relative(got["p"][0], true["p"]) < 2e-6 + 2.4e-7 / gap
    assert got["gap"][0] == pytest.approx(gap, rel=1e-6) and got["free"][0] == float(1 - float(a2) >= EDGE)


@pytest.mark.parametrize("a", [1.0 + 1e-6, 1.5, 10.0, 1e3])
def test_outside_the_ball_a_point_counts_as_lying_on_the_rim(a, device):
    got = device_functions(torch.tensor([a * a]), 1.0, device)
    length = float(mpmath.atanh(A_MAX))
    assert got["s"][0] * a == pytest.approx(length, rel=1e-6) and got["p"][0] == -got["s"][0]
    assert got["gap"][0] == EDGE and got["free"][0] == 0
    assert got["t"][0] * a <= 1 + 2e-7 and all(np.isfinite(values[0]) for values in got.values())


@pytest.mark.parametrize("name", ["t", "s"])
@pytest.mark.parametrize("dtype, scale, slope", [(np.float64, 2e-15, 2e-14), (np.float32, 1e-6, 1e-5)], ids=str)
def test_reference_and_its_automatic_derivative(name, dtype, scale, slope):
    values = ABOUT_ZERO + straddled(SWITCHES, dtype) + [0.5, 0.9, 0.99, 1.5, 10.0, 1e4]
    a2 = torch.tensor(np.array(values, dtype), requires_grad=True)
    y = {"t": exp_scale_reference, "s": log_scale_reference}[name](a2)
    (derivative,) = torch.autograd.grad(y.sum(), a2)
    assert y[0] == 1 and derivative[0] == pytest.approx({"t": -1 / 3, "s": 1 / 3}[name], rel=1e-6)
    for x, got, change in zip(a2.tolist()[1:], y.tolist()[1:], derivative.tolist()[1:], strict=True):
        true = truth(mpmath.mpf(x))
        assert relative(got, true[name]) < scale, x
        assert relative(change, true[{"t": "q", "s": "p"}[name]] / (2 * mpmath.mpf(x))) < slope, x


def test_reference_can_be_differentiated_twice():
    a2 = torch.tensor([0.0, 1e-9, 0.05, 0.3, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    for scale in (exp_scale_reference, log_scale_reference):
        assert torch.autograd.gradcheck(scale, a2[1:].detach().clone().clamp(1e-5).requires_grad_())
        assert torch.autograd.gradgradcheck(scale, a2[2:].detach().clone().requires_grad_())
        (first,) = torch.autograd.grad(scale(a2).sum(), a2, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), a2)
        expected = {exp_scale_reference: 4 / 15, log_scale_reference: 2 / 5}[scale]  # twice the third coefficient
        assert second[0] == pytest.approx(expected, rel=1e-14)
