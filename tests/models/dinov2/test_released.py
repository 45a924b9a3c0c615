"""The default settings are the released ones: their cost and their parameter groups, without their weights."""

import pytest
import torch

from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.method import InputSpec


@pytest.fixture(scope="module")
def method():
    with torch.device("meta"):
        return DINOv2().build(InputSpec(channels=3, global_size=144, n_global=2, local_size=60, n_local=8))


def test_astroclip_step_is_830_gflop(method):
    """The released code computes 830.4 GFLOP an image; the unused tokens of the last blocks are 24.7 of them."""
    flops = method.flops_per_sample()
    vit, masked = method.config.vit, 0.5 * 0.3 * 144
    unused = 2 * (vit.flops(144) - vit.flops(144, selected=1 + masked))
    unused += 3 * 2 * (vit.flops(144, kept=0.7) - vit.flops(144, kept=0.7, selected=1 + masked))
    unused += 3 * 8 * (vit.flops(60, kept=0.7) - vit.flops(60, kept=0.7, selected=1))
    assert flops + unused == pytest.approx(830.4e9, rel=5e-3)
    assert 0.02 < unused / 830.4e9 < 0.03


def test_parameter_groups_as_released(method):
    groups = method.parameter_groups()
    of = {name: g for g in groups for name in g.params}
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert set(of) == trained and sum(len(g.params) for g in groups) == len(trained)
    assert all(n.startswith("student.") for n in trained)

    def check(name, lr, wd, clip="backbone", freeze=False):
        g = of[f"student.{name}"]
        assert g.lr_scale == pytest.approx(lr, abs=1e-6)
        assert (g.weight_decay_scale, g.clip_group, g.freeze) == (wd, clip, freeze), name

    check("backbone.cls_token", 0.9**25, 1.0)
    check("backbone.mask_token", 0.07179, 1.0)
    check("backbone.patch_embed.proj.weight", 0.014358, 1.0)
    check("backbone.patch_embed.proj.bias", 0.014358, 0.0)
    check("backbone.blocks.0.attn.qkv.weight", 0.079766, 1.0)
    check("backbone.blocks.23.mlp.fc1.bias", 0.9, 0.0)
    check("backbone.blocks.23.ls1.gamma", 0.9, 0.0)
    check("backbone.blocks.3.norm2.weight", 0.9**21, 0.0)
    check("backbone.norm.weight", 1.0, 0.0)
    check("dino_head.mlp.2.weight", 1.0, 1.0, "dino_head")
    check("dino_head.last_layer.weight_g", 1.0, 1.0, "dino_head", True)
    check("dino_head.last_layer.weight_v", 1.0, 1.0, "dino_head", True)
    assert len([g for g in groups if g.clip_group == "backbone"]) == 52
