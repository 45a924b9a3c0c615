"""Patches of images as tokens, by `armillary.kernels.tokens.patch_embed`, which says what the shapes are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        """Tokens [P, D] of groups of crops, see `embed_crops`; all but the projection are the caller's."""
        crops = [crop.contiguous() for crop in crops]
        mask = None if mask is None else mask.contiguous()
        return self.proj(crops, positions, cls, registers, mask, mask_token)


class _PatchProjection(nn.Conv2d):
    impl: Impl = "auto"

    def forward(self, crops: Sequence[Tensor], *rest: Any) -> Tensor:  # type: ignore[override]
        assert self.bias is not None
        return embed_crops(crops, self.weight, self.bias, *rest, impl=self.impl)
