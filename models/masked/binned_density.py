"""Distributions of a number as probabilities of bins, uniform within each, scored by the continuous ranked probability.

Beyond the bins the cumulative distribution is 0 or 1, so that a truth there adds its distance to them to the score.

Shape legend: [...] distributions, K bins, m numbers asked of each distribution.

Source of the score: Gneiting and Raftery 2007 (J. Am. Stat. Assoc. 102, 359), equation 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from armillary.models.masked.density import Density, whole_precision
from armillary.models.masked.piecewise_linear import crps_between, cumulative, inverse, slope

__all__ = ["BinnedDensity", "edge_problems"]


def edge_problems(field: str, edges: Sequence[float]) -> list[str]:
    """Why edges of bins have no meaning, as `field: rule, got value`; empty if they have."""
    if len(edges) > 1 and all(map(math.isfinite, edges)) and all(a < b for a, b in zip(edges, edges[1:], strict=False)):
        return []
    return [f"{field}: must be two or more finite, increasing numbers, got {tuple(edges)}"]


class BinnedDensity(Density):
    """Distributions over the same bins.

    Args:
        edges: [K + 1] increasing, in the number's unit.
        logits: [..., K]; their softmax is the probability of each bin.
    """

    def __init__(self, edges: Tensor, logits: Tensor) -> None:
        self.logits = logits
        self.edges = edges.to(logits.device, torch.promote_types(logits.dtype, torch.float32))

    @property
    def probability(self) -> Tensor:
        """[..., K] of each bin, float32 at least."""
        return whole_precision(self.logits).softmax(-1)

    def pdf(self, x: Tensor) -> Tensor:
        """Densities [..., m], per unit, at x [..., m]; 0 beyond the bins."""
        return slope(*self._lines(), x)

    def cdf(self, x: Tensor) -> Tensor:
        """Cumulative probabilities [..., m] at x [..., m]."""
        return cumulative(*self._lines(), x)

    def quantile(self, probability: Tensor) -> Tensor:
        """Numbers [..., m] below which probabilities [..., m], in [0, 1], lie."""
        return inverse(*self._lines(), probability)

    def crps(self, true: Tensor) -> Tensor:
        """Scores [...] of true numbers [...]; NaN, with gradients of 0, where they are NaN."""
        known = ~true.isnan()
        y = torch.where(known, true.to(self.edges.dtype), self.edges[0])
        beyond = (self.edges[0] - y).clamp(min=0) + (y - self.edges[-1]).clamp(min=0)
        return torch.where(known, crps_between(*self._lines(), y) + beyond, torch.nan)

    def score(self, true: Tensor) -> Tensor:
        """The CRPS: unlike the likelihood of a bin it knows which bins are near."""
        return self.crps(true)

    def _lines(self) -> tuple[Tensor, Tensor]:
        """Knots and cumulative probabilities [..., K + 1]."""
        below = torch.nn.functional.pad(self.probability.cumsum(-1), (1, 0))
        return self.edges.expand_as(below), below

    def _half(self) -> Tensor:
        return torch.full_like(self.logits[..., 0], 0.5, dtype=self.edges.dtype)
