"""The network of MMAE as published: an encoder for each modality, fusion of the two, and heads on their pooled tokens.

    tokens -> hidden ones set to 0, their position with them -> encoder, of each modality
    four blocks: image tokens attend to spectrum tokens and these to those, through the same weights, both from before it
    one learned query pools the tokens of each modality; both results side by side are the representation
    decoders from it to all pixels of the image, to all bins of the spectrum, and to a redshift

All blocks are post-norm. The decoders are MLPs of one vector, not of tokens.

Shape legend: B samples, C channels, S side of the image, T patches, L bins of a spectrum, N its tokens, D width.

Source: MMAE (Himes et al. 2025, arXiv:2510.22527) and its released code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.models.astroclip.cross_attention import FoldedAttention
from armillary.models.masked.tokenisers import POSITION_STD, ImagePatches, SpectrumPatches, to_image

__all__ = ["Encoded", "Network", "PostNormBlock"]

MLP_RATIO = 4


class Encoded(NamedTuple):
    """What the network makes of samples.

    Attributes:
        fused: [B, 2 D] representation, the image's half first.
        image: [B, C, S, S] the whole image, decoded.
        spectrum: [B, L] all bins of the spectrum, decoded.
        redshift: [B].
    """

    fused: Tensor
    image: Tensor
    spectrum: Tensor
    redshift: Tensor


class _Attention(nn.Module):
    """Multi-head attention with names, shapes and initialisation of `nn.MultiheadAttention`'s parameters."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from x [B, T, D] to context [B, N, D]; returns [B, T, D]."""
        dim = x.shape[2]
        if x is context:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=2)
        else:
            q = F.linear(x, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
            k, v = F.linear(context, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=2)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2))


class PostNormBlock(nn.Module):
    """Attention and an MLP, each added to the tokens before a norm.

    Args:
        dim: Width D.
        heads: Attention heads; they divide `dim`.
        dropout: Of the attention's weights, within and behind the MLP, and behind the attention of self-attention.
        crossed: The context is another sequence.
    """

    def __init__(self, dim: int, heads: int, dropout: float, crossed: bool) -> None:
        super().__init__()
        self.attention = _Attention(dim, heads, dropout)
        self.attention_dropout = nn.Dropout(0.0 if crossed else dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, MLP_RATIO * dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(MLP_RATIO * dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Tokens [B, T, D] with what they take from context [B, N, D], which is x itself in self-attention."""
        x = self.norm1(x + self.attention_dropout(self.attention(x, context)))
        return self.norm2(x + self.mlp(x))


class _Encoder(nn.Module):
    def __init__(
        self, patches: ImagePatches | SpectrumPatches, depth: int, dim: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.patches = patches
        blocks = [PostNormBlock(dim, heads, dropout, crossed=False) for _ in range(depth)]
        # The released code copies one layer, so that all begin with the same in-projection.
        with torch.no_grad():
            for block in blocks[1:]:
                block.attention.in_proj_weight.copy_(blocks[0].attention.in_proj_weight)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """Tokens [B, T, D] of pixels, with those that are hidden [B, T] set to 0 before the blocks."""
        x = self.patches(pixels).masked_fill(hidden[..., None], 0.0)
        for block in self.blocks:
            x = block(x, x)
        return self.norm(x)


class _Pool(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(POSITION_STD * torch.randn(dim))
        self.attention = FoldedAttention(dim, heads, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, D] of tokens [B, T, D]."""
        return self.attention(self.query, tokens)[0]


def _decoder(dim: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2 * dim, 2 * dim),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(2 * dim, dim),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(dim, outputs),
    )


class Network(nn.Module):
    """Encoders, fusion, pooling and heads, freshly initialised as the released code does.

    Args:
        channels: Channels C.
        side: Side S of the image, a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        bins: Bins L of a spectrum.
        token_bins: Bins of a token.
        dim: Width D.
        depth: Blocks of each encoder.
        fusion_depth: Blocks of the fusion.
        heads: Attention heads; they divide `dim`.
        dropout: Dropout of encoders, fusion and decoders of pixels.
    """

    def __init__(
        self,
        *,
        channels: int,
        side: int,
        patch_size: int,
        bins: int,
        token_bins: int,
        dim: int,
        depth: int,
        fusion_depth: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.shape = (side // patch_size) ** 2, channels, patch_size, patch_size
        self.image_encoder = _Encoder(ImagePatches(channels, side, patch_size, dim), depth, dim, heads, dropout)
        self.spectrum_encoder = _Encoder(SpectrumPatches(bins, token_bins, dim), depth, dim, heads, dropout)
        self.fusion = nn.ModuleList(PostNormBlock(dim, heads, dropout, crossed=True) for _ in range(fusion_depth))
        self.image_pool, self.spectrum_pool = _Pool(dim, heads), _Pool(dim, heads)
        self.image_decoder = _decoder(dim, channels * side**2, dropout)
        self.spectrum_decoder = _decoder(dim, bins, dropout)
        self.reset_parameters()
        # Built behind that in the released code, so it keeps PyTorch's own initialisation.
        self.redshift_head = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def reset_parameters(self) -> None:
        """Xavier uniform and biases of 0 in linear layers but the redshift's; Kaiming normal of the fan-out in patches."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor, bins: Tensor, image_hidden: Tensor, spectrum_hidden: Tensor) -> Encoded:
        """Encode and decode samples.

        Args:
            image: [B, C, S, S] in the parameters' dtype.
            bins: [B, L] likewise.
            image_hidden: [B, T] bool: True where a patch is hidden.
            spectrum_hidden: [B, N] bool: True where a token is hidden.
        """
        x, y = self.image_encoder(image, image_hidden), self.spectrum_encoder(bins, spectrum_hidden)
        for block in self.fusion:
            x, y = block(x, y), block(y, x)
        fused = torch.cat([self.image_pool(x), self.spectrum_pool(y)], dim=1)
        decoded = to_image(self.image_decoder(fused).unflatten(1, self.shape))
        return Encoded(fused, decoded, self.spectrum_decoder(fused), self.redshift_head(fused)[:, 0])
