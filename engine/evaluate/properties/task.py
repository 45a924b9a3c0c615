"""Galaxy properties from frozen embeddings: redshift, mass, metallicity, age, star formation, as AstroCLIP tests them.

Each set of embeddings is judged with nothing fitted but 64 nearest neighbours, and with small perceptrons; predictions
of supervised models stand beside them. Everything is fitted on the training split and judged on the test split, on the
galaxies that all feature sets have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from armillary.engine.evaluate.probes.bins import quantile_strata, score_strata
from armillary.engine.evaluate.probes.perceptron import PerceptronTraining
from armillary.engine.evaluate.probes.probes import KNN, MLP, Probe
from armillary.engine.evaluate.properties.figures import bias_section, prediction_section, strata_section
from armillary.engine.evaluate.properties.results import (
    OWN,
    REDSHIFT,
    Comparison,
    Prediction,
    Strata,
    clear_winners,
    compare,
    predict,
)
from armillary.engine.evaluate.properties.tables import (
    class_section,
    comparison_section,
    redshift_section,
    table_section,
)
from armillary.engine.evaluate.study.options import PROPERTIES
from armillary.engine.evaluate.study.study import Measure, Outcome, Study

__all__ = ["MAGNITUDES", "TASK", "PropertyOptions", "properties"]

TASK = "properties"
MAGNITUDES = ("mag_r", "mag_z", "magnitude_z")
"""Labels that tell how bright a galaxy is; the first that the survey has is used."""


@dataclass(frozen=True)
class PropertyOptions:
    """Options of `properties`.

    Attributes:
        labels: What to predict; if empty, what the first set is trained to predict, and those of `PROPERTIES` that the survey
            has. The first is the headline, unless redshift is among those named.
        neighbours: Of the nearest neighbours, weighted by inverse Euclidean distance of standardised embeddings.
        hidden: Hidden layers of the perceptrons: AstroCLIP's paper has one of 32, its released code 64 and 64.
        training: How the perceptrons are trained; the study's seed takes the place of its own.
        magnitude: Label that bright and faint are told by; one of `MAGNITUDES` if empty.
        strata: Bins of magnitude and of the headline label.
        tomographic_bins: Bins of predicted redshift.
        outlier_threshold: Size of a redshift residual that counts as an outlier.
        resamples: Bootstrap resamples.
    """

    labels: tuple[str, ...] = ()
    neighbours: int = 64
    hidden: tuple[tuple[int, ...], ...] = ((32,), (64, 64))
    training: PerceptronTraining = field(default_factory=PerceptronTraining)
    magnitude: str = ""
    strata: int = 6
    tomographic_bins: int = 5
    outlier_threshold: float = 0.05
    resamples: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("neighbours", "strata", "tomographic_bins", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be 1 or more, got {getattr(self, name)}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: must differ, got {', '.join(self.labels)}")


def properties(study: Study, options: PropertyOptions | None = None) -> Outcome:
    """Predict galaxy properties from every feature set.

    Args:
        study: Catalogue and feature sets.
        options: What to predict and how; the defaults are AstroCLIP's.

    Returns:
        R2 of every label, set and probe; for redshifts NMAD, biases, outliers, catastrophic errors and the bias in
        tomographic bins; what alignment brings; the headline label by magnitude and by its true value.

    Raises:
        ValueError: There is none of the labels, one is constant or unknown in a split, there are fewer training samples
            than neighbours, or the feature sets share no galaxies.
    """
    options = options or PropertyOptions()
    trained_for = next(iter(study.features.values())).targets
    labels = options.labels or tuple(n for n in dict.fromkeys((*trained_for, *PROPERTIES)) if n in study.survey.labels)
    if not labels:
        raise ValueError(
            f"labels: survey {study.survey.name!r} has none of {', '.join(PROPERTIES)}, but "
            f"{', '.join(study.survey.labels) or 'none at all'}; name what to predict"
        )
    headline = REDSHIFT if REDSHIFT in labels and (options.labels or not trained_for) else labels[0]
    nearest = f"{options.neighbours}-NN"
    training = replace(options.training, seed=study.seed)
    perceptrons = [MLP(hidden, training) for hidden in options.hidden]
    probes: dict[str, Probe] = {nearest: KNN(options.neighbours, "euclidean", "distance", standardise=True)}
    probes |= {p.name: p for p in perceptrons}
    predictions = predict(
        study,
        labels,
        probes,
        bins=options.tomographic_bins,
        outlier_threshold=options.outlier_threshold,
        resamples=options.resamples,
    )
    comparisons = compare(study, predictions, nearest, resamples=options.resamples)
    heads = [p for p in predictions if p.label == headline and p.model in (nearest, OWN)]
    strata = _strata(study, heads, headline, options)
    winners = clear_winners(predictions, resamples=options.resamples, seed=study.seed)
    redshifts = [p for p in predictions if p.label == REDSHIFT]
    sections = [
        table_section(study, predictions, winners, labels),
        comparison_section(comparisons, headline, labels),
        redshift_section(redshifts),
        class_section(predictions),
        prediction_section([p for p in heads if not p.classes]),
        bias_section([p for p in heads if p.bias], list(study.features)),
        strata_section(strata, headline, list(study.features)),
    ]
    return Outcome(
        TASK,
        tuple(_measures(predictions, comparisons, strata, headline, nearest)),
        tuple(_lines(study, heads, comparisons, strata, headline, labels)),
        tuple(s for s in sections if s),
    )


def _strata(study: Study, heads: Sequence[Prediction], headline: str, options: PropertyOptions) -> list[Strata]:
    test = study.rows(study.test_split)
    magnitude = options.magnitude or next((m for m in MAGNITUDES if _is_known(study, m, test[heads[0].places])), "")
    found = []
    for by in dict.fromkeys([*([magnitude] if magnitude else []), headline]):
        # Every prediction of one label is of the same galaxies: those whose label is known.
        strata = quantile_strata(by, study.label(by, test[heads[0].places]), options.strata)
        if strata:
            scores = {
                p.features: score_strata(
                    strata,
                    p.true,
                    p.predicted,
                    redshift=headline == REDSHIFT,
                    outlier_threshold=options.outlier_threshold if headline == REDSHIFT else None,
                    resamples=min(options.resamples, 200),
                    seed=study.seed,
                )
                for p in heads
            }
            found.append(Strata(by, strata, scores))
    return found


def _is_known(study: Study, label: str, rows: np.ndarray) -> bool:
    try:
        return bool(np.isfinite(study.label(label, rows)).any())
    except ValueError:  # there is no such label, or it is not known of any of the rows
        return False


def _measures(
    predictions: Sequence[Prediction],
    comparisons: Sequence[Comparison],
    strata: Sequence[Strata],
    headline: str,
    probe: str,
) -> list[Measure]:
    out = []
    for p in predictions:
        names, count = (TASK, p.features, p.label, p.model), len(p.true)
        out.append(Measure(*names, "r2", p.r2, p.r2_se, count))
        if s := p.scores:
            for metric in ("nmad", "bias", "mean_bias", "outliers", "catastrophic"):
                out.append(Measure(*names, metric, getattr(s, metric), getattr(s, f"{metric}_se"), count))
        if k := p.classes:
            for metric in ("accuracy", "f1", "auc"):
                out.append(Measure(*names, metric, getattr(k, metric), getattr(k, f"{metric}_se"), count))
            out.append(Measure(*names, "commonest class", k.commonest, samples=count))
            if np.isfinite(k.share):
                out.append(Measure(*names, "share of ones", k.share, samples=count))
        if p.bias:
            out.append(Measure(*names, "tomographic_bias", abs(p.worst.bias), p.worst.error, p.worst.samples))
        for b in p.bias:
            where = f"predicted {p.label} {b.low:.4g} to {b.high:.4g}"
            out.append(Measure(*names, "mean_bias", b.bias, b.error, b.samples, where))
    for c in comparisons:
        d, names = c.difference, (TASK, f"{c.first} > {c.second}", c.label, c.model)
        out.append(Measure(*names, "r2_difference", d.value, d.se, c.samples))
        out.append(Measure(*names, "r2_difference_low", d.low, samples=c.samples))
        out.append(Measure(*names, "r2_difference_high", d.high, samples=c.samples))
    models = {p.features: p.model for p in predictions if p.model in (probe, OWN)}
    for one in strata:
        for features, scores in one.scores.items():
            names = (TASK, features, headline, models[features])
            for stratum, s in zip(one.strata, scores, strict=True):
                for metric in ("r2", "nmad", "mean_bias"):
                    value, error = getattr(s, metric), getattr(s, f"{metric}_se")
                    out.append(Measure(*names, metric, value, error, s.samples, stratum.name))
    return out


def _said(p: Prediction) -> str:
    """The scores of a prediction; with 95% intervals where nothing was fitted here."""
    if k := p.classes:
        low, high = k.accuracy - 1.96 * k.accuracy_se, k.accuracy + 1.96 * k.accuracy_se
        area = "" if np.isnan(k.auc) else f", AUC {k.auc:.3f}"
        said = f"accuracy {k.accuracy:.1%} (95% interval {low:.1%} to {high:.1%}; the commonest class alone {k.commonest:.1%})"
        return f"{said}, F1 {k.f1:.3f}{area}"
    said = f"R2 {p.r2:.3f} ± {p.r2_se:.3f}"
    if p.model == OWN:
        said += f" (95% interval {p.r2 - 1.96 * p.r2_se:.3f} to {p.r2 + 1.96 * p.r2_se:.3f})"
    return said + (f", NMAD {p.scores.nmad:.4f}, catastrophic {p.scores.catastrophic:.1%}" if p.scores else "")


def _lines(
    study: Study,
    heads: Sequence[Prediction],
    comparisons: Sequence[Comparison],
    strata: Sequence[Strata],
    headline: str,
    labels: Sequence[str],
) -> list[str]:
    out = [f"{headline} from {p.features} ({p.model}): {_said(p)}" for p in heads]
    out += [str(c) for c in comparisons if c.label == headline]
    for name, features in study.features.items():
        if features.targets and not set(features.targets) & set(labels):
            out.append(f"{name}: left out, it predicts none of {', '.join(labels)}")
    if len(strata) < 2 and not any(p.classes for p in heads):
        how = f"by {strata[0].by} only" if strata else "neither by magnitude nor by its value"
        out.append(f"{headline} is split {how}: there are too few test samples, or no label of {', '.join(MAGNITUDES)}")
    return out
