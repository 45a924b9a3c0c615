"""Weights of MMAE's released module under the names of `armillary.models.mmae.network`.

The released module keeps its positions and queries with leading axes of 1; all else is the same tensor under another name.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["from_released"]

RENAMED = (
    ("img_embed.", "image_encoder.patches."),
    ("spec_embed.", "spectrum_encoder.patches."),
    ("img_encoder.encoder.layers.", "image_encoder.blocks."),
    ("spec_encoder.encoder.layers.", "spectrum_encoder.blocks."),
    ("img_encoder.", "image_encoder."),
    ("spec_encoder.", "spectrum_encoder."),
    ("cross_attention_layers.", "fusion."),
    ("img_pool.", "image_pool.attention."),
    ("spec_pool.", "spectrum_pool.attention."),
    ("cls_token_img", "image_pool.query"),
    ("cls_token_spec", "spectrum_pool.query"),
    ("img_decoder.", "image_decoder."),
    ("spec_decoder.", "spectrum_decoder."),
    (".patches.proj.", ".patches.projection."),
    (".patches.linear.", ".patches.projection."),
    (".pos_embed", ".position"),
    (".self_attn.", ".attention."),
    (".cross_attn.", ".attention."),
    (".linear1.", ".mlp.0."),
    (".linear2.", ".mlp.3."),
    (".ffn.", ".mlp."),
)


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `Network` from one of the released module.

    Args:
        state: Tensors under the released names.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for old, new in RENAMED:
            name = name.replace(old, new) if old.startswith(".") or name.startswith(old) else name
        squeezed = value[0] if name.endswith(".position") else value.flatten() if name.endswith(".query") else value
        found[name] = squeezed
    return found
