"""What is hidden of a sample's quantities: whole ones, blocks of neighbouring components, and scattered runs.

    1  each sample draws p, uniform on (0, 1); each of its quantities is hidden with probability p
    2  of a vector that is shown, a share is hidden, U(low, high): with one probability a block of neighbouring components,
       half of the time at one of both ends, as questions ask for; with another one scattered runs, or scattered
       components where it is a single run; otherwise nothing
    3  some samples are shown what one of the listed questions gives, in place of 1 and 2

Something known stays shown, and where two quantities are known something is hidden. Every draw is a function of seed, epoch
and position.

Shape legend: B samples, Q quantities, n components of one, c of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary.kernels.pixels.philox import Purpose, streams, uniforms
from armillary.models.masked.masking import modality_masks, share_problems
from armillary.models.method import BatchKey
from armillary.models.mosaic.layout import Layout, Span

__all__ = ["Masking"]

WHOLE, ASKED = 65_535, 65_534  # numbers of the draws that belong to no single quantity


@dataclass(frozen=True)
class Masking:
    """Rates of the levels.

    Attributes:
        block: Probability that a block is hidden of a shown vector.
        scattered: Probability that scattered runs or components are.
        share: Least and greatest share of the components that is hidden then, below 1.
        questions: What questions give: quantities, or components of them as `name[first:end]`.
        question_share: Probability that a sample is shown what one of them gives.
        asked: Probability with which a hidden run of a vector is asked for in a step; hidden scalars always are.
    """

    block: float = 0.4
    scattered: float = 0.2
    share: tuple[float, float] = (0.0, 0.9)
    questions: tuple[tuple[str, ...], ...] = ()
    question_share: float = 0.0
    asked: float = 1.0

    def problems(self, layout: Layout) -> list[str]:
        """Every rule that it breaks, as `masking.field: rule, got value`."""
        found = [f"masking.{p}" for p in share_problems("share", self.share)]
        if self.share[1] >= 1:
            found.append(
                f"masking.share: must stay below 1, as hiding a quantity as a whole is another level, got {self.share}"
            )
        for name in ("block", "scattered", "question_share", "asked"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"masking.{name}: must be in [0, 1], got {getattr(self, name)}")
        if self.block + self.scattered > 1:
            found.append(f"masking.scattered: must be at most 1 - block, got {self.scattered} with block {self.block}")
        if self.question_share and not self.questions:
            found.append(f"masking.questions: must be listed for question_share {self.question_share}, got none")
        for question in self.questions:
            try:
                layout.chosen(question)
            except ValueError as error:
                found.append(f"masking.questions: {error}")
        return found

    def hidden(self, layout: Layout, known: Tensor, position: Tensor, key: BatchKey) -> Tensor:
        """[B, c] bool: True where a component is hidden.

        Args:
            layout: Of the quantities.
            known: [B, c] bool; something is known of each sample.
            position: [B] int64, places in the epoch's global order.
            key: Seed and epoch.
        """
        there = torch.stack([known[:, s.components].any(1) for s in layout.spans], dim=1)
        whole = modality_masks(position, key, there, None).cpu().numpy()
        places, is_known = position.cpu().numpy(), known.cpu().numpy()
        hidden = np.zeros(is_known.shape, bool)
        for number, span in enumerate(layout.spans):
            own = hidden[:, span.components]
            if span.quantity.size > 1:
                own[:] = self._within(span, _draws(number, places, key, 5 + span.quantity.size))
                own &= (is_known[:, span.components] & ~own).any(1, keepdims=True)  # or nothing would be shown of it
            own |= whole[:, number, None]
        u = _draws(WHOLE, places, key, 2 + len(layout.spans))
        if self.question_share:
            given = torch.stack([layout.chosen(q) for q in self.questions]).numpy()
            asked = ~given[(u[:, 0] / self.question_share * len(given)).astype(int).clip(0, len(given) - 1)]
            use = (u[:, 0] < self.question_share) & (is_known & ~asked).any(1)
            hidden = np.where(use[:, None], asked, hidden)
        nothing = ~(is_known & hidden).any(1)
        last = np.where(there.cpu().numpy() & (there.sum(1, keepdim=True) > 1).cpu().numpy(), u[:, 2:], -1.0)
        for number, span in enumerate(layout.spans):
            hidden[:, span.components] |= (nothing & (last.max(1) >= 0) & (last.argmax(1) == number))[:, None]
        return torch.from_numpy(hidden).to(position.device)

    def asked_of(self, layout: Layout, hidden: Tensor, position: Tensor, key: BatchKey) -> Tensor:
        """[B, T] bool: tokens to predict, of those [B, T] of which something is hidden."""
        if self.asked == 1:
            return hidden
        u = _draws(ASKED, position.cpu().numpy(), key, layout.tokens)
        for span in layout.spans:
            if span.quantity.size == 1:
                u[:, span.tokens] = 0
        return hidden & torch.from_numpy(u < self.asked).to(hidden.device)

    def _within(self, span: Span, u: NDArray[np.float64]) -> NDArray[np.bool_]:
        """[B, n] of one vector, of uniform draws [B, 5 + n]."""
        size, runs = span.quantity.size, span.quantity.runs
        share = self.share[0] + (self.share[1] - self.share[0]) * u[:, :1]
        length = (share * size).astype(int)
        first = (u[:, 1:2] * (size - length + 1)).astype(int)
        first = np.where(u[:, 2:3] < 0.25, 0, np.where(u[:, 2:3] < 0.5, size - length, first))
        place = np.arange(size) - first
        block = (place >= 0) & (place < length)
        pieces = runs if runs > 1 else size
        rank = u[:, 5 : 5 + pieces].argsort(1, kind="stable").argsort(1, kind="stable")
        scattered = (rank < (share * pieces).astype(int)).repeat(size // pieces, axis=1)
        kind = u[:, 3:4]
        return (block & (kind < self.block)) | (scattered & (kind >= self.block) & (kind < self.block + self.scattered))


def _draws(number: int, places: NDArray[np.int64], key: BatchKey, count: int) -> NDArray[np.float64]:
    return uniforms(streams(Purpose.COMPONENT_MASK, number, places, key.epoch), key.seed, count)
