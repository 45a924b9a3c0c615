r"""Pooling of tokens by one learned query, and the head on it that AstroCLIP aligns modalities with.

Multi-head attention of a query that is the same for all samples needs neither keys nor values:

    q_h     = W_q,h query + b_q,h                                     [d], head h of H, d = E / H
    scores  = x (W_k,h^T q_h / sqrt(d))                               the key bias shifts a head's scores alike: it cancels
    out_h   = W_v,h (sum_n softmax(scores)_n x_n) + b_v,h             the weights sum to 1
    out     = W_o [out_1 .. out_H] + b_o

which is `torch.nn.MultiheadAttention` exactly; 2 H N D multiply-adds a sample take the place of the 2 N D E that form keys and
values. The softmax is float32 at least.

Shape legend: B samples, N tokens of a sample, D their width, E width of the embedding, H heads.

Source: AstroCLIP (Parker et al. 2024, arXiv:2310.03024), section 3.3, and its released code, whose parameter names these are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.models.rules import at_least, fractions

__all__ = ["AlignmentHead", "CrossAttention", "FoldedAttention", "MLP"]

MLP_RATIO = 4
"""Hidden width of the MLP over E, as released."""


@dataclass(frozen=True)
class AlignmentHead:
    """Shape of a head: pooling, dropout and norm, then an MLP. The defaults are AstroCLIP's as released.

    Attributes:
        embedding: Width E of the embedding.
        heads: Attention heads H; they divide `embedding`.
        dropout: Fraction of the outputs of the pooling and of the MLP that are set to 0 in training.
    """

    embedding: int = 1024
    heads: int = 4
    dropout: float = 0.1

    def problems(self) -> list[str]:
        """Every rule that the shape breaks, as `field: rule, got value`."""
        found = at_least(1, self, "embedding", "heads")
        if not found and self.embedding % self.heads:
            found.append(f"heads: must divide embedding {self.embedding}, got {self.heads}")
        return found + fractions(self, "dropout")

    def flops(self, tokens: int, dim: int) -> float:
        """Matrix-product FLOPs of one sample, forward, 2 a multiply-add; what a batch shares (the folded query) not counted.

        Args:
            tokens: Tokens N.
            dim: Their width D.
        """
        e = self.embedding
        pooling = 2 * self.heads * tokens * dim + dim * e + e * e  # scores and sums; values; output
        return 2.0 * (pooling + 2 * MLP_RATIO * e * e)


class FoldedAttention(nn.Module):
    """`nn.MultiheadAttention(embedding, heads, kdim=dim, vdim=dim, batch_first=True)` of one query, without keys and values.

    Names, shapes and initialisation of the parameters are that module's, draw for draw.

    Args:
        embedding: Width E.
        heads: Heads H; they divide E.
        dim: Width D of the tokens.
    """

    in_proj_weight: nn.Parameter
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter

    def __init__(self, embedding: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.packed = embedding == dim
        if self.packed:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embedding, embedding))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(embedding, embedding))
            self.k_proj_weight = nn.Parameter(torch.empty(embedding, dim))
            self.v_proj_weight = nn.Parameter(torch.empty(embedding, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embedding))
        self.out_proj = nn.Linear(embedding, embedding)
        nn.init.zeros_(self.out_proj.bias)
        for name, p in self.named_parameters():
            if name.endswith("_proj_weight") or name == "in_proj_weight":
                nn.init.xavier_uniform_(p)

    def forward(self, query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pool tokens.

        Args:
            query: [E].
            tokens: [B, N, D], in the parameters' dtype.

        Returns:
            Pooled tokens [B, E], and the attention weights [B, H, N], float32 at least.
        """
        q_weight, k_weight, v_weight = self._weights()
        q_bias, _, v_bias = self.in_proj_bias.chunk(3)
        q = F.linear(query, q_weight, q_bias).unflatten(0, (self.heads, -1))  # H d
        by_head = (self.heads, -1)
        key = torch.einsum("hd,hdi->hi", q, k_weight.unflatten(0, by_head)) * q.shape[1] ** -0.5
        scores = F.linear(tokens, key)  # B N H
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=1).transpose(1, 2)
        pooled = weights.to(tokens.dtype) @ tokens  # B H D
        values = torch.einsum("bhi,hdi->bhd", pooled, v_weight.unflatten(0, by_head)).flatten(1) + v_bias
        return self.out_proj(values), weights

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.packed:
            q, k, v = self.in_proj_weight.chunk(3)
            return q, k, v
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight


class CrossAttention(nn.Module):
    """One learned query over the tokens, dropout and a norm.

    Args:
        head: Shape.
        dim: Width D of the tokens.
    """

    def __init__(self, head: AlignmentHead, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, head.embedding))
        self.multihead_attn = FoldedAttention(head.embedding, head.heads, dim)
        self.layernorm = nn.LayerNorm(head.embedding)
        self.dropout = nn.Dropout(head.dropout)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pool tokens.

        Args:
            tokens: [B, N, D] of any float dtype.

        Returns:
            [B, E] in the parameters' dtype, and the attention weights [B, H, N], float32 at least, of sum 1 over N.
        """
        pooled, weights = self.multihead_attn(self.query[0, 0], tokens.to(self.query.dtype))
        return self.layernorm(self.dropout(pooled)), weights


class MLP(nn.Module):
    """E -> 4 E -> E with an exact GELU, and dropout behind it.

    Args:
        head: Shape.
        residual: Add the input to the output.
    """

    def __init__(self, head: AlignmentHead, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.encoder = nn.Linear(head.embedding, MLP_RATIO * head.embedding)
        self.decoder = nn.Linear(MLP_RATIO * head.embedding, head.embedding)
        self.dropout = nn.Dropout(head.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, E] to [B, E]."""
        y = self.dropout(self.decoder(F.gelu(self.encoder(x))))
        return x + y if self.residual else y
