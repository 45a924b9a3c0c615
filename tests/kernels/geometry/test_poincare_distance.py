import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from aot import ARCHITECTURES, SHARED_LIMIT, resources
from float64 import assert_as_good_as_eager, evaluate

from armillary.kernels.geometry import poincare_distance as module
from armillary.kernels.geometry.curvature import EDGE
from armillary.kernels.geometry.poincare_distance import (
    LAUNCH,
    _arsinh_coefficients,
    _arsinh_ratio,
    poincare_distance,
    poincare_distance_reference,
)
from armillary.kernels.rows import tiles

mpmath.mp.dps = 60
NAMES = ("x", "y", "c")
SHAPES = [(1,), (1, 1), (5, 1), (3, 17), (2, 3, 64), (7, 129), (2, 1000)]


def op(x, y, c, impl):
    return poincare_distance(x, y, c, impl=impl)


def unit(rows, width):
    x = torch.randn(rows, width, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def scalar(c, dtype=torch.float32, device="cpu"):
    return torch.tensor(c, dtype=dtype, device=device)


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(shape, device, poison_empty):
    x, y = ((torch.rand(shape) / shape[-1] ** 0.5).to(device) for _ in range(2))
    cotangent = torch.rand(shape[:-1]).to(device) + 0.5
    assert_as_good_as_eager(op, (x, y, scalar(0.8, device=device)), cotangent, NAMES, floor=1e-6)


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
def test_finite_on_and_beyond_the_boundary(impl, dtype, device):
    radius = torch.tensor([0.0, 0.5, 1.0 - EDGE / 2, 1.0, 1.01, 30.0], dtype=torch.float64)
    x = unit(1, 7).repeat(36, 1)
    x, y = (x * radius.repeat_interleave(6)[:, None]), (-x * radius.repeat(6)[:, None])
    inputs = (x.to(dtype).to(device), y.to(dtype).to(device), scalar(1.0, device=device))
    for result in evaluate(op, inputs, torch.ones(36, device=device), impl):
        assert result.isfinite().all()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_rows(dtype, device):
    for a, b in ((1e-3, 0.4), (0.3, 0.6), (0.9, 0.9)):
        x, y = ((r * unit(3, 33)).to(dtype).to(device) for r in (a, b))
        assert_as_good_as_eager(op, (x, y, scalar(1.0, device=device)), torch.ones(3, device=device), NAMES)


def test_oracle_gradients():
    c = scalar(0.9, torch.float64).requires_grad_()
    for a, b in ((0.0, 0.1), (1e-3, 0.4), (0.5, 0.9), (0.9, 1.3), (1.5, 2.0)):
        x, y = (a * unit(2, 3)).requires_grad_(), (b * unit(2, 3)).requires_grad_()
        assert torch.autograd.gradcheck(poincare_distance_reference, (x, y, c))
        assert torch.autograd.gradgradcheck(poincare_distance_reference, (x, y, c), atol=1e-4)


def test_only_the_gradients_asked_for(device):
    inputs = [unit(3, 5).float().to(device) * 0.5, unit(3, 5).float().to(device) * 0.5, scalar(0.4, device=device)]
    cotangent = torch.randn(3, device=device)
    _, *expected = evaluate(op, inputs, cotangent, "triton")
    for i in range(3):
        leaves = [v.clone().requires_grad_(j == i) for j, v in enumerate(inputs)]
        poincare_distance(*leaves, impl="triton").backward(cotangent)
        assert torch.equal(leaves[i].grad, expected[i])
    with torch.no_grad():
        assert not poincare_distance(*leaves, impl="triton").requires_grad


def test_gradient_of_a_sum(device):
    x, y = ((0.5 * unit(3, 5)).float().to(device).requires_grad_() for _ in range(2))
    poincare_distance(x, y, 0.5, impl="triton").sum().backward()  # the incoming gradient has stride 0
    (expected,) = torch.autograd.grad(poincare_distance(x, y, 0.5, impl="reference").sum(), x)
    torch.testing.assert_close(x.grad, expected)
    (first,) = torch.autograd.grad(poincare_distance(x, y, 0.5, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 7)], ids=str)
def test_empty(shape, impl, device):
    x = torch.zeros(shape, device=device)
    d, dx, dy, dc = evaluate(op, (x, x, scalar(1.0, device=device)), torch.zeros(shape[:-1]), impl)
    assert d.shape == shape[:-1] and dx.shape == dy.shape == shape and dc == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
def test_a_bad_row_spoils_no_other(device):
    x, y = ((0.5 * unit(4, 6)).float().to(device) for _ in range(2))
    inputs = (x, y, scalar(1.0, device=device))
    clean = evaluate(op, inputs, torch.ones(4, device=device), "triton")
    y[1, 2] = float("nan")
    spoilt = evaluate(op, inputs, torch.ones(4, device=device), "triton")
    for before, after in zip(clean[:3], spoilt[:3], strict=True):
        assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and not after[1].isfinite().all()


def test_widest_rows(device):
    x, y = (0.7 * unit(2, 8192)).float().to(device), (0.6 * unit(2, 8192)).float().to(device)
    assert_as_good_as_eager(op, (x, y, scalar(1.0, device=device)), torch.ones(2, device=device), NAMES, floor=1e-6)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "x, y, c, impl, message",
    [
        (X, X, 1.0, "gpu", "impl must be one of"),
        (X.double(), X.double(), 1.0, "triton", "impl must be .* for torch.float64"),
        (X.long(), X, 1.0, "auto", "x must be torch.float32 or .*, got torch.int64"),
        (X.T, X, 1.0, "auto", "x must be contiguous"),
        (X, torch.zeros(3, 2).T, 1.0, "auto", "y must be contiguous"),
        (X, X.half(), 1.0, "auto", "y must be torch.float32, got torch.float16"),
        (X, X[:1], 1.0, "auto", r"y must have shape \[2, 3\], got \[1, 3\]"),
        (X, X.to("meta"), 1.0, "auto", "y must be on cpu, got meta"),
        (X, X, 0, "auto", "c must be finite and positive, got 0.0"),
        (X, X, torch.tensor(-2.0), "auto", "c must be finite and positive, got -2.0"),
        (X, X, torch.ones(2), "auto", r"c must have shape \[\], got \[2\]"),
    ],
)
def test_bad_input_is_refused(x, y, c, impl, message):
    with pytest.raises(ValueError, match=f"^poincare_distance: {message}"):
        poincare_distance(x, y, c, impl=impl)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(
    "name, dtype, width",
    [
        ("_poincare_distance_fwd_kernel", "*bf16", 1024),
        ("_poincare_distance_bwd_kernel", "*bf16", 1024),
        ("_poincare_distance_bwd_kernel", "*fp32", 1),
        ("_poincare_distance_bwd_kernel", "*fp32", 8192),
    ],
)
def test_compiles_without_spilling(name, dtype, width, sm, monkeypatch):
    monkeypatch.setattr("armillary.kernels.rows.settings", lambda table, x: table[sm])
    options = tiles(LAUNCH, torch.empty(64, width)).options
    pointers = {"x_ptr": dtype, "y_ptr": dtype, "c_ptr": "*fp32"}
    outputs = ("d",) if "fwd" in name else ("dd", "dx", "dy")
    pointers |= {f"{p}_ptr": dtype for p in outputs} | ({} if "fwd" in name else {"dc_ptr": "*fp32"})
    constants = {"EDGE": EDGE, "ROWS": options["ROWS"], "BLOCK": options["BLOCK"]}
    constants |= {} if "fwd" in name else {"WANT_X": True, "WANT_Y": True, "WANT_C": True}
    sizes = {"rows": "i32"} | ({"width": "i32"} if width > 1 else {})
    constants |= {"width": 1} if width == 1 else {}
    used = resources(
        f"{module.__name__}:{name}",
        pointers | sizes,
        constants,
        divisible=tuple(sizes),
        num_warps=options["num_warps"],
    )[sm]
    assert used.stack == used.local == 0, used
    assert used.shared <= SHARED_LIMIT[sm], used


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [3, 1024, 8192])
def test_training_shape(dtype, width):
    x, y = ((torch.linspace(0.01, 0.9, 4096)[:, None] * unit(4096, width)).to(dtype).cuda() for _ in range(2))
    inputs = (x, y, scalar(0.9, device="cuda"))
    assert_as_good_as_eager(op, inputs, torch.ones(4096).cuda(), NAMES, floor=5e-6)
