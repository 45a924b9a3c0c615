import pytest
import torch
from torch import nn

from armillary.models.astroclip.cross_attention import MLP, AlignmentHead, CrossAttention, FoldedAttention

SHAPES = pytest.mark.parametrize(
    "embedding, heads, dim",
    [(24, 4, 24), (24, 4, 10), (6, 1, 7), (8, 8, 8)],
    ids=["packed", "own widths", "one head", "heads of one"],
)


def twins(embedding, heads, dim, dtype=torch.float64):
    """The folded form and torch's, with the same parameters, all of them drawn."""
    folded = FoldedAttention(embedding, heads, dim).to(dtype)
    explicit = nn.MultiheadAttention(embedding, heads, kdim=dim, vdim=dim, batch_first=True).to(dtype)
    with torch.no_grad():
        for p in folded.parameters():
            p.normal_(std=0.4)
    explicit.load_state_dict(folded.state_dict(), strict=True)
    return folded, explicit


def values_and_gradients(module, query, tokens, upstream):
    query, tokens = query.clone().requires_grad_(), tokens.clone().requires_grad_()
    if isinstance(module, nn.MultiheadAttention):
        out, weights = module(query.expand(len(tokens), 1, -1), tokens, tokens, average_attn_weights=False)
        out, weights = out[:, 0], weights[:, :, 0]
    else:
        out, weights = module(query, tokens)
    names = [name for name, _ in module.named_parameters()]
    leaves = [query, tokens, *module.parameters()]
    found = torch.autograd.grad(out, leaves, upstream)
    return dict(zip(["out", "weights", "query", "tokens", *names], [out, weights, *found], strict=True))


@SHAPES
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_equals_multihead_attention_in_value_and_every_gradient(embedding, heads, dim, dtype, tolerance):
    folded, explicit = twins(embedding, heads, dim, dtype)
    query, tokens = torch.randn(embedding, dtype=dtype), torch.randn(3, 17, dim, dtype=dtype)
    upstream = torch.randn(3, embedding, dtype=dtype)
    got = values_and_gradients(folded, query, tokens, upstream)
    want = values_and_gradients(explicit, query, tokens, upstream)
    assert set(got) == set(want)
    for name, value in got.items():
        scale = want[name].abs().max()
        assert (value - want[name]).abs().max() <= tolerance * scale, name
    key_bias = got["in_proj_bias"].unflatten(0, (3, -1))[1]
    assert not key_bias.any()  # exactly: it cancels
    torch.testing.assert_close(got["weights"].sum(2), torch.ones(3, heads, dtype=dtype))


@SHAPES
def test_parameters_start_as_torch_draws_them(embedding, heads, dim):
    torch.manual_seed(3)
    ours = FoldedAttention(embedding, heads, dim).state_dict()
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(embedding, heads, kdim=dim, vdim=dim, batch_first=True).state_dict()
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_bf16_is_no_worse_than_multihead_attention_in_bf16():
    """Twice its error against float64 at most; weights stay float32."""
    folded, explicit = twins(64, 4, 48)
    query, tokens = torch.randn(64, dtype=torch.float64), torch.randn(8, 300, 48, dtype=torch.float64)
    exact, _ = folded(query, tokens)
    half = torch.bfloat16
    got, weights = folded.to(half)(query.to(half), tokens.to(half))
    with torch.no_grad():
        q = query.to(half).expand(8, 1, -1)
        theirs, _ = explicit.to(half)(q, tokens.to(half), tokens.to(half))
    assert weights.dtype == torch.float32 and got.dtype == half
    assert (got - exact).abs().max() <= 2 * (theirs[:, 0] - exact).abs().max()


def test_large_scores_do_not_overflow():
    folded, _ = twins(8, 2, 8, torch.float32)
    with torch.no_grad():
        folded.in_proj_weight.mul_(1e4)
    tokens = 1e4 * torch.randn(2, 5, 8)
    out, weights = folded(torch.randn(8), tokens)
    assert out.isfinite().all()
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 2))


def test_flops_counts_the_products():
    """Against PyTorch's own counter, without what the batch shares: the query's projection and its product with the keys."""
    from torch.utils.flop_counter import FlopCounterMode

    head, dim, tokens, batch = AlignmentHead(embedding=32, heads=4, dropout=0.0), 24, 50, 3
    pool, mlp = CrossAttention(head, dim), MLP(head, residual=True)
    with FlopCounterMode(display=False) as counter:
        mlp(pool(torch.randn(batch, tokens, dim))[0])
    shared = 2 * 32 * 32 + 2 * 32 * dim
    assert counter.get_total_flops() - shared == batch * head.flops(tokens, dim)


def test_released_shapes():
    """Sizes of the published heads, and what folding saves of their pooling."""
    head = AlignmentHead()
    with torch.device("meta"):
        image = nn.ModuleList([CrossAttention(head, 1024), MLP(head, False)])
        spectrum = nn.ModuleList([CrossAttention(head, 768), MLP(head, True)])
    assert sum(p.numel() for p in image.parameters()) == 12_595_200
    assert sum(p.numel() for p in spectrum.parameters()) == 12_070_912
    attention = sum(2 * 2 * head.heads * n * d for n, d in ((144, 1024), (778, 768)))
    assert attention / 1e9 == pytest.approx(0.012, abs=1e-4)


def test_pooling_takes_cached_half_precision_tokens_and_ignores_their_order():
    pool = CrossAttention(AlignmentHead(embedding=16, heads=2), 12).eval()
    tokens = torch.randn(4, 9, 12, dtype=torch.float16)
    out, weights = pool(tokens)
    assert out.dtype == torch.float32 and weights.shape == (4, 2, 9)
    order = torch.randperm(9)
    torch.testing.assert_close(pool(tokens[:, order])[0], out)
    torch.testing.assert_close(pool(tokens[:, order])[1], weights[:, :, order])


def test_dropout_acts_in_training_only_and_the_residual_is_a_choice():
    head = AlignmentHead(embedding=16, heads=2, dropout=0.5)
    pool, plain, residual = CrossAttention(head, 16), MLP(head, False), MLP(head, True)
    residual.load_state_dict(plain.state_dict())
    tokens = torch.randn(4, 9, 16)
    assert not torch.equal(pool(tokens)[0], pool(tokens)[0])
    x = pool.eval()(tokens)[0]
    assert torch.equal(pool(tokens)[0], x)
    assert not torch.equal(plain(x), plain(x))
    torch.testing.assert_close(residual.eval()(x), x + plain.eval()(x))


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"embedding": 0}, "embedding: must be at least 1, got 0"),
        ({"heads": 3}, "heads: must divide embedding 1024, got 3"),
        ({"dropout": 1.0}, r"dropout: must be in [0, 1), got 1.0"),
    ],
    ids=["no width", "heads", "dropout"],
)
def test_bad_shapes_are_named(fields, text):
    assert AlignmentHead(**fields).problems() == [text]
