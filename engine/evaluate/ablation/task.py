"""Task `ablation`: what a setting is worth. Runs by their settings in one table, differences from the first run's variant.

Numbers are of two kinds: predictions of the runs on the same test galaxies, scored here (R2, or weighted F1 of classes), and what
earlier evaluations wrote into RUN/evaluation/metrics.json, for which only the seeds are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from armillary.engine.config.config_json import to_json
from armillary.engine.evaluate.ablation.differences import Difference, Scored, difference, score_runs
from armillary.engine.evaluate.ablation.variants import RunResult, Variant, earlier_measures, settings_of, variants
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.page import figures
from armillary.engine.evaluate.page.html import Bold, card, grid, lines, number, quiet, section, table
from armillary.engine.evaluate.study.study import Measure, Outcome, Study

__all__ = ["ablation", "compare"]

TASK = "ablation"
SCRATCH = ("method.image_from", "None")
"""The setting of a fine-tuned network's counterpart."""
LINE = 48  # characters of a cell
_WORDS = {"r2": "R\u00b2", "f1": "F1"}


def ablation(study: Study, encoders: Sequence[Encoder], *, resamples: int = 1000) -> Outcome:
    """Compare the runs of a study by their settings.

    Args:
        study: With the predictions of the runs, where they have any.
        encoders: The runs, the one that the others are held against first.
        resamples: Bootstrap resamples.

    Raises:
        ValueError: The runs do not differ, or there is nothing that they can be compared by.
    """
    rows = study.rows(study.test_split)
    runs = []
    for encoder in encoders:
        predictions: dict[str, np.ndarray] = {}
        for name, features in study.features.items():
            if features.targets and features.embeddings.metadata.get("run") == encoder.run.name:
                predictions |= dict(zip(features.targets, study.vectors(name, rows).T.astype(np.float64), strict=True))
        record = to_json(encoder.run)
        measures = {} if encoder.folder is None else earlier_measures(encoder.folder, encoder.run.name)
        runs.append(RunResult(encoder.run.name, encoder.run.seed, settings_of(record), predictions, measures))
    wanted = dict.fromkeys(target for run in runs for target in run.predictions if target in study.survey.labels)
    truth = {target: study.label(target, rows) for target in wanted}
    return compare(runs, truth, resamples=resamples, seed=study.seed)


def compare(
    runs: Sequence[RunResult], truth: Mapping[str, np.ndarray], *, resamples: int = 1000, seed: int = 0
) -> Outcome:
    """The outcome of runs that have been read.

    Args:
        runs: The one that the others are held against first.
        truth: [M] true values by target, NaN where unknown.
        resamples: Bootstrap resamples.
        seed: Of their draws.

    Raises:
        ValueError: As for `ablation`.
    """
    found = variants(runs)
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"runs: names must differ, got {', '.join(run.name for run in runs)}")
    scored = []
    for target, true in truth.items():
        predicted = {run.name: run.predictions[target] for run in runs if target in run.predictions}
        if len(predicted) > 1:
            scored.append(score_runs(target, true, predicted, resamples=resamples, seed=seed))
    earlier = _earlier(runs)
    if not scored and not earlier:
        raise ValueError(
            "the runs have no predictions of the same labels and no evaluation/metrics.json with the same numbers; evaluate "
            "each of them first"
        )
    sections = []
    if scored:
        sections.append(_section("What is each setting worth?", _PREDICTED, found, scored, figure=True))
    if earlier:
        sections.append(_section("The same by earlier evaluations", _EARLIER, found, earlier, figure=False))
    measures = tuple(m for s in [*scored, *earlier] for m in _measures(s, found))
    told = [_verdict(s, v, found[0]) for s in scored for v in found[1:]]
    return Outcome(TASK, measures, tuple(text for _, _, text in told), tuple(sections), verdict=tuple(told))


_PREDICTED = (
    "Each row is a variant: the settings in which it differs from the first run, over its seeds. R\u00b2 of labels, weighted F1 of "
    "classes (labels of whole numbers), on the same test galaxies: mean over seeds \u00b1 their standard deviation, below it the "
    "difference from the first variant with its 95% interval, from galaxies drawn anew together and from the scatter of runs of "
    "equal seeds. Bold where the interval excludes 0; where it does not, no difference was found. In brackets what the most "
    "frequent class, or the mean, would score."
)
_EARLIER = (
    "Numbers that each run's own evaluation wrote, paired by seed: the interval is Student's over the seeds' differences and does "
    "not hold the chance of the galaxies. Three seeds have a wide one."
)


def _earlier(runs: Sequence[RunResult]) -> list[Scored]:
    """Numbers that at least two runs have."""
    names = dict.fromkeys(name for run in runs for name in run.measures)
    found = []
    for name in names:
        values = {run.name: run.measures[name] for run in runs if name in run.measures}
        if len(values) > 1:
            about = ", ".join(part for part in (name.task, name.features, name.target, name.model) if part)
            found.append(Scored(about, name.metric, values, {}, 0))
    return found


def _section(title: str, text: str, found: Sequence[Variant], scored: Sequence[Scored], *, figure: bool) -> Markup:
    head = ["", "Variant", "seeds", *(_column(s) for s in scored)]
    rows = []
    for place, variant in enumerate(found, 1):
        label = lines(*(part for k, v in variant.changes for part in _wrapped(f"{_short(k)} {v}"))) or variant.name
        cells: list[object] = [place, label, len(variant.runs)]
        cells += [_cell(s, variant, found[0]) for s in scored]
        rows.append(Bold(cells) if variant is found[0] else cells)
    parts = [card(table(head, [("", rows)], classes={1: "left"}))]
    if figure:
        parts.append(grid(card(_chart(s, found), title=_title(s)) for s in scored))
    return section(title, text, *parts)


def _title(s: Scored) -> str:
    return f"{_WORDS.get(s.metric, s.metric)} of {s.target}"


def _column(s: Scored) -> Markup | str:
    if math.isnan(s.baseline):
        return _title(s)
    return lines(_title(s), f"{s.samples:,} galaxies [{s.baseline:.3f}]")


def _cell(s: Scored, variant: Variant, first: Variant) -> Markup | str:
    values = [s.values[run.name] for run in variant.runs.values() if run.name in s.values]
    if not values:
        return "\u2013"
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    top = number(float(np.mean(values)), spread)
    if variant is first:
        return top
    gap = difference(s, variant, first)
    if gap is None:
        return lines(top, quiet("no seed in common"))
    return lines(top, number(gap.value, gap.half, "+.3f", bold=gap.clear))


def _chart(s: Scored, found: Sequence[Variant]) -> Markup:
    """Differences from the first variant with their intervals, one below the other, as themed SVG."""
    gaps = [(v, gap) for v in found[1:] if (gap := difference(s, v, found[0])) is not None]
    figure, axes = figures.canvas(4.8, 1.1 + 0.45 * len(gaps))
    axes.locator_params(axis="x", nbins=5)
    places = -np.arange(len(gaps))
    axes.axvline(0, color=figures.MUTED, lw=1)
    for place, (_, gap) in zip(places, gaps, strict=True):
        colour = figures.SERIES[0] if gap.clear else figures.MUTED
        axes.errorbar(
            [gap.value], [place], xerr=[np.nan_to_num(gap.half)], fmt="o", color=colour, ms=6, lw=2, capsize=0
        )
    axes.set_yticks(places, [f"variant {found.index(v) + 1}" for v, _ in gaps])
    axes.set_ylim(-len(gaps) + 0.4, 0.6)
    axes.set_xlabel(f"{_WORDS.get(s.metric, s.metric)} minus the first variant's")
    return figures.svg(figure)


def _measures(s: Scored, found: Sequence[Variant]) -> list[Measure]:
    rows = []
    for variant in found:
        values = [s.values[run.name] for run in variant.runs.values() if run.name in s.values]
        if values:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
            model = f"{len(values)} seeds"
            rows.append(
                Measure(TASK, variant.name, s.target, model, s.metric, float(np.mean(values)), spread, s.samples)
            )
        gap = difference(s, variant, found[0]) if variant is not found[0] else None
        if gap is not None:
            model = f"{gap.seeds} paired seeds"
            rows.append(
                Measure(TASK, variant.name, s.target, model, f"{s.metric} difference", gap.value, gap.half, s.samples)
            )
    return rows


def _verdict(s: Scored, variant: Variant, first: Variant) -> tuple[str, str, str]:
    """Kind, title and text of a line on a variant, for the head of the report and the terminal."""
    gap = difference(s, variant, first)
    name = ", ".join(f"{_short(k)} {v}" for k, v in variant.changes)
    if SCRATCH in variant.changes:
        name = f"the same network from scratch ({name})"
    if gap is None:
        text = f"{name}: no seed in common with the first run, so no difference of {s.target}"
        return "note", s.target, text
    # One seed may be chance: it is told, and is no verdict.
    kind = {"better": "yes", "worse": "no"}.get(gap.verdict, "note") if gap.seeds > 1 else "note"
    return kind, s.target, f"{name}: {_title(s)} {gap.value:+.3f}, {_within(gap)}: {gap.verdict}"


def _within(gap: Difference) -> str:
    if math.isnan(gap.half):
        return "no interval"
    seeds = f"{gap.seeds} seeds" if gap.seeds > 1 else "one seed"
    return f"95% interval {gap.value - gap.half:+.3f} to {gap.value + gap.half:+.3f} ({seeds})"


def _wrapped(text: str) -> list[str]:
    """A long list in a table's cell: an item a line."""
    return text.split(", ") if len(text) > LINE else [text]


def _short(name: str) -> str:
    """A setting without its section where what is left still says what it is."""
    return name.rpartition(".")[2].replace("_", " ")
