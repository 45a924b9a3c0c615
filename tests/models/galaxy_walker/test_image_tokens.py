"""Images among the tokens of a prompt: as transformers puts them there, but without its waits for the device."""

import pytest
import torch
from absent_gpu import absent_gpu
from tiny_vlm import SIDES

from armillary.models.galaxy_walker import vlm as vlms
from armillary.models.galaxy_walker.image_tokens import embed_images
from armillary.models.galaxy_walker.pixels import patches


def shown(family, images=2):
    """A random model, images of 16 tokens (two by two windows in Qwen2.5-VL), and prompts that hold them."""
    torch.manual_seed(0)
    vlm = vlms.build_random(vlms.tiny_config(family))
    vision, side = vlm.config.vision_config, 2 * SIDES[family]
    sizes = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    pixels = patches(torch.rand(images, 3, 48, 48), side, *sizes, clip_colours=family != "qwen3_vl")
    ids = torch.randint(256, (images, 24), device="cpu")
    ids[:, 3:19] = vlm.config.image_token_id
    return vlm, pixels, side // vision.patch_size, ids.to(pixels.device)


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_the_language_model_sees_what_transformers_shows_it(family):
    vlm, pixels, grid, ids = shown(family)
    places = {"position_ids": torch.arange(24).expand(3, 2, 24), "use_cache": False}
    with torch.no_grad():
        embedded = vlm.get_input_embeddings()(ids)
        filled, more = embed_images(vlm, pixels, grid, ids, embedded)
        ours = vlm.model.language_model(inputs_embeds=filled, **more, **places).last_hidden_state
        sizes = torch.tensor([[1, grid, grid]] * 2)
        theirs = vlm.model(inputs_embeds=embedded, pixel_values=pixels, image_grid_thw=sizes, **places)
    assert bool(more) == (family == "qwen3_vl")
    assert torch.equal(ours, theirs.last_hidden_state)


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_no_encoder_asks_its_device_for_numbers(family):
    with torch.device("meta"):
        vlm, pixels, grid, ids = shown(family)
    with absent_gpu():
        embedded = vlm.get_input_embeddings()(ids)
        assert embed_images(vlm, pixels, grid, ids, embedded)[0].shape == embedded.shape
        with pytest.raises(RuntimeError, match="meta tensor"):  # transformers' own way reads numbers that are not there
            vlm.model.get_image_features(pixels, torch.tensor([[1, grid, grid]] * 2, device="meta"))
