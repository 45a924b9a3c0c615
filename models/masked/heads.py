"""Heads: from a vector of a network to a distribution of each number that it shall predict.

    head = DensityHead(HeadConfig("mixture", 4), dim=128, entries=6)
    density = head.density(head(tokens))                # [B, 6] distributions
    loss = density.loss(true)                           # true [B, 6], NaN where unknown or not asked for
    draws = density.draw(uniforms)                      # [B, 6, S] of uniforms [B, 6, S]

The module's output is one tensor and what it means is worked out outside, because ZeRO follows tensors through modules.

Shape legend: B samples, D width of the network, e entries: numbers to predict, about unit variance each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from armillary.models.masked.binned_density import BinnedDensity
from armillary.models.masked.density import Density, PointDensity
from armillary.models.masked.gaussian_mixture import GaussianMixture
from armillary.models.masked.quantile_density import QuantileDensity
from armillary.models.rules import choices, positive

__all__ = ["DensityHead", "HeadConfig"]


@dataclass(frozen=True)
class HeadConfig:
    """The kind of distribution that a head predicts.

    Attributes:
        kind: mixture of Gaussians, trained by likelihood; quantile, by its quantiles' losses; binned, by CRPS; point, by the
            absolute error.
        size: Gaussians (1: a Gaussian), quantiles or bins; 1 for a point.
        reach: Bins of equal width cover entries from -reach to reach.
    """

    kind: Literal["mixture", "quantile", "binned", "point"] = "mixture"
    size: int = 4
    reach: float = 6.0

    def problems(self, field: str) -> list[str]:
        """Every rule that it breaks, as `field.name: rule, got value`; empty if none."""
        found = choices(self) + positive(self, "reach")
        least = 2 if self.kind in ("quantile", "binned") else 1
        if self.size < least or (self.kind == "point" and self.size != 1):
            rule = "1" if self.kind == "point" else f"at least {least}"
            found.append(f"size: must be {rule} with kind {self.kind}, got {self.size}")
        return [f"{field}.{problem}" for problem in found]

    @property
    def numbers(self) -> int:
        """What describes one distribution: numbers of the network."""
        return 3 * self.size if self.kind == "mixture" else self.size

    def density(self, numbers: Tensor) -> Density:
        """Distributions [...] of a network's numbers [..., `numbers`], which are unbounded."""
        if self.kind == "mixture":
            return GaussianMixture.of_numbers(numbers)
        if self.kind == "quantile":
            return QuantileDensity.of_numbers(numbers)
        if self.kind == "binned":
            return BinnedDensity(torch.linspace(-self.reach, self.reach, self.size + 1), numbers)
        return PointDensity(numbers[..., 0])


class DensityHead(nn.Module):
    """One linear layer.

    Args:
        config: Kind of distribution.
        dim: Width D.
        entries: e.
    """

    def __init__(self, config: HeadConfig, dim: int, entries: int) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(dim, entries * config.numbers)

    def forward(self, hidden: Tensor) -> Tensor:
        """Numbers [..., e, n] of vectors [..., D]: see `density`."""
        return self.linear(hidden).unflatten(-1, (-1, self.config.numbers))

    def density(self, numbers: Tensor) -> Density:
        """Distributions [..., e] of what `forward` gave."""
        return self.config.density(numbers)
