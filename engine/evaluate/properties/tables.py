"""Tables of galaxy properties predicted from feature sets, as pieces of the report."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from armillary.engine.evaluate.probes.scores import CATASTROPHIC
from armillary.engine.evaluate.properties.results import OWN, REDSHIFT, Comparison, Prediction
from armillary.engine.evaluate.study.study import Study

__all__ = ["MODALITIES", "comparison_section", "number", "redshift_section", "table", "table_section"]

MODALITIES = {"image": "From images", "spectrum": "From spectra", "columns": "From catalogue columns"}


def number(value: float, error: float = np.nan, form: str = ".3f", *, bold: bool = False) -> str:
    """A number with its error for a table.

    Args:
        value: The number.
        error: Its standard error; NaN for none.
        form: Format of both.
        bold: Whether it stands out.
    """
    if not np.isfinite(value):
        return '<span class="se">undefined</span>'
    text = f"{value:{form}}".replace("-", "\u2212")
    text = f"<b>{text}</b>" if bold else text
    return text + (f' <span class="se">\u00b1 {error:{form.lstrip("+")}}</span>' if np.isfinite(error) else "")


def table(head: Sequence[str], groups: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """A card with a table, its rows in groups.

    Args:
        head: Titles of the columns, as HTML.
        groups: Title and rows of each group, as HTML; a group without title has no line of its own.
    """
    rows = []
    for title, members in groups:
        if title:
            rows.append(f'<tr class="group"><td colspan="{len(head)}">{title}</td></tr>')
        rows += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in members]
    heads = "".join(f"<th>{h}</th>" for h in head)
    return (
        f'<section class="card"><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def table_section(
    study: Study, predictions: Sequence[Prediction], winners: Sequence[Prediction], labels: Sequence[str]
) -> str:
    """R2 of every label from every feature set by every probe.

    Args:
        study: Where they are from.
        predictions: All of them.
        winners: Which of them to print bold.
        labels: Columns of the table.
    """
    bold = {(p.features, p.model, p.label) for p in winners}
    found = {(p.features, p.model, p.label): p for p in predictions}
    groups = []
    for modality, title in MODALITIES.items():
        rows = []
        for features, model in dict.fromkeys((p.features, p.model) for p in predictions if p.modality == modality):
            cells = [f"{html.escape(features)}, {html.escape(model)}"]
            for label in labels:
                p = found.get((features, model, label))
                cells.append(number(p.r2, p.r2_se, bold=(features, model, label) in bold) if p else "\u2013")
            rows.append(cells)
        if rows:
            groups.append((title, rows))
    train, test = (len(study.rows(split)) for split in (study.train_split, study.test_split))
    fewer = " (fewer where a label is unknown)" if any(len(p.true) < test for p in predictions) else ""
    return (
        "<h2>How well are galaxy properties predicted?</h2>"
        f'<p class="quiet">R\u00b2, with bootstrap standard errors over test samples. Neighbours and perceptrons are '
        f"fitted on the frozen features of {train:,} training samples and judged on {test:,} test samples{fewer}, "
        f'those that every feature set has; "{OWN}" are predictions of models trained on labels. Bold: the best of its '
        "column and modality, where the 95% interval of its difference from the second-best feature set excludes 0.</p>"
        + table(["Features", *(html.escape(label) for label in labels)], groups)
    )


def comparison_section(comparisons: Sequence[Comparison], headline: str, labels: Sequence[str]) -> str:
    """What alignment brings: verdicts on the headline label, and differences in R2 of all labels.

    Args:
        comparisons: All of them; nothing is written where there are none.
        headline: The label that verdicts are given on.
        labels: Columns of the table.
    """
    if not comparisons:
        return ""
    verdicts = "".join(
        f'<li class="{"yes" if c.better else "no"}"><b>{"better" if c.better else "not better"}</b>'
        f"<span>{html.escape(str(c))}</span></li>"
        for c in comparisons
        if c.label == headline
    )
    found = {(c.first, c.second, c.label): c for c in comparisons}
    rows = []
    for first, second in dict.fromkeys((c.first, c.second) for c in comparisons):
        cells = [f"{html.escape(first)} \u2212 {html.escape(second)}"]
        for label in labels:
            c = found.get((first, second, label))
            d = c.difference if c else None
            cells.append(number(d.value, d.se, "+.3f", bold=d.low > 0 or d.high < 0) if d else "\u2013")
        rows.append(cells)
    return (
        f'<h2>What does alignment bring?</h2><ul class="verdict">{verdicts}</ul>'
        f'<p class="quiet">Below, differences in R\u00b2 ({html.escape(comparisons[0].model)} on embeddings) on the '
        "same test samples; errors resample both together, and differences whose 95% interval excludes 0 are bold.</p>"
        + table(["R\u00b2 difference", *(html.escape(label) for label in labels)], [("", rows)])
    )


def redshift_section(predictions: Sequence[Prediction]) -> str:
    """Scatter, bias and failures of the redshifts.

    Args:
        predictions: Of redshifts, with scores; nothing is written where there are none.
    """
    if not predictions:
        return ""
    groups = []
    threshold = 0.0
    for modality, title in MODALITIES.items():
        rows = []
        for p in predictions:
            if p.modality != modality or (s := p.scores) is None:
                continue
            threshold = s.outlier_threshold or 0.0
            rows.append(
                [
                    f"{html.escape(p.features)}, {html.escape(p.model)}",
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
        f"&gt; {threshold:g}, %",
        f"&gt; {CATASTROPHIC:g}, %",
    ]
    return (
        f"<h2>Errors of the {REDSHIFT}</h2>"
        '<p class="quiet">Of dz = (predicted \u2212 true) / (1 + true): NMAD is 1.4826 times its median absolute '
        f"deviation; its median and mean; the largest mean in {bins} bins of predicted redshift, as lensing surveys "
        f"cut their samples; the share of outliers (|dz| &gt; {threshold:g}) and of catastrophic errors (|dz| &gt; "
        f"{CATASTROPHIC:g}). The worst of several bins differs from 0 by chance alone.</p>" + table(head, groups)
    )
