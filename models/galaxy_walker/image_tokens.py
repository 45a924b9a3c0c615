"""Images as tokens of a vision-language model, by its own encoder, without waiting for the device.

The encoders of transformers read from a tensor how many patches each image has. On a GPU they wait for it several times in every block
(`tolist`), and again where they count the places that images take in the prompts. Here all images of a batch are alike, so the host
knows these numbers: they are made there once for each number of images, and handed over.

Shape legend: B images, P tokens of an image, D width of the language model, L tokens of a prompt.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["embed_images"]


def embed_images(vlm: Any, pixels: Tensor, grid: int, ids: Tensor, embedded: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Put the images' tokens into their places.

    Args:
        vlm: A model of transformers: Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        pixels: [B grid grid, 3 t p p] patches, see `armillary.models.galaxy_walker.pixels`.
        grid: Patches along a side of an image.
        ids: [B, L] int64 tokens, the image's placeholder P times in each prompt.
        embedded: [B, L, D] embeddings of the prompts.

    Returns:
        The embeddings with images, and what else the language model is given: Qwen3-VL adds features of the encoder's inner blocks
        to its first blocks.
    """
    known = dict(_known(_Encoder.of(vlm.model.visual), len(ids), grid, pixels.device))
    sizes = torch.tensor([[1, grid, grid]], device="cpu").expand(len(ids), -1)
    features = vlm.model.get_image_features(pixels, sizes, return_dict=True, **known)
    shown = ids == vlm.config.image_token_id
    tokens = torch.cat(features.pooler_output).to(embedded.dtype)
    inner = getattr(features, "deepstack_features", None)
    more = {} if not inner else {"visual_pos_masks": shown, "deepstack_visual_embeds": [torch.cat(x) for x in inner]}
    return embedded.masked_scatter(shown[..., None], tokens), more


class _Encoder(NamedTuple):
    """What the numbers depend on.

    Attributes:
        merge: Side of a token in patches.
        window: Pixels of a patch and of a window of attention, where it has windows (Qwen2.5-VL).
        table: Places along a side of the learned position embedding, how they are interpolated, and whether corners are aligned, where
            it has one (Qwen3-VL).
    """

    merge: int
    window: tuple[int, int] | None
    table: tuple[int, str, bool] | None

    @classmethod
    def of(cls, visual: Any) -> _Encoder:
        window = (visual.patch_size, visual.window_size) if hasattr(visual, "window_size") else None
        table = None
        if hasattr(visual, "num_grid_per_side"):
            table = (visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners)
        return cls(visual.spatial_merge_size, window, table)


@lru_cache(maxsize=16)
def _known(encoder: _Encoder, images: int, grid: int, device: torch.device) -> tuple[tuple[str, Tensor], ...]:
    """What an encoder would ask its device for, by the names under which transformers takes it."""
    from transformers import vision_utils as utils

    with torch.device("cpu"):
        sizes = torch.tensor([[1, grid, grid]]).expand(images, -1)
        # Lengths stay with the host, which splits the patches by them.
        lengths = {"image_cu_seqlens": utils.get_vision_cu_seqlens(sizes)}
        moved = {"image_position_ids": utils.get_vision_position_ids(sizes, encoder.merge)}
        if encoder.window is not None:
            patch, window = encoder.window
            found = utils.get_vision_window_index(sizes, encoder.merge, window, patch)
            moved["image_window_index"], lengths["image_cu_window_seqlens"] = found
        if encoder.table is not None:
            side, mode, aligned = encoder.table
            moved["image_interp_indices"], moved["image_interp_weights"] = (
                utils.get_vision_interpolation_indices_and_weights(
                    sizes, side, mode=mode, align_corners=aligned, spatial_merge_size=encoder.merge
                )
            )
    return tuple({**lengths, **{name: x.to(device) for name, x in moved.items()}}.items())
