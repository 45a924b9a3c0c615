"""A crop as the patches that Qwen's image encoders read: resized, normalised, in windows of merged patches.

Shape legend: B samples, S side of a crop, N side of the resized image, p side of a patch, m patches merged along each axis,
t frames of a patch (an image is repeated), g = N / p.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from armillary.models.constants import constant

__all__ = ["patches"]

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, with which Qwen2-VL and Qwen2.5-VL normalise; Qwen3-VL has .5 for all."""


def patches(crop: Tensor, side: int, patch: int, merge: int, frames: int, clip_colours: bool) -> Tensor:
    """[B g g, 3 t p p] patches, the m x m of a token one behind the other.

    Args:
        crop: [B, 3, S, S] red, green, blue in 0 .. 1.
        side: N, a multiple of p m.
        patch: p.
        merge: m.
        frames: t.
        clip_colours: Normalise with CLIP's mean and deviation, not with .5 and .5.
    """
    x = crop.float()
    if x.shape[-1] != side:
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    numbers = (MEAN, STD) if clip_colours else ((0.5,) * 3, (0.5,) * 3)
    mean, std = (constant(v, x).view(3, 1, 1) for v in numbers)
    b, grid = len(x), side // patch // merge
    x = ((x - mean) / std).view(b, 3, grid, merge, patch, grid, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, G, G, m, m, 3, p, p]
    x = x[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return x.reshape(b * grid * grid * merge * merge, 3 * frames * patch * patch)
