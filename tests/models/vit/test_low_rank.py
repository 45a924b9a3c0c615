"""Low-rank adapters: nothing at first, gradients against float64, merged as unmerged."""

import pytest
import torch
from torch import nn

from armillary.models.vit.low_rank import AdaptableLinear, adapt, is_adapter, merge
from armillary.models.vit.vit import VisionTransformer, ViT

VIT = ViT(channels=3, image_size=8, patch_size=4, dim=16, depth=2, heads=2, layer_scale=0.5, drop_path=0.0)
CROPS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def encoder(rank=3, seed=0):
    torch.manual_seed(seed)
    found = VisionTransformer(VIT, impl="reference").double().eval()
    plain = out(found).detach()
    adapt(found.float(), rank, 6.0)
    return found.double(), plain


def out(network):
    tokens = network([CROPS])
    return torch.cat([tokens.cls[0], tokens.patches[0].mean(1)], 1)


def grown(network):
    for name, p in network.named_parameters():
        if name.endswith("adapter.up"):
            nn.init.normal_(p, std=0.2)
    return network


def test_new_adapters_change_nothing_and_are_all_that_is_trained():
    network, plain = encoder()
    torch.testing.assert_close(out(network), plain, rtol=1e-6, atol=1e-6)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained == [name for name, _ in network.named_parameters() if is_adapter(name)]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert trained == [f"blocks.{b}.{x}.adapter.{p}" for b in (0, 1) for x in layers for p in ("down", "up")]


def test_merged_is_as_unmerged():
    network, plain = encoder()
    before = out(grown(network))
    assert (before - plain).abs().max() > 1e-3
    merge(network)
    torch.testing.assert_close(out(network), before, rtol=1e-12, atol=1e-12)
    bare = VisionTransformer(VIT, impl="reference").double().eval()
    bare.load_state_dict({k: v for k, v in network.state_dict().items() if not is_adapter(k)})
    torch.testing.assert_close(out(bare), before, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_chain_rule():
    network, _ = encoder()
    out(grown(network)).square().sum().backward()
    layer, scale = network.blocks[1].mlp.fc1, 6.0 / 3
    up, down = layer.adapter.up, layer.adapter.down
    found = up.grad.clone(), down.grad.clone()
    layer.weight.data, layer.adapter = layer.adapted().detach(), None
    layer.weight.requires_grad_()
    out(network).square().sum().backward()
    torch.testing.assert_close(found[0], scale * layer.weight.grad @ down.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], scale * up.T @ layer.weight.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backward", [True, False])
def test_selected_tokens_see_the_same_weights(backward):
    network, _ = encoder()
    grown(network).requires_grad_(backward)
    whole = network([CROPS])
    select = torch.arange(3 * 4)
    chosen = network([CROPS], None, select)
    torch.testing.assert_close(chosen.patches[0], whole.patches[0].flatten(0, 1), rtol=1e-10, atol=1e-10)


def test_a_layer_without_adapter_is_a_linear_layer():
    layer = AdaptableLinear(4, 3)
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert set(layer.state_dict()) == {"weight", "bias"}
