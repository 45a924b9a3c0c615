"""Patches of images as tokens.

Shape legend: N images of a group, C channels, T patches of p x p pixels an image, R registers, P tokens of all groups,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from armillary.kernels.launch import Impl
from armillary.kernels.tokens.patch_embed import embed_crops

__all__ = ["PatchEmbed"]


class PatchEmbed(nn.Module):
    """Tokens of all crops, packed. The weight is stored as the convolution it stands for, and applied as one product."""

    def __init__(self, channels: int, patch: int, dim: int, impl: Impl) -> None:
        super().__init__()
        self.proj = _PatchProjection(channels, dim, kernel_size=patch, stride=patch)
        self.proj.impl = impl

    def forward(
        self,
        crops: Sequence[Tensor],
        positions: Sequence[Tensor],
        cls: Tensor,
        registers: Tensor | None,
        mask: Tensor | None,
        mask_token: Tensor,
    ) -> Tensor:
        """Embed groups of crops; the other parameters are the caller's.

        Args:
            crops: One tensor a group, each [N, C, H, W].
            positions: One tensor a group, each [1 + T, D].
            cls: [D] class token.
            registers: [R, D] register tokens.
            mask: [N, T] bool for the first group: True where the mask token replaces the patch.
            mask_token: [D].

        Returns:
            [P, D]: for each group, crop by crop, class token, registers and patches.
        """
        return self.proj(crops, positions, cls, registers, mask, mask_token)


class _PatchProjection(nn.Conv2d):
    impl: Impl = "auto"

    def forward(  # type: ignore[override]
        self,
        crops: Sequence[Tensor],
        positions: Sequence[Tensor],
        cls: Tensor,
        registers: Tensor | None,
        mask: Tensor | None,
        mask_token: Tensor,
    ) -> Tensor:
        crops = [crop.contiguous() for crop in crops]
        mask = None if mask is None else mask.contiguous()
        bias = self.bias
        assert bias is not None
        return embed_crops(crops, self.weight, bias, positions, cls, registers, mask, mask_token, impl=self.impl)
