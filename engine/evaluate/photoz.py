"""How well a label is predicted: R2, scatter, outliers and bias, with bootstrap errors and paired comparisons.

For redshifts the residual is dz = (predicted - true) / (1 + true), as is usual for photometric redshifts; for any other
label it is the plain difference. R2 always uses plain differences.

Shape legend: M test samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Difference", "Scores", "paired_difference", "r2", "residuals", "score"]

MAD_TO_SIGMA = 1.4826
RESAMPLES = 1000


@dataclass(frozen=True)
class Scores:
    """Quality of one set of predictions; `se` fields are bootstrap standard errors over test samples.

    Attributes:
        samples: Test samples M.
        r2: Coefficient of determination; NaN where the label is constant, so that it is undefined.
        r2_se: Its standard error.
        nmad: 1.4826 times the median absolute deviation of the residuals from their median.
        nmad_se: Its standard error.
        outliers: Share of residuals larger in size than `outlier_threshold`; NaN where there is no threshold.
        outliers_se: Its standard error.
        bias: Median residual.
        bias_se: Its standard error.
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


def residuals(true: np.ndarray, predicted: np.ndarray, *, redshift: bool) -> np.ndarray:
    """[M] predicted minus true, divided by 1 + true for redshifts."""
    return (predicted - true) / (1 + true) if redshift else predicted - true


def r2(true: np.ndarray, predicted: np.ndarray) -> float:
    """1 - sum (predicted - true)^2 / sum (true - mean)^2; NaN where the label is constant."""
    true, predicted = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
    if np.ptp(true) == 0:
        return float("nan")
    return float(1 - ((predicted - true) ** 2).sum() / ((true - true.mean()) ** 2).sum())


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
    picks = _resamples(len(true), resamples, seed)
    squared = (predicted - true) ** 2

    def nmad(d: np.ndarray) -> np.ndarray:
        return MAD_TO_SIGMA * np.median(np.abs(d - np.median(d, axis=-1, keepdims=True)), axis=-1)

    constant = np.ptp(true) == 0
    outlying = np.full(len(dz), np.nan) if outlier_threshold is None else (np.abs(dz) > outlier_threshold).astype(float)
    drawn = dz[picks]
    return Scores(
        samples=len(true),
        r2=r2(true, predicted),
        r2_se=float("nan") if constant else _spread(_r2_of(true, squared, picks)),
        nmad=float(nmad(dz)),
        nmad_se=_spread(nmad(drawn)),
        outliers=float(outlying.mean()),
        outliers_se=_spread(outlying[picks].mean(1)),
        bias=float(np.median(dz)),
        bias_se=_spread(np.median(drawn, axis=1)),
        outlier_threshold=outlier_threshold,
        note=f"R2 is undefined: all {len(true)} test labels equal {true[0]:g}" if constant else "",
    )


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
    picks = _resamples(len(true), resamples, seed)
    drawn = _r2_of(true, (first - true) ** 2, picks) - _r2_of(true, (second - true) ** 2, picks)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    return Difference(value, _spread(drawn), float(low), float(high))


def _checked(true: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    true, predicted = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
    if true.ndim != 1 or true.shape != predicted.shape or not len(true):
        raise ValueError(f"labels and predictions: need two equal, non-empty rows, got {true.shape}, {predicted.shape}")
    for name, values in (("labels", true), ("predictions", predicted)):
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"{name}: {bad} of {len(values)} are not finite; drop those samples first")
    return true, predicted


def _resamples(count: int, resamples: int, seed: int) -> np.ndarray:
    if resamples < 1:
        raise ValueError(f"resamples: must be at least 1, got {resamples}")
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def _r2_of(true: np.ndarray, squared: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """R2 of every resample; NaN for one in which the label happens to be constant."""
    drawn = true[picks]
    total = ((drawn - drawn.mean(1, keepdims=True)) ** 2).sum(1)
    return 1 - squared[picks].sum(1) / np.where(total > 0, total, np.nan)


def _spread(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std()) if len(finite) > 1 else float("nan")
