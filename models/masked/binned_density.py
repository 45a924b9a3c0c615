r"""A distribution of one number as probabilities of bins, even within each: densities, quantiles, draws, PIT and CRPS.

The cumulative distribution F is linear within a bin, so the continuous ranked probability score

    CRPS = \int (F(x) - 1[x >= y])^2 dx

is a sum of integrals of squared lines, w (a^2 + a b + b^2) / 3 of a bin of width w with a and b at its ends; the bin that
holds y is two of them, and a truth beyond the bins adds its distance to them. It is exact and has gradients.

Shape legend: B samples, K bins, n numbers asked of each sample.

Source of the score: Gneiting and Raftery 2007 (J. Am. Stat. Assoc. 102, 359), equation 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BinnedDensity", "edge_problems"]


def edge_problems(field: str, edges: Sequence[float]) -> list[str]:
    """Why edges of bins have no meaning, as `field: rule, got value`; empty if they have."""
    if len(edges) > 1 and all(map(math.isfinite, edges)) and all(a < b for a, b in zip(edges, edges[1:], strict=False)):
        return []
    return [f"{field}: must be two or more finite, increasing numbers, got {tuple(edges)}"]


@dataclass(frozen=True, eq=False)
class BinnedDensity:
    """Distributions of B samples over the same bins.

    Attributes:
        edges: [K + 1] increasing, in the number's unit.
        logits: [B, K]; their softmax is the probability of each bin.
    """

    edges: Tensor
    logits: Tensor

    @property
    def probability(self) -> Tensor:
        """[B, K] of each bin, float32 at least."""
        return self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)).softmax(1)

    def pdf(self, x: Tensor) -> Tensor:
        """Densities [B, n], per unit, at x [B, n]; 0 beyond the bins."""
        p, edges = self.probability, self._edges
        within = (x >= edges[0]) & (x <= edges[-1])
        return (p / edges.diff()).gather(1, self._bin(x)) * within

    def cdf(self, x: Tensor) -> Tensor:
        """Cumulative probabilities [B, n] at x [B, n]."""
        p, edges, place = self.probability, self._edges, self._bin(x)
        part = ((x - edges[place]) / edges.diff()[place]).clamp(0, 1)
        return self._below(p).gather(1, place) + part * p.gather(1, place)

    def quantile(self, probability: Tensor) -> Tensor:
        """Numbers [B, n] below which probabilities [B, n], in [0, 1], lie. Of uniform draws, draws of the distribution."""
        p, edges = self.probability, self._edges
        below = self._below(p)
        place = torch.searchsorted(below[:, 1:].contiguous(), probability.to(p.dtype).contiguous())
        place = place.clamp(max=p.shape[1] - 1)
        inside = p.gather(1, place)
        part = (probability - below.gather(1, place)) / inside.clamp(min=torch.finfo(p.dtype).tiny)
        return edges[place] + part.clamp(0, 1) * edges.diff()[place]

    def median(self) -> Tensor:
        """[B] medians."""
        return self.quantile(torch.full_like(self.logits[:, :1], 0.5))[:, 0]

    def pit(self, true: Tensor) -> Tensor:
        """[B] cumulative probabilities of the true numbers [B]: uniform, if the distributions are calibrated."""
        return self.cdf(true[:, None])[:, 0]

    def crps(self, true: Tensor) -> Tensor:
        """[B] continuous ranked probability scores of true numbers [B], in their unit; NaN where they are NaN."""
        p, edges = self.probability, self._edges
        y = true.to(p.dtype)[:, None]
        below = self._below(p)
        a, b = below[:, :-1], below[:, 1:]
        cut = torch.minimum(torch.maximum(y, edges[:-1]), edges[1:])  # the end of what lies below y in each bin
        width = edges.diff()
        at = a + (cut - edges[:-1]) / width * p
        left = (cut - edges[:-1]) * (a * a + a * at + at * at)
        at, b = 1 - at, 1 - b
        right = (edges[1:] - cut) * (at * at + at * b + b * b)
        beyond = (edges[0] - y).clamp(min=0) + (y - edges[-1]).clamp(min=0)
        return (left + right).sum(1) / 3 + beyond[:, 0]

    @property
    def _edges(self) -> Tensor:
        return self.edges.to(self.logits.device, torch.promote_types(self.logits.dtype, torch.float32))

    def _bin(self, x: Tensor) -> Tensor:
        """[B, n] bin that holds x, the nearest one where none does."""
        place = torch.searchsorted(self._edges, x.to(self._edges.dtype).contiguous(), right=True) - 1
        return place.clamp(0, self.logits.shape[1] - 1)

    @staticmethod
    def _below(p: Tensor) -> Tensor:
        """[B, K + 1] cumulative probability at the edges."""
        return torch.nn.functional.pad(p.cumsum(1), (1, 0))
