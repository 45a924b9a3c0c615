import pytest
import torch
from products import assert_as_good

from armillary.kernels.tokens import packed_attention as module
from armillary.kernels.tokens.attention import MAX_SCORES_BYTES, PackedSequences, attention
from armillary.kernels.tokens.packed_attention import self_attention
from armillary.kernels.tokens.run_attention import run_attention, suits_runs

RUNS = {
    "one token": [(1, 1)],
    "global and local crops": [(2, 10), (5, 3)],
    "an empty run": [(2, 4), (0, 9), (1, 2)],
    "no tokens": [(0, 3)],
}


def draw(runs, heads=2, dim=8, dtype=torch.float64):
    layout = PackedSequences.from_runs(runs)
    return torch.randn(sum(n * length for n, length in runs), 3, heads, dim, dtype=torch.float64).to(dtype), layout


def with_gradient(fn, qkv):
    x = qkv.detach().requires_grad_()
    out = fn(x)
    return out.detach(), torch.autograd.grad((out * out).sum(), x)[0]


def dense(qkv, layout):
    return attention(*qkv.unbind(1), layout, backend="dense")


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_equals_the_reference(runs, poison_empty):
    qkv, layout = draw(runs)
    ours = with_gradient(lambda x: run_attention(x, layout), qkv)
    for a, b in zip(ours, with_gradient(lambda x: dense(x, layout), qkv), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_as_good_as_separate_operations(dtype):
    qkv, layout = draw([(3, 37), (4, 10)], dim=16, dtype=dtype)
    ours = with_gradient(lambda x: run_attention(x, layout), qkv)
    eager = with_gradient(lambda x: attention(*x.unbind(1), layout), qkv)
    right = with_gradient(lambda x: dense(x, layout), qkv.double())
    for a, b, exact in zip(ours, eager, right, strict=True):
        assert a.dtype == dtype
        assert_as_good(a, b, exact)


def test_gradcheck():
    qkv, layout = draw([(2, 3), (1, 2)], dim=2)
    assert torch.autograd.gradcheck(lambda x: run_attention(x, layout), qkv.requires_grad_())
    strided = torch.randn(8, 2, 3, 2, dtype=torch.float64).transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run_attention(x, layout), strided)


def test_a_gradient_that_repeats_one_number():
    qkv, layout = draw([(2, 4)])
    (ours,) = torch.autograd.grad(run_attention(qkv.requires_grad_(), layout).sum(), qkv)
    (right,) = torch.autograd.grad(dense(qkv, layout).sum(), qkv)
    torch.testing.assert_close(ours, right)


def test_where_it_is_taken(monkeypatch):
    took = []
    monkeypatch.setattr(module, "run_attention", lambda qkv, layout: took.append("runs") or dense(qkv, layout))
    qkv, layout = draw([(2, 4)], dtype=torch.float32)
    for backend, expected in (("auto", ["runs"]), ("torch", ["runs"]), ("dense", [])):
        self_attention(qkv, layout, backend=backend)
        assert took == expected
        took.clear()
    long = 1 + int((MAX_SCORES_BYTES / 4) ** 0.5)
    assert not suits_runs(torch.empty(long, 3, 1, 8), PackedSequences.from_runs([(1, long)]))
    assert not suits_runs(qkv, PackedSequences.from_lengths(torch.tensor([4, 4]), 4))
    with torch.autocast("cpu"):
        assert not suits_runs(qkv, layout)


def test_bad_layout():
    qkv, layout = draw([(2, 4)])
    with pytest.raises(ValueError, match="self_attention: layout must describe the 7 tokens of qkv, got 8"):
        self_attention(qkv[:7], layout)
