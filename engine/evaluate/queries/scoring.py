"""Errors of answers, what more data take from them, and whether distributions are calibrated.

Residuals are dz / (1 + z) for redshifts, differences of log10 (dex) where a quantity is scaled by log10, else plain differences.

Shape legend: M galaxies, S draws, n components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from armillary.engine.evaluate.posterior.calibration import interval_coverage, pit, uniformity
from armillary.engine.evaluate.probes.scores import interval95
from armillary.engine.evaluate.queries.answers import Answered
from armillary.engine.evaluate.queries.question import Comparison
from armillary.engine.evaluate.study.options import REDSHIFTS
from armillary.models.quantities import Quantity

__all__ = [
    "LEVELS",
    "METRICS",
    "Calibration",
    "Gain",
    "calibration",
    "gain",
    "nmad",
    "query_residuals",
    "residual_unit",
    "rms",
]

LEVELS = (0.68, 0.95)
BLOCK = 1 << 22  # numbers that a bootstrap holds at a time


def nmad(residuals: np.ndarray) -> np.ndarray:
    """[...] 1.4826 times the median absolute deviation from the median, over the last axis."""
    return 1.4826 * np.median(np.abs(residuals - np.median(residuals, axis=-1, keepdims=True)), axis=-1)


def rms(residuals: np.ndarray) -> np.ndarray:
    """[...] root mean square, over the last axis."""
    return np.sqrt(np.square(residuals).mean(-1))


METRICS = {"NMAD": nmad, "RMS": rms}


def residual_unit(quantity: Quantity) -> str:
    """What residuals of a quantity are measured in."""
    if quantity.name.lower() in REDSHIFTS:
        return "dz/(1+z)"
    return "dex" if quantity.scaling.kind == "log10" else quantity.unit


def query_residuals(quantity: Quantity, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[...] residuals; NaN where a logarithm has no value."""
    if quantity.name.lower() in REDSHIFTS:
        return (predicted - truth) / (1 + truth)
    if quantity.scaling.kind == "log10":
        t, p = (np.log10(np.where(x > 0, x, np.nan)) for x in (truth, predicted))
        return p - t
    return predicted - truth


@dataclass(frozen=True)
class Gain:
    """What a second error is below a first one, by one metric, on the same galaxies.

    Attributes:
        metric: Of `METRICS`.
        first: The error that it is compared with.
        second: The other.
        value: 1 - second / first.
        low: 2.5 % quantile over bootstrap resamples of the galaxies, each applied to both.
        high: 97.5 % quantile.
        samples: M.
    """

    metric: str
    first: float
    second: float
    value: float
    low: float
    high: float
    samples: int


def gain(metric: str, first: np.ndarray, second: np.ndarray, resamples: int, seed: int) -> Gain:
    """Compare residuals [M] of the same galaxies.

    Raises:
        ValueError: There are none, or a number is not finite.
    """
    if first.shape != second.shape or not len(first) or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError(f"residuals: need two equal rows of finite numbers, got {first.shape} and {second.shape}")
    of = METRICS[metric]
    rng = np.random.default_rng(seed)
    drawn = []
    for begin in range(0, resamples, size := max(1, BLOCK // len(first))):
        picks = rng.integers(0, len(first), (min(size, resamples - begin), len(first)))
        drawn.append(1 - of(second[picks]) / of(first[picks]))
    a, b = float(of(first)), float(of(second))
    return Gain(metric, a, b, 1 - b / a, *interval95(np.concatenate(drawn)), len(first))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Whether truths lie where an answer's distributions put them.

    Attributes:
        pit: [K] probability integral transforms of all known components of all galaxies.
        deviation: Largest distance of their distribution from the uniform one; of vectors the median over components.
        coverage: Share of truths in the central interval of each of `LEVELS`.
        coverage_error: Standard error of each, as if galaxies were alike and their components one.
        samples: M.
    """

    pit: np.ndarray
    deviation: float
    coverage: tuple[float, ...]
    coverage_error: tuple[float, ...]
    samples: int


def calibration(answered: Answered, seed: int) -> Calibration:
    """PIT and coverage of the draws of an answer."""
    rng = np.random.default_rng(seed)
    columns = []
    for n in range(answered.truth.shape[1]):
        known = np.isfinite(answered.truth[:, n])
        if known.any():
            draws, truth = answered.draws[known][:, :, n : n + 1], answered.truth[known][:, n : n + 1]
            columns.append(pit(draws, truth, rng)[:, 0])
    every = np.concatenate(columns)
    galaxies = len(answered.truth)
    return Calibration(
        every,
        float(np.median([uniformity(c).deviation for c in columns])),
        tuple(interval_coverage(every, level)[0] for level in LEVELS),
        tuple(math.sqrt(level * (1 - level) / galaxies) for level in LEVELS),
        galaxies,
    )


@dataclass(frozen=True)
class Compared:
    """Gains of one model in one comparison.

    Attributes:
        run: Whose views, and whose answers where the model is "answers".
        comparison: What is compared.
        model: "answers", or a supervised model.
        noise: What the run's views do with noise.
        unit: Of the errors.
        gains: By each metric.
    """

    run: str
    comparison: Comparison
    model: str
    noise: str
    unit: str
    gains: tuple[Gain, ...]

    @property
    def title(self) -> str:
        """The model, or the run where it is its own answers."""
        return self.run if self.model == "answers" else self.model


@dataclass(frozen=True, eq=False)
class Judged:
    """Errors and calibration of one query.

    Attributes:
        run: Who answered.
        answered: The answers.
        calibration: Of their draws.
        errors: Of their medians, by metric; of vectors over all components.
        unit: Of the errors.
    """

    run: str
    answered: Answered
    calibration: Calibration
    errors: Mapping[str, float]
    unit: str
