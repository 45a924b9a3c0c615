"""MMAE as published: against its equations in float64, and its numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pair_batches import INPUTS, PUBLISHED, batch_for
from tiny_mmae import TINY, build

from armillary.engine.zero.optim import build_groups
from armillary.models.method import Batch, BatchKey
from armillary.models.mmae.mmae import MMAE
from armillary.models.mmae.state_names import from_released


def released_shapes(channels=2, patch=4, patches=4, bins=13, token=3, dim=8, depth=2, fusion=2):
    """Names and shapes of the released module's tensors."""

    def linear(name, out, inward):
        return {f"{name}.weight": (out, inward), f"{name}.bias": (out,)}

    def norm(name):
        return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}

    def attention(name):
        return {f"{name}.in_proj_weight": (3 * dim, dim), f"{name}.in_proj_bias": (3 * dim,)} | linear(
            f"{name}.out_proj", dim, dim
        )

    found = {"img_embed.pos_embed": (1, patches, dim), "img_embed.proj.weight": (dim, channels, patch, patch)}
    found |= {"img_embed.proj.bias": (dim,), "spec_embed.pos_embed": (1, bins // token, dim)}
    found |= linear("spec_embed.linear", dim, token) | norm("spec_embed.norm")
    for part in ("img", "spec"):
        for i in range(depth):
            at = f"{part}_encoder.encoder.layers.{i}"
            found |= attention(f"{at}.self_attn") | linear(f"{at}.linear1", 4 * dim, dim)
            found |= linear(f"{at}.linear2", dim, 4 * dim) | norm(f"{at}.norm1") | norm(f"{at}.norm2")
        found |= norm(f"{part}_encoder.norm") | attention(f"{part}_pool") | {f"cls_token_{part}": (1, 1, dim)}
        found |= linear(f"{part}_decoder.0", 2 * dim, 2 * dim) | linear(f"{part}_decoder.3", dim, 2 * dim)
    found |= linear("img_decoder.6", patches * channels * patch**2, dim) | linear("spec_decoder.6", bins, dim)
    for i in range(fusion):
        at = f"cross_attention_layers.{i}"
        found |= attention(f"{at}.cross_attn") | linear(f"{at}.ffn.0", 4 * dim, dim)
        found |= linear(f"{at}.ffn.3", dim, 4 * dim) | norm(f"{at}.norm1") | norm(f"{at}.norm2")
    return found | linear("redshift_head.0", dim, 2 * dim) | linear("redshift_head.2", 1, dim)


class Oracle:
    """The published equations, sample by sample and token by token where that is plainer; no dropout."""

    heads, patch, token = 2, 4, 3

    def __init__(self, weights):
        self.w = weights

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def gelu(self, x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    def attend(self, name, query, context):
        dim, size = query.shape[-1], query.shape[-1] // self.heads
        weight, bias = self.w[f"{name}.in_proj_weight"], self.w[f"{name}.in_proj_bias"]
        q = query @ weight[:dim].T + bias[:dim]
        k = context @ weight[dim : 2 * dim].T + bias[dim : 2 * dim]
        v = context @ weight[2 * dim :].T + bias[2 * dim :]
        parts = []
        for h in range(self.heads):
            own = slice(h * size, (h + 1) * size)
            e = (q[..., own] @ k[..., own].mT / size**0.5).exp()
            parts.append(e / e.sum(-1, keepdim=True) @ v[..., own])
        return self.linear(f"{name}.out_proj", torch.cat(parts, -1))

    def encode(self, part, tokens, hidden, depth=2):
        x = tokens * ~hidden[..., None]
        for i in range(depth):
            at = f"{part}_encoder.encoder.layers.{i}"
            x = self.norm(f"{at}.norm1", x + self.attend(f"{at}.self_attn", x, x))
            x = self.norm(f"{at}.norm2", x + self.linear(f"{at}.linear2", self.gelu(self.linear(f"{at}.linear1", x))))
        return self.norm(f"{part}_encoder.norm", x)

    def decode(self, part, x):
        for layer in (0, 3):
            x = self.gelu(self.linear(f"{part}_decoder.{layer}", x))
        return self.linear(f"{part}_decoder.6", x)

    def cut(self, image):
        """Patches in the order of the decoder's outputs: row, column, channel, y, x."""
        p, side = self.patch, image.shape[-1] // self.patch
        at = [(i * p, j * p) for i in range(side) for j in range(side)]
        return torch.stack([image[:, :, y : y + p, x : x + p].flatten(1) for y, x in at], 1)

    def forward(self, image, bins, image_hidden, spectrum_hidden):
        patches = self.cut(image)
        kernel = self.w["img_embed.proj.weight"].flatten(1)
        x = patches @ kernel.T + self.w["img_embed.proj.bias"] + self.w["img_embed.pos_embed"]
        runs = torch.stack([bins[:, i : i + self.token] for i in range(0, 12, self.token)], 1)
        y = self.norm("spec_embed.norm", self.linear("spec_embed.linear", runs) + self.w["spec_embed.pos_embed"])
        x, y = self.encode("img", x, image_hidden), self.encode("spec", y, spectrum_hidden)
        for i in range(2):
            at = f"cross_attention_layers.{i}"

            def block(one, other, at=at):
                one = self.norm(f"{at}.norm1", one + self.attend(f"{at}.cross_attn", one, other))
                return self.norm(
                    f"{at}.norm2", one + self.linear(f"{at}.ffn.3", self.gelu(self.linear(f"{at}.ffn.0", one)))
                )

            x, y = block(x, y), block(y, x)
        one, other = (
            self.attend(f"{part}_pool", self.w[f"cls_token_{part}"].expand(len(image), -1, -1), tokens)[:, 0]
            for part, tokens in (("img", x), ("spec", y))
        )
        fused = torch.cat([one, other], 1)
        redshift = self.linear("redshift_head.2", self.linear("redshift_head.0", fused).clamp(min=0))[:, 0]
        return (
            fused,
            patches,
            self.decode("img", fused).unflatten(1, patches.shape[1:]),
            self.decode("spec", fused),
            redshift,
        )

    def loss(self, image, bins, image_hidden, spectrum_hidden, dropped, z):
        bins = bins * ~dropped
        _, patches, decoded, spectrum, redshift = self.forward(image, bins, image_hidden, spectrum_hidden)
        of_image = (decoded - patches)[image_hidden].square().mean()
        errors = (spectrum - bins)[:, :12].unflatten(1, (-1, self.token))[spectrum_hidden].square().mean()
        dz = (redshift - z) / (1 + z)
        return 0.1 * of_image, 0.01 * errors * (not dropped), (1 - 1 / (1 + (dz / 0.15) ** 2)).mean()


def bins_by_hand(flux, ivar, width):
    """The released preparation of one spectrum, in float64."""
    flux, ivar = flux.double().numpy(), ivar.double().numpy()
    x = np.zeros_like(flux)
    valid = (ivar > 0) & (flux != 0)
    if valid.any():
        mean = np.average(flux[valid], weights=ivar[valid])
        scatter = np.sqrt(np.average((flux[valid] - mean) ** 2, weights=ivar[valid]))
        x[valid] = (flux[valid] - mean) / (scatter or 1.0)
        for end in (0, -1):
            if abs(x[end]) > 100:
                x[end] = np.median(x[valid])
    return torch.tensor([x[i : i + width].mean() for i in range(0, len(x) - width + 1, width)])


@pytest.mark.parametrize("dropped", [False, True], ids=["with spectra", "without"])
def test_forward_loss_and_gradients_equal_the_published_equations(dropped):
    method = build(replace(TINY, spectrum_drop=float(dropped))).double()
    draw = torch.Generator().manual_seed(1)
    weights = {
        name: (0.3 * torch.randn(shape, generator=draw, dtype=torch.float64)).requires_grad_()
        for name, shape in released_shapes().items()
    }
    method.network.load_state_dict(from_released({k: v.detach() for k, v in weights.items()}))
    batch = batch_for(method, dtype=torch.float64)
    oracle = Oracle(weights)
    bins = torch.stack([bins_by_hand(f, i, 5) for f, i in zip(batch["spectrum"], batch["spectrum_ivar"], strict=True)])
    image_hidden, token_hidden = batch["image_mask"], batch["token_mask"]
    shown = bins * (not dropped)
    fused, _, patches, spectrum, redshift = oracle.forward(batch["crop"], shown, image_hidden, token_hidden)
    got = method.network(batch["crop"], shown, image_hidden, token_hidden)
    for mine, theirs in (
        (got.fused, fused),
        (oracle.cut(got.image), patches),
        (got.spectrum, spectrum),
        (got.redshift, redshift),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)

    z = batch["targets"][:, 0] * 0.4 + 0.5
    parts = oracle.loss(batch["crop"], bins, image_hidden, token_hidden, torch.tensor(dropped), z)
    losses = method(batch, {})
    assert list(losses.terms) == ["image", "spectrum", "redshift"]
    torch.testing.assert_close(list(losses.terms.values()), [p.detach() for p in parts], rtol=1e-10, atol=0)
    torch.testing.assert_close(losses.total, sum(parts), rtol=1e-10, atol=0)
    theirs = torch.autograd.grad(sum(parts), list(weights.values()), allow_unused=True, materialize_grads=True)
    theirs = from_released(dict(zip(weights, theirs, strict=True)))
    losses.total.backward()
    assert set(theirs) == {name for name, _ in method.network.named_parameters()}
    for name, p in method.network.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], rtol=1e-8, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")


def test_spectra_are_normalised_and_binned_as_published():
    flux = torch.randn(8, 101) + 3
    ivar = torch.rand(8, 101) + 0.1
    ivar[1, 20:50] = 0
    flux[1, 20:50] = torch.nan  # anything may stand there
    flux[2, ::3] = 0  # no data, as published
    ivar[3] = 0
    flux[4] = 7.0
    flux[5, 0], flux[6, -1], flux[7, [0, -1]] = 1e6, -1e6, 1e6
    ivar[5:, [0, -1]] = 1e-9
    flux[7, 3] = ivar[7, 3] = 0  # an odd and an even number of pixels for the median
    clean = torch.where(ivar > 0, flux, 1.0)
    expected = torch.stack([bins_by_hand(f, i, 10) for f, i in zip(clean, ivar, strict=True)])
    method = build(replace(TINY, bin_pixels=10), replace(INPUTS, pixels=101))
    got = method.bins(Batch(spectrum=flux, spectrum_ivar=ivar), 8)[0]
    assert got.shape == (8, 10) and not got[3].any()
    assert expected[5:, 0].abs().max() < 2 and expected[6, 0] != 0
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)  # atol: 16 roundings of the largest, 2
    without = method.bins(Batch(spectrum=clean[5:]), 3)[0]
    torch.testing.assert_close(without, method.bins(Batch(spectrum=clean[5:], spectrum_ivar=torch.ones(3, 101)), 3)[0])


def test_the_published_model_has_the_published_numbers():
    method = build(MMAE(), PUBLISHED)
    network = method.network
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert sum(count.values()) == 16_364_036 == sum(p.numel() for p in method.parameters())
    assert count == {
        "image_encoder": 98_560 + 3_159_552,
        "spectrum_encoder": 11_008 + 3_159_552,
        "fusion": 3_159_040,
        "image_pool": 263_168 + 256,
        "spectrum_pool": 263_168 + 256,
        "image_decoder": 5_657_344,
        "spectrum_decoder": 460_547,
        "redshift_head": 131_585,
    }
    decayed, plain = method.parameter_groups()
    assert sum(p.numel() for p in plain.params.values()) == 25_088
    assert (plain.lr_scale, plain.weight_decay_scale) == (0.1, 0.0)
    assert (decayed.lr_scale, decayed.weight_decay_scale) == (1.0, 1.0)
    assert "network.redshift_head.0.bias" in decayed.params  # biases and norms decay too
    assert sum(len(g["params"]) for g in build_groups(method)) == len(list(method.parameters()))
    shapes = released_shapes(5, 8, 64, 259, 8, 256, 4, 4)
    state = from_released({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in network.state_dict().items()}
    batch = method.prepare(Batch(position=torch.arange(50)), BatchKey(0, 0, 0, 50))
    assert batch["image_mask"].shape == (50, 64) and (batch["image_mask"].sum(1) == 48).all()
    assert batch["token_mask"].shape == (50, 32) and (batch["token_mask"].sum(1) == 24).all()


def test_initialisation_is_the_released_codes():
    network = build(MMAE(), PUBLISHED).network
    image, spectrum = network.image_encoder, network.spectrum_encoder
    assert image.patches.projection.weight.std().item() == pytest.approx(0.01105, rel=0.02)
    assert image.patches.projection.bias.abs().max() > 0  # PyTorch's own
    for x in (image.patches.position, spectrum.patches.position, network.image_pool.query, network.spectrum_pool.query):
        assert x.std().item() == pytest.approx(0.02, rel=0.2)  # 4 standard errors of 256 draws
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear):
            last = name.startswith("redshift_head")
            bound = layer.in_features**-0.5 if last else (6 / (layer.in_features + layer.out_features)) ** 0.5
            assert 0.98 * bound < layer.weight.abs().max() <= bound, name
            assert layer.bias.any() == last, name
        elif isinstance(layer, torch.nn.LayerNorm):
            assert (layer.weight == 1).all() and not layer.bias.any() and layer.eps == 1e-5
    assert network.redshift_head[0].weight.std().item() == pytest.approx(0.0255, rel=0.02)
    for encoder in (image, spectrum):
        first, *others = (block.attention.in_proj_weight for block in encoder.blocks)
        assert all(torch.equal(first, other) for other in others)
        assert not torch.equal(encoder.blocks[0].mlp[0].weight, encoder.blocks[1].mlp[0].weight)
    own = [block.attention.in_proj_weight for block in (*network.fusion, image.blocks[0], spectrum.blocks[0])]
    assert len({x[0, 0].item() for x in own}) == len(own)


def test_dropout_is_where_it_is_published():
    network = build(replace(TINY, dropout=0.1)).network
    rates = {name: m.p for name, m in network.named_modules() if isinstance(m, torch.nn.Dropout)}
    for part in ("image_encoder.blocks", "spectrum_encoder.blocks", "fusion"):
        for i in range(2):
            inside = [rates.pop(f"{part}.{i}.{at}") for at in ("mlp.2", "mlp.4", "attention_dropout")]
            assert inside == [0.1, 0.1, 0.0 if part == "fusion" else 0.1]
    assert rates == {f"{part}_decoder.{i}": 0.1 for part in ("image", "spectrum") for i in (2, 5)}
    block, x = network.fusion[0], torch.randn(3, 5, 8)
    assert not torch.equal(block.attention(x, x), block.attention(x, x))  # of the weights
    block.eval()
    assert torch.equal(block.attention(x, x), block.attention(x, x))
