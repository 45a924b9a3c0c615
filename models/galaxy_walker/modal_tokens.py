"""Embeddings of spectra and neighbourhoods as tokens of a language model, and the head that reads a number from it.

    token = alpha n / |n|,   n = LayerNorm(W clip(x) + b)

alpha is one learnt number a modality, .1 at the start. The three geometries share one projection. Everything is float32 but
the stored weights; a vector that is unknown (NaN) gives a token of zeros.

Shape legend: B samples, S geometries, F features, K = 1 + S tokens (S without spectra), D width of the language model.

Source: Galaxy-Walker (arXiv:2503.18578), section 3.2 and its released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ModalTokens", "NumericHead"]

LIMIT = 100.0
"""Features are clipped to this."""


class _Projection(nn.Module):
    """Linear and LayerNorm in float32, whatever the weights are stored in."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, features))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.norm_bias = nn.Parameter(torch.zeros(dim))
        nn.init.orthogonal_(self.weight, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.float(), self.weight.float(), self.bias.float())
        return F.layer_norm(y, y.shape[-1:], self.norm_weight.float(), self.norm_bias.float())


class ModalTokens(nn.Module):
    """The tokens.

    Args:
        spectrum: Features of the spectrum's embedding; 0 where there is none.
        geometry: Features of the neighbourhood's embeddings.
        spaces: Number S of them; may be 0.
        dim: Width D.
        scale: alpha at the start.
    """

    def __init__(self, spectrum: int, geometry: int, spaces: int, dim: int, scale: float = 0.1) -> None:
        super().__init__()
        self.dim = dim
        self.spectrum = _Projection(spectrum, dim) if spectrum else None
        self.geometry = _Projection(geometry, dim) if spaces else None
        self.scale = nn.Parameter(torch.full((bool(spectrum) + spaces,), scale))

    def forward(self, spectrum: Tensor | None, geometry: Tensor | None) -> Tensor:
        """[B, K, D] float32 tokens: of the spectrum, then of the geometries.

        Args:
            spectrum: [B, F] features, NaN where there is no spectrum.
            geometry: [B, S, F], likewise.
        """
        parts = []
        with torch.autocast(self.scale.device.type, enabled=False):
            for project, x in ((self.spectrum, spectrum), (self.geometry, geometry)):
                if project is None or x is None:
                    continue
                x = x if x.ndim == 3 else x[:, None]
                known = x.isfinite().all(-1, keepdim=True)
                clipped = torch.where(known, x, 0.0).clamp(-LIMIT, LIMIT)
                parts.append(torch.where(known, F.normalize(project(clipped), dim=-1), 0.0))
            return torch.cat(parts, 1) * self.scale.float()[:, None]


class NumericHead(nn.Module):
    """A number of a hidden state: Linear, GELU, Linear, in float32.

    Args:
        dim: Width D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden_weight = nn.Parameter(torch.empty(dim, dim))
        self.hidden_bias = nn.Parameter(torch.zeros(dim))
        self.out_weight = nn.Parameter(torch.empty(1, dim))
        self.out_bias = nn.Parameter(torch.zeros(1))
        nn.init.trunc_normal_(self.hidden_weight, std=dim**-0.5)
        nn.init.trunc_normal_(self.out_weight, std=dim**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        """[B, D] to [B] float32."""
        with torch.autocast(h.device.type, enabled=False):
            x = F.gelu(F.linear(h.float(), self.hidden_weight.float(), self.hidden_bias.float()))
            return F.linear(x, self.out_weight.float(), self.out_bias.float()).squeeze(-1)
