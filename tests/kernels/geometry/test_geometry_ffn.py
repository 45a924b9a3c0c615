import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ball import assert_rows_compile
from torch.autograd import grad, gradcheck
from torch.autograd.graph import saved_tensors_hooks

from armillary.kernels.geometry import geometry_rows as rows_module
from armillary.kernels.geometry.curvature import A_MAX
from armillary.kernels.geometry.geometry_ffn import geometry_ffn, geometry_ffn_reference, saved_bytes
from armillary.kernels.geometry.geometry_rows import geometry_rows, geometry_rows_reference
from armillary.kernels.mlp.up_projection import ACTIVATIONS

NAMES = tuple("x gate_weight gate_bias temperature weight1 bias1 weight2 bias2 kappa c moebius_bias".split())
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # a unit and a bit of what is stored


def inputs(body, rows=13, dim=33, hidden=29, bias=True, dtype=torch.float32, device="cpu"):
    """Everything that the layer takes, by name; rows of x as a LayerNorm gives them."""
    halves = [2] if body == "swiglu" else []
    n = partial(torch.randn, device=device)
    x = F.layer_norm(n(rows, dim), [dim]) if dim > 1 else n(rows, dim)
    half = {
        "x": x,
        "gate_weight": n(3, dim) / dim**0.5,
        "gate_bias": 0.2 * n(3) if bias else None,
        "weight1": n(3, *halves, hidden, dim) / dim**0.5,
        "bias1": 0.1 * n(3, *halves, hidden) if bias else None,
        "weight2": n(3, dim, hidden) / hidden**0.5,
        "bias2": 0.1 * n(3, dim) if bias else None,
        "moebius_bias": 0.2 * F.normalize(n(dim), dim=0) if bias else None,
    }
    single = {"temperature": 0.7, "kappa": 1.3, "c": 0.9}
    given = {name: t if t is None else t.to(dtype) for name, t in half.items()}
    given |= {name: torch.tensor(value, device=device) for name, value in single.items()}
    return {name: given[name] for name in NAMES}


def options(given, body, **more):
    return {"body": body, "input_scale": 0.5 / math.sqrt(given["x"].shape[1])} | more


def run(given, cotangents, wide=False, op=geometry_ffn, **more):
    """y, logits and every gradient, in float64 arithmetic if `wide`."""
    leaves = {k: t if t is None else (t.double() if wide else t).detach().requires_grad_() for k, t in given.items()}
    y, logits = op(*leaves.values(), **more)
    there = {name: t for name, t in leaves.items() if t is not None}
    dy = [d.to(out) for d, out in zip(cotangents, (y, logits), strict=True)]
    gradients = grad((y, logits), list(there.values()), dy, allow_unused=True)
    return {"y": y.detach(), "logits": logits.detach()} | {
        name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(there.items(), gradients, strict=True)
    }


def check_against_float64(given, body, **more):
    """y, logits and every gradient: at most twice the eager error, plus a unit of the stored dtype."""
    x = given["x"]
    cotangents = torch.randn_like(x), torch.randn(len(x), 3, device=x.device)
    exact = run(given, cotangents, wide=True, impl="reference", **options(given, body, **more))
    eager = run(given, cotangents, impl="reference", **options(given, body, **more))
    ours = run(given, cotangents, impl="triton", **options(given, body, **more))
    for name, truth in exact.items():
        assert ours[name].dtype == eager[name].dtype and ours[name].shape == truth.shape, name
        scale = truth.norm() + 1e-30
        if truth.dim() == 0:  # sums over rows that may cancel
            scale = scale + 0.1 * cotangents[0].double().norm()
        error = float((ours[name].double() - truth).norm() / scale)
        limit = 2 * float((eager[name].double() - truth).norm() / scale) + FLOOR[x.dtype]
        assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("routing", ["soft", "top1"])
@pytest.mark.parametrize("body", ACTIVATIONS)
def test_float32(body, routing, bias, device, poison_empty):
    check_against_float64(inputs(body, bias=bias, device=device), body, routing=routing)


@pytest.mark.parametrize("routing", ["soft", "top1"])
@pytest.mark.parametrize("body", ["gelu", "swiglu"])
def test_float16(body, routing, device, poison_empty):
    check_against_float64(inputs(body, dtype=torch.float16, device=device), body, routing=routing)


@pytest.mark.parametrize(("rows", "dim", "hidden"), [(1, 1, 1), (2, 3, 5), (5, 64, 17), (17, 65, 128)])
@pytest.mark.parametrize("routing", ["soft", "top1"])
def test_sizes(rows, dim, hidden, routing, device, poison_empty):
    check_against_float64(inputs("gelu", rows, dim, hidden, device=device), "gelu", routing=routing)


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.99, 2.1, 1e4], ids="{:g} of a LayerNorm's row".format)
def test_rows_of_any_length(size, device, poison_empty):
    """Inside the ball, and outside it where the row is projected."""
    given = inputs("gelu", device=device)
    given["x"] = given["x"] * size
    given["c"] = torch.ones((), device=device)
    check_against_float64(given, "gelu")


@pytest.mark.parametrize("routing", ["soft", "top1"])
def test_saturated_rows(routing, device, poison_empty):
    given = inputs("gelu", device=device)
    given["weight2"] = given["weight2"] * 1e3
    check_against_float64(given, "gelu", routing=routing)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("routing", ["soft", "top1"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_zero_rows(bias, routing, impl, device):
    given = inputs("swiglu", bias=bias, device=device)
    given["x"][[2, 7]] = 0
    cotangents = torch.randn_like(given["x"]), torch.randn(13, 3, device=device)
    out = run(given, cotangents, impl=impl, **options(given, "swiglu", routing=routing))
    assert all(t.isfinite().all() for t in out.values())
    assert bias or (out["y"][[2, 7]] == 0).all()
    assert out["x"].abs().max() < 1e3


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("routing", ["soft", "top1"])
def test_no_rows(routing, impl, device):
    given = inputs("swiglu", rows=0, device=device)
    cotangents = given["x"], torch.zeros(0, 3, device=device)
    out = run(given, cotangents, impl=impl, **options(given, "swiglu", routing=routing))
    assert out["y"].shape == (0, 33) and out["logits"].shape == (0, 3) and out["x"].shape == (0, 33)
    assert all((out[name] == 0).all() for name in NAMES)


@pytest.mark.parametrize("chosen", [0, 1, 2], ids=["euclidean", "spherical", "hyperbolic"])
@pytest.mark.parametrize("routing", ["soft", "top1"])
def test_one_expert_takes_all(chosen, routing, device, poison_empty):
    """Experts without a token are written and differentiated, too: their gradients are zero."""
    given = inputs("gelu", device=device)
    given["gate_bias"] = torch.full((3,), -1e3, device=device).index_fill_(0, torch.tensor(chosen, device=device), 1e3)
    check_against_float64(given, "gelu", routing=routing)
    cotangents = torch.randn_like(given["x"]), torch.zeros(13, 3, device=device)
    out = run(given, cotangents, impl="triton", **options(given, "gelu", routing=routing))
    others = [k for k in range(3) if k != chosen]
    assert (out["weight1"][others] == 0).all() and (out["bias2"][others] == 0).all() and (out["gate_bias"] == 0).all()
    assert out["weight1"][chosen].abs().max() > 0


def test_euclidean_expert_is_the_plain_mlp(device):
    given = inputs("gelu", device=device)
    given["gate_bias"] = torch.tensor([1e4, -1e4, -1e4], device=device)
    y, _ = geometry_ffn(*given.values(), **options(given, "gelu"), impl="triton")
    a = F.gelu(F.linear(given["x"], given["weight1"][0], given["bias1"][0]))
    torch.testing.assert_close(y, F.linear(a, given["weight2"][0], given["bias2"][0]))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_flat_limit(impl, device):
    """c -> 0: the hyperbolic expert is a Euclidean one that sees input_scale * x, and its bias is added."""
    given = inputs("gelu", device=device)
    given["gate_bias"] = torch.tensor([-1e4, -1e4, 1e4], device=device)
    given["c"] = torch.tensor(1e-10, device=device)
    y, _ = geometry_ffn(*given.values(), **options(given, "gelu"), impl=impl)
    a = F.gelu(F.linear(given["x"] * options(given, "gelu")["input_scale"], given["weight1"][2], given["bias1"][2]))
    torch.testing.assert_close(y, F.linear(a, given["weight2"][2], given["bias2"][2]) + given["moebius_bias"])


@pytest.mark.parametrize("routing", ["soft", "top1"])
def test_permuted_tokens_give_permuted_outputs(routing, device):
    given = inputs("gelu", device=device)
    order = torch.randperm(13, device=device)
    cotangents = torch.randn_like(given["x"]), torch.randn(13, 3, device=device)
    more = options(given, "gelu", routing=routing, impl="triton")
    a = run(given, cotangents, **more)
    b = run(given | {"x": given["x"][order]}, [d[order] for d in cotangents], **more)
    for name in a:
        expected = a[name][order] if name in ("x", "y", "logits") else a[name]
        torch.testing.assert_close(b[name], expected, rtol=1e-5, atol=2e-5)


def test_top1_is_the_soft_mixture_of_one(device):
    """Where the gate is decided, both routings agree."""
    given = inputs("gelu", device=device)
    given["temperature"] = torch.tensor(1e-4, device=device)
    soft, hard = (
        geometry_ffn(*given.values(), **options(given, "gelu", routing=r), impl="triton")[0] for r in ("soft", "top1")
    )
    torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("routing", ["soft", "top1"])
def test_without_gradients(routing, device):
    given = inputs("gelu", device=device)
    expected, _ = geometry_ffn(*given.values(), **options(given, "gelu", routing=routing), impl="triton")
    given["weight1"].requires_grad_()
    with torch.no_grad():
        y, _ = geometry_ffn(*given.values(), **options(given, "gelu", routing=routing), impl="triton")
    assert not y.requires_grad and torch.equal(y, expected)


@pytest.mark.parametrize("wanted", NAMES)
def test_gradient_of_one_input_alone(wanted, device):
    given = inputs("swiglu", device=device)
    given[wanted] = given[wanted].requires_grad_()
    dy = torch.randn_like(given["x"])
    found = [
        grad(geometry_ffn(*given.values(), **options(given, "swiglu"), impl=impl)[0], given[wanted], dy)[0]
        for impl in ("triton", "reference")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", ["soft", "top1"])
@pytest.mark.parametrize(("body", "dtype"), [("gelu", torch.float16), ("swiglu", torch.float32)], ids=str)
def test_saved_for_backward(body, dtype, routing, device):
    """z, u, x and per-row scalars: as many bytes a row as stated, beside the parameters."""
    given = inputs(body, rows=5, dim=32, hidden=48, dtype=dtype, device=device)
    parameters = {given[name].requires_grad_().untyped_storage().data_ptr() for name in NAMES[1:]}
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        x = given["x"].requires_grad_()
        out = geometry_ffn(*given.values(), **options(given, body, routing=routing), impl="triton")
    saved = {pointer: size for pointer, size in storages.items() if pointer not in parameters}
    assert sum(saved.values()) == 5 * saved_bytes(32, 48, body, dtype.itemsize, routing)
    assert x.untyped_storage().data_ptr() in saved and out[0].untyped_storage().data_ptr() not in saved


def test_stated_memory_of_a_training_layer():
    assert 16384 * saved_bytes(1024, 4096, "gelu", 2) / 1e9 == pytest.approx(0.54, abs=0.005)


def test_gradcheck_of_the_references():
    given = inputs("swiglu", rows=3, dim=4, hidden=3)
    given["x"] = given["x"] * torch.tensor([1e-2, 1.0, 1.5])[:, None]
    tensors = [t.double().requires_grad_() for t in given.values()]
    for routing in ("soft", "top1"):
        assert gradcheck(partial(geometry_ffn_reference, **options(given, "swiglu", routing=routing)), tensors)
    rows = tensors[:4] + tensors[9:10]
    assert gradcheck(lambda *a: geometry_rows_reference(*a, input_scale=0.25)[1:], rows)


# The row operation alone


def rows_inputs(rows=7, dim=97, size=1.0, dtype=torch.float32, device="cpu"):
    x = (size * torch.randn(rows, dim, device=device)).to(dtype)
    gate = torch.randn(3, dim, device=device).to(dtype) / dim**0.5
    scalars = torch.tensor(0.1, device=device), torch.tensor(0.8, device=device)
    return [x, gate, torch.randn(3, device=device).to(dtype), *scalars]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 0.3, 1.0, 2.2, 1e3])
def test_rows(size, dtype, device, poison_empty):
    tensors = rows_inputs(size=size, dtype=dtype, device=device)
    cotangents = [torch.randn(shape, device=device) for shape in ((7, 97), (7, 3), (3, 7))]
    cotangents[0] = cotangents[0].to(dtype)

    def evaluate(impl, wide):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in tensors]
        out = geometry_rows(*leaves, input_scale=0.5 / 97**0.5, impl=impl)
        return [*(o.detach() for o in out), *grad(out, leaves, [d.to(o) for d, o in zip(cotangents, out, strict=True)])]

    names = ("x", "logits", "scale", "dx", "dweight", "dbias", "dtemperature", "dc")
    exact, eager, ours = evaluate("reference", True), evaluate("reference", False), evaluate("triton", False)
    for name, truth, theirs, mine in zip(names, exact, eager, ours, strict=True):
        assert mine.dtype == theirs.dtype
        scale = float(truth.norm()) + 1e-30
        if name == "dc":
            scale += 1e-2
        error = float((mine.double() - truth).norm()) / scale
        limit = 2 * float((theirs.double() - truth).norm()) / scale + FLOOR[mine.dtype]
        assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.2e}"


def test_row_scale_is_the_logarithm_of_the_projection(device):
    x, *rest, c = rows_inputs(rows=5, device=device)
    x = x / x.norm(dim=1, keepdim=True) * torch.tensor([0.0, 1e-3, 0.7, 0.999, 40.0], device=device)[:, None]
    _, _, scale = geometry_rows(x, *rest, c, input_scale=1 / math.sqrt(0.8), impl="triton")
    a = x.double().norm(dim=1).clamp(1e-30, A_MAX)
    expected = a.atanh() * (x.double().norm(dim=1) > 0) / math.sqrt(0.8)
    torch.testing.assert_close((scale[2:].T * x).double().norm(dim=1), expected, rtol=2e-4, atol=1e-7)
    assert (scale[:2] == 1).all()


@pytest.mark.parametrize("used", [0, 1, 2], ids=["x", "logits", "scale"])
def test_rows_with_one_output_in_use(used, device):
    tensors = [t.requires_grad_() for t in rows_inputs(device=device)]
    found = []
    for impl in ("triton", "reference"):
        out = geometry_rows(*tensors, input_scale=0.05, impl=impl)[used].square().sum()
        gradients = grad(out, tensors, allow_unused=True)
        found.append([torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors, strict=True)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(33)}, r"x must have shape \[M, D\], got \[33\]"),
        ({"x": torch.zeros(33, 13).T}, "x must be contiguous"),
        ({"x": torch.zeros(13, 0)}, "D must be 1 to 8192, got 0"),
        ({"gate_weight": torch.zeros(2, 33)}, r"gate_weight must have shape \[3, 33\]"),
        ({"gate_bias": torch.zeros(4)}, r"gate_bias must have shape \[3\]"),
        ({"temperature": 0.0}, "temperature must be finite and positive, got 0.0"),
        ({"weight1": torch.zeros(3, 2, 29, 33)}, r"weight1 must have shape \[3, H, 33\]"),
        ({"weight1": torch.zeros(3, 29, 33).half()}, "weight1 must be torch.float32"),
        ({"weight2": torch.zeros(3, 33, 28)}, r"weight2 must have shape \[3, 33, 29\]"),
        ({"bias1": torch.zeros(3, 2, 29)}, r"bias1 must have shape \[3, 29\]"),
        ({"bias2": torch.zeros(33)}, r"bias2 must have shape \[3, 33\]"),
        ({"weight2": torch.zeros(3, 33, 29, device="meta")}, "weight2 must be on cpu, got meta"),
        ({"kappa": torch.zeros(3)}, r"kappa must have shape \[\]"),
        ({"c": -1.0}, "c must be finite and positive, got -1.0"),
        ({"moebius_bias": torch.zeros(34)}, r"moebius_bias must have shape \[33\]"),
        ({"clip": -2.0}, "clip must be positive, got -2.0"),
        ({"input_scale": 0.0}, "input_scale must be positive, got 0.0"),
        ({"body": "relu"}, "body must be one of gelu, gelu_tanh, swiglu, got 'relu'"),
        ({"routing": "top2"}, "routing must be one of soft, top1, got 'top2'"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_refused(change, message):
    given = inputs("gelu")
    arguments = given | options(given, "gelu") | change
    with pytest.raises(ValueError, match="geometry_ffn: " + message):
        geometry_ffn(**arguments)


@pytest.mark.parametrize("dim", [768, 1024, 1536])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_row_kernels_compile_without_spilling(way, dim):
    name, table = {
        "forward": ("_rows_fwd_kernel", rows_module.LAUNCH_FORWARD),
        "backward": ("_rows_bwd_kernel", rows_module.LAUNCH_BACKWARD),
    }[way]
    kernel = getattr(rows_module, name)
    constants = {"BIAS": True, "LOGITS": True, "SCALE": True, "DY": True}
    half = {"x_ptr", "weight_ptr", "bias_ptr", "dy_ptr", "dx_ptr"}
    assert_rows_compile(f"{rows_module.__name__}:{name}", kernel.arg_names, table, dim, half, constants)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["soft", "top1"])
@pytest.mark.parametrize("body", ["gelu", "swiglu"])
def test_training_shape_in_bfloat16(body, routing):
    given = inputs(body, 4096, 1024, 4096, dtype=torch.bfloat16, device="cuda")
    given["moebius_bias"] = given["moebius_bias"].float()
    check_against_float64(given, body, routing=routing)
