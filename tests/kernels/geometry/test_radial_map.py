import itertools

import pytest
import torch
from aot import ARCHITECTURES, SHARED_LIMIT, resources
from float64 import assert_as_good_as_eager, evaluate

from armillary.kernels.geometry import radial_map as module
from armillary.kernels.geometry.curvature import A_MAX
from armillary.kernels.geometry.radial_map import KINDS, LAUNCH, ball_limit, radial_map, radial_map_reference
from armillary.kernels.rows import tiles

BALL = ("exp0", "log0", "project")
SHAPES = [(1,), (1, 1), (5, 1), (3, 17), (2, 3, 64), (7, 129), (2, 1000)]


def op(kind):
    return lambda x, p, impl: radial_map(x, p, kind, impl=impl)


def rows(lengths, width, dtype=torch.float32, device="cpu"):
    """Rows of random directions and the given lengths, and a cotangent that leans along them."""
    direction = torch.randn(len(lengths), width, dtype=torch.float64)
    direction /= direction.norm(dim=1, keepdim=True)
    x = direction * torch.tensor(lengths, dtype=torch.float64)[:, None]
    cotangent = direction + 0.3 * torch.randn_like(direction)
    return x.to(dtype).to(device), cotangent.to(dtype).to(device)


def parameter(value, dtype=torch.float32, device="cpu"):
    return torch.tensor(value, dtype=dtype, device=device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(kind, shape, device, poison_empty):
    if kind == "sphere" and shape[-1] == 1:
        pytest.skip("in one dimension the truth is 0: test_no_radial_gradient_...")
    x = (torch.rand(shape) / shape[-1] ** 0.5).to(device)
    cotangent = torch.randn(shape).to(device) + x
    assert_as_good_as_eager(op(kind), (x, parameter(0.8, device=device)), cotangent, ("x", "p"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [1e-6, 1e-2, 1.0, 1e2])
def test_fifteen_decades_of_length(kind, c, device):
    for decade in range(-12, 4):
        x, cotangent = rows([10.0**decade, 3 * 10.0**decade], 13, device=device)
        assert_as_good_as_eager(op(kind), (x, parameter(c, device=device)), cotangent, ("x", "p"))


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_every_switch(kind, device):
    near = [s**0.5 * (1 + e) for s in (0.1, 0.2, 0.25) for e in (-1e-6, 0.0, 1e-6)]
    x, cotangent = rows(near, 5, device=device)
    assert_as_good_as_eager(op(kind), (x, parameter(1.0, device=device)), cotangent, ("x", "p"))


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
        assert_as_good_as_eager(op(kind), (x, parameter(c, device=device)), cotangent, ("x", "p"), floor)


@pytest.mark.parametrize("width", [1, 9])
@pytest.mark.parametrize("kind", ["log0", "project", "sphere"])
def test_no_radial_gradient_outside_the_ball_and_to_the_sphere(kind, width, device):
    x, _ = rows([1.5, 3.0, 100.0], width, device=device)
    for impl in ("reference", "triton"):
        y, dx, _ = evaluate(op(kind), (x, parameter(1.0, device=device)), x / x.norm(dim=1, keepdim=True), impl)
        assert (dx.norm(dim=1) <= 1e-6 * y.norm(dim=1) / x.norm(dim=1)).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_rows(impl, dtype, device):
    x = torch.zeros(3, 6, dtype=dtype, device=device)
    cotangent = torch.randn(3, 6, device=device).to(dtype)
    for kind in BALL:
        y, dx, dc = evaluate(op(kind), (x, parameter(0.7, device=device)), cotangent, impl)
        assert torch.equal(y, x) and torch.equal(dx, cotangent) and dc == 0  # the identity, to first order
    for gradient in evaluate(op("sphere"), (x, parameter(0.7, device=device)), cotangent, impl):
        assert not gradient.any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_too_short_for_a_direction(impl, device):
    x = torch.tensor([[1e-16, 0.0], [0.0, 2e-15]], device=device)
    y, dx, _ = evaluate(op("sphere"), (x, parameter(3.0, device=device)), torch.ones_like(x), impl)
    assert not y[0].any() and not dx[0].any()
    assert y[1].tolist() == pytest.approx([0, 3]) and dx[1].tolist() == pytest.approx([1.5e15, 0.0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_rows(kind, dtype, device):
    for length in (1e-3, 0.3, 0.9, 5.0, 30.0):
        x, cotangent = rows([length, 1.1 * length], 33, dtype, device)
        assert_as_good_as_eager(op(kind), (x, parameter(1.0, device=device)), cotangent, ("x", "p"))


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lengths", [(0.0,), (1e-9, 1e-3), (0.1**0.5 - 1e-3, 0.1**0.5 + 1e-3), (0.6, 0.9), (1.3, 7.0)], ids=str
)
def test_oracle_gradients(kind, lengths):
    if kind == "sphere" and min(lengths) < 1e-2:
        pytest.skip("no finite difference across the singularity at 0")
    x, _ = rows(lengths, 3, torch.float64)
    p = parameter(0.9 if max(lengths) < 1 else 1.1, torch.float64).requires_grad_()
    function = lambda x, p: radial_map_reference(x, p, kind)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), p))
    assert torch.autograd.gradgradcheck(function, (x, p), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_gradients_asked_for(kind, device):
    x, p = torch.randn(3, 5, device=device), parameter(0.4, device=device)
    cotangent = torch.randn(3, 5, device=device)
    _, dx, dp = evaluate(op(kind), (x, p), cotangent, "triton")
    for wants, expected in (((True, False), dx), ((False, True), dp)):
        leaf_x, leaf_p = (v.clone().requires_grad_(want) for v, want in zip((x, p), wants, strict=True))
        radial_map(leaf_x, leaf_p, kind, impl="triton").backward(cotangent)
        assert torch.equal(leaf_x.grad if wants[0] else leaf_p.grad, expected)
        assert (leaf_p if wants[0] else leaf_x).grad is None
    with torch.no_grad():
        assert not radial_map(x, p.requires_grad_(), kind, impl="triton").requires_grad


def test_gradient_of_a_sum_and_of_a_number(device):
    x = torch.randn(3, 5, device=device, requires_grad=True)
    radial_map(x, 0.5, "exp0", impl="triton").sum().backward()  # the incoming gradient has strides 0
    (expected,) = torch.autograd.grad(radial_map(x, 0.5, "exp0", impl="reference").sum(), x)
    torch.testing.assert_close(x.grad, expected)
    y = radial_map(x, 0.5, "exp0", impl="triton").square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_curvature_gets_a_wide_gradient(kind, impl, device):
    p = parameter(0.7, torch.float64, device).requires_grad_()
    radial_map(torch.randn(4, 3, device=device), p, kind, impl=impl).sum().backward()
    assert p.grad.dtype == torch.float64


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 7)], ids=str)
def test_empty(shape, impl, device):
    for kind in KINDS:
        y, dx, dp = evaluate(
            op(kind), (torch.zeros(shape, device=device), parameter(1.0, device=device)), torch.zeros(shape), impl
        )
        assert y.shape == dx.shape == shape and dp == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_spoils_no_other(kind, bad, device):
    x, cotangent = rows([0.1, 0.5, 0.9, 0.3], 6, device=device)
    clean = evaluate(op(kind), (x, parameter(1.0, device=device)), cotangent, "triton")
    x[1, 2] = bad
    spoilt = evaluate(op(kind), (x, parameter(1.0, device=device)), cotangent, "triton")
    for before, after in zip(clean[:2], spoilt[:2], strict=True):
        assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and not after[1].isfinite().all()


@pytest.mark.parametrize("kind", ["log0", "sphere"])
def test_widest_rows(kind, device):
    x, cotangent = rows([0.3, 0.8], 8192, device=device)
    assert_as_good_as_eager(op(kind), (x, parameter(1.0, device=device)), cotangent, ("x", "p"))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "x, p, kind, impl, message",
    [
        (X, 1.0, "exp", "auto", r"kind must be one of exp0, log0, project, sphere, got 'exp'"),
        (X, 1.0, "exp0", "gpu", r"impl must be one of"),
        (X.double(), 1.0, "exp0", "triton", r"impl must be .* for torch.float64"),
        (X.long(), 1.0, "exp0", "auto", r"x must be torch.float32 or .*, got torch.int64"),
        (X.T, 1.0, "exp0", "auto", r"x must be contiguous"),
        (torch.tensor(1.0), 1.0, "exp0", "auto", r"x must be a tensor \[..., D\], got \[\]"),
        ([1.0], 1.0, "exp0", "auto", r"x must be a tensor"),
        (torch.zeros(2, 0), 1.0, "exp0", "auto", r"x must have rows of 1 to 8192 elements, got \[2, 0\]"),
        (torch.zeros(1, 8193), 1.0, "exp0", "auto", r"x must have rows of 1 to 8192 elements, got \[1, 8193\]"),
        (X, 0.0, "exp0", "auto", r"c must be finite and positive, got 0.0"),
        (X, torch.tensor(-1.0), "log0", "auto", r"c must be finite and positive, got -1.0"),
        (X, float("nan"), "project", "auto", r"c must be finite and positive, got nan"),
        (X, float("inf"), "sphere", "auto", r"kappa must be finite, got inf"),
        (X, torch.ones(1), "exp0", "auto", r"c must have shape \[\], got \[1\]"),
        (X, torch.tensor(1.0, dtype=torch.bfloat16), "exp0", "auto", r"c must be torch.float32 or torch.float64"),
        (X, torch.tensor(1.0, device="meta"), "exp0", "auto", r"c must be on cpu, got meta"),
        (X, "1", "exp0", "auto", r"c must be a number or a 0-d tensor, got str"),
    ],
)
def test_bad_input_is_refused(x, p, kind, impl, message):
    with pytest.raises(ValueError, match=f"^radial_map: {message}"):
        radial_map(x, p, kind, impl=impl)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(
    "name, kind, dtype, width",
    [
        ("_radial_map_fwd_kernel", "log0", "*bf16", 1024),
        ("_radial_map_bwd_kernel", "log0", "*bf16", 1024),
        ("_radial_map_bwd_kernel", "exp0", "*fp32", 1),
    ],
)
def test_compiles_without_spilling(name, kind, dtype, width, sm, monkeypatch):
    monkeypatch.setattr("armillary.kernels.rows.settings", lambda table, x: table[sm])
    options = tiles(LAUNCH, torch.empty(4096, width)).options
    pointers = {"x_ptr": dtype, "parameter_ptr": "*fp32"}
    pointers |= {"y_ptr": dtype} if "fwd" in name else {"dy_ptr": dtype, "dx_ptr": dtype, "dp_ptr": "*fp32"}
    constants = {"LIMIT": A_MAX, "KIND": kind, "ROWS": options["ROWS"], "BLOCK": options["BLOCK"]}
    constants |= {} if "fwd" in name else {"WANT_X": True, "WANT_P": True}
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
@pytest.mark.parametrize("kind", KINDS)
def test_training_shape(kind):
    for dtype, width in itertools.product((torch.bfloat16, torch.float32), (1024, 3, 8192)):
        x, cotangent = rows(torch.linspace(0.01, 2.0, 4096).tolist(), width, dtype, "cuda")
        inputs = (x, parameter(0.9, device="cuda"))
        assert_as_good_as_eager(op(kind), inputs, cotangent, ("x", "p"), floor=2e-6)
