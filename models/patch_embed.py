"""Patches of an image as tokens.

Shape legend: N images, C channels, H x W pixels in h x w patches of p x p pixels, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from armillary.kernels.launch import Impl

__all__ = ["PatchEmbed"]


class PatchEmbed(nn.Module):
    """Projection of patches. The weight is stored as the convolution it stands for, and applied as one product."""

    def __init__(self, channels: int, patch: int, dim: int, impl: Impl) -> None:
        super().__init__()
        self.impl = impl
        self.patch = patch
        self.proj = _PatchProjection(channels, dim, kernel_size=patch, stride=patch)

    def patchify(self, image: Tensor) -> Tensor:
        """[N, C, H, W] to [N*h*w, C*p*p], in the parameters' dtype."""
        p = self.patch
        x = image.to(self.proj.weight.dtype)
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # N C h p w p
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, C*p*p] to [n, D]."""
        return self.proj(pixels)


class _PatchProjection(nn.Conv2d):
    def forward(self, pixels: Tensor) -> Tensor:
        return F.linear(pixels, self.weight.flatten(1), self.bias)
