"""Only the tokens that are shown: rows of a packed token axis, so that hidden ones cost nothing.

Each sample is a sequence of its own: one token for the sample as a whole, then its shown tokens of each modality in turn.

Shape legend: B samples, M modalities, N_m tokens of modality m, P packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from armillary.kernels.tokens.attention import PackedSequences

__all__ = ["Packing", "pack", "shown_rows"]


class Packing(NamedTuple):
    """Where shown tokens lie.

    Attributes:
        rows: For each modality, [P_m] int64, ascending: its shown tokens as sample * N_m + token.
        order: [P] int64: which of the samples' own tokens [B] and, behind them, of all modalities' rows is at each place.
        place: [P] int64: the inverse of `order`.
        layout: The samples' sequences in the packed axis.
    """

    rows: tuple[Tensor, ...]
    order: Tensor
    place: Tensor
    layout: PackedSequences

    def pack(self, own: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """Packed tokens [P, D] of the samples' own [B, D] and each modality's shown ones [P_m, D]."""
        return torch.cat([own, *tokens]).index_select(0, self.order)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        """The inverse: the samples' own tokens, then each modality's shown ones."""
        sizes = [self.layout.sequences, *(len(rows) for rows in self.rows)]
        return packed.index_select(0, self.place).split(sizes)


def shown_rows(hidden: Tensor) -> Tensor:
    """Rows [P_m] of shown tokens, sample * N_m + token, of a mask [B, N_m]; waits for the device to count them."""
    return (~hidden).flatten().nonzero()[:, 0]


def pack(hidden: Sequence[Tensor], rows: Sequence[Tensor]) -> Packing:
    """Find where the shown tokens go.

    Args:
        hidden: For each modality, [B, N_m] bool: True where a token is hidden.
        rows: For each modality, `shown_rows` of it.
    """
    device = hidden[0].device
    samples = torch.cat(
        [torch.arange(len(hidden[0]), device=device)]
        + [r // mask.shape[1] for r, mask in zip(rows, hidden, strict=True)]
    )
    order = samples.argsort(stable=True)
    lengths = 1 + (~torch.cat(list(hidden), dim=1)).sum(1)
    longest = 1 + sum(mask.shape[1] for mask in hidden)
    return Packing(tuple(rows), order, order.argsort(), PackedSequences.from_lengths(lengths, longest))
