"""Tables of galaxy properties predicted from feature sets, as pieces of the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.page.html import card, number, section, table, verdicts
from armillary.engine.evaluate.probes.scores import CATASTROPHIC
from armillary.engine.evaluate.properties.results import OWN, REDSHIFT, Comparison, Prediction
from armillary.engine.evaluate.study.study import Study

__all__ = ["MODALITIES", "class_section", "comparison_section", "redshift_section", "table_section"]

MODALITIES = {
    "image": "From images",
    "spectrum": "From spectra",
    "image+spectrum": "From images and spectra",
    "columns": "From catalogue columns",
}


def table_section(
    study: Study, predictions: Sequence[Prediction], winners: Sequence[Prediction], labels: Sequence[str]
) -> Markup:
    """R2 of every label from every feature set by every probe, the winners bold."""
    bold = {(p.features, p.model, p.label) for p in winners}
    found = {(p.features, p.model, p.label): p for p in predictions}
    groups: list[tuple[str, list[list[str]]]] = []
    for modality, title in MODALITIES.items():
        rows = []
        for features, model in dict.fromkeys((p.features, p.model) for p in predictions if p.modality == modality):
            cells = [f"{features}, {model}"]
            for label in labels:
                p = found.get((features, model, label))
                cells.append(number(p.r2, p.r2_se, bold=(features, model, label) in bold) if p else "\u2013")
            rows.append(cells)
        if rows:
            groups.append((title, rows))
    train, test = (len(study.rows(split)) for split in (study.train_split, study.test_split))
    fewer = " (fewer where a label is unknown)" if any(len(p.true) < test for p in predictions) else ""
    text = (
        "R\u00b2, with bootstrap standard errors over test samples. Neighbours and perceptrons are "
        f"fitted on the frozen features of {train:,} training samples and judged on {test:,} test samples{fewer}, "
        f'those that every feature set has; "{OWN}" are predictions of models trained on labels. Each feature set is '
        "represented by the probe that is best on a fifth of the training samples, which is held out for this. Bold: the "
        "best set of its column and modality, where the 95% interval of its difference from the second excludes 0."
    )
    return section("How well are galaxy properties predicted?", text, card(table(["Features", *labels], groups)))


def comparison_section(comparisons: Sequence[Comparison], headline: str, labels: Sequence[str]) -> Markup:
    """What alignment brings: verdicts on the headline label, differences in R2 of all labels; nothing without comparisons."""
    if not comparisons:
        return Markup()
    items = [
        ("yes" if c.better else "no", "better" if c.better else "not better", str(c))
        for c in comparisons
        if c.label == headline
    ]
    found = {(c.first, c.second, c.label): c for c in comparisons}
    rows = []
    for first, second in dict.fromkeys((c.first, c.second) for c in comparisons):
        cells = [f"{first} \u2212 {second}"]
        for label in labels:
            c = found.get((first, second, label))
            d = c.difference if c else None
            cells.append(number(d.value, d.se, "+.3f", bold=d.low > 0 or d.high < 0) if d else "\u2013")
        rows.append(cells)
    text = (
        f"First the verdicts on the {headline}; then the differences in R\u00b2 of all labels, on the same test samples, with "
        f"{comparisons[0].model} on embeddings. Errors come from resampling both together. Differences whose 95% interval "
        "excludes 0 are bold."
    )
    listing = card(table(["R\u00b2 difference", *labels], [("", rows)]))
    return section("What does alignment bring?", text, verdicts(items), listing)


def class_section(predictions: Sequence[Prediction]) -> Markup:
    """Accuracy, F1 and area under the ROC curve of labels that are classes; nothing without any."""
    groups: list[tuple[str, list[list[str]]]] = []
    for label in dict.fromkeys(p.label for p in predictions if p.classes):
        rows, common, share = [], 0.0, 0.0
        for p in predictions:
            if p.label == label and (k := p.classes):
                common, share = k.commonest, k.share
                cells = [number(getattr(k, m), getattr(k, f"{m}_se")) for m in ("accuracy", "f1", "auc")]
                rows.append([f"{p.features}, {p.model}", *cells])
        ones = "" if np.isnan(share) else f"{share:.1%} are 1; "
        groups.append((f"{label}: {ones}the commonest answer alone has {common:.3f}", rows))
    if not groups:
        return Markup()
    text = (
        "Labels that are 0 or 1: accuracy and F1 of the ones count a prediction above 1/2 as 1; AUC is the chance that a one has "
        "a higher prediction than a zero. Of more classes, F1 is the mean of theirs. Errors are bootstrap standard errors over test samples."
    )
    return section("How well are classes told apart?", text, card(table(["Features", "accuracy", "F1", "AUC"], groups)))


def redshift_section(predictions: Sequence[Prediction]) -> Markup:
    """Scatter, bias and failures of the redshifts; nothing without any."""
    if not predictions:
        return Markup()
    groups: list[tuple[str, list[list[str]]]] = []
    threshold = 0.0
    for modality, title in MODALITIES.items():
        rows = []
        for p in predictions:
            if p.modality != modality or (s := p.scores) is None:
                continue
            threshold = s.outlier_threshold or 0.0
            rows.append(
                [
                    f"{p.features}, {p.model}",
                    number(s.nmad, s.nmad_se, ".4f"),
                    number(s.bias, s.bias_se, "+.4f"),
                    number(s.mean_bias, s.mean_bias_se, "+.4f"),
                    number(p.worst.bias, p.worst.error, "+.4f"),
                    number(100 * s.outliers, 100 * s.outliers_se, ".1f"),
                    number(100 * s.catastrophic, 100 * s.catastrophic_se, ".2f"),
                ]
            )
        if rows:
            groups.append((title, rows))
    bins = max(len(p.bias) for p in predictions)
    head = [
        "Features",
        "NMAD",
        "median",
        "mean",
        f"worst of {bins} bins",
        f"> {threshold:g}, %",
        f"> {CATASTROPHIC:g}, %",
    ]
    text = (
        "Of dz = (predicted \u2212 true) / (1 + true): NMAD is 1.4826 times its median absolute "
        f"deviation; its median and mean; the largest mean in {bins} bins of predicted redshift, as lensing surveys "
        f"cut their samples; the share of outliers (|dz| > {threshold:g}) and of catastrophic errors (|dz| > "
        f"{CATASTROPHIC:g}). The worst of several bins differs from 0 by chance alone."
    )
    return section(f"Errors of the {REDSHIFT}", text, card(table(head, groups)))
