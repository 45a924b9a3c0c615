r"""Distributions of a number as its quantiles at equally spaced probabilities, linear in between.

    t_k = (k + 1/2) / K,    loss = 2 / K \sum_k max(t_k (y - q_k), (t_k - 1) (y - q_k))

which is the CRPS with its integral over probabilities taken at the K midpoints. Below the first quantile and above the last
one the density falls off exponentially, from its value in the segment beside. These tails hold 1 / 2K of the probability
each and are not learnt: ask for quantiles beyond t_1 and t_K with that in mind.

Shape legend: [...] distributions, K quantiles, m numbers asked of each distribution.

Source of the loss: Koenker and Bassett 1978 (Econometrica 46, 33); of its relation to the CRPS: Laio and Tamea 2007 (Hydrol.
Earth Syst. Sci. 11, 1267).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from armillary.models.masked.density import Density, whole_precision
from armillary.models.masked.piecewise_linear import crps_between, cumulative, inverse, slope, widths

__all__ = ["QuantileDensity"]

LEAST_WIDTH = 1e-4


class QuantileDensity(Density):
    """Distributions with K quantiles each.

    Args:
        quantiles: [..., K], strictly ascending, K at least 2.
    """

    def __init__(self, quantiles: Tensor) -> None:
        self.quantiles = whole_precision(quantiles)
        count = self.quantiles.shape[-1]
        self.levels = (torch.arange(count, device=quantiles.device, dtype=self.quantiles.dtype) + 0.5) / count

    @classmethod
    def of_numbers(cls, numbers: Tensor) -> QuantileDensity:
        """Read K unbounded numbers [..., K] of a network; where they are 0, quantiles are spread evenly over [-2, 2].

        The first number is the mean of the quantiles, the others are their widths, softplus(number + c) + .0001.
        """
        x = whole_precision(numbers)
        step = 4 / (x.shape[-1] - 1)
        steps = softplus(x[..., 1:] + math.log(math.expm1(step))) + LEAST_WIDTH
        ascending = torch.nn.functional.pad(steps.cumsum(-1), (1, 0))
        return cls(x[..., :1] + ascending - ascending.mean(-1, keepdim=True))

    def pdf(self, x: Tensor) -> Tensor:
        """Densities [..., m] at x [..., m]."""
        q, below = self._lines()
        depth, scale, left = self._beyond(x)
        tail = self._tail / scale * (-depth / scale).exp()
        return torch.where(depth > 0, tail, slope(q, below, x))

    def cdf(self, x: Tensor) -> Tensor:
        """Cumulative probabilities [..., m] at x [..., m]."""
        q, below = self._lines()
        depth, scale, left = self._beyond(x)
        tail = self._tail * (-depth / scale).exp()
        return torch.where(depth > 0, torch.where(left, tail, 1 - tail), cumulative(q, below, x))

    def quantile(self, probability: Tensor) -> Tensor:
        """Numbers [..., m] below which probabilities [..., m], in [0, 1], lie."""
        q, below = self._lines()
        left, right = self._scales
        low = q[..., :1] + left * (probability / self._tail).clamp(max=1).log()
        high = q[..., -1:] - right * ((1 - probability) / self._tail).clamp(max=1).log()
        middle = inverse(q, below, probability)
        return torch.where(probability < self._tail, low, torch.where(probability > 1 - self._tail, high, middle))

    def crps(self, true: Tensor) -> Tensor:
        """Scores [...] of true numbers [...], tails included; NaN, with gradients of 0, where they are NaN."""
        known, y = self._known(true)
        q, below = self._lines()
        found = crps_between(q, below, y)
        for distance, scale in zip((q[..., 0] - y, y - q[..., -1]), self._scales, strict=True):
            depth, s = distance.clamp(min=0), scale[..., 0]
            # The integral of the squared tail, and of what changes between the last quantile and a truth beyond it.
            found = found + self._tail**2 * s / 2 + depth + 2 * self._tail * s * torch.expm1(-depth / s)
        return torch.where(known, found, torch.nan)

    def score(self, true: Tensor) -> Tensor:
        """Losses [...] of true numbers [...]: see the module; NaN, with gradients of 0, where they are NaN."""
        known, y = self._known(true)
        above = y[..., None] - self.quantiles
        losses = 2 * torch.maximum(self.levels * above, (self.levels - 1) * above).mean(-1)
        return torch.where(known, losses, torch.nan)

    @property
    def _tail(self) -> float:
        """Probability of each tail."""
        return 0.5 / self.quantiles.shape[-1]

    @property
    def _scales(self) -> tuple[Tensor, Tensor]:
        """Lengths [..., 1] over which the left and the right tail fall by e, so that the density is continuous."""
        width = widths(self.quantiles)
        return width[..., :1] / 2, width[..., -1:] / 2

    def _beyond(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far [..., m] x lies beyond the quantiles, 0 within them; its tail's length; whether that is the left one."""
        left = x < self.quantiles[..., :1]
        depth = torch.maximum(self.quantiles[..., :1] - x, x - self.quantiles[..., -1:]).clamp(min=0)
        return depth, torch.where(left, *self._scales), left

    def _lines(self) -> tuple[Tensor, Tensor]:
        return self.quantiles, self.levels.expand_as(self.quantiles)

    def _known(self, true: Tensor) -> tuple[Tensor, Tensor]:
        known = ~true.isnan()
        return known, torch.where(known, true.to(self.quantiles.dtype), self.quantiles[..., 0].detach())

    def _half(self) -> Tensor:
        return torch.full_like(self.quantiles[..., 0], 0.5)
