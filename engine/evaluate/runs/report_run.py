"""The parts of the report that tell of the run: curves, throughput, provenance."""

from __future__ import annotations

import html

import numpy as np

from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.page import figures
from armillary.engine.evaluate.page.run_log import RunLog, flatten
from armillary.models.dinov2.collapse import MIN_EFFECTIVE_RANK, least_prototypes

__all__ = ["provenance", "throughput", "training"]


def training(logbook: RunLog) -> str:
    """Loss, its terms, health measures, schedules and gradient norms over the steps, as HTML."""
    series = logbook.series
    if "loss" not in series:
        return '<h2>Training</h2><p class="quiet">The run\'s folder holds no metrics.jsonl, so there are no curves.</p>'
    charts = {"Loss": figures.line_chart({"loss": series["loss"]})}
    if terms := logbook.losses():
        charts["Terms of the loss, as they enter it"] = figures.line_chart(terms)
    for name, values in logbook.monitors().items():
        limits = {}
        if name == "prototypes_in_use" and (total := logbook.prototypes()):
            least = least_prototypes(total, logbook.last("window_rows") or total)
            limits = {f"half of {2 * least:.0f}": least}
        elif name == "effective_rank":
            limits = {"collapse": MIN_EFFECTIVE_RANK}
        if name not in ("prototypes", "window_rows"):  # constants, not measures
            charts[_words(name)] = figures.line_chart({name: values}, limits=limits)
    for name in ("learning_rate", "weight_decay", "ema_momentum", "teacher_temperature"):
        if name in series:
            charts[_words(name)] = figures.line_chart({name: series[name]})
    norms = {k.partition("/")[2]: v for k, v in series.items() if k.startswith("grad_norm/")}
    if norms:
        charts["Gradient norm"] = figures.line_chart(norms, log=all((v > 0).all() for _, v in norms.values()))
    cards = "".join(f'<div class="card"><h3>{html.escape(k)}</h3>{chart}</div>' for k, chart in charts.items())
    return f'<h2>Training</h2><div class="grid">{cards}</div>'


def throughput(logbook: RunLog) -> str:
    """Medians and quantiles of images a second, MFU, data wait and memory, as HTML; nothing if none was logged."""
    shown: list[tuple[str, str]] = []
    for name, title, scale, form in (
        ("images_per_s", "images a second", 1.0, ",.1f"),
        ("mfu", "model FLOPs utilisation, %", 100.0, ".1f"),
        ("data_wait", "time spent waiting for data, %", 100.0, ".1f"),
        ("peak_gib", "peak memory, GiB", 1.0, ".2f"),
    ):
        if name in logbook.series:
            values = logbook.series[name][1] * scale
            low, middle, high = np.quantile(values, [0.2, 0.5, 0.8])
            shown.append((title, f"<td>{middle:{form}}</td><td>{low:{form}}</td><td>{high:{form}}</td>"))
    if not shown:
        return ""
    rows = "".join(f"<tr><td>{title}</td>{cells}</tr>" for title, cells in shown)
    return (
        '<h2>Throughput</h2><section class="card"><div class="scroll"><table><thead><tr><th></th><th>median</th>'
        f"<th>20%</th><th>80%</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def provenance(survey: Survey, logbook: RunLog, name: str = "") -> str:
    """The records of the run and of the survey, folded away, as HTML.

    Args:
        survey: The survey.
        logbook: The run's record.
        name: The run's name, where a page tells of several.
    """
    tables = [("The run's record", flatten(logbook.record)), ("Provenance of the survey", flatten(survey.provenance))]
    blocks = ""
    for title, items in tables:
        rows = "".join(
            f'<tr><td class="code">{html.escape(k)}</td><td class="code">{html.escape(v)}</td></tr>' for k, v in items
        )
        if rows:
            blocks += f'<details><summary>{html.escape(title)}</summary><div class="scroll"><table>{rows}</table></div></details>'
    title = f"Where {html.escape(name)} comes from" if name else "Where this comes from"
    return f'<h2>{title}</h2><section class="card">{blocks or "<p>No record was kept.</p>"}</section>'


def _words(name: str) -> str:
    words = name.replace("_", " ").replace("/", " ")
    return words[:1].upper() + words[1:] if not words.startswith("ema ") else "EMA " + words[4:]
