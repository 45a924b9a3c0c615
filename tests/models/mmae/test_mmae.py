"""MMAE: what its objective leaves out, what it says of images with and without spectra, that it learns, and its rules."""

from dataclasses import replace

import pytest
import torch
from pair_batches import INPUTS, PUBLISHED, batch_for, losses_on_one_batch
from tiny_mmae import TINY, build

from armillary.engine.config.config_json import from_json, to_json, type_problems
from armillary.models.method import Batch, BatchKey
from armillary.models.mmae.mmae import MMAE


def test_a_hidden_spectrum_is_a_spectrum_of_zero():
    method = build()
    batch = batch_for(method)
    batch["spectrum_hidden"][:] = True
    losses = method(batch, {})
    assert losses.terms["spectrum"] == 0
    losses.total.backward()
    assert not any(p.grad.any() for p in method.network.spectrum_decoder.parameters())
    other = Batch(**{**batch, "spectrum": 5 * torch.randn_like(batch["spectrum"])})
    assert torch.equal(method(other, {}).total, losses.total)
    moved = Batch(**{**batch, "token_mask": ~batch["token_mask"]})  # its tokens still show where they are
    assert not torch.equal(method(moved, {}).total, losses.total)


def test_samples_without_a_spectrum_are_hidden_and_not_scored():
    method = build(replace(TINY, spectrum_drop=0.0))
    batch = batch_for(method, prepared=False)
    batch["has_spectrum"] = torch.arange(6) != 2
    batch["spectrum"][2] = batch["spectrum_ivar"][2] = 0
    batch = method.prepare(batch, BatchKey(0, 0, 0, 6))
    assert batch["spectrum_hidden"].tolist() == [False, False, True, False, False, False]
    rest = {k: v[torch.arange(6) != 2] for k, v in batch.items()}
    torch.testing.assert_close(method(batch, {}).terms["spectrum"], method(rest, {}).terms["spectrum"])


def test_spectra_are_dropped_by_whole_global_batches():
    method = build(replace(TINY, spectrum_drop=0.5))
    for first in range(0, 400, 8):
        halves = [
            method.prepare(Batch(position=torch.arange(at, at + 4)), BatchKey(0, 0, first, 8))["spectrum_hidden"]
            for at in (first, first + 4)
        ]
        assert len(set(torch.cat(halves).tolist())) == 1


def test_what_is_not_hidden_and_unknown_redshifts_are_not_scored():
    method = build()
    batch = batch_for(method)
    batch["spectrum_hidden"][:] = False
    batch["targets"][1:4] = torch.nan
    seen = []
    handle = method.network.register_forward_hook(lambda _, args, out: seen.append(out))
    losses = method(batch, {})
    handle.remove()
    image, spectrum, redshift = torch.autograd.grad(losses.total, seen[0][1:])
    scored = batch["image_mask"].view(6, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(image.ne(0).all(1), scored) and torch.equal(image.ne(0).any(1), scored)
    assert torch.equal(spectrum[:, :12].ne(0), batch["token_mask"].repeat_interleave(3, 1))
    assert not spectrum[:, 12:].any()  # bins that fill no token
    assert redshift.ne(0).tolist() == [True, False, False, False, True, True]
    batch["targets"][:] = torch.nan
    losses = method(batch, {})
    assert losses.terms["redshift"] == 0 and losses.total.isfinite()


def test_with_nothing_hidden_only_the_redshift_is_learnt():
    method = build(replace(TINY, image_mask=0.0, spectrum_mask=0.0, spectrum_drop=0.0))
    losses = method(batch_for(method), {})
    assert losses.terms["image"] == losses.terms["spectrum"] == 0 < losses.total


def test_embeddings_of_images_alone_and_with_spectra():
    method = build(replace(TINY, dropout=0.1)).eval()
    batch = batch_for(method, prepared=False)
    found = method.encode(batch)
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        "image": (6, 16), "image_redshift": (6, 1), "both": (6, 16), "both_redshift": (6, 1)
    }  # fmt: skip
    assert list(method.readouts()) == ["image", "both", "image_redshift", "both_redshift"]
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in found.values())
    torch.testing.assert_close(method.encode(batch), found, rtol=0, atol=0)
    alone = method.encode(Batch(crop=batch["crop"]))
    assert list(alone) == ["image", "image_redshift"]
    torch.testing.assert_close(alone["image"], found["image"], rtol=0, atol=0)
    assert not torch.equal(found["image"], found["both"])
    patches, tokens = torch.zeros(6, 4, dtype=torch.bool), torch.ones(6, 4, dtype=torch.bool)
    expected = method.network(batch["crop"], torch.randn(6, 13), patches, tokens)  # all tokens 0: no spectrum
    torch.testing.assert_close(found["image_redshift"][:, 0], expected.redshift.detach(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="the batch has no `crop`"):
        method.encode(Batch(spectrum=batch["spectrum"]))
    assert set(method.encoders()) == {"image", "spectrum"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns(seed):
    """On one batch; over 10 seeds the last loss was .01 to .07 of the first."""
    method = build(replace(TINY, dim=16, depth=1, fusion_depth=1, spectrum_drop=0.0), seed=seed)
    losses = losses_on_one_batch(method, seed)
    assert losses[-1] < 0.2 * losses[0]


def test_bfloat16_weights_give_float32_losses():
    method = build()
    batch = batch_for(method)
    exact = method(batch, {}).total
    total = method.bfloat16()(batch, {}).total
    assert total.dtype == torch.float32 and total.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(v.dtype == torch.float32 for v in method.encode(batch).values())


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("crop", "crop: missing from the batch"),
        ("spectrum", "spectrum: missing from the batch"),
        ("targets", "targets: missing from the batch"),
        ("image_mask", "image_mask: missing from the batch; .* `prepare` masks"),
    ],
)
def test_incomplete_batches_are_refused(missing, text):
    method = build()
    batch = batch_for(method)
    del batch[missing]
    with pytest.raises(ValueError, match=text):
        method(batch, {})


def test_wrong_shapes_are_refused():
    method = build()
    batch = batch_for(method)
    with pytest.raises(ValueError, match=r"crop: must be \[B, 2, 8, 8\] as built for, got \(6, 2, 8, 7\)"):
        method.encode(Batch(crop=batch["crop"][..., :7]))
    with pytest.raises(ValueError, match=r"spectrum: must be \[B, 67\] as built for, got \(6, 66\)"):
        method.encode(Batch(crop=batch["crop"], spectrum=batch["spectrum"][:, :66]))


@pytest.mark.parametrize(
    ("config", "inputs", "text"),
    [
        ({"dim": 0}, {}, "dim: must be at least 1, got 0"),
        ({"heads": 3}, {}, "heads: must divide dim 8, got 3"),
        ({"image_mask": 1.5}, {}, "image_mask: must be in [0, 1], got 1.5"),
        ({"spectrum_drop": float("nan")}, {}, "spectrum_drop: must be in [0, 1], got nan"),
        ({"image_weight": -1.0}, {}, "image_weight: must be finite and at least 0, got -1.0"),
        ({"dropout": 1.0}, {}, "dropout: must be in [0, 1), got 1.0"),
        ({"redshift_scale": 0.0}, {}, "redshift_scale: must be positive, got 0.0"),
        ({"patch_size": 3}, {}, "views.image.global_size: must be a multiple of patch_size 3, got 8"),
        ({"bin_pixels": 30}, {}, "views.spectrum: must have 90 pixels for a token, got 67"),
        ({}, {"channels": 0}, "views.image: must give one crop an object, got 0"),
        ({}, {"n_global": 2}, "views.image: must give one crop an object, got 2"),
        ({}, {"pixels": 0}, "views.spectrum: must give spectra, got none"),
        ({}, {"targets": ()}, "views.targets: must be ('redshift',), which the method predicts, got ()"),
    ],
)
def test_broken_rules_are_named(config, inputs, text):
    config, inputs = replace(TINY, **config), replace(INPUTS, **inputs)
    assert config.problems(inputs) == [text]
    with pytest.raises(ValueError, match="MMAE: "):
        config.build(inputs)


def test_configuration_survives_its_record():
    assert from_json(to_json(TINY)) == TINY
    assert type_problems(TINY) == [] == TINY.problems(INPUTS) == MMAE().problems(PUBLISHED)
