import math
from functools import partial

import pytest
import torch
from ball import assert_rows_compile
from torch.autograd import grad, gradcheck, gradgradcheck

from armillary.kernels.geometry import combine_backward, combine_forward
from armillary.kernels.geometry.geometry_combine import CLIP, geometry_combine, geometry_combine_reference

NAMES = ("u", "logits", "kappa", "c", "moebius_bias")
FLOOR = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # a unit and a bit of what is stored


def inputs(rows=7, dim=97, radius=0.5, moebius=True, expert=None, c=0.7, dtype=torch.float32, device="cpu"):
    """u with rows of that norm, logits, kappa, c, a Moebius bias at 0.3 of the ball's radius."""
    u = torch.randn(3 if expert is None else 1, rows, dim, device=device)
    u = radius * u / u.norm(dim=-1, keepdim=True)
    bias = torch.randn(dim, device=device)
    bias = 0.3 * bias / bias.norm() / math.sqrt(c)
    logits = torch.randn(rows, 3, device=device)
    scalars = torch.tensor(1.7, device=device), torch.tensor(c, device=device)
    return [u.to(dtype), logits, *scalars, bias.to(dtype) if moebius else None]


def run(tensors, dy, wide=False, **options):
    """Output and gradients, in float64 arithmetic if `wide`."""
    leaves = [None if t is None else (t.double() if wide else t).detach().requires_grad_() for t in tensors]
    y = geometry_combine(*leaves, **options)
    given = [t for t in leaves if t is not None]
    gradients = grad(y, given, dy.to(y.dtype), allow_unused=True)
    found = {
        name: torch.zeros_like(t) if g is None else g
        for name, t, g in zip(
            [n for n, t in zip(NAMES, leaves, strict=True) if t is not None], given, gradients, strict=True
        )
    }
    return {"y": y.detach(), **found}


def check_against_float64(tensors, dtype=torch.float32, **options):
    """Forward and every gradient: at most twice the eager error, plus a unit of the stored dtype."""
    dy = torch.randn(tensors[0].shape[1:], device=tensors[0].device).to(dtype)
    exact = run(tensors, dy, wide=True, impl="reference", **options)
    eager = run(tensors, dy, impl="reference", **options)
    ours = run(tensors, dy, impl="triton", **options)
    for name, truth in exact.items():
        assert ours[name].dtype == eager[name].dtype and ours[name].shape == truth.shape, name
        scale = truth.norm() + 1e-30
        if name in ("kappa", "c"):  # sums over rows that may cancel
            scale = scale + dy.double().norm() * 1e-3
        error = float((ours[name].double() - truth).norm() / scale)
        limit = 2 * float((eager[name].double() - truth).norm() / scale) + FLOOR[ours[name].dtype]
        assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("expert", [None, 0, 1, 2], ids=["mixture", "euclidean", "spherical", "hyperbolic"])
@pytest.mark.parametrize("moebius", [False, True], ids=["plain", "moebius"])
@pytest.mark.parametrize("radius", [1e-7, 1e-3, 0.3, 2.0, 30.0, 1e7])
def test_float32_over_radii(radius, moebius, expert, device, poison_empty):
    check_against_float64(inputs(radius=radius, moebius=moebius, expert=expert, device=device), expert=expert)


@pytest.mark.parametrize("clip", [CLIP, 0.3, math.inf])
@pytest.mark.parametrize("radius", [0.2, 2.0, 20.0])
def test_any_clip(radius, clip, device, poison_empty):
    moebius = clip < math.inf or radius < 20  # on the boundary itself the bias has no gradient but rounding
    check_against_float64(inputs(radius=radius, moebius=moebius, device=device), clip=clip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("radius", [1e-2, 0.5, 20.0])
def test_half_precision(radius, dtype, device, poison_empty):
    check_against_float64(inputs(radius=radius, dtype=dtype, device=device), dtype)


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (2, 3), (3, 128), (17, 129), (5, 1000)])
def test_sizes(rows, dim, device, poison_empty):
    check_against_float64(inputs(rows, dim, device=device))


@pytest.mark.parametrize("a2", [0.1, 0.25, CLIP**2], ids=["reference's series", "kernel's series", "clip"])
def test_both_sides_of_each_threshold(a2, device, poison_empty):
    tensors = inputs(rows=8, dim=33, device=device)
    factor = 1 + torch.tensor([-1e-2, -1e-4, -1e-6, -1e-7, 1e-7, 1e-6, 1e-4, 1e-2], device=device)
    tensors[0] = tensors[0] / tensors[0].norm(dim=-1, keepdim=True) * (factor * a2 / tensors[3]).sqrt()[:, None]
    if a2 == CLIP**2:  # where it jumps, rounding decides the side
        tensors[0] = torch.cat([tensors[0][:, :2], tensors[0][:, -2:]], 1).contiguous()
        tensors[1] = tensors[1][:4].contiguous()
    check_against_float64(tensors)


def test_bias_in_float32_beside_half_precision(device):
    tensors = inputs(dtype=torch.float16, device=device)
    tensors[4] = tensors[4].float()
    check_against_float64(tensors, torch.float16)


def test_numbers_instead_of_tensors(device):
    u, logits, kappa, c, bias = inputs(device=device)
    expected = geometry_combine(u, logits, kappa, c, bias, impl="triton")
    assert torch.equal(geometry_combine(u, logits, 1.7, float(c), bias, impl="triton"), expected)


def test_gradcheck_of_the_reference():
    for expert in (None, 1, 2):
        tensors = inputs(3, 4, radius=1.0, expert=expert)
        tensors = [t.double().requires_grad_() for t in tensors]
        tensors[0] = (tensors[0] * torch.tensor([0.01, 1.0, 5.0])[:, None]).detach().requires_grad_()
        assert gradcheck(partial(geometry_combine_reference, expert=expert), tensors)
        assert gradgradcheck(partial(geometry_combine_reference, expert=expert), tensors, atol=1e-4)


def test_triton_form_is_differentiable_once(device):
    tensors = [t.requires_grad_() for t in inputs(device=device)]
    dy = torch.ones(7, 97, device=device, requires_grad=True)
    (du,) = grad(geometry_combine(*tensors, impl="triton"), tensors[:1], dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        du.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_hyperbolic_expert_stops_at_the_clip(impl, device):
    u, logits, kappa, c, _ = inputs(expert=2, radius=50.0, device=device)
    logits[:, 2] = 100.0
    u.requires_grad_()
    y = geometry_combine(u, logits, kappa, c, expert=2, impl=impl)
    torch.testing.assert_close(y.norm(dim=1), (math.tanh(CLIP) / c.sqrt()).expand(7))
    (du,) = grad(y, u, torch.randn_like(y))
    assert (du * u).sum(-1).abs().max() < 1e-5  # only the direction is pulled


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_zero_rows_have_finite_gradients(impl, device):
    tensors = inputs(device=device)
    tensors[0][:, 2] = 0
    out = run(tensors, torch.ones(7, 97, device=device), impl=impl)
    assert all(t.isfinite().all() for t in out.values())
    assert (out["u"][1, 2] == 0).all()  # no direction
    gates = tensors[1].softmax(1)
    b, c = tensors[4], tensors[3]
    torch.testing.assert_close(out["y"][2], gates[2, 2] * b)  # 0 (+) b = b
    torch.testing.assert_close(out["u"][0, 2], gates[2, 0].expand(97))
    assert float(c * b @ b) < 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of the bad rows
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_bad_row_spoils_itself_only(impl, device):
    tensors = inputs(device=device)
    tensors[0][2, 3, 5] = float("nan")
    tensors[0][1, 4, 5] = float("inf")
    good = [0, 1, 2, 5, 6]
    out = run(tensors, torch.ones(7, 97, device=device), impl=impl)
    assert (
        out["y"][good].isfinite().all() and out["u"][:, good].isfinite().all() and out["logits"][good].isfinite().all()
    )
    assert out["y"][3].isnan().any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_rows(impl, device):
    out = run(inputs(rows=0, device=device), torch.zeros(0, 97, device=device), impl=impl)
    assert out["y"].shape == (0, 97) and out["u"].shape == (3, 0, 97)
    assert all((out[name] == 0).all() for name in ("kappa", "c", "moebius_bias"))


def test_gates_sum_to_one(device):
    """Where the three experts agree, the gate does not matter."""
    f = torch.randn(9, 33, device=device)
    f = f / f.norm(dim=1, keepdim=True)
    a = 0.5
    u = torch.stack([a * f, 3.0 * f, math.atanh(a) * f])
    y = geometry_combine(u, 5 * torch.randn(9, 3, device=device), a, 1.0, impl="triton")
    torch.testing.assert_close(y, a * f)


@pytest.mark.parametrize("shift", [-1e4, 300.0])
def test_logits_are_defined_up_to_a_constant(shift, device):
    u, logits, *rest = inputs(device=device)
    logits = (4 * logits).round()  # exact after the shift
    expected = geometry_combine(u, logits, *rest, impl="triton")
    assert torch.equal(geometry_combine(u, logits + shift, *rest, impl="triton"), expected)


def test_flat_limit(device):
    """c -> 0: the hyperbolic expert becomes the Euclidean one, and the Moebius bias an addition."""
    u, logits, kappa, _, bias = inputs(radius=3.0, expert=2, device=device)
    y = geometry_combine(u, logits, kappa, 1e-12, bias, expert=2, impl="triton")
    torch.testing.assert_close(y, logits.softmax(1)[:, 2:] * (u[0] + bias))


def test_permuted_tokens_give_permuted_outputs(device):
    tensors = inputs(rows=11, device=device)
    order = torch.randperm(11)
    dy = torch.randn(11, 97, device=device)
    a = run(tensors, dy, impl="triton")
    b = run([tensors[0][:, order].contiguous(), tensors[1][order], *tensors[2:]], dy[order], impl="triton")
    assert torch.equal(a["y"][order], b["y"]) and torch.equal(a["u"][:, order], b["u"])
    assert torch.equal(a["logits"][order], b["logits"])


def test_spherical_expert_forgets_length(device):
    u, logits, kappa, c, _ = inputs(expert=1, device=device)
    y = geometry_combine(u, logits, kappa, c, expert=1, impl="triton")
    assert torch.equal(geometry_combine(4 * u, logits, kappa, c, expert=1, impl="triton"), y)


def test_column_sums(device, poison_empty):
    tensors = inputs(rows=10, device=device)
    dy = torch.randn(10, 97, device=device)
    du, *_, sums = combine_backward.combine_backward(dy, *tensors, None, CLIP, column_sums=True)
    torch.testing.assert_close(sums, du.sum(1))
    one = [tensors[0][:1].contiguous(), *tensors[1:]]
    for expert in range(3):
        du, *_, sums = combine_backward.combine_backward(dy, *one, expert, CLIP, column_sums=True)
        torch.testing.assert_close(sums, du.sum(1))


def test_gradient_that_is_not_contiguous(device):
    tensors = inputs(device=device)
    ours, eager = (run(tensors, torch.ones((), device=device).expand(7, 97), impl=i) for i in ("triton", "reference"))
    for name in eager:
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 7, 97)}, r"u must have shape \[3, M, D\], got \[2, 7, 97\]"),
        ({"u": torch.zeros(3, 97, 7).transpose(1, 2)}, "u must be contiguous"),
        ({"u": torch.zeros(3, 7, 97, dtype=torch.int32)}, "u must be torch.float32"),
        ({"u": torch.zeros(3, 7, 0)}, "D must be 1 to 8192, got 0"),
        ({"u": torch.zeros(3, 1, 8193), "logits": torch.zeros(1, 3)}, "D must be 1 to 8192, got 8193"),
        ({"logits": torch.zeros(7, 2)}, r"logits must have shape \[7, 3\]"),
        ({"logits": torch.zeros(7, 3).half()}, "logits must be torch.float32"),
        ({"kappa": torch.ones(1)}, r"kappa must have shape \[\]"),
        ({"c": 0.0}, "c must be finite and positive, got 0.0"),
        ({"c": torch.tensor(-1.0)}, "c must be finite and positive, got -1.0"),
        ({"moebius_bias": torch.zeros(96)}, r"moebius_bias must have shape \[97\]"),
        ({"moebius_bias": torch.zeros(97).half()}, "moebius_bias must be torch.float32"),
        ({"logits": torch.zeros(7, 3, device="meta")}, "logits must be on cpu, got meta"),
        ({"expert": 3}, "expert must be 0, 1, 2 or None, got 3"),
        ({"expert": 1}, r"u must have shape \[1, M, D\]"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_refused(change, message):
    arguments = dict(zip(NAMES, inputs(), strict=True)) | change
    u = arguments.pop("u")
    with pytest.raises(ValueError, match="geometry_combine: " + message):
        geometry_combine(u, **arguments)


@pytest.mark.parametrize("dim", [768, 1024, 1536])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_compiles_without_spilling(way, dim):
    module, name = {
        "forward": (combine_forward, "_combine_fwd_kernel"),
        "backward": (combine_backward, "_combine_bwd_kernel"),
    }[way]
    kernel = getattr(module, name)
    constants = {"EXPERT": -1, "MOEBIUS": True, "COLUMN_SUMS": True}
    half = {"u_ptr", "y_ptr", "dy_ptr", "du_ptr"}
    for used in assert_rows_compile(f"{module.__name__}:{name}", kernel.arg_names, module.LAUNCH, dim, half, constants):
        assert "ld.global.v4" in used.ptx


@pytest.mark.gpu
def test_training_shape_in_bfloat16():
    tensors = inputs(4096, 1024, radius=1.0, dtype=torch.bfloat16, device="cuda")
    tensors[0] = tensors[0] * torch.logspace(-3, 3, 4096, device="cuda", dtype=torch.bfloat16)[:, None]
    tensors[4] = tensors[4].float()
    check_against_float64(tensors, torch.bfloat16)
    dy = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    a, b = run(tensors, dy, impl="triton"), run(tensors, dy, impl="triton")
    assert all(torch.equal(a[name], b[name]) for name in a)
