"""Scores of variants and their paired differences, with intervals that hold both chances: of the galaxies, and of training.

Galaxies are drawn anew together for all runs, so that a difference is one on the same galaxies; training differs from seed to
seed, and runs of equal seeds are paired. With n shared seeds, s the standard deviation of the seeds' differences and e their mean's
bootstrap error over galaxies, half of the 95 % interval is

    sqrt( (1.96 e)^2 + (t s)^2 / n )        t: Student's for n - 1 degrees of freedom

One shared seed leaves the first term alone: an interval that does not know how much training scatters.

Shape legend: M galaxies, P runs, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from armillary.engine.evaluate.ablation.variants import Variant
from armillary.engine.evaluate.morphology.task import weighted_f1

__all__ = ["Difference", "Scored", "difference", "is_classes", "most_frequent", "score_runs"]

MOST_CLASSES = 20

Score = Callable[[np.ndarray], np.ndarray]
"""[P] scores of runs with galaxies weighted by [M]."""


@dataclass(frozen=True)
class Scored:
    """Scores of one target by all runs.

    Attributes:
        target: The label.
        metric: "r2", or "f1" (weighted) for classes.
        values: Score by the run's name.
        drawn: [R] the same on resampled galaxies, by the run's name; empty where only the scores are known.
        samples: Galaxies M whose label is known.
        baseline: Score of the most frequent class; 0 of the mean.
    """

    target: str
    metric: str
    values: Mapping[str, float]
    drawn: Mapping[str, np.ndarray]
    samples: int
    baseline: float = math.nan


@dataclass(frozen=True)
class Difference:
    """A variant's score minus the first variant's.

    Attributes:
        value: Mean over shared seeds.
        half: Half of the 95 % interval; NaN where one shared seed is all that is known.
        seeds: Shared seeds.
    """

    value: float
    half: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.value) > self.half

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if math.isnan(self.half):
            return "one seed"
        return ("better" if self.value > 0 else "worse") if self.clear else "no difference found"


def is_classes(true: np.ndarray) -> bool:
    """Whether the known values [M] of a label are codes of classes: whole numbers, few different ones."""
    known = true[np.isfinite(true)]
    return bool((known == np.round(known)).all()) and len(np.unique(known)) <= MOST_CLASSES


def score_runs(
    target: str, true: np.ndarray, predicted: Mapping[str, np.ndarray], *, resamples: int, seed: int
) -> Scored:
    """Score the predictions of runs, on resampled galaxies too.

    Args:
        target: The label.
        true: [M] values, NaN where unknown.
        predicted: [M] by run.
        resamples: R.
        seed: Of the draws.
    """
    known = np.isfinite(true)
    truth, values = true[known], np.stack([p[known] for p in predicted.values()])
    classes = is_classes(truth)
    score = _f1(truth, values) if classes else _r2(truth, values)
    rng = np.random.default_rng([seed, 3])
    n = len(truth)
    drawn = np.array([score(np.bincount(rng.integers(0, n, n), minlength=n)) for _ in range(resamples)])
    drawn = drawn.reshape(resamples, len(values))
    whole = score(np.ones(n))
    names = list(predicted)
    return Scored(
        target,
        "f1" if classes else "r2",
        dict(zip(names, map(float, whole), strict=True)),
        dict(zip(names, drawn.T, strict=True)),
        n,
        most_frequent(truth) if classes else 0.0,
    )


def most_frequent(truth: np.ndarray) -> float:
    """Weighted F1 of the answer that is the most frequent one, for known codes [M]."""
    codes, counts = np.unique(truth, return_counts=True)
    return float(_f1(truth, np.full((1, len(truth)), codes[counts.argmax()]))(np.ones(len(truth)))[0])


def difference(scored: Scored, variant: Variant, first: Variant) -> Difference | None:
    """A variant minus the first one; None where no seed of both has the score."""
    pairs = [(variant.runs[seed].name, first.runs[seed].name) for seed in variant.runs if seed in first.runs]
    pairs = [(a, b) for a, b in pairs if a in scored.values and b in scored.values]
    if not pairs:
        return None
    gaps = np.array([scored.values[a] - scored.values[b] for a, b in pairs])
    terms = []
    if scored.drawn:
        drawn = np.mean([scored.drawn[a] - scored.drawn[b] for a, b in pairs], 0)
        terms.append(stats.norm.ppf(0.975) * drawn.std())
    if (n := len(gaps)) > 1:
        terms.append(stats.t.ppf(0.975, n - 1) * gaps.std(ddof=1) / math.sqrt(n))
    return Difference(float(gaps.mean()), math.hypot(*terms) if terms else math.nan, n)


def _r2(truth: np.ndarray, values: np.ndarray) -> Score:
    errors = (values - truth) ** 2

    def score(weight: np.ndarray) -> np.ndarray:
        mean = np.average(truth, weights=weight)
        return 1 - errors @ weight / (weight @ (truth - mean) ** 2)

    return score


def _f1(truth: np.ndarray, values: np.ndarray) -> Score:
    codes, place = np.unique(np.concatenate([truth[None], values]), return_inverse=True)
    place = place.reshape(len(values) + 1, -1)
    cells = place[0] * len(codes) + place[1:]

    def score(weight: np.ndarray) -> np.ndarray:
        confusion = np.stack([np.bincount(row, weight, len(codes) ** 2) for row in cells])
        return weighted_f1(confusion.reshape(-1, len(codes), len(codes)))

    return score
