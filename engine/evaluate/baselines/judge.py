"""A label from a frozen encoder and from what it has to beat, by the same probes, and the margins that it should keep.

Shape legend: N training samples, M test samples, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from armillary.engine.evaluate.probes.perceptron import PerceptronTraining
from armillary.engine.evaluate.probes.probes import KNN, MLP, Probe, Ridge, labelled
from armillary.engine.evaluate.probes.scores import Difference, Scores, paired_difference, score

__all__ = ["AIMS", "PROBES", "TRAINED", "UNTRAINED", "Aim", "LabelResult", "MethodResult", "judge_label"]

TRAINED, UNTRAINED = "trained encoder", "untrained encoder"
PCA_INPUT, PCA_ASINH = "PCA-64 of the encoder's input", "PCA-64 of asinh pixels"
PCA_FEW = "PCA-8 of the encoder's input"

NEIGHBOURS = 16
COSINE, EUCLIDEAN = KNN(NEIGHBOURS, "cosine"), KNN(NEIGHBOURS, "euclidean", "distance")
PERCEPTRON = MLP((64,), PerceptronTraining(100, 200, dropout=0.0, held_out=0.1, patience=10))
PROBES: dict[str, tuple[Probe, ...]] = {
    TRAINED: (COSINE, EUCLIDEAN, Ridge(), PERCEPTRON),
    UNTRAINED: (COSINE, EUCLIDEAN, Ridge(), PERCEPTRON),
    PCA_INPUT: (COSINE, EUCLIDEAN, Ridge(), PERCEPTRON),
    PCA_FEW: (COSINE, EUCLIDEAN),
    PCA_ASINH: (COSINE, EUCLIDEAN, Ridge()),
}

AIMS = {UNTRAINED: 0.04, PCA_INPUT: 0.08, PCA_ASINH: 0.08}
"""By how much the trained encoder's cosine kNN should exceed the cosine kNN of these, in R2."""


@dataclass(frozen=True)
class MethodResult:
    """Predictions of one probe on one kind of embedding.

    Attributes:
        features: What was embedded how.
        probe: The predictor's name.
        scores: Their quality.
        predicted: [M] predictions.
    """

    features: str
    probe: str
    scores: Scores
    predicted: np.ndarray


@dataclass(frozen=True)
class Aim:
    """A margin that the trained encoder should keep.

    Attributes:
        against: The features it is compared with.
        margin: Wanted difference in R2.
        difference: Measured difference.
    """

    against: str
    margin: float
    difference: Difference

    @property
    def reached(self) -> bool | None:
        """True where the whole 95% interval of the difference is at least the margin, False where all of it is below.

        None where the interval holds the margin, or is undefined: these samples do not tell.
        """
        if self.difference.low >= self.margin:
            return True
        return False if self.difference.high < self.margin else None


@dataclass(frozen=True)
class LabelResult:
    """All probes on one label.

    Attributes:
        label: Column of the catalogue.
        redshift: True where residuals are divided by 1 + label.
        train: Labelled training samples N.
        test: Labelled test samples M.
        dropped: Samples without the label, in both splits.
        rows: [M] places of the labelled test samples in the test split.
        true: [M] labels.
        methods: Results, the headline first.
        aims: What the headline is held against.
    """

    label: str
    redshift: bool
    train: int
    test: int
    dropped: int
    rows: np.ndarray
    true: np.ndarray
    methods: tuple[MethodResult, ...]
    aims: tuple[Aim, ...]

    def find(self, features: str, probe: str = COSINE.name) -> MethodResult | None:
        """The result of one probe on one kind of embedding; None if it was not run."""
        return next((m for m in self.methods if m.features == features and m.probe == probe), None)


def judge_label(
    features: Mapping[str, tuple[np.ndarray, np.ndarray]],
    train_label: np.ndarray,
    test_label: np.ndarray,
    *,
    label: str,
    redshift: bool,
    outlier_threshold: float | None = 0.05,
    probes: Mapping[str, Sequence[Probe]] = PROBES,
    resamples: int = 1000,
) -> LabelResult:
    """Predict a label from several kinds of embeddings and compare.

    Args:
        features: By name, embeddings of the training split [N, D] and the test split [M, D].
        train_label: [N], NaN where unknown.
        test_label: [M], NaN where unknown.
        label: Its name.
        redshift: Divide residuals by 1 + label.
        outlier_threshold: Size of a residual that counts as an outlier; None for no such count.
        probes: Probes to run on each of the features; the first of the first is the headline.
        resamples: Bootstrap resamples.

    Raises:
        ValueError: A split has no labelled sample, or too few for a probe.
    """
    results: list[MethodResult] = []
    _, known_train, keep_train = labelled(train_label[:, None], train_label)
    _, known_test, keep_test = labelled(test_label[:, None], test_label)
    for name, (train, test) in features.items():
        for probe in probes.get(name, (COSINE,)):
            predicted = probe.predict(train[keep_train], known_train, test[keep_test])
            scores = score(
                known_test, predicted, redshift=redshift, outlier_threshold=outlier_threshold, resamples=resamples
            )
            results.append(MethodResult(name, probe.name, scores, predicted))
    headline = results[0]
    aims = tuple(
        Aim(name, margin, paired_difference(known_test, headline.predicted, other.predicted, resamples=resamples))
        for name, margin in AIMS.items()
        for other in results
        if headline.features == TRAINED and other.features == name and other.probe == headline.probe
    )
    return LabelResult(
        label=label,
        redshift=redshift,
        train=int(keep_train.sum()),
        test=int(keep_test.sum()),
        dropped=int((~keep_train).sum() + (~keep_test).sum()),
        rows=np.flatnonzero(keep_test),
        true=known_test,
        methods=tuple(results),
        aims=aims,
    )
