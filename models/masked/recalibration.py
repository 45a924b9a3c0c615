r"""Distributions whose probabilities are corrected by how often the truth fell where: R(F(x)) in place of F(x).

R is the cumulative distribution of the PIT values F(y) of samples that were not trained on, linear between its K quantiles. If
the PIT was uniform, R(p) = p and nothing changes; if half of the truths lay outside of 68 % intervals, intervals grow.

Shape legend: [...] distributions, K steps of R, M samples to fit on, m numbers asked of each distribution, S draws.

Source: Kuleshov, Fenner and Ermon 2018 (arXiv:1807.00263), algorithm 1, with quantiles in place of isotonic regression. Draws
that keep their order: ensemble copula coupling, Schefzik, Thorarinsdottir and Gneiting 2013 (arXiv:1302.7149), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.models.masked.density import Density, whole_precision
from armillary.models.masked.piecewise_linear import cumulative, inverse, slope

__all__ = ["RecalibratedDensity", "coupled", "recalibration"]

SCORED = 100
"""Quantiles that the CRPS is integrated over."""

CERTAIN = 1e-6
"""Probabilities nearer to 0 or 1 are taken for this: where all truths lay beyond a distribution, quantiles stay finite."""


def recalibration(pit: Tensor, steps: int = 20) -> Tensor:
    """Fit R.

    Args:
        pit: [M, ...] PIT values of each kind of distribution, NaN where the truth is unknown.
        steps: K; a step holds M / K of the samples, which sets the noise of R.

    Returns:
        [..., K + 1] quantiles of the PIT from 0 to 1, of the PIT's dtype: what `RecalibratedDensity` takes.

    Raises:
        ValueError: Fewer than 2 K truths are known of one of them.
    """
    fewest = int((~pit.isnan()).sum(0).min())
    if fewest < 2 * steps:
        raise ValueError(f"recalibration: {steps} steps need {2 * steps} or more known truths, got {fewest}")
    levels = torch.linspace(0, 1, steps + 1, dtype=pit.dtype, device=pit.device)
    found = pit.nanquantile(levels, dim=0).movedim(0, -1).clamp(CERTAIN, 1 - CERTAIN)
    found[..., 0], found[..., -1] = 0, 1
    return found


def coupled(template: Tensor, margin: Tensor, steps: Tensor) -> Tensor:
    """Draws of corrected distributions, in the order of draws that belong together.

    Args:
        template: [..., S] draws whose order is kept.
        margin: [..., M] other draws, which stand for the distribution that is corrected.
        steps: What `recalibration` gave, [..., K + 1].

    Returns:
        [..., S], the corrected distribution's quantiles at (s + 1/2) / S; its median where S is 1.
    """
    count, size = template.shape[-1], margin.shape[-1]
    middle = (torch.arange(max(count, size), dtype=torch.float64, device=margin.device) + 0.5).to(margin.dtype)
    levels = torch.linspace(0, 1, steps.shape[-1], dtype=margin.dtype, device=margin.device)
    wanted = inverse(
        steps.to(margin), levels.expand(steps.shape), (middle[:count] / count).expand(*steps.shape[:-1], -1)
    )
    ordered = margin.sort(dim=-1).values
    below = (middle[:size] / size).expand_as(ordered)
    quantiles = inverse(ordered, below, wanted.expand(*ordered.shape[:-1], -1))
    return quantiles.gather(-1, template.argsort(dim=-1).argsort(dim=-1))


EDGE = 1e-7
"""Probabilities that float32 tells apart from 0 and 1, where quantiles are infinite."""


class RecalibratedDensity(Density):
    """A distribution with probabilities corrected by R.

    Args:
        density: Distributions [...].
        steps: What `recalibration` gave, [K + 1] or one for each distribution [..., K + 1].
    """

    def __init__(self, density: Density, steps: Tensor) -> None:
        self.density = density
        half = whole_precision(density.median())
        self._knots = steps.to(half).expand(*half.shape, steps.shape[-1])
        self._below = torch.linspace(0, 1, steps.shape[-1]).to(half).expand_as(self._knots)

    def pdf(self, x: Tensor) -> Tensor:
        """Densities [..., m] at x [..., m]."""
        return slope(self._knots, self._below, self.density.cdf(x)) * self.density.pdf(x)

    def cdf(self, x: Tensor) -> Tensor:
        """Cumulative probabilities [..., m] at x [..., m]."""
        return cumulative(self._knots, self._below, self.density.cdf(x))

    def quantile(self, probability: Tensor) -> Tensor:
        """Numbers [..., m] below which probabilities [..., m], in [0, 1], lie; finite ones also for 0 and 1."""
        corrected = inverse(self._knots, self._below, probability)
        return self.density.quantile(corrected.clamp(EDGE, 1 - EDGE))

    def crps(self, true: Tensor) -> Tensor:
        """Scores [...] of true numbers [...], integrated over 100 quantiles; NaN where they are NaN."""
        levels = (torch.arange(SCORED, dtype=self._knots.dtype, device=self._knots.device) + 0.5) / SCORED
        above = true[..., None] - self.quantile(levels.expand(*self._knots.shape[:-1], -1))
        return 2 * torch.maximum(levels * above, (levels - 1) * above).mean(-1)

    def score(self, true: Tensor) -> Tensor:
        """The CRPS."""
        return self.crps(true)

    def _half(self) -> Tensor:
        return self._below[..., 0] + 0.5
