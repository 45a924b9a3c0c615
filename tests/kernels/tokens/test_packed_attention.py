import pytest
import torch
import torch.nn.functional as F
from aot import ARCHITECTURES, SHARED_LIMIT, resources
from products import assert_as_good

from armillary.kernels.launch import INTERPRETER, Launch
from armillary.kernels.tokens import packed_attention as module
from armillary.kernels.tokens.attention import PackedSequences
from armillary.kernels.tokens.packed_attention import packed_attention, packed_attention_reference, self_attention
from armillary.kernels.tokens.packed_attention_kernels import LAUNCH


def by_sdpa(qkv, lengths, scale=None):
    """PyTorch's attention, one sequence at a time."""
    out = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part.unbind(1)), scale=scale)
        for part in qkv.split(lengths)
    ]
    return torch.cat([o[0].transpose(0, 1) for o in out])


def draw(lengths, heads, dim, device, dtype=torch.float32):
    return torch.randn(sum(lengths), 3, heads, dim).to(device, dtype)


def with_gradient(fn, qkv, weight):
    x = qkv.detach().requires_grad_()
    out = fn(x)
    return out.detach(), torch.autograd.grad(out, x, weight.to(out.dtype))[0]


def check(lengths, qkv, layout, scale=None):
    """The 2x rule for the result and for the gradient of qkv."""
    weight = torch.randn(qkv.shape[0], *qkv.shape[2:], device=qkv.device).to(qkv.dtype)
    got = with_gradient(lambda x: packed_attention(x, layout, scale=scale, impl="triton"), qkv, weight)
    eager = with_gradient(lambda x: by_sdpa(x, lengths, scale), qkv, weight)
    right = with_gradient(lambda x: by_sdpa(x, lengths, scale), qkv.double(), weight)
    for ours, plain, exact in zip(got, eager, right, strict=True):
        assert ours.dtype == qkv.dtype
        assert_as_good(ours, plain, exact)
    sums = got[1].__dict__["column_sums"][1]  # of the gradient's rows, in float32
    assert_as_good(sums.to(qkv.dtype), eager[1].sum(0), right[1].sum(0))


RAGGED = {  # lengths, heads, head dim, scale; blocks have 16 tokens
    "one token": ([1], 1, 16, None),
    "less than a block, a block, more": ([15, 16, 17], 2, 16, None),
    "crops of two sizes": ([26, 26, 5, 5, 5], 2, 32, None),
    "a head that is no power of two, a scale": ([1, 33], 2, 24, 0.5),
    "a small head, an empty sequence": ([3, 0, 20], 3, 8, None),
}


@pytest.mark.parametrize("lengths, heads, dim, scale", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("known", [True, False], ids=["host knows the lengths", "device knows them"])
def test_equals_attention_by_sequence(lengths, heads, dim, scale, known, device, poison_empty):
    if known:
        runs = [(1, n) if n else (0, 1) for n in lengths]
        layout, lengths = PackedSequences.from_runs(runs, device), [n for n in lengths if n]
    else:
        layout = PackedSequences.from_lengths(torch.tensor(lengths, device=device), max(lengths) + 3)
    check(lengths, draw(lengths, heads, dim, device), layout, scale)


@pytest.mark.parametrize(
    "lengths, dim", [([26, 26], 64), ([145], 64), ([197], 64), ([778], 16), ([70, 9], 128)], ids=str
)
def test_lengths_of_models(lengths, dim, device, monkeypatch, poison_empty):
    """With the blocks that a GPU has."""
    monkeypatch.setitem(LAUNCH, INTERPRETER, Launch({"BLOCK": 64}))
    check(lengths, draw(lengths, 1, dim, device), PackedSequences.from_runs([(1, n) for n in lengths], device))


@pytest.mark.parametrize("lengths", [[9], [20, 3]], ids=str)
def test_half_precision(lengths, device, poison_empty):
    """float16: the interpreter multiplies bit patterns for bfloat16, which the GPU test covers."""
    qkv = draw(lengths, 2, 16, device, torch.float16)
    check(lengths, qkv, PackedSequences.from_runs([(1, n) for n in lengths], device))


def test_large_scores_stay_finite(device):
    """Scores of 10,000, rows whose probabilities are all but one zero, and a first block far below the second."""
    qkv = draw([20], 1, 16, device) * 60
    qkv[:16, 1] -= 100 * qkv[0, 0].sign()
    check([20], qkv, PackedSequences.from_runs([(1, 20)], device))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_sequences_do_not_see_each_other(device):
    """A sequence of NaN spoils itself alone, also where a block of another reaches over its border."""
    layout = PackedSequences.from_runs([(1, 20), (1, 3), (1, 18)], device)
    qkv = draw([20, 3, 18], 2, 16, device)
    spoiled = qkv.clone()
    spoiled[20:23] = float("nan")
    weight = torch.ones(41, 2, 16, device=device)
    right, bad = (
        with_gradient(lambda t: packed_attention(t, layout, impl="triton"), x, weight) for x in (qkv, spoiled)
    )
    others = torch.arange(41, device=device).sub(20).abs().ge(3) | (torch.arange(41, device=device) < 20)
    for a, b in zip(right, bad, strict=True):
        assert torch.equal(a[others], b[others]) and b[~others].isnan().all()


def test_same_bits_again_and_in_any_launch(device):
    """No sum hangs on the order of programs; nor on how sequences are put into launches of one block size."""
    lengths = [20, 26, 17]
    qkv, weight = draw(lengths, 1, 16, device), torch.randn(63, 1, 16, device=device)
    known = PackedSequences.from_runs([(1, n) for n in lengths], device)
    ragged = PackedSequences.from_lengths(torch.tensor(lengths, device=device), 30)
    first, again, other = (
        with_gradient(lambda t, at=layout: packed_attention(t, at, impl="triton"), qkv, weight)
        for layout in (known, known, ragged)
    )
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_launches():
    """Neighbouring runs with blocks of one size are one launch; runs of many sizes in turn are one, with the longest's blocks."""
    assert module._pieces(((124, 145), (0, 9), (504, 26)), 64) == ((0, 124, 145), (124, 504, 26))
    assert module._pieces(((2, 65), (3, 300), (1, 64), (2, 30), (4, 26)), 64) == ((0, 6, 300), (6, 6, 30))
    assert module._pieces(tuple((1, n) for n in (70, 20) * 3), 64) == ((0, 6, 70),)
    assert module._pieces(((0, 5),), 64) == ()


def test_no_tokens(device):
    qkv = torch.empty(0, 3, 2, 16, device=device, requires_grad=True)
    out = packed_attention(qkv, PackedSequences.from_runs([(0, 5)], device), impl="triton")
    assert out.shape == (0, 2, 16) and torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_gradcheck_of_the_reference():
    qkv = torch.randn(7, 3, 1, 3, dtype=torch.float64, requires_grad=True)
    layout = PackedSequences.from_runs([(2, 2), (1, 3)])
    assert torch.autograd.gradcheck(lambda x: packed_attention(x, layout, scale=0.7), qkv)
    torch.testing.assert_close(packed_attention_reference(qkv, layout, scale=0.7), by_sdpa(qkv, [2, 2, 3], 0.7))


def test_auto_takes_it_for_short_sequences_in_half_precision_on_a_gpu(monkeypatch):
    """Elsewhere attention of q, k and v, with the backend that was asked for."""
    took = []
    monkeypatch.setattr(module, "packed_attention", lambda *a, **k: took.append("packed") or torch.empty(0))
    monkeypatch.setattr(module, "attention", lambda *a, backend: took.append(backend) or torch.empty(0))
    monkeypatch.setattr(module, "use_triton", lambda operation, impl, x: True)
    monkeypatch.setattr(module, "suits_runs", lambda qkv, layout: False)  # as tensors on a GPU
    for length, dtype, dim, backend, expected in (
        (145, torch.bfloat16, 64, "auto", "packed"),
        (192, torch.float16, 128, "auto", "packed"),
        (193, torch.bfloat16, 64, "auto", "auto"),
        (26, torch.float32, 64, "auto", "auto"),
        (26, torch.bfloat16, 129, "auto", "auto"),
        (26, torch.bfloat16, 64, "torch", "torch"),
        (778, torch.float32, 64, "triton", "packed"),
    ):
        qkv = torch.empty(length, 3, 1, dim, dtype=dtype)
        self_attention(qkv, PackedSequences.from_runs([(1, length)]), backend=backend)
        assert took.pop() == expected, (length, dtype, dim, backend)


def test_on_a_cpu_auto_is_as_before():
    qkv, layout = draw([4, 4, 3], 2, 8, "cpu", torch.float64), PackedSequences.from_runs([(2, 4), (1, 3)])
    torch.testing.assert_close(self_attention(qkv, layout), by_sdpa(qkv, [4, 4, 3]))


def test_bad_inputs():
    qkv, layout = torch.randn(6, 3, 2, 16), PackedSequences.from_runs([(2, 3)])
    for given, at, message in (
        (qkv.flatten(1), layout, r"qkv must have shape \[P, 3, H, D\], got \[6, 96\]"),
        (qkv.transpose(0, 1).contiguous().transpose(0, 1), layout, "qkv must be contiguous"),
        (qkv, PackedSequences.from_runs([(2, 4)]), "layout must describe the 6 tokens of qkv, got 8"),
        (torch.randn(6, 3, 1, 129), layout, "must have heads of 1 to 128 numbers, got 129"),
    ):
        with pytest.raises(ValueError, match=f"packed_attention: {message}|packed_attention: qkv {message}"):
            packed_attention(given, at, impl="triton")
    with pytest.raises(ValueError, match="backend: must be one of auto, triton"):
        self_attention(qkv, layout, backend="xformers")


COMPILED = {  # kernel, head dim, longest sequence
    "forward, long": ("packed_attention_fwd", 64, 145),
    "forward, short": ("packed_attention_fwd", 64, 26),
    "backward, short": ("whole_bwd", 64, 26),
    "backward, queries": ("queries_bwd", 64, 145),
    "backward, keys": ("keys_bwd", 64, 145),
    "backward, keys, wide heads": ("keys_bwd", 128, 778),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel, dim, longest", COMPILED.values(), ids=COMPILED)
def test_compiles_without_spilling(kernel, dim, longest):
    pointers = ("qkv_ptr", "out_ptr", "d_out_ptr", "d_qkv_ptr")
    for sm in ARCHITECTURES:
        row = LAUNCH[max(key for key in LAUNCH if key <= sm)]
        options = module._options(row, 16, dim, longest, "ieee")
        fn = getattr(module, f"{kernel}_kernel").fn
        names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
        kinds = {"cu_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "sums_ptr": "*fp32", "scale": "fp32"}
        kinds |= dict.fromkeys(pointers, "*bf16") | dict.fromkeys(("first", "blocks", "tokens"), "i32")
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        signature = {name: kind for name, kind in kinds.items() if name in names}
        where = f"armillary.kernels.tokens.packed_attention_kernels:{kernel}_kernel"
        used = resources(where, signature, options, architectures=(sm,), **launch)[sm]
        assert used.stack == used.local == used.spills == 0, (sm, used)
        assert used.shared <= SHARED_LIMIT[sm], (sm, used)
        assert any(name in used.ptx for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_training_shape(dim, dtype):
    runs = [(124, 145), (504, 26), (2, 778)]
    lengths = [length for n, length in runs for _ in range(n)]
    qkv = draw(lengths, 16, dim, "cuda", dtype)
    check(lengths, qkv, PackedSequences.from_runs(runs, "cuda"))
