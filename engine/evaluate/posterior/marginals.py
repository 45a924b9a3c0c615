"""How good predicted distributions of one number are: PIT, coverage of central intervals, CRPS, each with its error.

Shape legend: M samples, S draws of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from armillary.engine.evaluate.posterior import calibration
from armillary.models.masked.density import Density

__all__ = ["Interval", "Marginal"]


@dataclass(frozen=True)
class Interval:
    """A central interval.

    Attributes:
        level: Probability that it claims to hold.
        inside: Fraction of truths in it.
        error: Binomial standard error of that fraction, were the claim right.
    """

    level: float
    inside: float
    error: float


@dataclass(frozen=True)
class Marginal:
    """Distributions of one number beside the truths; samples of unknown truth are left out.

    Attributes:
        pit: [M] cumulative probability at the truth: uniform, if calibrated.
        crps: [M] continuous ranked probability score, in the number's unit.
    """

    pit: np.ndarray
    crps: np.ndarray

    @classmethod
    @torch.no_grad()
    def of_density(cls, density: Density, true: torch.Tensor) -> Marginal:
        """Of distributions [M] that a head predicts, exactly.

        Args:
            density: Distributions of M numbers.
            true: [M], in the unit of the distributions, NaN where unknown.

        Raises:
            ValueError: No truth is known.
        """
        known = _known(true.cpu().numpy())
        return cls(*(x.double().cpu().numpy()[known] for x in (density.pit(true), density.crps(true))))

    @classmethod
    def of_draws(cls, draws: np.ndarray, true: np.ndarray, rng: np.random.Generator) -> Marginal:
        """Of draws, such as those of an answer.

        Args:
            draws: [M, S], two or more of each; NaN where a sample has no answer, which leaves it out.
            true: [M], NaN where unknown.
            rng: Breaks the discreteness of ranks.

        Raises:
            ValueError: No truth is known of a sample with an answer, or shapes disagree.
        """
        if draws.ndim != 2 or true.shape != (len(draws),):
            raise ValueError(f"shapes: need draws [M, S] and truths [M], got {draws.shape} and {true.shape}")
        known = _known(np.where(np.isnan(draws).any(1), np.nan, true))
        some, truth = draws[known, :, None], true[known, None]
        return cls(calibration.pit(some, truth, rng)[:, 0], calibration.crps(some, truth)[:, 0])

    @property
    def samples(self) -> int:
        """M."""
        return len(self.pit)

    @property
    def uniformity(self) -> calibration.Uniformity:
        """Largest distance of the PIT from uniform, and how often chance gives a larger one."""
        return calibration.uniformity(self.pit)

    @property
    def mean_crps(self) -> tuple[float, float]:
        """Mean score and its standard error; the error of a single sample is NaN."""
        spread = float(self.crps.std(ddof=1)) if self.samples > 1 else math.nan
        return float(self.crps.mean()), spread / math.sqrt(self.samples)

    def coverage(self, levels: Sequence[float] = (0.68, 0.95)) -> tuple[Interval, ...]:
        """Fractions of truths in central intervals."""
        return tuple(Interval(level, *calibration.interval_coverage(self.pit, level)) for level in levels)


def _known(true: np.ndarray) -> np.ndarray:
    known = ~np.isnan(true)
    if not known.any():
        raise ValueError(f"truth: none of {len(true)} is known")
    return known
