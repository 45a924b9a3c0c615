"""How well a yes-or-no label is predicted by a number: accuracy, F1 and the area under the ROC curve, with bootstrap errors.

R2 and scatter of a label that is 0 or 1 tell little: a rare class is missed at a high R2.

Shape legend: M test samples, R bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

__all__ = ["ClassScores", "class_scores", "is_binary"]


@dataclass(frozen=True)
class ClassScores:
    """Quality of predictions of a label that is 0 or 1; fields that end in `_se` are bootstrap standard errors.

    Attributes:
        samples: Test samples M.
        share: Share of ones: whoever always gives the commoner answer has an accuracy of max(share, 1 - share).
        accuracy: Share of samples that lie on the right side of 1/2.
        f1: Harmonic mean of precision and recall of the ones, at 1/2; 0 where no one is found.
        auc: Chance that a one has a higher prediction than a zero, ties counting half; NaN with one class only.
    """

    samples: int
    share: float
    accuracy: float
    accuracy_se: float
    f1: float
    f1_se: float
    auc: float
    auc_se: float


def is_binary(values: np.ndarray) -> bool:
    """Whether all known values of a label are 0 or 1, and both occur."""
    known = values[np.isfinite(values)]
    return bool(len(known)) and set(np.unique(known)) == {0.0, 1.0}


def class_scores(true: np.ndarray, predicted: np.ndarray, *, resamples: int = 200, seed: int = 0) -> ClassScores:
    """Score predictions [M] of labels [M] that are 0 or 1.

    Raises:
        ValueError: There are none, or a label is neither 0 nor 1.
    """
    if not len(true) or not np.isin(true, (0, 1)).all():
        raise ValueError("class_scores: labels must be 0 or 1, and at least one")
    draws = np.random.default_rng(seed).integers(len(true), size=(resamples, len(true)))
    boot = np.array([_measures(true[d], predicted[d]) for d in draws])
    accuracy, f1, auc = _measures(true, predicted)
    curves = boot[np.isfinite(boot[:, 2]), 2]
    errors = *boot[:, :2].std(axis=0).tolist(), float(curves.std()) if len(curves) else np.nan
    return ClassScores(len(true), float(np.mean(true)), accuracy, errors[0], f1, errors[1], auc, errors[2])


def _measures(true: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    ones, said = true == 1, predicted > 0.5
    hits, total = np.sum(ones & said), np.sum(ones) + np.sum(said)
    n1 = int(np.sum(ones))
    n0, auc = len(true) - n1, np.nan
    if n1 and n0:  # Mann-Whitney U
        auc = float((rankdata(predicted)[ones].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))
    return float(np.mean(ones == said)), float(2 * hits / total) if total else 0.0, auc
