"""Patch tokens of a method's image encoder, beside the embeddings that the method itself gives.

Shape legend: B images, h x w patches, D dimensions, C channels, S crop side, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from armillary.models.method import Batch, Method
from armillary.models.vit.vit import VisionTransformer

__all__ = ["PATCHES", "class_attention", "image_encoder", "patch_encode", "patch_tokens"]

PATCHES = "patches"
"""Name of the readout: tokens of an image's patches one behind the other, row by row, [h w D]."""


def image_encoder(method: Method) -> VisionTransformer | None:
    """The vision transformer that a method reads images with; None where it has none."""
    prefix = method.encoders().get("image")
    found = None if prefix is None else dict(method.named_modules()).get(prefix.rstrip("."))
    return found if isinstance(found, VisionTransformer) else None


def patch_encode(method: Method) -> Callable[[Batch], Mapping[str, Tensor]]:
    """What stands in for `Method.encode` where the readout "patches" is asked for.

    Raises:
        ValueError: The method has no vision transformer for images.
    """
    network = image_encoder(method)
    if network is None:
        raise ValueError(
            f"readout: {PATCHES!r} needs a vision transformer that reads images, got {type(method).__name__}"
        )

    def encode(batch: Batch) -> dict[str, Tensor]:
        return {PATCHES: patch_tokens(network, batch["crop"]).flatten(1)} if "crop" in batch else {}

    return encode


@torch.no_grad()
def patch_tokens(network: VisionTransformer, crop: Tensor) -> Tensor:
    """Tokens [B, h, w, D] of the patches of crops [B, C, S, S], after the final norm, float32."""
    side = crop.shape[-1] // network.config.patch_size
    return network([crop]).patches[0].float().unflatten(1, (-1, side))


@torch.no_grad()
def class_attention(network: VisionTransformer, crop: Tensor) -> Tensor:
    """What the class token of the last block attends to: weights [B, H, h, w] float32.

    Those of the patches alone; with those of the class token itself and of registers, a head's sum to 1.
    """
    seen: list[Tensor] = []
    handle = network.get_submodule(f"blocks.{network.config.depth - 1}.attn.qkv").register_forward_hook(
        lambda module, args, out: seen.append(out[0])
    )
    try:
        network([crop])
    finally:
        handle.remove()
    heads, skip = network.config.heads, 1 + network.config.registers
    q, k, _ = seen[0].float().unflatten(0, (len(crop), -1)).unflatten(2, (3, heads, -1)).unbind(2)  # [B, L, H, d]
    scores = torch.einsum("bhd,blhd->bhl", q[:, 0], k) * q.shape[-1] ** -0.5
    side = crop.shape[-1] // network.config.patch_size
    return scores.softmax(-1)[..., skip:].unflatten(2, (-1, side))
