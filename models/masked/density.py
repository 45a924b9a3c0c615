"""What a distribution of one number is, as a head of a network predicts it.

Every kind has a loss that is a proper score: its expectation is least for the distribution that the numbers are drawn from.
Parameters are brought to float32 before anything is computed of them, so that a network may run in bfloat16.

Shape legend: [...] one distribution each: [B] of a scalar, [B, e] of the entries of a vector, independent of each other; m
numbers asked of each distribution, S draws of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["Density", "PointDensity", "known_mean", "whole_precision"]


def whole_precision(parameters: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they are."""
    return parameters.to(torch.promote_types(parameters.dtype, torch.float32))


def known_mean(scores: Tensor) -> Tensor:
    """Mean of the scores that are not NaN; 0, with gradients of 0, where all are."""
    known = ~scores.isnan()
    return torch.where(known, scores, 0).sum() / known.sum().clamp(min=1)


class Density(ABC):
    """Distributions of real numbers, each on its own."""

    @abstractmethod
    def pdf(self, x: Tensor) -> Tensor:
        """Densities [..., m], per unit, at x [..., m]."""

    @abstractmethod
    def cdf(self, x: Tensor) -> Tensor:
        """Cumulative probabilities [..., m] at x [..., m]."""

    @abstractmethod
    def quantile(self, probability: Tensor) -> Tensor:
        """Numbers [..., m] below which probabilities [..., m], in [0, 1], lie."""

    @abstractmethod
    def crps(self, true: Tensor) -> Tensor:
        """Continuous ranked probability scores [...] of true numbers [...], in their unit; NaN where they are NaN."""

    @abstractmethod
    def score(self, true: Tensor) -> Tensor:
        """What this kind of distribution is trained by: a proper score [...] of true numbers [...]; NaN where they are NaN.

        Gradients are finite, and 0 where a truth is NaN.
        """

    def loss(self, true: Tensor) -> Tensor:
        """Mean score, a scalar, of the true numbers [...] that are known (not NaN); 0 where none is."""
        return known_mean(self.score(true))

    def draw(self, uniform: Tensor) -> Tensor:
        """Draws [..., S] of uniform numbers [..., S] on (0, 1), which should be float64: float32 rounds tails to 0 and 1."""
        return self.quantile(uniform)

    def median(self) -> Tensor:
        """[...] medians."""
        return self.quantile(self._half()[..., None])[..., 0]

    def pit(self, true: Tensor) -> Tensor:
        """[...] cumulative probabilities of the true numbers [...]: uniform, if the distributions are calibrated."""
        return self.cdf(true[..., None])[..., 0]

    @abstractmethod
    def _half(self) -> Tensor:
        """[...] of .5, in the parameters' dtype and on their device."""


class PointDensity(Density):
    """One number without an uncertainty: all probability lies at it. Trained by the absolute error, which is its CRPS.

    Args:
        value: [...] predicted numbers.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = whole_precision(value)

    def pdf(self, x: Tensor) -> Tensor:
        """Infinite at the number, 0 elsewhere."""
        return torch.where(x == self.value[..., None], torch.inf, 0.0)

    def cdf(self, x: Tensor) -> Tensor:
        """0 below the number, 1 from it on; NaN where x is NaN."""
        return torch.where(x.isnan(), x, (x >= self.value[..., None]).to(x.dtype))

    def quantile(self, probability: Tensor) -> Tensor:
        """The number, for every probability."""
        return self.value[..., None].expand(*self.value.shape, probability.shape[-1])

    def crps(self, true: Tensor) -> Tensor:
        """Absolute errors [...]."""
        # Not `abs` of a NaN: its gradient would be a NaN, even where it is multiplied by 0.
        known = ~true.isnan()
        return torch.where(known, (torch.where(known, true, self.value.detach()) - self.value).abs(), torch.nan)

    def score(self, true: Tensor) -> Tensor:
        """Absolute errors [...]."""
        return self.crps(true)

    def _half(self) -> Tensor:
        return torch.full_like(self.value, 0.5)
