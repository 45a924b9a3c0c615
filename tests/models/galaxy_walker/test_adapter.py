"""Geometry adapters: a model stays itself at a gate of 1, and starts near itself; what cannot be adapted is said."""

from dataclasses import replace

import pytest
import tiny_vlm
import torch
from torch import nn

from armillary.kernels.geometry.geometry_combine import EXPERTS
from armillary.models.galaxy_walker import vlm as vlms
from armillary.models.galaxy_walker.adapter import GeometryAdapter, adapt, adapted, ffn_problems, language_layers
from armillary.models.geometry.geometry_experts import gate_statistics


def model(family="qwen2_vl", dtype=torch.float32):
    torch.manual_seed(0)
    return vlms.build_random(vlms.tiny_config(family)).to(dtype)


def logits(vlm, family="qwen2_vl"):
    """Of a prompt with an image."""
    config, side = vlm.config, tiny_vlm.SIDES[family]
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 1], ids[:, 2:6], ids[:, 6] = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    patch = config.vision_config.patch_size
    count = side // patch
    pixels = torch.randn(2 * count * count, 6 * patch * patch, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return vlm(
            input_ids=ids,
            pixel_values=pixels.to(vlm.dtype),
            image_grid_thw=torch.tensor([[1, count, count]] * 2),
            mm_token_type_ids=(ids == config.image_token_id).int(),
        ).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("experts", ["equations", "published"])
@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_a_gate_of_one_leaves_the_model_as_it_was_to_the_last_bit(family, experts, dtype):
    vlm = model(family, dtype)
    before = logits(vlm, family)
    layers = adapt(vlm, GeometryAdapter(every=2, experts=experts, start=1.0))
    assert list(layers) == [0, 2]
    assert torch.equal(logits(vlm, family), before)


@pytest.mark.parametrize("experts", ["equations", "published"])
def test_training_starts_near_the_model_with_a_share_of_nine_tenths(experts):
    vlm = model()
    before = logits(vlm)
    layers = adapt(vlm, GeometryAdapter(every=4, experts=experts))
    for layer in layers.values():
        layer.record = True
    after = logits(vlm)
    # Correlation .996 and .997 with seeds 0 to 2; a random model's logits are uncorrelated.
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.98
    assert not torch.equal(before, after)
    share = gate_statistics(layers[0].logits).share
    torch.testing.assert_close(share, torch.tensor([0.9, 0.05, 0.05]))


@pytest.mark.parametrize("experts", ["equations", "published"])
@pytest.mark.parametrize("use", [("euclidean",), ("spherical",), ("euclidean", "hyperbolic"), EXPERTS])
def test_only_experts_that_take_part_get_a_share_and_learn(use, experts):
    gate = "learned" if use == EXPERTS else "even"
    layer = GeometryAdapter(use=use, gate=gate, experts=experts, start=0.8).layer(24, 40)
    layer.record = True
    x = torch.nn.functional.layer_norm(torch.randn(5, 24), [24])
    layer(x).square().sum().backward()
    share = gate_statistics(layer.logits).share
    expected = torch.tensor([float(name in use) / len(use) for name in EXPERTS])
    if gate == "learned":
        expected = torch.tensor([0.8, 0.1, 0.1])
    torch.testing.assert_close(share, expected)
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    if experts == "equations":
        learning = layer.experts.down_weight.grad.flatten(1).abs().sum(1) > 0
        assert learning.tolist() == [name in use for name in EXPERTS]
    router = layer.experts.router.weight if experts == "published" else layer.experts.router_weight
    assert router.requires_grad == (gate == "learned")


def test_published_experts_are_those_of_the_released_code():
    """Sizes of their outputs: the sphere's rows have norm 1, the hyperbolic one's are about 1 / sqrt(D) of a network's."""
    layer = GeometryAdapter(experts="published", start=None).layer(256, 512).experts
    x = torch.nn.functional.layer_norm(torch.randn(64, 256), [256])
    outputs = {}
    for i, name in enumerate(EXPERTS):
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.bias.copy_(-1e3 * (torch.arange(3) != i).float())
            layer.load_mlp(layer.hyperbolic.state_dict())  # the same network
            outputs[name] = layer(x).y
    torch.testing.assert_close(outputs["spherical"].norm(dim=1), torch.ones(64))
    ratio = outputs["hyperbolic"].norm() / outputs["euclidean"].norm()
    assert float(ratio) == pytest.approx(256**-0.5, rel=0.2)  # .061 to .065 with seeds 0 to 2


@pytest.mark.parametrize("every, blocks", [(0, []), (1, [0, 1, 2, 3]), (3, [0, 3]), (9, [0])])
def test_every_kth_block(every, blocks):
    vlm = model()
    adapt(vlm, GeometryAdapter(every=every))
    assert list(adapted(vlm)) == blocks


def test_what_cannot_be_adapted_is_said():
    vlm = model()
    language_layers(vlm)[2].mlp = nn.Sequential(nn.Linear(4, 4))
    (problem,) = ffn_problems(vlm, 2)
    assert "block 2 of Qwen2VLForConditionalGeneration must have mlp.gate_proj, mlp.up_proj, mlp.down_proj" in problem
    assert ffn_problems(vlm, 3) == []
    with pytest.raises(ValueError, match=r"got 0.weight, 0.bias"):
        adapt(vlm, GeometryAdapter(every=2))
    with pytest.raises(ValueError, match=r"Linear: must have its blocks in model.language_model.layers"):
        adapt(nn.Linear(2, 2), GeometryAdapter())


@pytest.mark.parametrize(
    "change, text",
    [
        ({"every": -1}, "adapter.every: must be at least 0, got -1"),
        ({"start": 0.0}, "adapter.start: must be in"),
        ({"use": ()}, "adapter.use: must be some of"),
        ({"use": ("euclidean", "euclidean")}, "adapter.use: must be some of"),
        ({"use": ("spherical",)}, "adapter.start: must be None without the Euclidean expert"),
        ({"experts": "both"}, "adapter.experts: must be one of equations, published"),
        ({"temperature": 0.0}, "adapter.temperature: must be positive"),
        ({"curvature": 3.0}, "adapter.curvature: must lie between"),
    ],
)
def test_broken_rules(change, text):
    assert any(p.startswith(text) for p in replace(GeometryAdapter(), **change).problems())
