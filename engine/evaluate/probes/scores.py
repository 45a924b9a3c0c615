"""How well a label is predicted: R2, scatter, outliers and bias, with bootstrap errors and paired comparisons.

For redshifts the residual is dz = (predicted - true) / (1 + true), as is usual for photometric redshifts; for any other
label it is the plain difference. R2 always uses plain differences.

Bias has two forms: the median of dz tells of most galaxies, the mean also of the failures, which is what lensing and
clustering feel. They know only the predicted redshift, so `tomographic_bias` takes bins of that.

Shape legend: M test samples, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = [
    "CATASTROPHIC",
    "BiasBin",
    "Difference",
    "Scores",
    "interval95",
    "paired_difference",
    "r2",
    "r2_with_error",
    "residuals",
    "score",
    "tomographic_bias",
]

MAD_TO_SIGMA = 1.4826
RESAMPLES = 1000
BLOCK = 2**21  # numbers that a bootstrap holds at a time, so that a million test samples fit into memory

CATASTROPHIC = 0.15
"""Size of dz above which a redshift is a catastrophic error; their share is eta (Ilbert et al. 2006, A&A 457, 841)."""


@dataclass(frozen=True)
class Scores:
    """Quality of one set of predictions; fields that end in `_se` are bootstrap standard errors over test samples.

    Attributes:
        samples: Test samples M.
        r2: Coefficient of determination; NaN where the label is constant, so that it is undefined.
        nmad: 1.4826 times the median absolute deviation of the residuals from their median.
        outliers: Share of residuals larger in size than `outlier_threshold`; NaN where there is no threshold.
        bias: Median residual.
        mean_bias: Mean residual.
        catastrophic: Share of redshifts with |dz| above `CATASTROPHIC`; NaN for other labels.
        outlier_threshold: What counts as an outlier; None for labels where nothing does.
        note: Why a number is missing; empty where none is.
    """

    samples: int
    r2: float
    r2_se: float
    nmad: float
    nmad_se: float
    outliers: float
    outliers_se: float
    bias: float
    bias_se: float
    mean_bias: float
    mean_bias_se: float
    catastrophic: float
    catastrophic_se: float
    outlier_threshold: float | None
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """First method's R2 minus the second's, on the same test samples.

    Attributes:
        value: The difference.
        se: Bootstrap standard error, resampling test samples for both methods together.
        low: 2.5% quantile of the bootstrap.
        high: 97.5% quantile of the bootstrap.
    """

    value: float
    se: float
    low: float
    high: float


@dataclass(frozen=True)
class BiasBin:
    """Bias of the redshifts in one bin of predicted redshift.

    Attributes:
        low: Least predicted redshift in it.
        high: Greatest predicted redshift in it.
        predicted: Mean predicted redshift.
        samples: Galaxies in it.
        bias: Mean of dz.
        error: Standard error of that mean; NaN for one galaxy.
    """

    low: float
    high: float
    predicted: float
    samples: int
    bias: float
    error: float


def residuals(true: np.ndarray, predicted: np.ndarray, *, redshift: bool) -> np.ndarray:
    """[M] predicted minus true, divided by 1 + true for redshifts."""
    return (predicted - true) / (1 + true) if redshift else predicted - true


def r2(true: np.ndarray, predicted: np.ndarray) -> float:
    """1 - sum (predicted - true)^2 / sum (true - mean)^2; NaN where the label is constant."""
    true, predicted = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
    if np.ptp(true) == 0:
        return float("nan")
    return float(1 - ((predicted - true) ** 2).sum() / ((true - true.mean()) ** 2).sum())


def r2_with_error(
    true: np.ndarray, predicted: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """R2 and its bootstrap standard error of [M] finite labels and predictions, both NaN where the label is constant.

    Raises:
        ValueError: The arrays are empty, differ in length or hold non-finite numbers.
    """
    true, predicted = _checked(true, predicted)
    if np.ptp(true) == 0:
        return math.nan, math.nan
    squared = (predicted - true) ** 2
    return r2(true, predicted), _spread(_bootstrap(len(true), resamples, seed, lambda p: _r2_of(true, squared, p)))


def score(
    true: np.ndarray,
    predicted: np.ndarray,
    *,
    redshift: bool = True,
    outlier_threshold: float | None = 0.05,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Score predictions of one label.

    Args:
        true: [M] finite labels.
        predicted: [M] finite predictions.
        redshift: Divide residuals by 1 + true.
        outlier_threshold: Size of a residual that counts as an outlier; None for no such count.
        resamples: Bootstrap resamples.
        seed: Keys the bootstrap.

    Raises:
        ValueError: The arrays are empty, differ in length or hold non-finite numbers, a redshift is -1 or less, or
            `outlier_threshold` is not positive.
    """
    true, predicted = _checked(true, predicted)
    if outlier_threshold is not None and not outlier_threshold > 0:
        raise ValueError(f"outlier_threshold: must be positive, got {outlier_threshold}")
    if redshift and true.min() <= -1:
        raise ValueError(f"redshift labels must be greater than -1, got {true.min():g}")
    dz = residuals(true, predicted, redshift=redshift)
    squared = (predicted - true) ** 2
    constant = np.ptp(true) == 0
    outlying = np.full(len(dz), np.nan) if outlier_threshold is None else (np.abs(dz) > outlier_threshold).astype(float)
    far = (np.abs(dz) > CATASTROPHIC).astype(float) if redshift else np.full(len(dz), np.nan)

    def statistics(picks: np.ndarray) -> np.ndarray:
        drawn = dz[picks]
        middle = np.median(drawn, axis=1)
        nmad = MAD_TO_SIGMA * np.median(np.abs(drawn - middle[:, None]), axis=1)
        quality = _r2_of(true, squared, picks)
        return np.stack([quality, nmad, outlying[picks].mean(1), middle, drawn.mean(1), far[picks].mean(1)])

    spread = [_spread(row) for row in _bootstrap(len(true), resamples, seed, statistics)]
    return Scores(
        samples=len(true),
        r2=r2(true, predicted),
        r2_se=math.nan if constant else spread[0],
        nmad=float(MAD_TO_SIGMA * np.median(np.abs(dz - np.median(dz)))),
        nmad_se=spread[1],
        outliers=float(outlying.mean()),
        outliers_se=spread[2],
        bias=float(np.median(dz)),
        bias_se=spread[3],
        mean_bias=float(dz.mean()),
        mean_bias_se=spread[4],
        catastrophic=float(far.mean()),
        catastrophic_se=spread[5],
        outlier_threshold=outlier_threshold,
        note=f"R2 is undefined: all {len(true)} test labels equal {true[0]:g}" if constant else "",
    )


def tomographic_bias(true: np.ndarray, predicted: np.ndarray, *, bins: int = 5) -> tuple[BiasBin, ...]:
    """Mean dz in bins of predicted redshift that hold about equally many galaxies.

    These are the bins in which lensing surveys use photometric redshifts, five for the sources of LSST, and their means
    are what its requirements are about: to be known within 0.002 (1 + z) after one year, 0.001 (1 + z) after ten (LSST
    DESC Science Requirements Document, arXiv:1809.01669). The bias itself may be larger where it is calibrated. The
    largest bias of several bins is larger than 0 by chance alone: compare it with its error.

    Args:
        true: [M] redshifts above -1.
        predicted: [M] predictions.
        bins: How many; equal predictions stay together, so there may be fewer.

    Returns:
        The bins, by increasing redshift.

    Raises:
        ValueError: The arrays are empty, differ in length or hold non-finite numbers, a redshift is -1 or less, or
            there are fewer samples than bins.
    """
    true, predicted = _checked(true, predicted)
    if not 1 <= bins <= len(true):
        raise ValueError(f"bins: must lie between 1 and the {len(true)} samples, got {bins}")
    if true.min() <= -1:
        raise ValueError(f"redshift labels must be greater than -1, got {true.min():g}")
    dz = residuals(true, predicted, redshift=True)
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)))
    which = np.searchsorted(edges[1:-1], predicted, side="right")
    found = []
    for number in np.unique(which):
        inside = which == number
        count, p, d = int(inside.sum()), predicted[inside], dz[inside]
        error = float(d.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
        found.append(BiasBin(float(p.min()), float(p.max()), float(p.mean()), count, float(d.mean()), error))
    return tuple(found)


def paired_difference(
    true: np.ndarray, first: np.ndarray, second: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Compare two methods by R2 on the same test samples.

    Args:
        true: [M] labels.
        first: [M] predictions of the method whose R2 comes first.
        second: [M] predictions of the other.
        resamples: Bootstrap resamples, each applied to both methods.
        seed: Keys the bootstrap.

    Raises:
        ValueError: The arrays are empty, differ in length or hold non-finite numbers.
    """
    _, first = _checked(true, first)
    true, second = _checked(true, second)
    value = r2(true, first) - r2(true, second)
    if np.ptp(true) == 0:
        return Difference(value, float("nan"), float("nan"), float("nan"))
    errors = (first - true) ** 2, (second - true) ** 2
    drawn = _bootstrap(len(true), resamples, seed, lambda p: _r2_of(true, errors[0], p) - _r2_of(true, errors[1], p))
    drawn = drawn[np.isfinite(drawn)]
    return Difference(value, _spread(drawn), *interval95(drawn))


def interval95(drawn: np.ndarray) -> tuple[float, float]:
    """The interval that holds the middle 95 % of bootstrap draws [R]; NaN where there are none."""
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    return float(low), float(high)


def _checked(true: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    true, predicted = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
    if true.ndim != 1 or true.shape != predicted.shape or not len(true):
        raise ValueError(f"labels and predictions: need two equal, non-empty rows, got {true.shape}, {predicted.shape}")
    for name, values in (("labels", true), ("predictions", predicted)):
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"{name}: {bad} of {len(values)} are not finite; drop those samples first")
    return true, predicted


def _bootstrap(count: int, resamples: int, seed: int, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[..., R] statistics of resamples, of which `statistic` is given some at a time as [r, count] indices."""
    if resamples < 1:
        raise ValueError(f"resamples: must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    size = max(1, BLOCK // count)
    blocks = [min(size, resamples - start) for start in range(0, resamples, size)]
    return np.concatenate([statistic(rng.integers(0, count, (block, count))) for block in blocks], axis=-1)


def _r2_of(true: np.ndarray, squared: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """R2 of every resample; NaN for one in which the label happens to be constant."""
    drawn = true[picks]
    total = ((drawn - drawn.mean(1, keepdims=True)) ** 2).sum(1)
    return 1 - squared[picks].sum(1) / np.where(total > 0, total, np.nan)


def _spread(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std()) if len(finite) > 1 else float("nan")
