"""How well classes are predicted: accuracy, F1 and, of a yes-or-no label, the area under the ROC curve, with bootstrap errors.

R2 and scatter of a label that is 0 or 1 tell little: a rare class is missed at a high R2. Of a label of more classes they tell nothing.

Shape legend: M test samples, R bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

__all__ = ["ClassScores", "are_classes", "class_scores", "is_binary"]

MOST_CLASSES = 100


@dataclass(frozen=True)
class ClassScores:
    """Quality of predictions of classes; fields that end in `_se` are bootstrap standard errors.

    Attributes:
        samples: Test samples M.
        share: Share of ones; NaN where there are more classes than 0 and 1.
        commonest: Accuracy of who always gives the commonest class.
        accuracy: Share of samples that lie on the right side of 1/2, or whose class is right.
        f1: Harmonic mean of precision and recall of the ones, at 1/2; 0 where no one is found. Of more classes the mean of theirs.
        auc: Chance that a one has a higher prediction than a zero, ties counting half; NaN with one class or more than two, and
            where predictions are classes themselves.
    """

    samples: int
    share: float
    commonest: float
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


def are_classes(true: np.ndarray, predicted: np.ndarray) -> bool:
    """Whether a label and what is said of it are codes 0, 1, ... of classes: whole numbers, few of them, the label varying."""
    codes = np.concatenate([true, predicted])
    if not len(true) or not np.isfinite(codes).all() or not (codes == codes.round()).all() or np.ptp(true) == 0:
        return False
    return bool(codes.min() >= 0 and codes.max() < MOST_CLASSES)


def class_scores(true: np.ndarray, predicted: np.ndarray, *, resamples: int = 200, seed: int = 0) -> ClassScores:
    """Score predictions [M] of labels [M] that are 0 or 1, or of classes 0, 1, 2, ... by such codes.

    Raises:
        ValueError: There are none, or one is no code of a class.
    """
    binary = len(true) > 0 and bool(np.isin(true, (0, 1)).all())
    if not binary and not are_classes(true, predicted):
        raise ValueError(
            "class_scores: labels must be 0 or 1, or codes of classes as their predictions are, and at least one"
        )
    measures = _measures if binary else _of_codes
    draws = np.random.default_rng(seed).integers(len(true), size=(resamples, len(true)))
    boot = np.array([measures(true[d], predicted[d]) for d in draws])
    accuracy, f1, auc = measures(true, predicted)
    curves = boot[np.isfinite(boot[:, 2]), 2]
    errors = *boot[:, :2].std(axis=0).tolist(), float(curves.std()) if len(curves) else np.nan
    share, commonest = (
        float(np.mean(true)) if binary else np.nan,
        float(np.bincount(true.astype(int)).max() / len(true)),
    )
    return ClassScores(len(true), share, commonest, accuracy, errors[0], f1, errors[1], auc, errors[2])


def _of_codes(true: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    of_each = [
        2 * np.sum((true == c) & (predicted == c)) / np.sum((true == c) * 1 + (predicted == c)) for c in np.unique(true)
    ]
    return float(np.mean(true == predicted)), float(np.mean(of_each)), np.nan


def _measures(true: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    ones, said = true == 1, predicted > 0.5
    hits, total = np.sum(ones & said), np.sum(ones) + np.sum(said)
    n1 = int(np.sum(ones))
    n0, auc = len(true) - n1, np.nan
    if n1 and n0 and not np.isin(predicted, (0, 1)).all():  # Mann-Whitney U
        auc = float((rankdata(predicted)[ones].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))
    return float(np.mean(ones == said)), float(2 * hits / total) if total else 0.0, auc
