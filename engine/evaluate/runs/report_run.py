"""The parts of the report that tell of the run: its evaluations of itself, curves, throughput, provenance."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.page import figures, html
from armillary.engine.evaluate.page.run_log import RunLog, flatten
from armillary.models.dinov2.collapse import MIN_EFFECTIVE_RANK, least_prototypes

__all__ = ["evals", "provenance", "throughput", "training"]


def training(logbook: RunLog, name: str) -> Markup:
    """Loss, its terms, health measures, schedules and gradient norms of a run over the steps."""
    title = f"Training of {name}"
    series = logbook.series
    if "loss" not in series:
        return html.section(title, "The run's folder holds no metrics.jsonl, so there are no curves.")
    charts = {"Loss": figures.line_chart({"loss": series["loss"]})}
    if terms := logbook.losses():
        charts["Terms of the loss, as they enter it"] = figures.line_chart(terms)
    for measure, values in logbook.monitors().items():
        limits = {}
        if measure == "prototypes_in_use" and (total := logbook.prototypes()):
            least = least_prototypes(total, logbook.last("window_rows") or total)
            limits = {f"half of {2 * least:.0f}": least}
        elif measure == "effective_rank":
            limits = {"collapse": MIN_EFFECTIVE_RANK}
        if measure not in ("prototypes", "window_rows"):  # constants, not measures
            charts[_words(measure)] = figures.line_chart({measure: values}, limits=limits)
    for schedule in ("learning_rate", "weight_decay", "ema_momentum", "teacher_temperature"):
        if schedule in series:
            charts[_words(schedule)] = figures.line_chart({schedule: series[schedule]})
    norms = {k.partition("/")[2]: v for k, v in series.items() if k.startswith("grad_norm/")}
    if norms:
        charts["Gradient norm"] = figures.line_chart(norms, log=all((v > 0).all() for _, v in norms.values()))
    return html.section(title, "", html.grid(html.card(chart, title=name) for name, chart in charts.items()))


def evals(logbook: RunLog, name: str) -> Markup:
    """What a run found when it evaluated itself, over the steps; nothing where it did not."""
    found, best = logbook.evals(), logbook.best
    if not found:
        return Markup()
    text = "R\u00b2 of held-out samples by their nearest neighbours among training samples, with the loss below."
    if share := logbook.last("eval/share"):
        text += f" The evaluations took {share:.1%} of the time."
    if best is not None:
        newest = f"; the newest is of step {logbook.last('step'):,.0f}" if logbook.last("step") != best.step else ""
        text += (
            f" The best checkpoint by {best.name} is that of step {best.step:,}{newest}. A score that chose a checkpoint is no "
            "result; results are those on the test split."
        )
    charts, rows = [], []
    for eval_name, (at, value) in found.items():
        kept = best.step if best is not None and best.name == eval_name else None
        chart = figures.score_chart(
            (at, value), logbook.series.get("loss", (at[:0], value[:0])), y="R\u00b2", best=kept
        )
        charts.append(html.card(chart, title=eval_name))
        top = int(value.argmax())
        rows.append((eval_name, f"{value[-1]:.3f}", f"{at[-1]:,}", f"{value[top]:.3f}", f"{at[top]:,}"))
    table = html.table(("", "last", "at step", "highest", "at step"), [("", rows)])
    return html.section(f"Held-out scores while {name} was trained", text, html.grid(charts), html.card(table))


def throughput(logbook: RunLog) -> Markup:
    """Medians and quantiles of images a second, MFU, data wait and memory of a run; nothing if none was logged."""
    rows = []
    for name, title, scale, form in (
        ("images_per_s", "images a second", 1.0, ",.1f"),
        ("mfu", "model FLOPs utilisation, %", 100.0, ".1f"),
        ("data_wait", "time spent waiting for data, %", 100.0, ".1f"),
        ("peak_gib", "peak memory, GiB", 1.0, ".2f"),
    ):
        if name in logbook.series:
            values = logbook.series[name][1] * scale
            low, middle, high = np.quantile(values, [0.2, 0.5, 0.8])
            rows.append((title, f"{middle:{form}}", f"{low:{form}}", f"{high:{form}}"))
    if not rows:
        return Markup()
    return html.section("Throughput", "", html.card(html.table(("", "median", "20%", "80%"), [("", rows)])))


def provenance(survey: Survey, logbook: RunLog, name: str) -> Markup:
    """The records of the run and of the survey, folded away."""
    records = {"The run's record": logbook.record, "Provenance of the survey": survey.provenance}
    blocks = [
        html.details(title, html.table((), [("", rows)], classes={0: "code", 1: "code"}))
        for title, record in records.items()
        if (rows := list(flatten(record)))
    ]
    return html.section(f"Where {name} comes from", "", html.card(*blocks or ("No record was kept.",)))


def _words(name: str) -> str:
    words = name.replace("_", " ").replace("/", " ")
    return words[:1].upper() + words[1:] if not words.startswith("ema ") else "EMA " + words[4:]
