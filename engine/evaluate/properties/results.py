"""What feature sets tell of galaxy properties: predictions, their quality, and who beats whom on the same galaxies.

Shape legend: M test samples, m of them with a label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from armillary.engine.evaluate.probes.bins import Stratum
from armillary.engine.evaluate.probes.classes import ClassScores, are_classes, class_scores, is_binary
from armillary.engine.evaluate.probes.probes import MLP, Probe
from armillary.engine.evaluate.probes.scores import (
    BiasBin,
    Difference,
    Scores,
    paired_difference,
    r2,
    r2_with_error,
    score,
    tomographic_bias,
)
from armillary.engine.evaluate.study.study import FeatureSet, Modality, Study

__all__ = ["OWN", "REDSHIFT", "Comparison", "Prediction", "Strata", "clear_winners", "compare", "predict"]

REDSHIFT = "redshift"
OWN = "supervised"
"""Stands for a probe where the features are predictions themselves."""

HELD_OUT = 5  # one training sample in so many chooses among probes


@dataclass(frozen=True)
class Prediction:
    """One label, predicted from one feature set by one probe.

    Attributes:
        features: The feature set.
        modality: What it was made of.
        model: The probe, or `OWN`.
        label: What was predicted.
        places: [m] places of the samples among the M test samples: those whose label is known.
        true: [m] labels.
        predicted: [m] predictions.
        r2: Coefficient of determination.
        r2_se: Its bootstrap standard error.
        scores: All scores, for redshifts; None for other labels.
        classes: Accuracy and the like, for labels that are 0 or 1, or codes of classes that a network predicts; None for others.
        bias: Mean dz in bins of predicted redshift; empty for other labels.
        held_out: R2 on a fifth of the training samples, the probe fitted on the others: what a probe is chosen by. NaN
            for predictions among the feature sets, and where too few samples are left.
    """

    features: str
    modality: Modality
    model: str
    label: str
    places: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    r2: float
    r2_se: float
    scores: Scores | None = None
    classes: ClassScores | None = None
    bias: tuple[BiasBin, ...] = ()
    held_out: float = math.nan

    @property
    def worst(self) -> BiasBin:
        """The tomographic bin with the largest bias, of redshifts."""
        return max(self.bias, key=lambda b: abs(b.bias))


@dataclass(frozen=True)
class Comparison:
    """R2 from aligned embeddings against that of a rival of the same modality, on the same galaxies.

    Attributes:
        modality: Of the aligned embeddings.
        first: The aligned embeddings.
        second: The rival.
        supervised: True where the rival was trained on labels.
        model: Probe of the aligned embeddings, and of the rival where it is not supervised.
        label: What was predicted.
        difference: First minus second.
        samples: Galaxies.
    """

    modality: Modality
    first: str
    second: str
    supervised: bool
    model: str
    label: str
    difference: Difference
    samples: int

    @property
    def better(self) -> bool:
        """True where the whole 95% interval is above 0."""
        return self.difference.low > 0

    def __str__(self) -> str:
        """The verdict as a sentence."""
        d = self.difference
        rival = f"{self.second}, which was trained on labels" if self.supervised else "unaligned ones"
        who = self.first if self.supervised else f"{self.first} against {self.second}"
        return (
            f"aligned {self.modality} embeddings {'beat' if self.better else 'do NOT beat'} {rival}: {self.label} R2 "
            f"{d.value:+.3f} ± {d.se:.3f}, 95% interval {d.low:+.3f} to {d.high:+.3f} ({who}, {self.model}, "
            f"{self.samples} test samples)"
        )


@dataclass(frozen=True)
class Strata:
    """Scores of one label in bins of another.

    Attributes:
        by: The label that the bins are of.
        strata: The bins.
        scores: By feature set, the scores in each bin.
    """

    by: str
    strata: tuple[Stratum, ...]
    scores: dict[str, list[Scores]]


def predict(
    study: Study,
    labels: Sequence[str],
    probes: Mapping[str, Probe],
    *,
    bins: int = 5,
    outlier_threshold: float = 0.05,
    resamples: int = 1000,
) -> list[Prediction]:
    """Predict labels from every feature set by every probe, all on the galaxies that all sets have.

    Predictions among the feature sets are scored as they are, for those of the labels that they have.

    Args:
        study: Catalogue and feature sets.
        labels: What to predict.
        probes: By what, with the names that tables call them.
        bins: Tomographic bins.
        outlier_threshold: Size of a redshift residual that counts as an outlier.
        resamples: Bootstrap resamples.

    Returns:
        Predictions, by feature set, then probe, then label.

    Raises:
        ValueError: A label is missing, text, unknown or constant in a split, the sets have no galaxies in common, there
            are too few samples for a probe, or vectors are not finite.
    """
    train, test = study.rows(study.train_split), study.rows(study.test_split)
    known = np.stack([study.varying(label, train) for label in labels], 1)
    truth = {label: study.varying(label, test) for label in labels}
    found = []
    for name, features in study.features.items():
        if features.targets:
            vectors = _finite(name, study.vectors(name, test))
            columns = {
                label: vectors[:, features.targets.index(label)] for label in labels if label in features.targets
            }
            by_model = {OWN: columns}
        else:
            split = [_finite(name, study.vectors(name, rows)) for rows in (train, test)]
            by_model = {model: _fit(probe, split[0], known, split[1], labels) for model, probe in probes.items()}
        for model, predicted in by_model.items():
            held_out = {} if features.targets else _held_out(probes[model], split[0], known, labels, study.seed)
            for label, values in predicted.items():
                one = _judge(
                    features, model, label, truth[label], values, bins, outlier_threshold, resamples, study.seed
                )
                found.append(replace(one, held_out=held_out.get(label, math.nan)))
    return found


def compare(study: Study, predictions: Sequence[Prediction], model: str, *, resamples: int = 1000) -> list[Comparison]:
    """Hold every set of aligned embeddings against the unaligned and the supervised of its modality.

    Aligned embeddings are those with a shared space (`FeatureSet.space`). A model of catalogue columns, such as
    magnitudes, is a rival of images.
    """
    found = []
    for one in predictions:
        aligned = study.features[one.features]
        if not aligned.space or aligned.targets or one.model != model:
            continue
        for other in predictions:
            rival = study.features[other.features]
            same = rival.modality == aligned.modality
            unaligned = same and not rival.space and not rival.targets and other.model == model
            photometry = aligned.modality == "image" and rival.modality == "columns"
            supervised = bool(rival.targets) and (same or photometry)
            if other.label != one.label or not (unaligned or supervised):
                continue
            difference = paired_difference(
                one.true, one.predicted, other.predicted, resamples=resamples, seed=study.seed
            )
            names = (aligned.modality, one.features, other.features, supervised)
            found.append(Comparison(*names, model, one.label, difference, len(one.true)))
    return found


def clear_winners(predictions: Sequence[Prediction], *, resamples: int = 1000, seed: int = 0) -> list[Prediction]:
    """The predictions that are the best of their label and modality by more than chance.

    Each feature set enters with the probe that is best on held-out training samples. The best set wins where the 95%
    interval of its R2 minus the second set's is above 0; a set alone in its modality wins nothing.
    """
    won = []
    for group in dict.fromkeys((p.label, p.modality) for p in predictions):
        by_set: dict[str, list[Prediction]] = {}
        for p in predictions:
            if (p.label, p.modality) == group:
                by_set.setdefault(p.features, []).append(p)
        chosen = [max(mine, key=lambda p: np.nan_to_num(p.held_out, nan=-np.inf)) for mine in by_set.values()]
        first, *others = sorted(chosen, key=lambda p: -p.r2)
        if others:
            d = paired_difference(first.true, first.predicted, others[0].predicted, resamples=resamples, seed=seed)
            if d.low > 0:
                won.append(first)
    return won


def _fit(
    probe: Probe, train: np.ndarray, known: np.ndarray, test: np.ndarray, labels: Sequence[str]
) -> dict[str, np.ndarray]:
    # AstroCLIP's perceptrons predict the redshift alone, and all other properties together.
    groups = [list(labels)]
    if isinstance(probe, MLP):
        groups = [[n for n in labels if n == REDSHIFT], [n for n in labels if n != REDSHIFT]]
    found: dict[str, np.ndarray] = {}
    for group in filter(None, groups):
        predicted = probe.predict_jointly(train, known[:, [labels.index(n) for n in group]], test)
        found |= dict(zip(group, predicted.T, strict=True))
    return {label: found[label] for label in labels}


def _held_out(probe: Probe, train: np.ndarray, known: np.ndarray, labels: Sequence[str], seed: int) -> dict[str, float]:
    """R2 of each label on a fifth of the training samples; nothing where the others are too few for the probe."""
    held = np.random.default_rng([seed, 2]).permutation(len(train)) < len(train) // HELD_OUT
    try:
        predicted = _fit(probe, train[~held], known[~held], train[held], labels)
    except ValueError:
        return {}
    truth = {label: known[held, place] for place, label in enumerate(labels)}
    return {label: r2(t[m], predicted[label][m]) for label, t in truth.items() if (m := np.isfinite(t)).any()}


def _judge(
    features: FeatureSet,
    model: str,
    label: str,
    truth: np.ndarray,
    values: np.ndarray,
    bins: int,
    outlier_threshold: float,
    resamples: int,
    seed: int,
) -> Prediction:
    places = np.flatnonzero(np.isfinite(truth))
    true, predicted = truth[places], values[places].astype(np.float64)
    names = (features.name, features.modality, model, label)
    if label != REDSHIFT:
        coded = is_binary(true) or (model == OWN and are_classes(true, predicted))
        classes = class_scores(true, predicted, resamples=min(resamples, 200), seed=seed) if coded else None
        explained = r2_with_error(true, predicted, resamples=resamples, seed=seed)
        return Prediction(*names, places, true, predicted, *explained, classes=classes)
    scores = score(true, predicted, outlier_threshold=outlier_threshold, resamples=resamples, seed=seed)
    bias = tomographic_bias(true, predicted, bins=min(bins, len(true)))
    return Prediction(*names, places, true, predicted, scores.r2, scores.r2_se, scores, bias=bias)


def _finite(name: str, vectors: np.ndarray) -> np.ndarray:
    if bad := int((~np.isfinite(vectors)).any(1).sum()):
        raise ValueError(f"{name}: {bad} of {len(vectors)} vectors hold non-finite numbers; embed those samples anew")
    return vectors
