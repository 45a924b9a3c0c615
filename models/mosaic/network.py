"""A transformer whose shown tokens tell, and whose asked tokens only ask.

Each block's queries are all tokens of a sample, its keys and values the shown ones: no token attends to an asked one. So
what is said of a quantity does not depend on what else is asked, and hidden or unknown tokens that nobody asks for are not
computed. A sample has one token of its own, which is always shown.

Shape legend: B samples, T tokens of all quantities, D width; e entries, w of a token; R computed tokens, K shown ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.kernels.tokens.attention import Backend, PackedSequences, attention
from armillary.models.masked.heads import DensityHead, HeadConfig
from armillary.models.mosaic.layout import Layout

__all__ = ["Network", "Rows", "computed_rows"]

INITIAL_STD = 0.02


class Rows(NamedTuple):
    """Which tokens are computed, counted out: made ahead of the step.

    Attributes:
        tokens: [R] int64, as sample * (1 + 2 T) + place; places are a sample's own token, T shown and T asked ones. Samples
            with equally many shown tokens lie together.
        keys: [K] int64, which of these are the sample's own or shown.
    """

    tokens: Tensor
    keys: Tensor


def computed_rows(shown: Tensor, asked: Tensor) -> Rows:
    """Rows of shown and asked tokens, both [B, T] bool; waits for the device to count them."""
    present, order = _present(shown, asked)
    tokens = shown.shape[1]
    within = present[order].nonzero()
    return Rows(order[within[:, 0]] * (1 + 2 * tokens) + within[:, 1], (within[:, 1] <= tokens).nonzero()[:, 0])


def _present(shown: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1 + 2 T] bool: tokens that are computed, and the samples' order."""
    present = torch.cat([torch.ones_like(shown[:, :1]), shown, asked], dim=1)
    return present, shown.sum(1).argsort(stable=True)


class _Embedding(nn.Module):
    """Tokens of one quantity: entries with what is known of them and their errors, through a perceptron."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * width, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, entries: Tensor, errors: Tensor) -> Tensor:
        """[B, r, D] of [B, r, w] entries and errors, NaN where unknown."""
        known = ~entries.isnan()
        certain = (errors / (1 + errors)).nan_to_num(0.0) * known
        features = torch.cat([entries.nan_to_num(0.0), known.to(entries.dtype), certain], dim=-1)
        return self.layers(features.to(next(self.parameters()).dtype))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, backend: Backend) -> None:
        super().__init__()
        self.heads, self.dropout, self.backend = heads, dropout, backend
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, keys: Tensor, layout: PackedSequences, queries: PackedSequences) -> Tensor:
        """[R, D] of tokens [R, D], of which `keys` [K] are shown."""
        y = self.norm1(x)
        q = self.query(y).unflatten(1, (self.heads, -1))
        k, v = self.key_value(y.index_select(0, keys)).unflatten(1, (2, self.heads, -1)).unbind(1)
        y = attention(q, k.contiguous(), v.contiguous(), layout, query_layout=queries, backend=self.backend)
        x = x + self._drop(self.out(y.flatten(1)))
        return x + self._drop(self.down(F.gelu(self.up(self.norm2(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class _Loadings(nn.Module):
    """How the entries of a token vary together, see `armillary.models.masked.copula`."""

    def __init__(self, dim: int, width: int, rank: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(dim, width * rank) if rank else None

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, r, w, rank] of tokens [B, r, D]."""
        if self.linear is None:
            return tokens.new_zeros(*tokens.shape[:-1], self.width, 0)
        return self.linear(tokens).unflatten(-1, (self.width, -1))


class Network(nn.Module):
    """Embeddings, blocks and heads.

    Args:
        layout: Of the quantities.
        dim: Width D.
        depth: Blocks.
        heads: Attention heads.
        hidden: Hidden width of a block's perceptron.
        dropout: Of both branches of a block.
        scalar: Distribution of scalars.
        vector: Distribution of each entry of vectors.
        rank: Of the copula of the entries of a token.
        backend: See `armillary.kernels.tokens.attention`.
    """

    def __init__(
        self,
        layout: Layout,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        dropout: float,
        scalar: HeadConfig,
        vector: HeadConfig,
        rank: int,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.layout, self.rank = layout, rank
        self.embeddings = nn.ModuleList(_Embedding(s.width, dim) for s in layout.spans)
        self.own = nn.Parameter(INITIAL_STD * torch.randn(1, dim))
        self.position = nn.Parameter(INITIAL_STD * torch.randn(layout.tokens, dim))
        self.question = nn.Parameter(INITIAL_STD * torch.randn(layout.tokens, dim))
        self.blocks = nn.ModuleList(_Block(dim, heads, hidden, dropout, backend) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleList(
            DensityHead(scalar if s.quantity.size == 1 else vector, dim, s.width) for s in layout.spans
        )
        self.loadings = nn.ModuleList(_Loadings(dim, s.width, rank if s.width > 1 else 0) for s in layout.spans)

    def head(self, number: int) -> DensityHead:
        """The head of a quantity."""
        head = self.heads[number]
        assert isinstance(head, DensityHead)
        return head

    def forward(
        self, entries: Tensor, errors: Tensor, asked: Tensor, tokens: Tensor, keys: Tensor
    ) -> tuple[Tensor, ...]:
        """What the heads say of asked tokens; of others their numbers have no meaning.

        Args:
            entries: [B, e], NaN where hidden or unknown.
            errors: [B, e], NaN where not stated.
            asked: [B, T] bool.
            tokens: [R], see `Rows`.
            keys: [K], likewise.

        Returns:
            The samples' own tokens [B, D]; of each quantity [B, runs, w, numbers] for `DensityHead.density`; and of each
            [B, runs, w, rank], the loadings of its copula.
        """
        size, count = asked.shape
        shown = self.layout.any_of_token(~entries.isnan())
        embedded = [
            embed(span.of(entries), span.of(errors))
            for span, embed in zip(self.layout.spans, self.embeddings, strict=True)
        ]
        every = [
            self.own.expand(size, 1, -1),
            torch.cat(embedded, 1) + self.position,
            self.question.expand(size, -1, -1),
        ]
        x = torch.cat(every, dim=1).flatten(0, 1).index_select(0, tokens)
        present, order = _present(shown, asked)
        layout = PackedSequences.from_lengths((1 + shown.sum(1))[order], 1 + count)
        queries = PackedSequences.from_lengths(present.sum(1)[order], 1 + 2 * count)
        for block in self.blocks:
            x = block(x, keys, layout, queries)
        x = self.norm(x)
        spread = x.new_zeros(size * (1 + 2 * count), x.shape[1]).index_copy(0, tokens, x).unflatten(0, (size, -1))
        answers = spread[:, 1 + count :]
        tokens_of = [answers[:, span.tokens] for span in self.layout.spans]
        numbers = [head(x) for head, x in zip(self.heads, tokens_of, strict=True)]
        return spread[:, 0], *numbers, *(of(x) for of, x in zip(self.loadings, tokens_of, strict=True))
