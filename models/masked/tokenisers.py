"""Tokens of an image and of a spectrum: patches through one linear layer, and a learned vector for each place.

Shape legend: B samples, C channels, S side of the image, p side of a patch, T patches; L pixels of a spectrum, w pixels of a
token, N tokens; D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ImagePatches", "SpectrumPatches", "to_image", "to_patches"]

POSITION_STD = 0.02


def to_patches(image: Tensor, size: int) -> Tensor:
    """Patches [B, T, C, p, p] of images [B, C, S, S], row by row."""
    rows = image.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # B C h p w p
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def to_image(patches: Tensor) -> Tensor:
    """Images [B, C, S, S] of their patches [B, T, C, p, p]: the inverse of `to_patches`."""
    side = round(patches.shape[1] ** 0.5)
    return patches.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class ImagePatches(nn.Module):
    """Patches of an image.

    Args:
        channels: Channels C.
        side: Side S in pixels, a multiple of `size`.
        size: Side p of a patch in pixels.
        dim: Width D.
    """

    def __init__(self, channels: int, side: int, size: int, dim: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, dim, size, size)
        self.position = nn.Parameter(POSITION_STD * torch.randn((side // size) ** 2, dim))

    def forward(self, image: Tensor) -> Tensor:
        """Tokens [B, T, D] of images [B, C, S, S]."""
        return self.projection(image).flatten(2).mT + self.position


class SpectrumPatches(nn.Module):
    """Successive runs of a spectrum's pixels, normalised; pixels that do not fill a run are left out.

    Args:
        pixels: Pixels L of a spectrum.
        size: Pixels w of a token.
        dim: Width D.
    """

    def __init__(self, pixels: int, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.projection = nn.Linear(size, dim)
        self.position = nn.Parameter(POSITION_STD * torch.randn(pixels // size, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, spectrum: Tensor) -> Tensor:
        """Tokens [B, N, D] of spectra [B, L]."""
        runs = spectrum.unfold(1, self.size, self.size)
        return self.norm(self.projection(runs) + self.position)
