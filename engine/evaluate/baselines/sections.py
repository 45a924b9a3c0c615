"""What the page shows of the baselines: headline, verdict, table of probes, predicted against true."""

from __future__ import annotations

import html

import numpy as np

from armillary.engine.evaluate.baselines.judge import COSINE, TRAINED, UNTRAINED, LabelResult, MethodResult
from armillary.engine.evaluate.page import figures
from armillary.engine.evaluate.page.verdict import item, number, with_error

__all__ = ["comparison", "headline", "predictions", "verdict"]

COLOUR_OF = {TRAINED: 0, UNTRAINED: 1}


def headline(result: LabelResult) -> str:
    """The trained encoder's scores in large figures, and how many aims it reaches."""
    best = result.methods[0]
    s = best.scores
    second = [("NMAD", f"{s.nmad:.4f}")]
    if s.outlier_threshold is not None:
        second.append((f"outliers beyond {s.outlier_threshold:g}", f"{s.outliers:.1%}"))
    second.append(("bias", f"{s.bias:+.4f}"))
    reached = [a.reached for a in result.aims]
    overall = f'<p class="overall">{sum(reached)} of {len(reached)} aims reached.</p>' if reached else ""
    return (
        f'<div class="headline"><div><div class="big">{number(s.r2, ".3f")}'
        f"<small> ± {number(s.r2_se, '.3f')}</small></div>"
        f'<div class="label">R² of {html.escape(result.label)}, {best.probe} on the frozen encoder</div></div>'
        + "".join(f'<div><div class="second">{v}</div><div class="label">{k}</div></div>' for k, v in second)
        + f"</div>{overall}"
    )


def verdict(result: LabelResult) -> str:
    """A line for each aim, and what is odd about the labels."""
    note = result.methods[0].scores.note
    return (item("note", "Note", note) if note else "") + "".join(
        item(
            "yes" if aim.reached else "no",
            "Aim reached" if aim.reached else "Aim missed",
            f"R² minus that of the {aim.against}, same probe: {number(d.value, '+.3f')} ± {number(d.se, '.3f')}; the aim "
            f"is {aim.margin:+.2f} or more. 95% of paired bootstraps lie between {number(d.low, '+.3f')} and "
            f"{number(d.high, '+.3f')}.",
        )
        for aim in result.aims
        for d in (aim.difference,)
    )


def comparison(result: LabelResult) -> str:
    """Every probe on every kind of features, as a table."""
    methods = result.methods
    colours = [COLOUR_OF.get(m.features, 2) for m in methods]
    dots = figures.interval_chart([m.scores.r2 for m in methods], [m.scores.r2_se for m in methods], colours)
    threshold = methods[0].scores.outlier_threshold
    rows, group = [], ""
    for place, (method, dot) in enumerate(zip(methods, dots, strict=True)):
        s = method.scores
        if method.features != group:
            group = method.features
            rows.append(f'<tr class="group"><td colspan="6">{html.escape(group[0].upper() + group[1:])}</td></tr>')
        outliers = "" if threshold is None else f"<td>{with_error(100 * s.outliers, 100 * s.outliers_se, '.1f')}</td>"
        rows.append(
            f"<tr{' class=head' if place == 0 else ''}><td>{html.escape(method.probe)}</td>"
            f'<td>{with_error(s.r2, s.r2_se, ".3f")}</td><td class="dot">{dot}</td>'
            f"<td>{with_error(s.nmad, s.nmad_se, '.4f')}</td>{outliers}"
            f"<td>{with_error(s.bias, s.bias_se, '+.4f')}</td></tr>"
        )
    outlier_head = "" if threshold is None else f"<th>outliers &gt; {threshold:g}, %</th>"
    dz = "(predicted − true) / (1 + true)" if result.redshift else "predicted − true"
    dropped = f" {result.dropped:,} samples without it were left out." if result.dropped else ""
    return (
        f"<h2>How well is {html.escape(result.label)} predicted?</h2>"
        f'<p class="quiet">Every probe is fitted on {result.train:,} training samples and judged on {result.test:,} test '
        f"samples.{dropped} Residuals are {dz}; NMAD is 1.4826 times their median absolute deviation. Errors are bootstrap "
        "standard errors over test samples.</p>"
        '<section class="card"><div class="scroll"><table><thead><tr><th>Probe on frozen features</th><th>R²</th>'
        f'<th class="dot"></th><th>NMAD</th>{outlier_head}<th>bias</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div></section>"
    )


def predictions(result: LabelResult) -> str:
    """Predicted against true labels of the headline, its first rival and the best."""
    rivals = [m for m in result.methods if m.features != result.methods[0].features and m.probe == COSINE.name]
    shown: list[MethodResult] = [result.methods[0], *rivals[:1]]
    best = max(result.methods, key=lambda m: np.nan_to_num(m.scores.r2, nan=-np.inf))
    if best not in shown:
        shown.append(best)
    cards = "".join(
        f'<div class="card"><h3>{html.escape(m.features[0].upper() + m.features[1:])}, {html.escape(m.probe)}</h3>'
        + figures.prediction_chart(result.true, m.predicted, m.scores, label=result.label, redshift=result.redshift)
        + "</div>"
        for m in shown
    )
    return (
        f"<h2>Predicted against true {html.escape(result.label)}</h2>"
        '<p class="quiet">Each dot is a test galaxy, warmer where they crowd. The line in the lower panel is the running '
        f'median, dashes mark the outlier threshold.</p><div class="grid">{cards}</div>'
    )
