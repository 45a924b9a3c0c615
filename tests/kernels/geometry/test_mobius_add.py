import mpmath
import pytest
import torch
from aot import ARCHITECTURES, SHARED_LIMIT, resources
from float64 import assert_as_good_as_eager, evaluate

from armillary.kernels.geometry import mobius_add as module
from armillary.kernels.geometry.curvature import EDGE
from armillary.kernels.geometry.mobius_add import LAUNCH, mobius_add, mobius_add_reference
from armillary.kernels.rows import tiles

mpmath.mp.dps = 60
NAMES = ("x", "y", "c")
SHAPES = [(1,), (1, 1), (5, 1), (3, 17), (2, 3, 64), (7, 129), (2, 1000)]


def op(x, y, c, impl):
    return mobius_add(x, y, c, impl=impl)


def unit(rows, width):
    x = torch.randn(rows, width, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def scalar(c, dtype=torch.float32, device="cpu"):
    return torch.tensor(c, dtype=dtype, device=device)


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(shape, device, poison_empty):
    x, y = ((torch.rand(shape) / shape[-1] ** 0.5).to(device) for _ in range(2))
    cotangent = torch.randn(shape).to(device)
    assert_as_good_as_eager(op, (x, y, scalar(0.8, device=device)), cotangent, NAMES)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_finite_on_and_beyond_the_boundary(impl, dtype, device):
    x = unit(1, 7).repeat(36, 1)
    radius = torch.tensor([0.0, 0.5, 1.0 - EDGE / 2, 1.0, 1.01, 30.0], dtype=torch.float64)
    x, y = (x * radius.repeat_interleave(6)[:, None]), (-x * radius.repeat(6)[:, None])
    inputs = (x.to(dtype).to(device), y.to(dtype).to(device), scalar(1.0, device=device))
    for result in evaluate(op, inputs, unit(36, 7).to(dtype).to(device), impl):
        assert result.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_zero_rows(impl, device):
    x, y, g = (unit(3, 4).float().to(device) * 0.6 for _ in range(3))
    zero = torch.zeros_like(x)
    torch.testing.assert_close(mobius_add(x, zero, 0.8, impl=impl), x)
    torch.testing.assert_close(mobius_add(zero, y, 0.8, impl=impl), y)
    f, dx, dy, dc = evaluate(op, (zero, zero, scalar(0.8, device=device)), g, impl)
    assert not f.any() and torch.equal(dx, g) and torch.equal(dy, g) and dc == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_rows(dtype, device):
    for a, b in ((1e-3, 0.4), (0.3, 0.6), (0.9, 0.9)):
        x, y = ((r * unit(3, 33)).to(dtype).to(device) for r in (a, b))
        assert_as_good_as_eager(op, (x, y, scalar(1.0, device=device)), unit(3, 33).to(device), NAMES)


def test_oracle_gradients():
    c = scalar(0.9, torch.float64).requires_grad_()
    for a, b in ((0.0, 0.0), (1e-9, 0.4), (0.5, 0.9), (0.9, 1.3), (1.5, 2.0)):
        x, y = (a * unit(2, 3)).requires_grad_(), (b * unit(2, 3)).requires_grad_()
        assert torch.autograd.gradcheck(mobius_add_reference, (x, y, c))
        assert torch.autograd.gradgradcheck(mobius_add_reference, (x, y, c), atol=1e-4)


def test_only_the_gradients_asked_for(device):
    inputs = [unit(3, 5).float().to(device) * 0.5, unit(3, 5).float().to(device) * 0.5, scalar(0.4, device=device)]
    cotangent = torch.randn(3, 5, device=device)
    _, *expected = evaluate(op, inputs, cotangent, "triton")
    for i in range(3):
        leaves = [v.clone().requires_grad_(j == i) for j, v in enumerate(inputs)]
        mobius_add(*leaves, impl="triton").backward(cotangent)
        assert torch.equal(leaves[i].grad, expected[i])
    with torch.no_grad():
        assert not mobius_add(*leaves, impl="triton").requires_grad


def test_gradient_of_a_sum(device):
    x = (0.5 * unit(3, 5)).float().to(device).requires_grad_()
    mobius_add(x, x.detach(), 0.5, impl="triton").sum().backward()  # the incoming gradient has strides 0
    (expected,) = torch.autograd.grad(mobius_add(x, x.detach(), 0.5, impl="reference").sum(), x)
    torch.testing.assert_close(x.grad, expected)
    (first,) = torch.autograd.grad(mobius_add(x, x, 0.5, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 7)], ids=str)
def test_empty(shape, impl, device):
    x = torch.zeros(shape, device=device)
    f, dx, dy, dc = evaluate(op, (x, x, scalar(1.0, device=device)), x, impl)
    assert f.shape == dx.shape == dy.shape == shape and dc == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_spoils_no_other(bad, device):
    x, y, g = ((0.5 * unit(4, 6)).float().to(device) for _ in range(3))
    clean = evaluate(op, (x, y, scalar(1.0, device=device)), g, "triton")
    y[1, 2] = bad
    spoilt = evaluate(op, (x, y, scalar(1.0, device=device)), g, "triton")
    for before, after in zip(clean[:3], spoilt[:3], strict=True):
        assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and not after[1].isfinite().all()


def test_widest_rows(device):
    x, y = (0.7 * unit(2, 8192)).float().to(device), (0.6 * unit(2, 8192)).float().to(device)
    assert_as_good_as_eager(op, (x, y, scalar(1.0, device=device)), unit(2, 8192).to(device), NAMES)


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
    with pytest.raises(ValueError, match=f"^mobius_add: {message}"):
        mobius_add(x, y, c, impl=impl)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(
    "name, dtype, width",
    [
        ("_mobius_add_fwd_kernel", "*bf16", 1024),
        ("_mobius_add_bwd_kernel", "*bf16", 1024),
        ("_mobius_add_bwd_kernel", "*fp32", 1),
        ("_mobius_add_bwd_kernel", "*fp32", 8192),
    ],
)
def test_compiles_without_spilling(name, dtype, width, sm, monkeypatch):
    monkeypatch.setattr("armillary.kernels.rows.settings", lambda table, x: table[sm])
    options = tiles(LAUNCH, torch.empty(64, width)).options
    pointers = {"x_ptr": dtype, "y_ptr": dtype, "c_ptr": "*fp32"}
    outputs = ("f",) if "fwd" in name else ("df", "dx", "dy")
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
    assert_as_good_as_eager(op, inputs, unit(4096, width).cuda(), NAMES, floor=5e-6)
