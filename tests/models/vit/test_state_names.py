import pytest
import torch

from armillary.models.vit.state_names import from_public, to_public
from armillary.models.vit.vit import VisionTransformer, ViT

CONFIG = ViT(image_size=16, patch_size=4, dim=8, depth=6, heads=2, registers=1)


@pytest.fixture
def state():
    return VisionTransformer(CONFIG).state_dict()


def shapes(state):
    return {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("chunks", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.backbone.", "teacher.backbone."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_round_trip(state, chunks, prefix, wrapped):
    public = {prefix + k: v for k, v in to_public(state, chunks).items()}
    public["dino_head.last_layer.weight_g"] = torch.ones(4, 1)  # heads lie beside the encoder and are left out
    back = from_public({"teacher": public, "epoch": 3} if wrapped else public, shapes(state))
    assert back.keys() == state.keys() and all(back[k] is state[k] for k in state)
    VisionTransformer(CONFIG).load_state_dict(back)


def test_chunked_names_keep_the_global_index(state):
    names = set(to_public(state, 2))
    assert "blocks.0.2.norm1.weight" in names and "blocks.1.3.norm1.weight" in names
    assert "blocks.1.5.mlp.fc2.bias" in names and "register_tokens" in names


def test_refuses_what_does_not_fit(state):
    expected = shapes(state)
    public = to_public(state, 3)
    del public["norm.bias"], public["blocks.0.1.ls1.gamma"]
    public["head.weight"] = torch.zeros(1)
    public["pos_embed"] = torch.zeros(1, 26, 8)
    public["module.mask_token"] = public["mask_token"]
    with pytest.raises(ValueError) as error:
        from_public(public, expected)
    text = str(error.value)
    assert "pos_embed: shape (1, 26, 8), expected (1, 17, 8)" in text
    assert "missing: " in text and "norm.bias" in text and "blocks.1.ls1.gamma" in text
    assert "unexpected: head.weight" in text and "there twice: module.mask_token" in text


@pytest.mark.parametrize("chunks", [-1, 4, 7])
def test_chunks_must_divide_the_depth(state, chunks):
    with pytest.raises(ValueError, match=f"chunks: must be 0 or divide the depth 6, got {chunks}"):
        to_public(state, chunks)
