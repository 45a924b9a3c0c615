from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from armillary.models.dinov2.dino_head import DINOHead, Head

SMALL = Head(prototypes=50, hidden=12, bottleneck=8)


def test_features_and_prototypes():
    head = DINOHead(SMALL, 6).double()
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    x = torch.randn(5, 6).double()
    features, prototypes = head(x)
    torch.testing.assert_close(features, F.normalize(head.mlp(x), dim=-1))
    v, g = head.last_layer.weight_v, head.last_layer.weight_g
    torch.testing.assert_close(prototypes, g * v / v.norm(dim=1, keepdim=True))
    assert head(x[:0])[0].shape == (0, 8)


@pytest.mark.parametrize("kind, trained", [("trainable", True), ("unit", False)])
def test_norms_of_prototypes(kind, trained):
    head = DINOHead(replace(SMALL, weight_norm=kind), 6)
    torch.testing.assert_close(head(torch.randn(2, 6))[1].norm(dim=1), torch.ones(50))
    names = {n for n, _ in head.named_parameters()}
    assert ("last_layer.weight_g" in names) == trained == ("last_layer.weight_g" in head.state_dict())


def test_names_and_size_as_published():
    with torch.device("meta"):
        head = DINOHead(Head(), 1024)
    assert sum(p.numel() for p in head.parameters()) == 23_662_848
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    assert shapes["mlp.4.weight"] == (256, 2048) and shapes["mlp.0.bias"] == (2048,)
    assert shapes["last_layer.weight_g"] == (65536, 1) and shapes["last_layer.weight_v"] == (65536, 256)
    assert Head().flops(1024) == pytest.approx(47.2e6, rel=1e-3)


@pytest.mark.parametrize("kind", ["trainable", "unit"])
def test_bfloat16_norms_stay_near_one(kind):
    head = DINOHead(replace(SMALL, weight_norm=kind, bottleneck=256), 6).bfloat16()
    for name, buffer in head.last_layer.named_buffers():  # the engine keeps buffers in float32
        setattr(head.last_layer, name, buffer.float())
    features, prototypes = head(torch.randn(64, 6).bfloat16())
    assert features.dtype == prototypes.dtype == torch.bfloat16
    for x in (features, prototypes):
        assert (x.float().norm(dim=1) - 1).abs().max() < 4e-3


def test_zero_tokens_have_finite_gradients():
    head = DINOHead(SMALL, 6)
    with torch.no_grad():
        head.mlp[4].weight.zero_()
    features, _ = head(torch.zeros(2, 6))
    features.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.mlp.parameters())


@pytest.mark.parametrize(
    "change, text",
    [
        ({"prototypes": 1}, "prototypes: must be at least 2, got 1"),
        ({"hidden": 0}, "hidden: must be at least 1, got 0"),
        ({"weight_norm": "none"}, "weight_norm: must be one of trainable, unit, got 'none'"),
    ],
)
def test_bad_configurations(change, text):
    with pytest.raises(ValueError, match=text):
        DINOHead(replace(SMALL, **change), 6)
