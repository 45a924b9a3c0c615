"""The task "baselines": a label from the trained encoder, from its untrained twin and from pixels, and the aims."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from armillary.engine.evaluate.baselines import sections
from armillary.engine.evaluate.baselines.judge import PCA_FEW, PCA_INPUT, TRAINED, LabelResult, judge_label
from armillary.engine.evaluate.probes.scores import Scores
from armillary.engine.evaluate.study.options import REDSHIFTS, Options
from armillary.engine.evaluate.study.study import Measure, Outcome, Study

__all__ = ["baselines"]

FEW_COMPONENTS = 8  # of the baseline that was best on simulated galaxies
WORDS = {True: "reached", False: "NOT reached", None: "not decided"}
LEAST = 20, 1  # labelled samples to train on and to test: the perceptron holds out a tenth, kNN takes 16


def baselines(study: Study, options: Options) -> Outcome:
    """Predict a label from the first feature set and from the study's baselines.

    Raises:
        ValueError: The first feature set holds predictions, or the label cannot be predicted.
    """
    first = next(iter(study.features.values()))
    if first.targets:
        raise ValueError(f"{first.name} are predictions, not embeddings")
    label = options.first_label(list(study.survey.labels))
    values = study.label(label)
    rows = [study.rows(split, first.name) for split in (study.train_split, study.test_split)]
    for split, mine, least in zip((study.train_split, study.test_split), rows, LEAST, strict=True):
        if (known := int(np.isfinite(values[mine]).sum())) < least:
            raise ValueError(f"only {known} samples of the {split} split have a known {label}, and {least} are needed")
    train, test = rows
    keys = [study.catalogue["key"].take(mine).to_pylist() for mine in rows]
    vectors = {TRAINED: (study.vectors(first.name, train), study.vectors(first.name, test))}
    for name, one in study.baselines.items():
        vectors[name] = one.aligned(keys[0]), one.aligned(keys[1])
        if name == PCA_INPUT:
            vectors[PCA_FEW] = vectors[name][0][:, :FEW_COMPONENTS], vectors[name][1][:, :FEW_COMPONENTS]
    redshift = label.lower() in REDSHIFTS if options.redshift is None else options.redshift
    result = judge_label(
        vectors,
        values[train],
        values[test],
        label=label,
        redshift=redshift,
        outlier_threshold=0.05 if options.outlier_threshold is None and redshift else options.outlier_threshold,
        resamples=options.resamples,
    )
    return Outcome(
        "baselines",
        tuple(_measures(result)),
        tuple(_lines(result)),
        (sections.comparison(result), sections.predictions(result)),
        headline=sections.headline(result),
        verdict=tuple(sections.verdict(result)),
    )


def _measures(result: LabelResult) -> list[Measure]:
    found = []
    for method in result.methods:
        s = method.scores
        for name in (f.name for f in fields(Scores)):
            value = getattr(s, name)
            if isinstance(value, float) and not name.endswith("_se"):
                error = getattr(s, f"{name}_se", np.nan)
                found.append(
                    Measure("baselines", method.features, result.label, method.probe, name, value, error, s.samples)
                )
    head = result.methods[0]
    for aim in result.aims:
        d, against = aim.difference, f"{TRAINED} - {aim.against}"
        for name, value, error in (("r2 difference", d.value, d.se), ("low", d.low, np.nan), ("high", d.high, np.nan)):
            metric = name if name == "r2 difference" else f"r2 difference, {name} end of 95%"
            found.append(
                Measure("baselines", against, result.label, head.probe, metric, value, error, head.scores.samples)
            )
        found.append(Measure("baselines", against, result.label, head.probe, "aim", aim.margin))
        found.append(
            Measure(
                "baselines",
                against,
                result.label,
                head.probe,
                "reached",
                np.nan if aim.reached is None else float(aim.reached),
            )
        )
    for name in ("train", "test", "dropped"):
        found.append(Measure("baselines", "", result.label, "", f"{name} samples", float(getattr(result, name))))
    return found


def _lines(result: LabelResult) -> list[str]:
    head = result.methods[0]
    s = head.scores
    outliers = "" if s.outlier_threshold is None else f", outliers {s.outliers:.1%}"
    lines = [
        f"{result.label}: R2 {s.r2:.3f} +- {s.r2_se:.3f}, NMAD {s.nmad:.4f}{outliers}, bias {s.bias:+.4f} "
        f"({head.features}, {head.probe}, {s.samples} test samples)"
    ]
    if s.note:
        lines.append(s.note)
    for aim in result.aims:
        d = aim.difference
        lines.append(
            f"{WORDS[aim.reached]}: R2 {d.value:+.3f} +- {d.se:.3f} over the {aim.against} (95%: {d.low:+.3f} to {d.high:+.3f}), "
            f"aim {aim.margin:+.2f}"
        )
    return lines
