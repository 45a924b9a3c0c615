"""How good redshifts are: the measures of MMAE's authors, with bootstrap intervals.

    dz = (z_predicted - z_true) / (1 + z_true)

    nmad             1.4826 median |dz - median dz|
    nmad_about_zero  1.4826 median |dz|: the same where there is no bias
    bias             median dz
    outliers         share of |dz| > .15
    catastrophic     share of |z_predicted - z_true| > 1
    rms              root mean square of dz
    loss             mean of 1 - 1 / (1 + (dz / .15)^2)

Shape legend: M galaxies, R resamples.

Source: Himes et al. 2025 (MMAE, arXiv:2510.22527) and its released code; the loss, Tanaka et al. 2018 (arXiv:1704.05988).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from armillary.engine.evaluate.probes.scores import interval95

__all__ = ["METRICS", "RedshiftBin", "Score", "difference_of_nmad", "redshift_bins", "redshift_scores"]

METRICS = ("nmad", "nmad_about_zero", "bias", "outliers", "catastrophic", "rms", "loss")
OUTLIER = 0.15
CATASTROPHIC = 1.0
MAD_TO_SIGMA = 1.4826
BIN = 0.2
LEAST = 20  # galaxies of a bin
BLOCK = 2**21  # numbers that a bootstrap holds at a time


class Score(NamedTuple):
    """A measure with its bootstrap errors over galaxies.

    Attributes:
        value: Of all galaxies.
        error: Standard deviation over resamples.
        low: 2.5 % quantile over resamples.
        high: 97.5 % quantile.
    """

    value: float
    error: float
    low: float
    high: float


class RedshiftBin(NamedTuple):
    """Galaxies with low < z_true <= high; `inside` is [M] bool."""

    low: float
    high: float
    inside: np.ndarray


def redshift_scores(
    true: np.ndarray, predicted: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Score]:
    """Every measure by name.

    Args:
        true: [M] finite redshifts above -1.
        predicted: [M] finite redshifts.
        resamples: Bootstrap resamples R.
        seed: Keys the bootstrap.

    Raises:
        ValueError: There are no galaxies, lengths differ, or numbers are not finite.
    """
    true, predicted = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
    if true.shape != predicted.shape or not true.size or not np.isfinite([true, predicted]).all():
        raise ValueError(
            f"redshifts: need two equal, non-empty rows of finite numbers, got {true.shape}, {predicted.shape}"
        )
    values = _measures(true[None], predicted[None])[:, 0]
    drawn = _bootstrap(len(true), resamples, seed, lambda p: _measures(true[p], predicted[p]))
    return {
        name: Score(float(value), float(draws.std()), *interval95(draws))
        for name, value, draws in zip(METRICS, values, drawn, strict=True)
    }


def difference_of_nmad(
    true: np.ndarray, first: np.ndarray, second: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> Score:
    """NMAD of the first predictions minus that of the second, on the same galaxies [M], resampled together."""
    true, first, second = (np.asarray(x, np.float64) for x in (true, first, second))

    def difference(t: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return _measures(t, a)[:1] - _measures(t, b)[:1]

    value = difference(true[None], first[None], second[None])[0, 0]
    drawn = _bootstrap(len(true), resamples, seed, lambda p: difference(true[p], first[p], second[p]))[0]
    return Score(float(value), float(drawn.std()), *interval95(drawn))


def redshift_bins(true: np.ndarray) -> list[RedshiftBin]:
    """Bins of .2 in true redshift [M] from 0 on, as the authors', that hold 20 galaxies or more."""
    edges = BIN * np.arange(1 + max(1, int(np.ceil(true.max() / BIN - 1e-9))))
    found = [RedshiftBin(float(a), float(b), (true > a) & (true <= b)) for a, b in zip(edges, edges[1:], strict=False)]
    return [b for b in found if b.inside.sum() >= LEAST]


def _measures(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[measures, r] of redshifts [r, M]."""
    dz = (predicted - true) / (1 + true)
    middle = np.median(dz, axis=1)
    size = np.abs(dz)
    scaled = (dz / OUTLIER) ** 2
    return np.stack(
        [
            MAD_TO_SIGMA * np.median(np.abs(dz - middle[:, None]), axis=1),
            MAD_TO_SIGMA * np.median(size, axis=1),
            middle,
            (size > OUTLIER).mean(1),
            (np.abs(predicted - true) > CATASTROPHIC).mean(1),
            np.sqrt((dz**2).mean(1)),
            (scaled / (1 + scaled)).mean(1),
        ]
    )


def _bootstrap(count: int, resamples: int, seed: int, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[measures, R] of resamples, of which `statistic` is given some at a time as [r, M] indices."""
    rng = np.random.default_rng(seed)
    size = max(1, BLOCK // count)
    blocks = [min(size, resamples - start) for start in range(0, resamples, size)]
    return np.concatenate([statistic(rng.integers(0, count, (block, count))) for block in blocks], axis=1)
