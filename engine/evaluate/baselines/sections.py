"""What the page shows of the baselines: headline, verdict, table of probes, predicted against true."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.baselines.judge import COSINE, TRAINED, UNTRAINED, LabelResult, MethodResult
from armillary.engine.evaluate.page import figures, html

__all__ = ["comparison", "headline", "predictions", "verdict"]

COLOUR_OF = {TRAINED: 0, UNTRAINED: 1}


def headline(result: LabelResult) -> Markup:
    """The trained encoder's scores in large figures, and how many aims it reaches."""
    best = result.methods[0]
    s = best.scores
    others = [("NMAD", f"{s.nmad:.4f}")]
    if s.outlier_threshold is not None:
        others.append((f"outliers beyond {s.outlier_threshold:g}", f"{s.outliers:.1%}"))
    others.append(("bias", f"{s.bias:+.4f}"))
    label = f"R² of {result.label}, {best.probe} on the frozen encoder"
    return html.headline(_text(s.r2, ".3f"), _text(s.r2_se, ".3f"), label, others)


def verdict(result: LabelResult) -> list[tuple[str, str, str]]:
    """How many aims are reached, a line for each, and what is odd about the labels."""
    lines = []
    if note := result.methods[0].scores.note:
        lines.append(("note", "Note", note))
    if result.aims:
        lines.append(
            ("note", "Aims", f"{sum(a.reached is True for a in result.aims)} of {len(result.aims)} aims reached.")
        )
    for aim in result.aims:
        d = aim.difference
        text = (
            f"R² minus that of the {aim.against}, same probe: {_text(d.value, '+.3f')} ± {_text(d.se, '.3f')}; the aim is "
            f"{aim.margin:+.2f} or more. 95% of paired bootstraps lie between {_text(d.low, '+.3f')} and "
            f"{_text(d.high, '+.3f')}."
        )
        if aim.reached is None:
            text += " The aim lies between them, so that these samples do not decide."
            lines.append(("note", "Not decided", text))
        else:
            lines.append(("yes", "Aim reached", text) if aim.reached else ("no", "Aim missed", text))
    return lines


def comparison(result: LabelResult) -> Markup:
    """Every probe on every kind of features, as a table."""
    methods = result.methods
    colours = [COLOUR_OF.get(m.features, 2) for m in methods]
    dots = figures.interval_chart([m.scores.r2 for m in methods], [m.scores.r2_se for m in methods], colours)
    threshold = methods[0].scores.outlier_threshold
    groups: dict[str, list[list[object]]] = {}
    for method, dot in zip(methods, dots, strict=True):
        s = method.scores
        row: list[object] = [method.probe, html.number(s.r2, s.r2_se), dot, html.number(s.nmad, s.nmad_se, ".4f")]
        if threshold is not None:
            row.append(html.number(100 * s.outliers, 100 * s.outliers_se, ".1f"))
        row.append(html.number(s.bias, s.bias_se, "+.4f"))
        groups.setdefault(_capital(method.features), []).append(html.Bold(row) if method is methods[0] else row)
    outliers = () if threshold is None else (f"outliers > {threshold:g}, %",)
    head = ("Probe on frozen features", "R²", "", "NMAD", *outliers, "bias")
    dz = "(predicted − true) / (1 + true)" if result.redshift else "predicted − true"
    dropped = f" {result.dropped:,} samples without it were left out." if result.dropped else ""
    return html.section(
        f"How well is {result.label} predicted?",
        f"Every probe is fitted on {result.train:,} training samples and judged on {result.test:,} test samples.{dropped} "
        f"Residuals are {dz}; NMAD is 1.4826 times their median absolute deviation. Errors are bootstrap standard errors over "
        "test samples.",
        html.card(html.table(head, list(groups.items()), classes={2: "dot"})),
    )


def predictions(result: LabelResult) -> Markup:
    """Predicted against true labels of the headline, its first rival and the best."""
    rivals = [m for m in result.methods if m.features != result.methods[0].features and m.probe == COSINE.name]
    shown: list[MethodResult] = [result.methods[0], *rivals[:1]]
    best = max(result.methods, key=lambda m: np.nan_to_num(m.scores.r2, nan=-np.inf))
    if best not in shown:
        shown.append(best)
    cards = []
    for m in shown:
        chart = figures.prediction_chart(
            result.true, m.predicted, m.scores, label=result.label, redshift=result.redshift
        )
        cards.append(html.card(chart, title=f"{_capital(m.features)}, {m.probe}"))
    return html.section(
        f"Predicted against true {result.label}",
        "Each dot is a test galaxy, warmer where they crowd. The line in the lower panel is the running median, dashes mark "
        "the outlier threshold.",
        html.grid(cards),
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _text(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "\u2212") if np.isfinite(value) else "undefined"
