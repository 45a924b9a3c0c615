"""Masked modelling of spectra: the loss from its definition, what it leaves out, and what the model fills in."""

import pytest
import torch
from torch import nn

from armillary.kernels.tokens.window_embed import window_features
from armillary.models.method import Batch, BatchKey, InputSpec
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.specformer.specformer_pretraining import SpecFormerPretraining
from armillary.models.specformer.spectrum_filling import fill_hidden

PIXELS = 123  # 40 windows, no pixel left over
INPUTS = InputSpec(n_global=1, pixels=PIXELS)
SHAPE = SpecFormer(dim=24, depth=2, heads=2, mlp_ratio=2.0, window=6, step=3, positions=50)
TINY = SpecFormerPretraining(SHAPE, chunks=3, chunk_tokens=5)


def batch_for(method, size=4, seed=0, missing=0.0, **tensors):
    """Spectra with a slope and a bump at a place of its own."""
    draw = torch.Generator().manual_seed(seed)
    at = torch.linspace(0, 1, method.inputs.pixels)
    centre, slope = torch.rand(size, 1, generator=draw), torch.randn(size, 1, generator=draw)
    flux = 5 + 3 * slope * at + 4 * torch.exp(-(((at - centre) / 0.15) ** 2))
    ivar = (torch.rand(flux.shape, generator=draw) >= missing).float()
    batch = Batch(position=torch.arange(size) + 1000 * seed, spectrum=flux * (ivar > 0), spectrum_ivar=ivar)
    batch.update(tensors)
    return method.prepare(batch, BatchKey(0, 0, 0, size))


def by_hand(method, batch):
    """Sum of squares and number of counted features, one by one."""
    shape = method.config.encoder
    flux, ivar, mask = batch["spectrum"], batch["spectrum_ivar"], batch["token_mask"]
    tokens = method.encoder(flux, ivar, mask)
    predicted = method.encoder.head(tokens)
    total, count = 0.0, 0
    for b in range(len(flux)):
        seen = ivar[b] > 0
        whole = torch.where(seen, flux[b], flux[b][seen].mean())
        target = window_features(whole[None], window=shape.window, step=shape.step)[0]
        for t in range(len(target)):
            for f in range(shape.features):
                if t == 0:
                    data = f < 2
                else:
                    data = f >= 2 and bool(seen[(t - 1) * shape.step + f - 2])
                if mask[b, t] and data and target[t, f] != 0:
                    total = total + (predicted[b, t, f] - target[t, f]) ** 2
                    count += 1
    return total, count


@pytest.mark.parametrize("missing", [0.0, 0.3], ids=["all pixels", "gaps"])
def test_loss_and_gradients_equal_the_definition(missing):
    method = TINY.build(INPUTS)
    batch = batch_for(method, missing=missing)
    batch["token_mask"][1, 0] = True  # mean and deviation of one spectrum
    losses = method(batch, {})
    total, count = by_hand(method, batch)
    torch.testing.assert_close(losses.total, total / count)
    torch.testing.assert_close(losses.terms["masked"], losses.total.detach())
    assert not losses.terms["masked"].requires_grad
    parameters = list(method.parameters())
    got, want = (torch.autograd.grad(x, parameters) for x in (losses.total, total / count))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if not missing:
        features = 3 * 5 * 6 * 4
        assert count == features + 2 - 6 * sum(bool(m[0]) and i != 1 for i, m in enumerate(batch["token_mask"]))


def test_what_carries_no_data_is_not_learnt():
    method = TINY.build(INPUTS)
    batch = batch_for(method)
    hidden = batch["token_mask"][0].nonzero().flatten()
    gap = slice(3 * (int(hidden[2]) - 1), 3 * (int(hidden[2]) - 1) + 6)  # the pixels of a hidden window
    batch["spectrum_ivar"][0, gap] = 0
    batch["spectrum"][0, gap] = 0
    before = method(batch, {}).total
    predicted = []
    handle = method.encoder.head.register_forward_hook(lambda _, args, out: predicted.append(out) or out)
    batch["spectrum"][0, gap] = torch.nan  # anything may stand there
    after = method(batch, {}).total
    handle.remove()
    assert torch.equal(before, after)
    (slope,) = torch.autograd.grad(after, predicted[0])
    assert not slope[0, hidden[2]].any() and slope[0, hidden[1], 2:5].all() and not slope[0, hidden[1], 5:].any()
    assert not slope[~batch["token_mask"]].any()


def test_a_batch_without_anything_to_predict_gives_zero():
    method = TINY.build(INPUTS)
    batch = batch_for(method)
    for change in ({"token_mask": torch.zeros(4, 41, dtype=torch.bool)}, {"spectrum_ivar": torch.zeros(4, PIXELS)}):
        total = method(Batch(**{**batch, **change}), {}).total
        assert total.item() == 0
        assert not any(g.any() for g in torch.autograd.grad(total, list(method.parameters())))
    flat = Batch(**{**batch, "spectrum": torch.full((4, PIXELS), 7.0), "token_mask": batch["token_mask"].clone()})
    flat["token_mask"][:, 0] = False
    assert method(flat, {}).total.item() == 0  # the released rule: what hiding did not change is not counted


def test_prepare_adds_masks_of_the_positions():
    method = SpecFormerPretraining().build(InputSpec(n_global=1, pixels=7781))
    key = BatchKey(5, 2, 0, 8)
    whole = method.prepare(Batch(position=torch.arange(8)), key)["token_mask"]
    assert whole.shape == (8, 778) and (whole.sum(1) == 300).all()
    half = method.prepare(Batch(position=torch.arange(4, 8)), key)["token_mask"]
    assert torch.equal(half, whole[4:])
    given = Batch(position=torch.arange(4))
    method.prepare(given, key)
    assert set(given) == {"position"}


def test_kernels_and_formulas_agree(device):
    results = []
    for impl in ("reference", "triton"):
        torch.manual_seed(0)
        method = SpecFormerPretraining(SHAPE, chunks=3, chunk_tokens=5, impl=impl).build(INPUTS).to(device)
        batch = {k: x.to(device) for k, x in batch_for(method, size=2, missing=0.1).items()}
        total = method(batch, {}).total
        results.append([total, *torch.autograd.grad(total, list(method.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_bfloat16_loss_is_float32():
    method = TINY.build(INPUTS)
    batch = batch_for(method, missing=0.1)
    exact = method(batch, {}).total
    total = method.bfloat16()(batch, {}).total
    assert total.dtype == torch.float32 and total.item() == pytest.approx(exact.item(), rel=0.03)
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, list(method.parameters())))
    assert method.encode(batch)["mean"].dtype == torch.float32


def test_embeddings_are_the_mean_of_all_tokens_and_repeat():
    method = TINY.build(INPUTS)
    batch = batch_for(method, missing=0.2)
    tokens = method.encoder(batch["spectrum"], batch["spectrum_ivar"])
    assert tokens.shape == (4, 41, 24) and tokens.requires_grad
    found = method.encode(batch)
    assert list(found) == ["mean"] and not found["mean"].requires_grad
    torch.testing.assert_close(found["mean"], tokens.mean(1).detach())
    assert torch.equal(method.encode(batch)["mean"], found["mean"])
    without_gaps = batch_for(method)
    assert torch.equal(
        method.encode({"spectrum": without_gaps["spectrum"]})["mean"], method.encode(without_gaps)["mean"]
    )
    with pytest.raises(ValueError, match="embeds spectra, but the batch has no `spectrum`"):
        method.encode(Batch(crop=torch.zeros(1, 3, 8, 8)))


class _Oracle(nn.Module):
    """Knows the windows of whole spectra, in place of encoder and head."""

    def __init__(self, flux):
        super().__init__()
        self.shape = SHAPE
        self.features = window_features(flux, window=6, step=3)
        self.head = nn.Identity()

    def forward(self, spectrum, ivar=None, mask=None):
        return self.features


def test_reconstruction_puts_windows_back_in_the_unit_of_the_input():
    method = TINY.build(INPUTS)
    batch = batch_for(method)
    mask = batch["token_mask"]
    mask[2] = False
    filled = fill_hidden(_Oracle(batch["spectrum"]), batch["spectrum"], batch["spectrum_ivar"], mask)
    for b in range(4):
        hides = [set(range(3 * (t - 1), 3 * (t - 1) + 6)) for t in range(1, 41) if mask[b, t]]
        shows = [set(range(3 * (t - 1), 3 * (t - 1) + 6)) for t in range(1, 41) if not mask[b, t]]
        covered = torch.tensor([any(p in w for w in hides) for p in range(PIXELS)])
        unseen = covered & ~torch.tensor([any(p in w for w in shows) for p in range(PIXELS)])
        assert torch.equal(filled.hidden[b], unseen) and torch.equal(filled.flux[b].isfinite(), covered)
        torch.testing.assert_close(filled.flux[b][covered], batch["spectrum"][b][covered], rtol=1e-5, atol=1e-5)
    assert not filled.hidden[2].any() and filled.hidden[0].any()


def test_hidden_pixels_do_not_reach_their_reconstruction():
    """Only through mean and deviation, which the token in front carries: it is hidden here, and they are kept."""
    method = TINY.build(INPUTS)
    batch = batch_for(method)
    mask = batch["token_mask"]
    mask[:, 0] = True
    first = fill_hidden(method.encoder, batch["spectrum"], batch["spectrum_ivar"], mask)
    changed = batch["spectrum"].clone()
    for b in range(4):  # the same values in another order
        place = first.hidden[b].nonzero().flatten()
        changed[b, place] = changed[b, place.flip(0)]
    second = fill_hidden(method.encoder, changed, batch["spectrum_ivar"], mask)
    assert not torch.equal(changed, batch["spectrum"])
    torch.testing.assert_close(first.flux, second.flux, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_training_learns_to_fill_gaps():
    method = SpecFormerPretraining(SpecFormer(48, 2, 2, 2.0, 6, 3, 50), chunks=3, chunk_tokens=5).build(INPUTS)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    losses = []
    for step in range(200):
        optimizer.zero_grad()
        total = method(batch_for(method, size=16, seed=step, missing=0.05), {}).total
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[0] > 0.9  # the mean of a spectrum, without knowing more, scores 1
    assert sum(losses[-20:]) / 20 < 0.5  # 0.30 +- 0.03 over 5 seeds


def test_groups_flops_and_encoders():
    from torch.utils.flop_counter import FlopCounterMode

    method = TINY.build(INPUTS)
    (group,) = method.parameter_groups()
    assert list(group.params) == [name for name, _ in method.named_parameters()]
    assert (group.lr_scale, group.weight_decay_scale, group.clip_group, group.freeze) == (1.0, 1.0, "all", False)
    with FlopCounterMode(display=False) as counter:
        method(batch_for(method), {}).total.backward()
    embedding = 2 * 41 * SHAPE.features * SHAPE.dim  # spectra need no gradient, so that product is not formed
    assert counter.get_total_flops() == 4 * (method.flops_per_sample() - embedding)
    (prefix,) = method.encoders().values()
    assert all(name.startswith(prefix) for name in group.params)


@pytest.mark.parametrize(
    ("change", "inputs", "said"),
    [
        ({}, InputSpec(3, 32), "views.spectrum: must be on, because the method learns from spectra, got 0 pixels"),
        ({"chunk_tokens": 13}, INPUTS, "chunk_tokens: must be in 1 .. 12, to fit into each of 3 parts of 13 tokens, got 13"),
        ({"chunks": 0}, INPUTS, "chunks: must be at least 1, got 0"),
        ({"attention": "fast"}, INPUTS, "attention: must be one of auto, triton, flash_attn, torch, dense, got 'fast'"),
        ({"impl": "c"}, INPUTS, "impl: must be one of auto, reference, triton, got 'c'"),
        ({"encoder": SpecFormer(window=200)}, INPUTS,
         "encoder.window: must leave at least one window of a spectrum of 123 pixels, got 200"),
    ],
    ids=["no spectra", "long chunks", "no chunks", "attention", "impl", "long windows"],
)  # fmt: skip
def test_configurations_that_cannot_run(change, inputs, said):
    config = SpecFormerPretraining(**{"encoder": SHAPE, "chunks": 3, "chunk_tokens": 5} | change)
    assert config.problems(inputs) == [said]
    with pytest.raises(ValueError, match="SpecFormerPretraining: "):
        config.build(inputs)


def test_batches_that_do_not_fit():
    method = TINY.build(INPUTS)
    batch = batch_for(method)
    with pytest.raises(ValueError, match=r"spectrum: must be \[B, 123\] as built for, got \(4, 120\)"):
        method(Batch(**{**batch, "spectrum": batch["spectrum"][:, :120]}), {})
    del batch["token_mask"]
    with pytest.raises(ValueError, match="token_mask: missing from the batch; `prepare` adds it"):
        method(batch, {})
