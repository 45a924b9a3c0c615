from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from two_ranks import run_on_two_ranks

from armillary.models.astroclip.astroclip import AstroCLIP
from armillary.models.astroclip.info_nce import info_nce
from armillary.models.method import Batch, InputSpec
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.vit.vit import ViT

SOMEWHERE = Path("runs/somewhere")  # read by the engine, not by the method
INPUTS = InputSpec(channels=3, global_size=16, n_global=1, pixels=63)
TINY = AstroCLIP(
    image=ViT(channels=3, image_size=16, patch_size=4, dim=24, depth=2, heads=2, layer_scale=0.5, drop_path=0.0),
    spectrum=SpecFormer(dim=20, depth=2, heads=2, window=9, step=6, positions=12),
    image_from=SOMEWHERE,
    spectrum_from=SOMEWHERE,
    embedding=16,
    heads=2,
)
TUNED = replace(TINY, freeze=False)
T, N = 16, 11  # tokens of an image and of a spectrum


def pairs(size=6):
    spectrum = torch.randn(size, 63) + 2
    return Batch(crop=torch.randn(size, 3, 16, 16), spectrum=spectrum, spectrum_ivar=torch.ones(size, 63))


def only(batch, *names):
    return Batch(**{k: batch[k] for k in names})


@pytest.mark.parametrize("kind", ["patches", "positioned", "all"])
def test_step_is_infonce_of_the_heads_on_the_encoders_tokens(kind):
    method = replace(TINY, image_tokens=kind, dropout=0.0).build(INPUTS)
    batch = pairs()
    vit, specformer = method.image_encoder.backbone, method.spectrum_encoder.backbone
    seen = vit([batch["crop"]])
    tokens = {
        "patches": vit([batch["crop"]], patches_only=True).patches[0],
        "positioned": seen.patches[0],
        "all": torch.cat([seen.cls[0][:, None], seen.patches[0]], 1),
    }[kind]
    image = method.image_encoder.mlp(method.image_encoder.cross_attention(tokens)[0])
    pooled = method.spectrum_encoder.cross_attention(specformer(batch["spectrum"], batch["spectrum_ivar"]))[0]
    expected = info_nce(image, method.spectrum_encoder.mlp(pooled), 15.5, gather=False)
    losses = method(batch, {})
    torch.testing.assert_close(losses.total, expected.a_to_b + expected.b_to_a)
    torch.testing.assert_close(losses.terms["image_to_spectrum"], expected.a_to_b.detach())
    torch.testing.assert_close(losses.total.detach(), sum(losses.terms.values()))


def test_heads_differ_by_the_released_residual():
    method = TINY.build(INPUTS).eval()
    image, spectrum = method.image_encoder, method.spectrum_encoder
    tokens, pool = torch.randn(3, T, 24), image.cross_attention
    decode = image.mlp.decoder(torch.nn.functional.gelu(image.mlp.encoder(pool(tokens)[0])))
    torch.testing.assert_close(image(tokens), decode)
    tokens, pool = torch.randn(3, N, 20), spectrum.cross_attention
    x = pool(tokens)[0]
    decode = spectrum.mlp.decoder(torch.nn.functional.gelu(spectrum.mlp.encoder(x)))
    torch.testing.assert_close(spectrum(tokens), x + decode)


@pytest.mark.parametrize(
    "kind, order_matters", [("patches", False), ("positioned", True)], ids=["patches", "positioned"]
)
def test_released_image_embedding_does_not_know_where_patches_are(kind, order_matters):
    method = replace(TINY, image_tokens=kind).build(INPUTS).eval()
    with torch.no_grad():
        method.image_encoder.backbone.pos_embed.normal_()
    crop = torch.randn(2, 3, 16, 16)
    turned = crop.roll((4, 8), (2, 3))  # by whole patches
    a, b = (method.encode(Batch(crop=c))["image"] for c in (crop, turned))
    assert torch.allclose(a, b, atol=1e-5) != order_matters


def test_frozen_encoders_stay_as_they_are_through_training():
    config = replace(TINY, image=replace(TINY.image, drop_path=0.9))
    method = config.build(INPUTS).train()
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert trained and all(n.split(".")[1] in ("cross_attention", "mlp") for n in trained)
    assert method.image_encoder.cross_attention.training
    assert not method.image_encoder.backbone.training and not method.spectrum_encoder.backbone.training
    batch = pairs()
    first, second = method.tokens(batch), method.tokens(batch)
    assert all(torch.equal(first[k], second[k]) and not first[k].requires_grad for k in first)
    before = {n: p.clone() for n, p in method.named_parameters()}
    (group,) = method.parameter_groups()
    assert set(group.params) == trained and group.weight_decay_scale == 1
    optimizer = torch.optim.AdamW(group.params.values(), lr=1e-2)
    method(batch, {}).total.backward()
    optimizer.step()
    assert {n for n, p in method.named_parameters() if not torch.equal(p, before[n])} == trained
    assert method.eval().training is False and method.train().spectrum_encoder.mlp.training


@pytest.mark.parametrize("kind", ["patches", "positioned", "all"])
def test_every_trained_parameter_gets_a_gradient(kind):
    method = replace(TUNED, image_tokens=kind, dropout=0.0).build(INPUTS)
    with torch.no_grad():  # a zero query bias would hide nothing, but zero gains would
        for p in method.parameters():
            p.add_(0.1 * torch.randn_like(p))
    method(pairs(), {}).total.backward()
    missing = {n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not missing
    unused = {n for n, p in method.named_parameters() if not p.requires_grad}
    backbone = "image_encoder.backbone."
    expected = {f"{backbone}mask_token", "spectrum_encoder.backbone.head.weight", "spectrum_encoder.backbone.head.bias"}
    assert unused == expected | ({f"{backbone}cls_token", f"{backbone}pos_embed"} if kind == "patches" else set())


def test_cached_tokens_stand_for_the_data():
    method = replace(TINY, dropout=0.0).build(INPUTS)
    batch = pairs()
    cached = Batch(**method.tokens(batch))
    assert cached["image_tokens"].shape == (6, T, 24) and cached["spectrum_tokens"].shape == (6, N, 20)
    before = method.flops_per_sample()
    assert torch.equal(method(cached, {}).total, method(batch, {}).total)
    method(cached, {})
    head = TINY.head
    assert method.flops_per_sample() == 3 * (head.flops(T, 24) + head.flops(N, 20))
    encoders = TINY.image.flops(16, patches_only=True) + TINY.spectrum.flops(63)
    assert before == method.flops_per_sample() + encoders
    assert TUNED.build(INPUTS).flops_per_sample() == method.flops_per_sample() + 3 * encoders
    whole, part = method.encode(batch), method.encode(cached)
    assert set(part) == {"image", "spectrum", "spectrum_backbone"}
    assert all(torch.equal(part[k], whole[k]) for k in part)


def test_encode_gives_what_the_batch_holds():
    method = TINY.build(INPUTS).eval()
    batch = pairs()
    both = method.encode(batch)
    assert list(both) == ["image", "spectrum", "image_backbone", "spectrum_backbone"]
    shapes = {k: tuple(v.shape) for k, v in both.items()}
    assert shapes == {"image": (6, 16), "spectrum": (6, 16), "image_backbone": (6, 24), "spectrum_backbone": (6, 20)}
    image = method.encode(only(batch, "crop"))
    spectrum = method.encode(only(batch, "spectrum", "spectrum_ivar"))
    assert list(image) == ["image", "image_backbone"] and list(spectrum) == ["spectrum", "spectrum_backbone"]
    assert all(torch.equal(v, both[k]) for k, v in (image | spectrum).items())
    torch.testing.assert_close(both["image_backbone"], method.image_encoder.backbone([batch["crop"]]).cls[0])
    with pytest.raises(ValueError, match="neither `crop` nor `spectrum`"):
        method.encode(Batch(row=torch.arange(3)))


def test_attention_maps_are_weights_over_tokens():
    method = TINY.build(INPUTS).eval()
    maps = method.attention(pairs())
    assert maps["image"].shape == (6, 2, T) and maps["spectrum"].shape == (6, 2, N)
    for weights in maps.values():
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(2), torch.ones(6, 2))
    assert set(method.attention(only(pairs(1), "crop"))) == {"image"}  # one sample will do


def test_state_dict_has_the_released_names():
    names = set(TINY.build(INPUTS).state_dict())
    head = {f"cross_attention.{n}" for n in ("query", "layernorm.weight", "layernorm.bias")}
    head |= {f"cross_attention.multihead_attn.{n}" for n in ("in_proj_bias", "out_proj.weight", "out_proj.bias")}
    head |= {f"mlp.{n}.{w}" for n in ("encoder", "decoder") for w in ("weight", "bias")}
    own = {f"cross_attention.multihead_attn.{n}_proj_weight" for n in "qkv"}
    for encoder in ("image_encoder", "spectrum_encoder"):
        found = {n.removeprefix(f"{encoder}.") for n in names if n.startswith(encoder)}
        assert {n for n in found if not n.startswith("backbone.")} == head | own
    wide = replace(TINY, embedding=24).build(INPUTS).state_dict()
    packed = "cross_attention.multihead_attn.in_proj_weight"
    assert f"image_encoder.{packed}" in wide and f"spectrum_encoder.{packed}" not in wide


def test_released_size():
    inputs = InputSpec(channels=3, global_size=144, n_global=1, pixels=7781)
    config = AstroCLIP(image_from=SOMEWHERE, spectrum_from=SOMEWHERE)
    with torch.device("meta"):
        method = config.build(inputs)
    assert sum(p.numel() for p in method.parameters()) == 302_954_496 + 43_177_750 + 12_595_200 + 12_070_912
    trained = sum(p.numel() for g in method.parameter_groups() for p in g.params.values())
    assert trained == 12_595_200 + 12_070_912
    assert method.starts_from() == {"image": SOMEWHERE, "spectrum": SOMEWHERE}


def test_misuse_is_named():
    method = TINY.build(INPUTS)
    batch = pairs()
    with pytest.raises(ValueError, match="must hold images and spectra of the same objects"):
        method(only(batch, "crop"), {})
    tuned = TUNED.build(INPUTS)
    with pytest.raises(ValueError, match="are of frozen encoders"):
        tuned(Batch(**method.tokens(batch)), {})
    with pytest.raises(ValueError, match="cannot be kept"):
        tuned.tokens(batch)


@pytest.mark.parametrize(
    "changes, inputs, text",
    [
        ({"heads": 3}, INPUTS, "heads: must divide embedding 16, got 3"),
        ({"image_tokens": "some"}, INPUTS, "image_tokens: must be one of patches, positioned, all, got 'some'"),
        ({"logit_scale": 0.0}, INPUTS, "logit_scale: must be positive, got 0.0"),
        ({"spectrum_from": None}, INPUTS, "spectrum_from: must name a run or a file while freeze is on"),
        ({"image": replace(TINY.image, heads=5)}, INPUTS, "image.heads: must divide dim 24, got 5"),
        ({"spectrum": replace(TINY.spectrum, positions=10)}, INPUTS, "spectrum.positions: must be at least the 11 tokens"),
        ({}, replace(INPUTS, channels=0), "views.image: must give one crop an object, got 0"),
        ({}, replace(INPUTS, n_global=2), "views.image: must give one crop an object, got 2"),
        ({}, replace(INPUTS, pixels=0), "views.spectrum: must give spectra, got none"),
        ({}, replace(INPUTS, channels=5), "image.channels: must be the views' 5, got 3"),
        ({}, replace(INPUTS, global_size=18), "views.image.global_size: must be a multiple of patch_size 4, got 18"),
    ],
    ids=["heads", "tokens", "scale", "from", "image", "spectrum", "no image", "crops", "no spectrum", "bands", "size"],
)  # fmt: skip
def test_bad_configurations_are_named(changes, inputs, text):
    config = replace(TINY, **changes)
    (found,) = config.problems(inputs)
    assert found.startswith(text)
    with pytest.raises(ValueError, match="AstroCLIP: "):
        config.build(inputs)


def test_encoders_that_are_trained_need_no_start():
    assert replace(TUNED, image_from=None, spectrum_from=None).problems(INPUTS) == []
    assert replace(TUNED, image_from=None).build(INPUTS).starts_from() == {"spectrum": SOMEWHERE}


def test_bf16_step():
    method = TINY.build(INPUTS).bfloat16()
    losses = method(pairs(), {})
    losses.total.backward()
    assert losses.total.dtype == torch.float32 and losses.total.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameter_groups()[0].params.values())
    assert all(v.dtype == torch.float32 for v in method.encode(pairs()).values())


def toy_galaxies(count, seed):
    """Images and spectra whose look follows one hidden vector each, with noise that they do not share."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 4, generator=generator)
    fixed = torch.Generator().manual_seed(99)
    templates, lines = torch.randn(4, 3, 16, 16, generator=fixed), torch.randn(4, 63, generator=fixed)
    crop = torch.einsum("bk,kchw->bchw", hidden, templates) + 0.1 * torch.randn(count, 3, 16, 16, generator=generator)
    spectrum = hidden @ lines + 3 + 0.1 * torch.randn(count, 63, generator=generator)
    return Batch(crop=crop, spectrum=spectrum, spectrum_ivar=torch.full_like(spectrum, 100.0))


def test_toy_galaxies_find_their_spectra():
    """Heads on frozen random encoders: the loss falls from chance, and pairs never seen are found, too."""
    torch.manual_seed(1)
    method = replace(TINY, embedding=32, dropout=0.0).build(INPUTS)
    train, test = toy_galaxies(64, 0), toy_galaxies(64, 1)
    cached = Batch(**method.tokens(train))
    optimizer = torch.optim.AdamW(method.parameter_groups()[0].params.values(), lr=2e-3, weight_decay=0.05)
    losses, measures = [], []
    for _ in range(150):
        optimizer.zero_grad()
        loss = method(cached, {}).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        measures.append(method.monitor())
    assert losses[-1] < 0.02 * losses[0]  # 0.005 +- 0.0015 over 8 seeds
    assert min(measures[-1].values()) > 0.9 > 0.1 > max(measures[0].values())
    assert method.monitor() == {}
    found = method.eval().encode(test)
    held_out = info_nce(found["image"], found["spectrum"], 15.5, gather=False)
    assert min(held_out.a_hits, held_out.b_hits) > 0.5  # of 64: 0.76 +- 0.06 over 8 seeds, chance is 0.016


def _gathers_under_every_stage(rank):
    """Two ranks with negatives of both take the step of one process with the whole batch, under ZeRO 1, 2 and 3."""
    import os
    from pathlib import Path

    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for most of a minute
    from armillary.models.astroclip.astroclip import AstroCLIP
    from armillary.models.method import Batch, InputSpec
    from armillary.models.specformer.specformer import SpecFormer
    from armillary.models.vit.vit import ViT

    config = AstroCLIP(
        image=ViT(3, 8, 4, dim=16, depth=1, heads=2, layer_scale=0.5, drop_path=0.0),
        spectrum=SpecFormer(dim=12, depth=1, heads=2, window=9, step=6, positions=12),
        image_from=Path("x"),
        spectrum_from=Path("y"),
        freeze=os.environ["FREEZE"] == "yes",
        embedding=16,
        heads=2,
        dropout=0.0,
        gather=True,
    )
    torch.manual_seed(7)
    crop, spectrum = torch.randn(3, 8, 3, 8, 8), torch.randn(3, 8, 63)

    def method():
        torch.manual_seed(0)
        return config.build(InputSpec(channels=3, global_size=8, n_global=1, pixels=63))

    def batch(step, rows):
        return Batch(crop=crop[step, rows], spectrum=spectrum[step, rows])

    def alone():
        """The whole batch on one rank, without a process group's help."""
        single = method()
        single.config = type(config)(**{**vars(config), "gather": False})
        optimizer = torch.optim.SGD(single.parameter_groups()[0].params.values(), lr=0.5)
        losses = []
        for step in range(3):
            optimizer.zero_grad()
            losses.append(single(batch(step, slice(None)), {}).total)
            losses[-1].backward()
            optimizer.step()
        return torch.stack(losses).detach()

    def together(stage):
        engine, *_ = deepspeed.initialize(
            model=(model := method()),
            optimizer=torch.optim.SGD(model.parameter_groups()[0].params.values(), lr=0.5),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 4,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "gradient_clipping": 0.0,  # the default is 1
                "steps_per_print": 10**9,
            },
        )
        losses = []
        for step in range(3):
            loss = engine(batch(step, slice(4 * rank, 4 * rank + 4)), {}).total
            engine.backward(loss)
            engine.step()
            dist.all_reduce(mean := loss.detach().clone())
            losses.append(mean / 2)
        return torch.stack(losses)

    expected = alone()
    assert expected[-1] != expected[0]
    for stage in (1, 2, 3):
        torch.testing.assert_close(together(stage), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["yes", "no"], ids=["frozen", "tuned"])
def test_trains_under_zero(tmp_path, monkeypatch, freeze):
    monkeypatch.setenv("FREEZE", freeze)
    run_on_two_ranks(_gathers_under_every_stage, tmp_path)
