r"""Mixtures of Gaussians; a Gaussian is a mixture of one.

    p(x) = \sum_k w_k N(x; m_k, s_k^2)
    CRPS = \sum_k w_k A(y - m_k, s_k^2) - 1/2 \sum_{jk} w_j w_k A(m_j - m_k, s_j^2 + s_k^2)
    A(d, v) = E|X| of N(d, v) = 2 \sqrt{v} \phi(d / \sqrt{v}) + d (2 \Phi(d / \sqrt{v}) - 1)

Shape legend: [...] distributions, K Gaussians, m numbers asked of each distribution, S draws.

Source of the score: Grimit et al. 2006 (Q. J. R. Meteorol. Soc. 132, 2925), equation 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.special import ndtr, ndtri

from armillary.models.masked.density import Density, whole_precision

__all__ = ["GaussianMixture"]

LEAST_STD = 1e-3
MOST_STEPS = 60
"""Of the iteration for a quantile, if it had to halve its bracket each time; some ten are usual."""

ENOUGH = 1e-10
"""Difference in probability at which it ends."""


class GaussianMixture(Density):
    """Mixtures of K Gaussians each.

    Args:
        log_weight: [..., K], normalised here.
        mean: [..., K].
        std: [..., K], positive.
    """

    def __init__(self, log_weight: Tensor, mean: Tensor, std: Tensor) -> None:
        self.log_weight = whole_precision(log_weight).log_softmax(-1)
        self.mean, self.std = whole_precision(mean), whole_precision(std)

    @classmethod
    def of_numbers(cls, numbers: Tensor) -> GaussianMixture:
        """Read 3 K unbounded numbers [..., 3 K] of a network; where they are 0, means are spread over [-1, 1].

        A standard deviation is softplus(number + .54) + .001: 1 at 0, and never so small that a gradient is lost.
        """
        log_weight, mean, width = whole_precision(numbers).chunk(3, dim=-1)
        count = mean.shape[-1]
        # Gaussians that begin as equals would stay so.
        place = (torch.arange(count, device=mean.device, dtype=mean.dtype) + 0.5) / count * 2 - 1
        return cls(log_weight, mean + place, softplus(width + math.log(math.e - 1)) + LEAST_STD)

    def pdf(self, x: Tensor) -> Tensor:
        """Densities [..., m] at x [..., m]."""
        return self.log_pdf(x).exp()

    def log_pdf(self, x: Tensor) -> Tensor:
        """Logarithms of the densities [..., m] at x [..., m]."""
        z = self._standard(x)
        constant = self.std.log() + math.log(2 * math.pi) / 2
        return (self.log_weight[..., None, :] - z.square() / 2 - constant[..., None, :]).logsumexp(-1)

    def cdf(self, x: Tensor) -> Tensor:
        """Cumulative probabilities [..., m] at x [..., m]."""
        return (self._weight * ndtr(self._standard(x))).sum(-1)

    @torch.no_grad()
    def quantile(self, probability: Tensor) -> Tensor:
        """Numbers [..., m] below which probabilities [..., m], in [0, 1], lie: by iteration, without gradients."""
        each = self.mean[..., None, :] + self.std[..., None, :] * ndtri(probability)[..., None]
        if self.mean.shape[-1] == 1:
            return each[..., 0]
        low, high = each.double().aminmax(dim=-1)
        ends = low.isinf() | high.isinf()
        x, before = (low + high) / 2, torch.ones_like(low)
        weight = self.log_weight.double().softmax(-1)[..., None, :]  # sums to 1 in double precision, too
        for _ in range(MOST_STEPS):
            z = self._standard(x)
            off = (weight * ndtr(z)).sum(-1) - probability
            done = ends | (off.abs() <= ENOUGH)
            if bool(done.all()):
                break
            low, high = torch.where(off < 0, x, low), torch.where(off < 0, high, x)
            # Newton's step while it helps and stays between the two; else half the way.
            slope = ((weight / self.std[..., None, :]) * (-z.square() / 2).exp()).sum(-1) / math.sqrt(2 * math.pi)
            step = x - off / slope
            good = (step >= low) & (step <= high) & (off.abs() <= before / 2)
            x = torch.where(done, x, torch.where(good, step, low + (high - low) / 2))
            before = off.abs()
        return torch.where(ends, each.amin(-1).double(), x).to(each.dtype)

    def draw(self, uniform: Tensor) -> Tensor:
        """Draws [..., S] of uniform numbers [..., S] on (0, 1), float64: each chooses a Gaussian, and a place in it."""
        if self.mean.shape[-1] == 1:
            return self.quantile(uniform)
        # As wide as the draws: where probabilities are rounded to 1, a number above all of them stays in the last Gaussian.
        below = self.log_weight.to(uniform.dtype).exp().cumsum(-1).contiguous()
        chosen = torch.searchsorted(below, uniform.contiguous()).clamp(max=below.shape[-1] - 1)
        weight = self.log_weight.to(uniform.dtype).exp().gather(-1, chosen)
        left = below.gather(-1, chosen) - weight
        tiny = torch.finfo(uniform.dtype).eps
        inside = ((uniform - left) / weight.clamp(min=tiny)).clamp(tiny, 1 - tiny)
        return self.mean.gather(-1, chosen) + self.std.gather(-1, chosen) * ndtri(inside)

    def crps(self, true: Tensor) -> Tensor:
        """Scores [...] of true numbers [...]; NaN, with gradients of 0, where they are NaN."""
        known, y = self._known(true)
        weight, variance = self.log_weight.exp(), self.std.square()
        first = (weight * _absolute(y[..., None] - self.mean, variance)).sum(-1)
        apart = self.mean[..., :, None] - self.mean[..., None, :]
        pairs = _absolute(apart, variance[..., :, None] + variance[..., None, :])
        second = (weight[..., :, None] * weight[..., None, :] * pairs).sum((-1, -2)) / 2
        return torch.where(known, first - second, torch.nan)

    def score(self, true: Tensor) -> Tensor:
        """Negative log-likelihoods [...] of true numbers [...]; NaN, with gradients of 0, where they are NaN."""
        known, y = self._known(true)
        return torch.where(known, -self.log_pdf(y[..., None])[..., 0], torch.nan)

    @property
    def _weight(self) -> Tensor:
        return self.log_weight.exp()[..., None, :]

    def _standard(self, x: Tensor) -> Tensor:
        """[..., m, K] distances of x [..., m] from the means, in standard deviations."""
        return (x[..., None] - self.mean[..., None, :]) / self.std[..., None, :]

    def _known(self, true: Tensor) -> tuple[Tensor, Tensor]:
        known = ~true.isnan()
        return known, torch.where(known, true.to(self.mean.dtype), self.mean[..., 0].detach())

    def _half(self) -> Tensor:
        return torch.full_like(self.mean[..., 0], 0.5)


def _absolute(distance: Tensor, variance: Tensor) -> Tensor:
    """Expected |X| of Gaussians with these means and variances."""
    std = variance.sqrt()
    z = distance / std
    return std * math.sqrt(2 / math.pi) * (-z.square() / 2).exp() + distance * (2 * ndtr(z) - 1)
