import sys
import types

import pytest
import torch

from armillary.kernels.tokens import attention as module
from armillary.kernels.tokens.attention import PackedSequences, attention, attention_reference

RUNS = {
    "one sequence": [(1, 7)],
    "one token": [(3, 1)],
    "global and local crops": [(2, 10), (5, 3)],
    "an empty run": [(2, 4), (0, 9), (1, 2)],
    "equal runs apart": [(1, 3), (1, 5), (1, 3)],
}


def qkv(tokens, heads=2, dim=8, dtype=torch.float64, grad=True):
    return [torch.randn(tokens, heads, dim, dtype=torch.float64).to(dtype).requires_grad_(grad) for _ in range(3)]


def by_hand(q, k, v, lengths):
    """One softmax(QK)V a sequence and head."""
    out = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("qhd,khd->hqk", a, b) / a.shape[-1] ** 0.5
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c))
    return torch.cat(out)


@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_equals_one_attention_a_sequence(runs, backend, device):
    lengths = [length for n, length in runs for _ in range(n)]
    inputs = qkv(sum(lengths))
    expected = by_hand(*inputs, lengths)
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    moved = [x.detach().to(device).requires_grad_() for x in inputs]
    out = attention(*moved, PackedSequences.from_runs(runs, device), backend=backend)
    grads = torch.autograd.grad((out * weights.to(device)).sum(), moved)
    torch.testing.assert_close(out.cpu(), expected)
    for g, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(g.cpu(), e)
    with torch.no_grad():
        torch.testing.assert_close(
            attention(*moved, PackedSequences.from_runs(runs, device), backend=backend).cpu(), expected
        )


@pytest.mark.parametrize("known", [True, False], ids=["host knows the lengths", "device knows them"])
def test_ragged_layout(known):
    lengths = [3, 3, 1, 6]
    q, k, v = qkv(sum(lengths), grad=False)
    layout = (
        PackedSequences.from_runs([(1, n) for n in lengths])
        if known
        else PackedSequences.from_lengths(torch.tensor(lengths), 8)
    )
    torch.testing.assert_close(attention(q, k, v, layout), by_hand(q, k, v, lengths))


@pytest.mark.parametrize("wanted", [[1, 1, 1, 1], [1, 4, 2, 1], [4, 4, 2, 2], [0, 3, 1, 0]], ids=str)
def test_fewer_queries_than_keys(wanted):
    """The rows of the full attention that belong to the queries, and their gradients."""
    lengths = [4, 4, 2, 2]
    q, k, v = qkv(sum(lengths))
    starts = [0, 4, 8, 10]
    rows = torch.tensor([s + i for s, n in zip(starts, wanted, strict=True) for i in range(n)], dtype=torch.int64)
    known, ragged = PackedSequences.from_runs([(2, 4), (2, 2)]), PackedSequences.from_lengths(torch.tensor(lengths), 9)
    queries = PackedSequences.from_lengths(torch.tensor(wanted), 4)
    expected = by_hand(q, k, v, lengths)[rows]
    weights = torch.randn_like(expected)
    want = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for backend, layout in (("torch", known), ("torch", ragged), ("dense", known)):
        out = attention(q[rows], k, v, layout, query_layout=queries, backend=backend)
        torch.testing.assert_close(out, expected)
        for g, e in zip(torch.autograd.grad((out * weights).sum(), (q, k, v)), want, strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_at_most_twice_that_of_the_reference(dtype):
    runs = [(3, 17), (4, 5)]
    exact = qkv(3 * 17 + 4 * 5, dim=64, grad=False)
    rounded = [x.to(dtype) for x in exact]
    truth = attention_reference(*[x.double() for x in rounded], PackedSequences.from_runs(runs))

    def eager(q, k, v):
        parts = []
        for a, b, c in zip(*(x.split([51, 20]) for x in (q, k, v)), strict=True):
            n = 3 if len(a) == 51 else 4
            a, b, c = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in (a, b, c))
            parts.append(((a @ b.mT) / 8).softmax(-1).matmul(c).transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)

    allowed = (eager(*rounded).double() - truth).abs().max()
    for grad in (False, True):
        inputs = [x.clone().requires_grad_(grad) for x in rounded]
        error = (attention(*inputs, PackedSequences.from_runs(runs)).double() - truth).abs().max()
        assert error <= 2 * allowed


def test_sequences_do_not_see_each_other():
    q, k, v = qkv(9, grad=False)
    layout = PackedSequences.from_runs([(1, 4), (1, 5)])
    before = attention(q, k, v, layout)
    k[4:], v[4:] = 100.0, torch.nan
    after = attention(q, k, v, layout)
    assert torch.equal(before[:4], after[:4])
    assert after[4:].isnan().all()


def test_layouts_of_equal_runs_are_made_once():
    assert PackedSequences.from_runs([(2, 3)]) is PackedSequences.from_runs(((2, 3),))
    layout = PackedSequences.from_runs([(2, 3), (1, 7)])
    assert layout.cu_seqlens.tolist() == [0, 3, 6, 13] and layout.cu_seqlens.dtype == torch.int32
    assert (layout.sequences, layout.max_len) == (3, 7)


def test_no_tokens():
    q, k, v = qkv(0)
    assert attention(q, k, v, PackedSequences.from_runs([(0, 5)])).shape == (0, 2, 8)


def test_gradcheck():
    q, k, v = qkv(7, heads=1, dim=3)
    layout = PackedSequences.from_runs([(2, 2), (1, 3)])
    assert torch.autograd.gradcheck(lambda *x: attention(*x, layout), (q, k, v))


@pytest.mark.parametrize("package", ["flash_attn", "flash_attn.cute"], ids=["version 2", "version 4"])
def test_flash_attention_is_found_and_called(monkeypatch, package):
    """The package is looked for on first use; both generations get the same sequences."""
    seen = {}

    def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        seen.update(cu=(cu_seqlens_q, cu_seqlens_k), longest=(max_seqlen_q, max_seqlen_k))
        out = by_hand(q, k, v, [2, 3])
        return (out, None) if package.endswith("cute") else out

    kernel.__module__ = package + ".interface"
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    fake = types.ModuleType(package)
    fake.flash_attn_varlen_func = kernel
    monkeypatch.setitem(sys.modules, package, fake)
    module._flash_attn.cache_clear()
    try:
        found = module._flash_attn()
    finally:
        module._flash_attn.cache_clear()
    assert found is kernel
    q, k, v = qkv(5)
    layout = PackedSequences.from_runs([(1, 2), (1, 3)])
    torch.testing.assert_close(module._varlen(found, q, k, v, layout, layout), by_hand(q, k, v, [2, 3]))
    assert seen["longest"] == (3, 3) and all(torch.equal(c, layout.cu_seqlens) for c in seen["cu"])


def test_bad_inputs():
    q, k, v = qkv(6, grad=False)
    layout = PackedSequences.from_runs([(2, 3)])
    with pytest.raises(ValueError, match=r"backend: must be one of auto, .*got 'xformers'"):
        attention(q, k, v, layout, backend="xformers")
    with pytest.raises(ValueError, match=r"backend: flash_attn needs CUDA tensors in bf16 or fp16, got torch.float64"):
        attention(q, k, v, layout, backend="flash_attn")
    with pytest.raises(ValueError, match=r"q: must be \[tokens, heads, head dim\], got shape \(6, 16\)"):
        attention(q.flatten(1), k, v, layout)
    with pytest.raises(ValueError, match=r"k: must be floating point with q's dtype"):
        attention(q, k.float(), v, layout)
    with pytest.raises(ValueError, match=r"v: must have k's shape"):
        attention(q, k, v[:5], layout)
    with pytest.raises(ValueError, match=r"q: must have k's heads and head dim \(2, 8\), got \(2, 4\)"):
        attention(q[..., :4], k, v, layout)
    with pytest.raises(ValueError, match=r"layout: describes 8 tokens, got 6"):
        attention(q, k, v, PackedSequences.from_runs([(2, 4)]))
    with pytest.raises(ValueError, match=r"query_layout: must have layout's 2 sequences, got 1"):
        attention(q, k, v, layout, query_layout=PackedSequences.from_runs([(1, 6)]))
    with pytest.raises(ValueError, match=r"runs: counts must be >= 0 and lengths >= 1"):
        PackedSequences.from_runs([(2, 0)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_half_precision_on_cuda(dtype, ragged):
    lengths = [16, 16, 5]
    exact = [x.cuda().to(dtype).detach().requires_grad_() for x in qkv(37, dim=64)]
    layout = (
        PackedSequences.from_lengths(torch.tensor(lengths, device="cuda"), 16)
        if ragged
        else PackedSequences.from_runs([(2, 16), (1, 5)], "cuda")
    )
    out = attention(*exact, layout, backend="torch")
    truth = by_hand(*[x.double() for x in exact], lengths)
    torch.testing.assert_close(out.double(), truth, atol=2e-2, rtol=2e-2)
    for g, e in zip(torch.autograd.grad(out.sum(), exact), torch.autograd.grad(truth.sum(), exact), strict=True):
        torch.testing.assert_close(g, e, atol=5e-2, rtol=5e-2)
