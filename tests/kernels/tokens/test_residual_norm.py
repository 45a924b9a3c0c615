from dataclasses import replace

import pytest
import torch
from aot import ARCHITECTURES, SHARED_LIMIT, resources

from armillary.kernels.tokens import residual_norm as module
from armillary.kernels.tokens import residual_norm_kernels as kernels
from armillary.kernels.tokens.residual_norm import (
    Packing,
    residual_add,
    residual_add_reference,
    residual_norm,
    residual_norm_reference,
)

GROUPS = ((3, 2), (4, 1), (1, 3))  # samples and their tokens
TOKENS = 13
UNITS = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # the interpreter truncates to bf16


def packing(*samples, groups=GROUPS, device="cpu"):
    """Packing of a branch that these samples of each group run, in this order."""
    sample, place, start, scale, rows = [], [], [], [], 0
    for chosen, (n, length) in zip(samples, groups, strict=True):
        first = {s: rows + i * length for i, s in enumerate(chosen)}
        rows += len(chosen) * length
        for s in range(n):
            sample += [len(start)] * length
            place += range(length)
            start.append(first.get(s, -1))
            scale.append(n / max(len(chosen), 1))
    maps = [torch.tensor(x, dtype=torch.int32, device=device) for x in (sample, place, start)]
    return Packing(*maps, torch.tensor(scale, device=device), rows)


# samples in both branches, in one, in none; a group without any
RAN, RUNS, NONE = ((2, 0), (1, 3), ()), ((0,), (3, 0, 2), (0,)), ((), (), ())
BRANCHES = {
    "every sample": (None, None),
    "subsets": (RAN, RUNS),
    "subset, then every sample": (RAN, None),
    "every sample, then subset": (None, RUNS),
    "no sample, then subset": (NONE, RUNS),
    "subset, then no sample": (RAN, NONE),
    "first norm, every sample": ("first", None),
    "first norm, subset": ("first", RUNS),
}


class Case:
    """Inputs, in float64, of one norm; the first one of a model has no y."""

    def __init__(self, ran, runs, width=33, groups=GROUPS, device="cpu"):
        self.first = ran == "first"
        self.ran = None if ran is None or self.first else packing(*ran, groups=groups, device=device)
        self.runs = None if runs is None else packing(*runs, groups=groups, device=device)
        tokens = sum(n * length for n, length in groups)
        rows = tokens if self.ran is None else self.ran.rows
        x, y = (torch.randn(n, width, dtype=torch.float64, device=device) for n in (tokens, rows))
        weight, bias = torch.randn(2, width, dtype=torch.float64, device=device)
        self.inputs = [x, weight, bias] if self.first else [x, weight, bias, y]
        rows = tokens if self.runs is None else self.runs.rows
        self.weights = [torch.randn(n, width, dtype=torch.float64, device=device) for n in (tokens, rows)]

    def run(self, function, dtype, **kwargs):
        """x', n and the gradients of x, weight, bias and y."""
        x, weight, bias, *y = inputs = [t.to(dtype, copy=True).requires_grad_() for t in self.inputs]
        out = function(x, y[0] if y else None, weight, bias, self.ran, self.runs, **kwargs)
        return [*out, *torch.autograd.grad(out, inputs, [w.to(dtype) for w in self.weights])]

    def round(self, dtype):
        """Inputs that the dtype represents, so that every precision computes the same."""
        self.inputs, self.weights = ([t.to(dtype).double() for t in some] for some in (self.inputs, self.weights))
        return self

    def check(self, dtype):
        """Row by row, at most twice the error of eager PyTorch at the same precision."""
        exact = self.run(residual_norm_reference, torch.float64)
        eager = self.run(residual_norm_reference, dtype)
        got = self.run(residual_norm, dtype, impl="triton")
        names = ("x'", "n", "dx", "dweight", "dbias", "dy")[: len(exact)]
        for name, a, e, t in zip(names, got, eager, exact, strict=True):
            assert a.dtype == dtype and a.shape == t.shape, name
            error, allowed = ((z.double() - t).abs().amax(-1) for z in (a, e))
            limit = 2 * allowed + UNITS[dtype] * t.abs().amax(-1)
            assert (error <= limit).all(), (name, (error / limit).max())
        if not self.first:  # sums of dy travel with it
            sums, parts = got[-1].__dict__["column_sums"][1], exact[-1]
            assert sums.dtype == torch.float32
            assert ((sums - parts.sum(0)).abs() <= 4 * UNITS[dtype] * (1 + parts.abs().sum(0))).all()


@pytest.mark.parametrize("branches", BRANCHES)
def test_forward_and_gradients(branches, device, poison_empty):
    Case(*BRANCHES[branches], device=device).round(torch.float32).check(torch.float32)


@pytest.mark.parametrize("width", [1, 2, 384, 600, 1024])
@pytest.mark.parametrize("branches", ["every sample", "subsets"])
def test_widths(branches, width, device, poison_empty):
    ran, runs = (None, None) if branches == "every sample" else (((1,), (0,)), ((0, 1), ()))
    Case(ran, runs, width, ((2, 3), (1, 2)), device).round(torch.float32).check(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("branches", ["every sample", "subsets", "first norm, subset"])
def test_half_precision(branches, dtype, device, poison_empty):
    Case(*BRANCHES[branches], device=device).round(dtype).check(dtype)


def test_rows_of_any_magnitude(device):
    """Below and above the norm's epsilon, with a mean far above the spread, all zero."""
    case = Case(RAN, RUNS, width=48, device=device)
    scale = torch.logspace(-20, 15, TOKENS, dtype=torch.float64, device=device)
    case.inputs[0] *= scale[:, None]
    case.inputs[0][5:8] = 1e4 + 1e-2 * case.inputs[0][5:8].sign()
    case.inputs[0][10] = 0
    case.inputs[3] *= scale[case.ran.tokens()][:, None]
    case.round(torch.float32).check(torch.float32)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1.1, 1e4 + 0.3, 1e15])
def test_constant_rows_are_their_own_mean(value, device):
    """Their norm is the bias to the bit, though 384 terms of a sum round."""
    x, weight, bias = torch.full((2, 384), value), torch.randn(384), torch.randn(384)
    x, weight, bias = (t.to(device).requires_grad_() for t in (x, weight, bias))
    _, n = residual_norm(x, None, weight, bias, impl="triton")
    assert torch.equal(n, bias.expand(2, 384))
    d_n = torch.randn_like(n)
    d_x, d_weight = torch.autograd.grad(n, [x, weight], d_n)
    g = (d_n * weight).double()
    torch.testing.assert_close(d_x.double(), (g - g.mean(1, keepdim=True)) * 1e-6**-0.5, rtol=1e-4, atol=1e-3)
    assert not d_weight.any()


def test_norm_is_that_of_the_tokens_as_stored(device):
    """Rounding x' to bfloat16 changes its statistics, and the backward pass reads what was stored."""
    case = Case(RAN, RUNS, device=device)
    x, weight, bias, y = (t.bfloat16() for t in case.inputs)
    out, n = residual_norm(x, y, weight, bias, case.ran, case.runs, impl="triton")
    _, again = residual_norm(out, None, weight, bias, runs=case.runs, impl="triton")
    assert torch.equal(n, again)


def test_a_bad_token_spoils_its_row_alone(device):
    case = Case(RAN, RUNS, device=device)
    got = []
    for bad in (0.0, float("nan")):
        case.inputs[0][0, 3] = bad  # of sample 0: row 2 of y, row 0 of n
        got.append(case.run(residual_norm, torch.float32, impl="triton"))
    rows = {0: {0}, 1: {0}, 2: {0}, 5: {2}}
    for index, spoilt in rows.items():
        clean, dirty = got[0][index], got[1][index]
        same = torch.tensor([row not in spoilt for row in range(len(clean))], device=device)
        assert torch.equal(clean[same], dirty[same]) and dirty[~same].isnan().any()


@pytest.mark.parametrize("branches", ["every sample", "subsets"])
@pytest.mark.parametrize("used", ["x'", "n"])
def test_one_output_unused(branches, used, device, poison_empty):
    """After the last norm nothing reads x'; of a norm that no sample is selected from, nothing reads n."""
    case = Case(*BRANCHES[branches], device=device)
    out, grads = used == "n", []
    for dtype, kwargs in ((torch.float32, {"impl": "triton"}), (torch.float64, {"impl": "reference"})):
        x, weight, bias, y = inputs = [t.to(dtype, copy=True).requires_grad_() for t in case.inputs]
        result = residual_norm(x, y, weight, bias, case.ran, case.runs, **kwargs)[out]
        grads.append(torch.autograd.grad(result, inputs, case.weights[out].to(dtype), allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "branches, wanted",
    [("every sample", "x"), ("every sample", "y"), *(("subsets", w) for w in ("x", "y", "weight", "bias", "nothing"))],
)
def test_only_some_inputs_need_gradients(branches, wanted, device, poison_empty):
    case = Case(*BRANCHES[branches], device=device)
    names = ("x", "weight", "bias", "y")
    every = dict(zip(names, case.run(residual_norm, torch.float32, impl="triton")[2:], strict=True))
    x, weight, bias, y = (t.float().requires_grad_(name == wanted) for name, t in zip(names, case.inputs, strict=True))
    out = residual_norm(x, y, weight, bias, case.ran, case.runs, impl="triton")
    assert out[1].requires_grad == (wanted != "nothing")
    if wanted != "nothing":
        leaf = dict(zip(names, (x, weight, bias, y), strict=True))[wanted]
        (grad,) = torch.autograd.grad(out, leaf, [w.float() for w in case.weights])
        assert torch.equal(grad, every[wanted])


@pytest.mark.parametrize("samples", [None, RAN, NONE], ids=["every sample", "subset", "no sample"])
def test_add(samples, device, poison_empty):
    ran = None if samples is None else packing(*samples, device=device)
    x, y = (torch.randn(n, 33, device=device) for n in (TOKENS, TOKENS if ran is None else ran.rows))
    weights, results = torch.randn(TOKENS, 33, device=device), []
    for function, kwargs in ((residual_add, {"impl": "triton"}), (residual_add_reference, {})):
        inputs = [t.clone().requires_grad_() for t in (x, y)]
        out = function(*inputs, ran, **kwargs)
        results.append([out, *torch.autograd.grad(out, inputs, weights)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_reference_sample_by_sample():
    case = Case(RAN, RUNS)
    x, weight, bias, y = case.inputs
    out, n = residual_norm_reference(x, y, weight, bias, case.ran, case.runs)
    samples = [s for (_, length), g in zip(GROUPS, x.split([6, 4, 3]), strict=True) for s in g.split(length)]
    of_y, of_n, begin = y.split([2, 2, 1, 1]), n.split([2, 1, 1, 1, 3]), 0
    ran, runs = {2: (0, 3 / 2), 0: (1, 3 / 2), 4: (2, 2.0), 6: (3, 2.0)}, {0: 0, 6: 1, 3: 2, 5: 3, 7: 4}
    for i, sample in enumerate(samples):
        if i in ran:
            sample = sample + ran[i][1] * of_y[ran[i][0]]
        torch.testing.assert_close(out[begin : begin + len(sample)], sample)
        if i in runs:
            centred = sample - sample.mean(1, keepdim=True)
            normal = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
            torch.testing.assert_close(of_n[runs[i]], normal * weight + bias)
        begin += len(sample)


@pytest.mark.parametrize("branches", BRANCHES)
def test_gradcheck_of_the_reference(branches):
    case = Case(*BRANCHES[branches], width=3)

    def function(x, weight, bias, y=None):
        return residual_norm_reference(x, y, weight, bias, case.ran, case.runs)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in case.inputs])


def test_saves_what_is_there_anyway(device):
    """x' is an output; besides it one mean and one rstd a row of the next branch."""
    case = Case(RAN, RUNS, device=device)
    x, weight, bias, y = (t.float().requires_grad_() for t in case.inputs)
    out, n = residual_norm(x, y, weight, bias, case.ran, case.runs, impl="triton")
    saved, saved_weight, mean, rstd = n.grad_fn.saved_tensors
    assert saved.data_ptr() == out.data_ptr() and saved_weight.data_ptr() == weight.data_ptr()
    assert mean.dtype == rstd.dtype == torch.float32 and mean.shape == rstd.shape == (case.runs.rows,)
    first, _ = residual_norm(x, None, weight, bias, runs=case.runs, impl="triton")
    assert first.data_ptr() == x.data_ptr()


def test_same_bits_again(device):
    case = Case(RAN, RUNS, width=100, device=device)
    for a, b in zip(*(case.run(residual_norm, torch.float32, impl="triton") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_tokens(impl, device):
    x, y = (torch.empty(0, 8, device=device, requires_grad=True) for _ in range(2))
    weight, bias = (torch.ones(8, device=device, requires_grad=True) for _ in range(2))
    out, n = residual_norm(x, y, weight, bias, impl=impl)
    assert out.shape == n.shape == (0, 8)
    grads = torch.autograd.grad((out.sum() + n.sum()), [x, y, weight, bias])
    assert [tuple(g.shape) for g in grads] == [(0, 8), (0, 8), (8,), (8,)] and not any(g.any() for g in grads)


def test_no_second_derivative(device):
    case = Case(None, None, device=device)
    x, weight, bias, y = (t.float().requires_grad_() for t in case.inputs)
    _, n = residual_norm(x, y, weight, bias, impl="triton")
    (grad,) = torch.autograd.grad(n.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_inputs():
    branch = packing(*RAN)
    x, y, weight, bias = torch.zeros(TOKENS, 8), torch.zeros(branch.rows, 8), torch.zeros(8), torch.zeros(8)
    good = {"x": x, "y": y, "weight": weight, "bias": bias, "ran": branch, "runs": None}
    long, short = replace(branch, sample=branch.sample.long()), replace(branch, place=branch.place[1:])
    for change, text in (
        ({"x": x[0]}, r"x must have shape \[P, D\], got \[8\]"),
        ({"x": torch.zeros(8, TOKENS).T}, r"x must be contiguous, got strides \(1, 13\) for shape \[13, 8\]"),
        ({"x": x.long()}, "x must be floating point, got torch.int64"),
        ({"y": y[1:]}, r"y must have shape \[6, 8\], got \[5, 8\]"),
        ({"y": y.half()}, "y must be torch.float32, got torch.float16"),
        ({"y": None}, "ran must be absent without y"),
        ({"weight": weight[1:]}, r"weight must have shape \[8\], got \[7\]"),
        ({"weight": weight.to("meta")}, "weight must be on cpu, got meta"),
        ({"bias": bias.double()}, "bias must be torch.float32, got torch.float64"),
        ({"ran": long}, "ran.sample must be torch.int32, got torch.int64"),
        ({"ran": short}, r"ran.place must have shape \[13\], got \[12\]"),
        ({"runs": replace(branch, scale=branch.scale[1:])}, r"runs.scale must have shape \[8\], got \[7\]"),
        ({"runs": replace(branch, start=branch.start[::2])}, "runs.start must be contiguous"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"impl": "fast"}, "impl must be one of auto, reference, triton, got 'fast'"),
        ({"x": x.double(), "impl": "triton"}, 'impl must be "reference" or "auto" for torch.float64'),
    ):
        with pytest.raises(ValueError, match=f"residual_norm: {text}"):
            residual_norm(**(good | change))
    wide = torch.zeros(1, module.MAX_WIDTH + 1)
    with pytest.raises(ValueError, match="x must have a width D of 1 to 8192, got 8193"):
        residual_norm(wide, None, wide[0], wide[0], impl="triton")
    with pytest.raises(ValueError, match=r"residual_add: y must have shape \[13, 8\], got \[6, 8\]"):
        residual_add(x, y)


MAPS = dict.fromkeys(("sample_ptr", "place_ptr", "ran_ptr", "runs_ptr"), "*i32") | {"scale_ptr": "*fp32"}
STATISTICS = dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32")
SIGNATURES = {
    "fwd": (("x_ptr", "y_ptr", "weight_ptr", "bias_ptr", "out_ptr", "n_ptr"), {"width": "i32", "eps": "fp32"}),
    "bwd": (
        ("d_out_ptr", "d_n_ptr", "out_ptr", "weight_ptr", "d_x_ptr", "d_y_ptr"),
        {"sums_ptr": "*fp32", "y_sums_ptr": "*fp32", "tokens": "i32", "width": "i32"},
    ),
}


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(
    "kernel, dtype, width", [("fwd", "bf16", 1024), ("bwd", "bf16", 1024), ("bwd", "bf16", 384), ("bwd", "fp32", 1024)]
)
def test_compiles_without_spilling(kernel, dtype, width, sm):
    rows, others = SIGNATURES[kernel]
    shape = kernels.row_shape(kernels.LAUNCH[sm], width)
    used = resources(
        f"armillary.kernels.tokens.residual_norm_kernels:residual_norm_{kernel}_kernel",
        dict.fromkeys(rows, f"*{dtype}") | STATISTICS | MAPS | others,
        {"COLUMNS": shape["COLUMNS"]},
        divisible=("width",),
        num_warps=shape["num_warps"],
    )[sm]
    assert used.stack == used.local == 0 and used.shared <= SHARED_LIMIT[sm], used
    assert used.registers * 32 * 20 <= 65536, used  # all warps of the backward kernel are resident at once


@pytest.mark.gpu
def test_training_shape_on_a_gpu():
    """ViT-L/12, 96 galaxies: 2 x 145 and 8 x 26 tokens each, in bfloat16."""
    groups = ((192, 145), (768, 26))
    ran, runs = ([torch.randperm(n)[: int(0.7 * n)].tolist() for n, _ in groups] for _ in range(2))
    Case(ran, runs, 1024, groups, "cuda").round(torch.bfloat16).check(torch.bfloat16)
