"""The spectrum encoder against its formulas in float64, and against the facts of the released code."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from armillary.kernels.tokens.window_embed import window_features
from armillary.models.specformer.specformer import SpecFormer, SpectrumTransformer, fill_missing

TINY = SpecFormer(dim=24, depth=2, heads=2, mlp_ratio=2.0, window=6, step=3, positions=20)
PIXELS = 43  # 13 windows, one pixel left over
RELEASED_NAMES = {
    "data_embed.weight": (768, 22),
    "data_embed.bias": (768,),
    "position_embed.weight": (800, 768),
    "final_layernorm.weight": (768,),
    "final_layernorm.bias": (768,),
    "head.weight": (22, 768),
    "head.bias": (22,),
} | {
    f"blocks.{i}.{name}": shape
    for i in range(6)
    for name, shape in {
        "layernorm1.weight": (768,),
        "layernorm1.bias": (768,),
        "attention.attention.weight": (2304, 768),
        "attention.attention.bias": (2304,),
        "attention.projection.weight": (768, 768),
        "attention.projection.bias": (768,),
        "layernorm2.weight": (768,),
        "layernorm2.bias": (768,),
        "mlp.encoder.weight": (3072, 768),
        "mlp.encoder.bias": (3072,),
        "mlp.decoder.weight": (768, 3072),
        "mlp.decoder.bias": (768,),
    }.items()
}


def stirred(shape=TINY, **options):
    """An encoder whose biases and norms are not those of the start."""
    model = SpectrumTransformer(shape, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def spectra(count=3, pixels=PIXELS):
    level = torch.tensor([2.0, 40.0, -1.0, 0.0]).repeat(-(-count // 4))[:count, None]
    return level + torch.randn(count, pixels) * (0.3 + level.abs() / 4)


def plain(state, shape, spectrum, mask=None):
    """Tokens and predictions from the formulas, spectrum by spectrum, in the dtype of the parameters."""
    tokens = []
    for i, x in enumerate(spectrum.to(state["head.weight"].dtype)):
        mean, std = x.mean(), x.std().clamp(min=0.2)
        starts = range(0, len(x) - shape.window + 1, shape.step)
        rows = [torch.stack([(mean - 2) / 2, (std - 2) / 8, *x.new_zeros(shape.window)])]
        rows += [torch.cat([x.new_zeros(2), (x[s : s + shape.window] - mean) / std]) for s in starts]
        y = torch.stack(rows)
        if mask is not None:
            y = y * ~mask[i][:, None]
        y = F.linear(y, state["data_embed.weight"], state["data_embed.bias"])
        y = y + state["position_embed.weight"][: len(y)]
        for b in range(shape.depth):

            def layer(name, v, b=b):
                return F.linear(v, state[f"blocks.{b}.{name}.weight"], state[f"blocks.{b}.{name}.bias"])

            def norm(name, v, b=b):
                at = f"blocks.{b}.{name}"
                return F.layer_norm(v, v.shape[1:], state[f"{at}.weight"], state[f"{at}.bias"], 1e-5)

            q, k, v = layer("attention.attention", norm("layernorm1", y)).split(shape.dim, dim=1)
            heads = []
            for one in range(shape.heads):
                at = slice(one * shape.dim // shape.heads, (one + 1) * shape.dim // shape.heads)
                scores = q[:, at] @ k[:, at].T / math.sqrt(shape.dim // shape.heads)
                heads.append(scores.softmax(1) @ v[:, at])
            y = y + layer("attention.projection", torch.cat(heads, 1))
            y = y + layer("mlp.decoder", F.gelu(layer("mlp.encoder", norm("layernorm2", y))))
        tokens.append(
            F.layer_norm(y, (shape.dim,), state["final_layernorm.weight"], state["final_layernorm.bias"], 1e-5)
        )
    out = torch.stack(tokens)
    return out, F.linear(out, state["head.weight"], state["head.bias"])


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_released_names_shapes_and_parameter_count():
    with torch.device("meta"):
        model = SpectrumTransformer(SpecFormer())
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == RELEASED_NAMES
    assert sum(p.numel() for p in model.parameters()) == 43_177_750


@pytest.mark.parametrize(
    ("pixels", "tokens", "as_released"), [(7781, 778, 778), (7780, 778, 777), (7790, 779, 778), (7789, 778, 778)]
)
def test_tokens_of_a_spectrum(pixels, tokens, as_released):
    """The released code loses a full window where it ends with the spectrum."""
    assert SpecFormer().tokens(pixels) == tokens
    assert SpecFormer(drop_last_window=True).tokens(pixels) == as_released
    shape = SpecFormer(dim=8, depth=1, heads=1, drop_last_window=True)
    assert SpectrumTransformer(shape)(torch.randn(1, pixels)).shape == (1, as_released, 8)


def test_initialisation_as_released():
    shape = SpecFormer(dim=192, depth=3, heads=3)
    model = SpectrumTransformer(shape)
    cut = 0.98658  # deviation of a normal cut at three deviations
    state = model.state_dict()
    expected = {"data_embed.weight": 192**-0.5, "position_embed.weight": 192**-0.5, "head.weight": 192**-0.5}
    for name, fan_in in {
        "attention.attention": 192,
        "attention.projection": 192,
        "mlp.encoder": 192,
        "mlp.decoder": 768,
    }.items():
        expected[f"blocks.2.{name}.weight"] = (2 * 3 * fan_in) ** -0.5
        assert not state[f"blocks.2.{name}.bias"].any()
    for name, std in expected.items():
        x = state[name]
        assert x.std().item() == pytest.approx(cut * std, rel=5 / (2 * x.numel()) ** 0.5), name
        assert x.abs().max() <= 3.0001 * std, name
        assert x.mean().abs() < 5 * std / x.numel() ** 0.5, name
    assert not state["head.bias"].any()
    assert 0 < state["data_embed.bias"].abs().max() <= 22**-0.5  # PyTorch's default
    assert torch.equal(state["blocks.0.layernorm1.weight"], torch.ones(192))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_packed_encoder_equals_the_formulas(masked, backend):
    model, x = stirred(backend=backend).double(), spectra().double()
    mask = torch.rand(3, 14) < 0.4 if masked else None
    tokens = model(x, mask=mask)
    predicted = model.head(tokens)
    g = torch.randn_like(tokens), torch.randn_like(predicted)
    parameters = dict(model.named_parameters())
    expected = plain(parameters, TINY, x, mask)
    for ours, theirs in zip((tokens, predicted), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    got = gradients(model, (tokens * g[0]).sum() + (predicted * g[1]).sum())
    want = gradients(model, (expected[0] * g[0]).sum() + (expected[1] * g[1]).sum())
    for name, ours, theirs in zip(parameters, got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=name)


def error_and_allowance(ours, exact, eager):
    return (ours.double() - exact).norm(), 2 * (eager.double() - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        pytest.param("reference", torch.float32, id="reference float32"),
        pytest.param("reference", torch.bfloat16, id="reference bfloat16"),
        pytest.param("triton", torch.float32, id="triton float32"),
        # the interpreter has no products of bfloat16
        pytest.param("triton", torch.bfloat16, id="triton bfloat16", marks=pytest.mark.gpu),
    ],
)
def test_error_is_at_most_twice_that_of_eager(impl, dtype, device):
    model = stirred(impl=impl).to(device, dtype)
    x, mask = spectra(2).to(device), (torch.rand(2, 14) < 0.4).to(device)
    tokens = model(x, mask=mask)
    assert tokens.dtype == dtype
    g = torch.randn(tokens.shape, device=device)
    got = gradients(model, (tokens.float() * g).sum() + model.head(tokens).float().square().sum())

    def formulas(at):
        state = {name: p.detach().to(at).requires_grad_() for name, p in model.named_parameters()}
        out, predicted = plain(state, TINY, x if at == torch.float64 else x.float(), mask)
        loss = (out.to(g.dtype) * g).sum() + predicted.to(torch.promote_types(at, torch.float32)).square().sum()
        return out, torch.autograd.grad(loss, list(state.values()))

    exact, exact_gradients = formulas(torch.float64)
    eager, eager_gradients = formulas(dtype)
    error, allowed = error_and_allowance(tokens, exact, eager)
    assert error <= allowed
    for name, *three in zip(dict(model.named_parameters()), got, exact_gradients, eager_gradients, strict=True):
        error, allowed = error_and_allowance(*three)
        assert error <= allowed, name


def test_pixels_without_data_become_the_mean_of_the_others():
    x = spectra(4)
    ivar = (torch.rand(4, PIXELS) > 0.3).float() * 7
    ivar[2] = 1.0
    dirty = x.masked_fill(ivar == 0, torch.nan)
    filled = fill_missing(dirty, ivar)
    for i in range(4):
        seen = ivar[i] > 0
        assert torch.equal(filled[i][seen], x[i][seen])
        gaps = filled[i][~seen]
        torch.testing.assert_close(gaps, x[i][seen].double().mean().float().expand_as(gaps))
    model = stirred()
    torch.testing.assert_close(model(dirty, ivar), model(filled))
    assert torch.equal(model(x, torch.full_like(x, 3.0)), model(x))  # bit for bit where every pixel carries data
    assert torch.equal(model(dirty, ivar), model(dirty, ivar * 100))  # ivar says where data are, no more


def test_published_weights_see_zeros_where_a_pixel_carries_no_data():
    x, ivar = spectra(4), (torch.rand(4, PIXELS) > 0.3).float()
    dirty = x.masked_fill(ivar == 0, torch.nan)
    model = stirred()
    model.shape = replace(model.shape, missing="zero")
    assert torch.equal(model(dirty, ivar), model(torch.where(ivar > 0, x, 0.0)))
    assert replace(model.shape, missing="gap").problems() == ["missing: must be one of mean, zero, got 'gap'"]


@pytest.mark.parametrize("left", [0, 1, 2], ids=["no pixel", "one pixel", "two pixels"])
def test_spectra_with_hardly_any_data_stay_finite(left):
    x, ivar = spectra(2) * 1e3, torch.zeros(2, PIXELS)
    ivar[:, 20 : 20 + left] = 1
    ivar[1] = 1
    model = stirred()
    tokens = model(x.masked_fill(ivar == 0, torch.nan), ivar)
    assert tokens.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(model, tokens.square().sum() + model.head(tokens).sum()))
    features = window_features(fill_missing(x, ivar), window=6, step=3)
    assert features.isfinite().all()
    if left < 2:
        assert features[0, 1:].abs().max() < 1e-2  # flat: its only pixel is its mean


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": 0, "positions": 0}, ["dim: must be at least 1, got 0", "positions: must be at least 1, got 0"]),
        ({"heads": 5}, ["heads: must divide dim 24, got 5"]),
        ({"window": 1}, ["window: must be in 2 .. 254 pixels, got 1"]),
        ({"window": 255}, ["window: must be in 2 .. 254 pixels, got 255"]),
        ({"mlp_ratio": 0.01}, ["mlp_ratio: must give a hidden width of at least 1, got 0.01"]),
    ],
    ids=["zeros", "heads", "window of one", "long window", "no hidden width"],
)
def test_shapes_that_cannot_be_built(change, said):
    shape = SpecFormer(**{"dim": 24, "depth": 1, "heads": 2} | change)
    assert shape.problems() == said
    with pytest.raises(ValueError, match=said[0]):
        SpectrumTransformer(shape)


@pytest.mark.parametrize(
    ("shape", "pixels", "said"),
    [
        (SpecFormer(), 8010, r"positions: must be at least the 801 tokens of a spectrum of 8010 pixels, got 800"),
        (SpecFormer(), 19, "window: must leave at least one window of a spectrum of 19 pixels, got 20"),
        (SpecFormer(drop_last_window=True), 20, "window: must leave at least one window of a spectrum of 20 pixels"),
    ],
    ids=["too few positions", "shorter than a window", "its only window dropped"],
)
def test_shapes_that_do_not_fit_a_spectrum(shape, pixels, said):
    (found,) = shape.problems(pixels)
    assert found.startswith(said)
    assert shape.problems(pixels - 1 if pixels > 1000 else 21) == []


def test_bad_inputs():
    model = SpectrumTransformer(TINY)
    with pytest.raises(ValueError, match=r"ivar: must have the spectrum's shape \(3, 43\), got \(3, 42\)"):
        model(spectra(), torch.ones(3, 42))
    with pytest.raises(ValueError, match=r"position must have a row for each of 21 tokens"):
        model(torch.randn(1, 63))
    with pytest.raises(ValueError, match=r"mask must have shape \[3, 14\]"):
        model(spectra(), mask=torch.zeros(3, 13, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"SpecFormer: backend: must be one of .* got 'fast'; impl: must be .* got 'c'"
    ):
        SpectrumTransformer(TINY, "fast", "c")


def test_flops_are_those_that_run():
    from torch.utils.flop_counter import FlopCounterMode

    shape = SpecFormer(dim=24, depth=2, heads=2, window=6, step=3)
    model = SpectrumTransformer(shape)
    with FlopCounterMode(display=False) as counter:
        model(spectra())
    assert counter.get_total_flops() == 3 * shape.flops(PIXELS)
