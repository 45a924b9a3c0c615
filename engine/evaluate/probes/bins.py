"""Bins of a label: how predictions fare among bright and faint, near and far galaxies.

Shape legend: M test samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from armillary.engine.evaluate.probes.scores import Scores, score

__all__ = ["Stratum", "quantile_strata", "score_strata"]

LEAST = 20  # samples of a bin: an R2 of fewer says nothing


@dataclass(frozen=True)
class Stratum:
    """The test samples in one bin of a label.

    Attributes:
        label: Column of the catalogue.
        low: Least value in the bin.
        high: Greatest value in the bin.
        middle: Median value.
        rows: Places of its samples among the M.
    """

    label: str
    low: float
    high: float
    middle: float
    rows: np.ndarray

    @property
    def name(self) -> str:
        """What tables call it: the label and its range."""
        return f"{self.label} {self.low:.4g} to {self.high:.4g}"


def quantile_strata(label: str, values: np.ndarray, bins: int, *, least: int = LEAST) -> tuple[Stratum, ...]:
    """Bins of equally many samples, by increasing value.

    Args:
        label: Column of the catalogue.
        values: [M], NaN where unknown: those samples are in no bin.
        bins: How many; fewer where a bin would hold fewer than `least` samples. Equal values stay together, and a bin
            that they leave with fewer than `least` is left out.
        least: Fewest samples of a bin.

    Returns:
        The bins; none where there are too few samples for two of them, or all values are equal.

    Raises:
        ValueError: `bins` or `least` is not positive.
    """
    if bins < 1 or least < 1:
        raise ValueError(f"bins, least: must be 1 or more, got {bins} and {least}")
    values = np.asarray(values, np.float64)
    known = np.flatnonzero(np.isfinite(values))
    bins = min(bins, len(known) // least)
    if bins < 2:
        return ()
    edges = np.unique(np.quantile(values[known], np.linspace(0, 1, bins + 1)))[1:-1]
    which = np.searchsorted(edges, values[known], side="right")
    rows = [known[which == number] for number in range(len(edges) + 1)]
    kept = [r for r in rows if len(r) >= least]
    if len(kept) < 2:
        return ()
    return tuple(
        Stratum(label, float(values[r].min()), float(values[r].max()), float(np.median(values[r])), r) for r in kept
    )


def score_strata(
    strata: tuple[Stratum, ...],
    true: np.ndarray,
    predicted: np.ndarray,
    *,
    redshift: bool,
    outlier_threshold: float | None = 0.05,
    resamples: int = 200,
    seed: int = 0,
) -> list[Scores]:
    """Score predictions in each bin; [M] labels and predictions, all else as for `scores.score`.

    R2 compares with the variance inside a bin, so it is lower there than over all samples, and most of all in bins of
    the predicted label itself: NMAD is what can be compared between bins.
    """
    return [
        score(
            true[s.rows],
            predicted[s.rows],
            redshift=redshift,
            outlier_threshold=outlier_threshold,
            resamples=resamples,
            seed=seed,
        )
        for s in strata
    ]
