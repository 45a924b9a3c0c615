"""Are posteriors calibrated? PIT, interval and TARP coverage, CRPS and energy score, from posterior draws.

A posterior is calibrated if the truth is, statistically, one more draw of it. Everything here is built on that: among S
draws the truth's rank is uniform on 0..S, and `(rank + u) / (S + 1)`, u uniform on [0, 1), is exactly uniform on [0, 1).

Shape legend: M samples, S draws of the posterior of each, P parameters, G points of a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = [
    "Coverage",
    "Uniformity",
    "chance_deviation",
    "crps",
    "energy_score",
    "interval_coverage",
    "pit",
    "pit_on_grid",
    "tarp",
    "uniformity",
]


class Uniformity(NamedTuple):
    """Kolmogorov-Smirnov test of numbers against the uniform distribution on [0, 1].

    Attributes:
        deviation: Largest distance of their cumulative distribution from the diagonal.
        p_value: Probability of a larger one, were they uniform.
    """

    deviation: float
    p_value: float


@dataclass(frozen=True)
class Coverage:
    """Expected coverage of credible regions.

    Attributes:
        credibility: [A] probability that a region claims to hold, 0 to 1.
        expected: [A] fraction of samples whose truth lies in it.
        low: [A] 2.5% quantile of `expected` over bootstraps of the samples.
        high: [A] 97.5% quantile.
        test: Largest |expected - credibility| over all credibilities, and its p-value.
        samples: M.
    """

    credibility: np.ndarray
    expected: np.ndarray
    low: np.ndarray
    high: np.ndarray
    test: Uniformity
    samples: int


def pit(draws: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[M, P] probability integral transform of the truth: its randomised rank among the draws of each parameter.

    Args:
        draws: [M, S, P] posterior draws.
        truth: [M, P] true parameters.
        rng: Breaks the discreteness of ranks, and ties.

    Raises:
        ValueError: Shapes disagree or numbers are not finite.
    """
    draws, truth = _checked(draws, truth)
    return _rank(draws, truth[:, None], rng)


def pit_on_grid(grid: np.ndarray, cdf: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[M] PIT by linear interpolation of cumulative distributions; 0 or 1 for a truth beyond the grid.

    Args:
        grid: [G] ascending values.
        cdf: [M, G] cumulative probability at them.
        truth: [M] true values.

    Raises:
        ValueError: Shapes disagree, or the grid does not ascend.
    """
    if grid.ndim != 1 or cdf.shape != (len(truth), len(grid)):
        raise ValueError(f"shapes: need [G], [M, G] and [M], got {grid.shape}, {cdf.shape} and {truth.shape}")
    if not (np.diff(grid) > 0).all():
        raise ValueError("grid: must ascend strictly")
    return np.array([np.interp(t, grid, c, left=0.0, right=1.0) for t, c in zip(truth, cdf, strict=True)], np.float64)


def uniformity(values: np.ndarray) -> Uniformity:
    """Kolmogorov-Smirnov test against the uniform distribution on [0, 1].

    Args:
        values: [M] PIT values or coverages.

    Raises:
        ValueError: There are none, or they are not finite.
    """
    from scipy.stats import kstest

    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values: need one or more finite numbers, got shape {values.shape}")
    found = kstest(values, "uniform")
    return Uniformity(float(found.statistic), float(found.pvalue))


def chance_deviation(samples: int, probability: float = 0.95) -> float:
    """Deviation that a calibrated posterior stays below with the given probability (Kolmogorov's, for that many samples).

    Args:
        samples: M.
        probability: How often.

    Raises:
        ValueError: There are no samples.
    """
    from scipy.stats import kstwo

    if samples < 1:
        raise ValueError(f"samples: need one or more, got {samples}")
    return float(kstwo.ppf(probability, samples))


def interval_coverage(pit_values: np.ndarray, level: float) -> tuple[float, float]:
    """Fraction of truths in the central credible interval, and its binomial standard error at the nominal level.

    Args:
        pit_values: [M] PIT of one parameter.
        level: Probability of the interval, 0.68 or 0.95.

    Raises:
        ValueError: The level is no probability, or there are no values.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: must lie between 0 and 1, got {level}")
    if not len(pit_values):
        raise ValueError("pit_values: need one or more, got none")
    inside = np.abs(np.asarray(pit_values) - 0.5) <= level / 2
    return float(inside.mean()), math.sqrt(level * (1 - level) / len(inside))


def tarp(draws: np.ndarray, truth: np.ndarray, rng: np.random.Generator, *, bootstraps: int = 200) -> Coverage:
    """Coverage tested with random points (TARP; Lemos et al. 2023, arXiv:2302.03026).

    Around a random reference point of each sample, the ball that reaches the truth holds a fraction f of the draws. For
    a calibrated posterior f is uniform, in any number of dimensions. Parameters are standardised by the truths' mean
    and spread and references are uniform over the truths' range, independent of the sample (so a posterior that
    ignores its data but equals the prior passes, too: coverage is necessary, not sufficient). A width that is wrong by a
    factor of two shows at once; a shift partly cancels between references on either side of it, and PIT sees it better.

    Args:
        draws: [M, S, P] posterior draws.
        truth: [M, P] true parameters.
        rng: Of references, ties and bootstraps.
        bootstraps: Resamplings of the M samples for the band.

    Raises:
        ValueError: Shapes disagree, numbers are not finite, or a parameter's truths are all equal.
    """
    draws, truth = _checked(draws, truth)
    if bootstraps < 1:
        raise ValueError(f"bootstraps: must be positive, got {bootstraps}")
    mean, spread = truth.mean(0), truth.std(0)
    if not (spread > 0).all():
        raise ValueError(
            f"truth: parameter {int(np.argmin(spread))} is equal in all samples; coverage has no scale for it"
        )
    t, d = (truth - mean) / spread, (draws - mean) / spread
    reference = rng.uniform(t.min(0), t.max(0), t.shape)
    reach = np.linalg.norm(t - reference, axis=1)
    distance = np.linalg.norm(d - reference[:, None], axis=2)
    fraction = _rank(distance, reach[:, None], rng)
    credibility = np.linspace(0, 1, 51)
    resampled = fraction[rng.integers(len(t), size=(bootstraps, len(t)))]
    band = np.stack([_below(f, credibility) for f in resampled])
    low, high = np.quantile(band, [0.025, 0.975], axis=0)
    return Coverage(credibility, _below(fraction, credibility), low, high, uniformity(fraction), len(t))


def crps(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[M, P] continuous ranked probability score of each parameter, in its units, smaller is better.

    The fair estimator E|X - y| - E|X - X'| / 2 with X != X' (Ferro 2014): unbiased for any number of draws. It reduces
    to the absolute error for a posterior without width.

    Args:
        draws: [M, S, P] posterior draws, two or more.
        truth: [M, P] true parameters.

    Raises:
        ValueError: Shapes disagree, numbers are not finite, or there is one draw.
    """
    draws, truth = _checked(draws, truth, least=2)
    count = draws.shape[1]
    # The sum of |x_i - x_j| over pairs i < j of sorted x is that of (2 i - n + 1) x_i: no S x S table.
    weight = (2 * np.arange(count) - count + 1)[None, :, None]
    pairs = (weight * np.sort(draws, axis=1)).sum(1) / (count * (count - 1) / 2)
    return np.abs(draws - truth[:, None]).mean(1) - pairs / 2


def energy_score(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[M] energy score, the CRPS of all parameters jointly with Euclidean distances (Gneiting & Raftery 2007), fair.

    Standardise the parameters first: distances add their squares.

    Args:
        draws: [M, S, P] posterior draws, two or more.
        truth: [M, P] true parameters.

    Raises:
        ValueError: Shapes disagree, numbers are not finite, or there is one draw.
    """
    from scipy.spatial.distance import pdist

    draws, truth = _checked(draws, truth, least=2)
    to_truth = np.linalg.norm(draws - truth[:, None], axis=2).mean(1)
    return to_truth - np.array([pdist(d).mean() for d in draws]) / 2


def _rank(values: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Randomised rank of truth [M, 1, ...] among values [M, S, ...] as a number in [0, 1); a tie is a coin's toss."""
    below, equal = (values < truth).sum(1), (values == truth).sum(1)
    rank = below + rng.integers(0, equal + 1)
    return (rank + rng.random(rank.shape)) / (values.shape[1] + 1)


def _below(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(values), levels, side="right") / len(values)


def _checked(draws: np.ndarray, truth: np.ndarray, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    # In C order, so that distances of equal vectors are sums in the same order.
    draws, truth = np.ascontiguousarray(draws, np.float64), np.ascontiguousarray(truth, np.float64)
    if draws.ndim != 3 or truth.shape != (draws.shape[0], draws.shape[2]) or not truth.size:
        raise ValueError(f"shapes: need draws [M, S, P] and truths [M, P], got {draws.shape} and {truth.shape}")
    if draws.shape[1] < least:
        raise ValueError(f"draws: need {least} or more of each sample, got {draws.shape[1]}")
    for name, values in (("draws", draws), ("truth", truth)):
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"{name}: {bad} of {values.size} numbers are not finite")
    return draws, truth
