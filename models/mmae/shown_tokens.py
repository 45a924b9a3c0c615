"""The network of MMAE with shown tokens only: one encoder of both modalities, and a light decoder of images.

Shape legend: B samples, C channels, T patches of p x p pixels; N tokens of a spectrum of w bins each; D width, P packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.kernels.launch import Impl
from armillary.kernels.tokens.attention import Backend, PackedSequences
from armillary.models.masked.packing import Packing
from armillary.models.masked.tokenisers import POSITION_STD
from armillary.models.vit.residual_stream import ResidualNorm, Stream
from armillary.models.vit.vit_block import Block

__all__ = ["ImageDecoder", "ShownEncoder", "Tokens", "convolutions", "linear"]

MLP_RATIO = 4


class Tokens(nn.Module):
    """Tokens of the chosen pieces of one modality, with their positions.

    Args:
        layer: Makes a vector of a piece.
        count: Pieces of a sample.
        dim: Width D.
    """

    def __init__(self, layer: nn.Module, count: int, dim: int) -> None:
        super().__init__()
        self.layer = layer
        self.position = nn.Parameter(POSITION_STD * torch.randn(count, dim))

    def forward(self, pieces: Tensor, rows: Tensor) -> Tensor:
        """[P, D] of rows [P] of pieces [B, N, ...] (sample * N + piece)."""
        chosen = pieces.flatten(0, 1).index_select(0, rows).to(self.position.dtype)
        return self.layer(chosen) + self.position.index_select(0, rows % len(self.position))


def linear(channels: int, size: int, dim: int) -> nn.Module:
    """One linear layer of a patch [C, p, p]."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, dim))


def convolutions(channels: int, size: int, dim: int) -> nn.Module:
    """Two convolutions within a patch [C, p, p], so that nothing of a hidden one is seen, then a linear layer."""
    width = dim // 2
    first = nn.Conv2d(channels, width, 3, padding=1)
    return nn.Sequential(
        first,
        nn.GELU(),
        nn.Conv2d(width, width, 3, 2, 1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(width * ((size + 1) // 2) ** 2, dim),
    )


class _Blocks(nn.Module):
    def __init__(self, depth: int, dim: int, heads: int, attention: Backend, impl: Impl) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, heads, MLP_RATIO * dim, 1.0, attention, "erf", impl) for _ in range(depth)
        )
        self.norm = ResidualNorm(dim, impl)

    def forward(self, x: Tensor, layout: PackedSequences) -> Tensor:
        stream = Stream(x)
        for block in self.blocks:
            stream = block(stream, layout, (None, None))
        return self.norm(stream)[1]


class ShownEncoder(nn.Module):
    """A transformer over the shown tokens of both modalities, behind a token of the sample's own.

    Args:
        image: Tokens of patches.
        spectrum: Tokens of runs of bins.
        depth: Blocks.
        dim: Width D.
        heads: Attention heads; they divide `dim`.
        attention: Backend, see `armillary.kernels.tokens.attention`.
        impl: Implementation of the blocks' kernels, see `armillary.kernels.launch`.
    """

    def __init__(
        self, image: Tokens, spectrum: Tokens, depth: int, dim: int, heads: int, attention: Backend, impl: Impl
    ) -> None:
        super().__init__()
        self.own = nn.Parameter(POSITION_STD * torch.randn(dim))
        self.image, self.spectrum = image, spectrum
        self.blocks = _Blocks(depth, dim, heads, attention, impl)

    def forward(self, patches: Tensor, runs: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        """The samples' own tokens [B, D], and the shown ones of images and of spectra.

        Args:
            patches: [B, T, C, p, p].
            runs: [B, N, w].
            packing: Which of them are shown.
        """
        of_image, of_spectrum = packing.rows
        tokens = self.image(patches, of_image), self.spectrum(runs, of_spectrum)
        packed = packing.pack(self.own.expand(packing.layout.sequences, -1), tokens)
        return packing.unpack(self.blocks(packed, packing.layout))


class ImageDecoder(nn.Module):
    """A light transformer over all patches, with a learned token in place of those that are hidden.

    Args:
        patches: Patches T.
        pixels: Numbers C p p of a patch.
        encoder_dim: Width D of the encoder.
        depth: Blocks.
        dim: Width of the decoder.
        heads: Attention heads; they divide `dim`.
        attention: Backend, see `armillary.kernels.tokens.attention`.
        impl: Implementation of the blocks' kernels, see `armillary.kernels.launch`.
    """

    def __init__(
        self,
        patches: int,
        pixels: int,
        encoder_dim: int,
        depth: int,
        dim: int,
        heads: int,
        attention: Backend,
        impl: Impl,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.projection = nn.Linear(encoder_dim, dim)
        self.hidden = nn.Parameter(POSITION_STD * torch.randn(dim))
        self.position = nn.Parameter(POSITION_STD * torch.randn(1 + patches, dim))
        self.blocks = _Blocks(depth, dim, heads, attention, impl)
        self.pixels = nn.Linear(dim, pixels)

    def forward(self, own: Tensor, shown: Tensor, rows: Tensor) -> Tensor:
        """Pixels [B, T, C p p] of all patches, of own tokens [B, D] and of shown patches [P_i, D] and their rows."""
        size = len(own) * self.patches
        hidden = self.hidden.expand(size, -1).index_copy(0, rows, self.projection(shown))
        tokens = torch.cat([self.projection(own)[:, None], hidden.unflatten(0, (len(own), -1))], dim=1) + self.position
        layout = PackedSequences.from_runs(((len(own), 1 + self.patches),), own.device)
        decoded = self.blocks(tokens.flatten(0, 1), layout).unflatten(0, (len(own), -1))
        return self.pixels(decoded[:, 1:])
