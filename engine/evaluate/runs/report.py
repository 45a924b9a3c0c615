"""The report: one self-contained page with what every task found, and the same numbers as JSON and Parquet.

Nothing is loaded from elsewhere: pictures are data URIs, charts are inline SVG.
"""

from __future__ import annotations

import datetime
import html
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from armillary.engine.atomic_file import atomic_path, write_text
from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.page.run_log import RunLog
from armillary.engine.evaluate.page.style import CSS
from armillary.engine.evaluate.page.verdict import item
from armillary.engine.evaluate.runs import report_run
from armillary.engine.evaluate.study.study import Measure, Outcome, Study

__all__ = ["page", "save_measures", "write_report"]


def page(title: str, header: str, sections: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: For the browser's tab.
        header: HTML of the head.
        sections: HTML of the body, in order.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body>"
        f"{header}<main>{''.join(sections)}</main>"
        f"<footer>Written {_now()} by armillary. This page needs no network.</footer></body></html>\n"
    )


def save_measures(folder: Path, study: Study, outcomes: Sequence[Outcome]) -> None:
    """Write metrics.json and metrics.parquet: every number of every task, a row each.

    Args:
        folder: Where to.
        study: What was studied.
        outcomes: What the tasks found.
    """
    rows = [asdict(m) for outcome in outcomes for m in outcome.measures]
    record = {
        "run": study.log.name,
        "survey": study.survey.name,
        "splits": {"train": study.train_split, "test": study.test_split},
        "features": {
            f.name: {"modality": f.modality, "dimensions": f.embeddings.vector.shape[1], **f.embeddings.metadata}
            for f in study.features.values()
        },
        "collapsed": any(outcome.collapsed for outcome in outcomes),
        "left_out": {outcome.task: outcome.left_out for outcome in outcomes if outcome.left_out},
        "lines": [line for outcome in outcomes for line in outcome.lines],
        "measures": [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows
        ],
    }
    write_text(folder / "metrics.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    kinds = {"value": pa.float64(), "error": pa.float64(), "samples": pa.int64()}
    names = list(Measure.__dataclass_fields__)
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    with atomic_path(folder / "metrics.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary)


def write_report(
    path: Path, title: str, study: Study, outcomes: Sequence[Outcome], logbooks: Mapping[str, RunLog]
) -> None:
    """Write the page.

    Args:
        path: HTML file.
        title: Its heading: the run that is studied.
        study: What was studied.
        outcomes: What the tasks found, in the order of the page.
        logbooks: Records and curves of the runs whose embeddings are compared, by name; the studied one first.
    """
    first = next(iter(logbooks.values()))
    training = "".join(
        report_run.training(book).replace("<h2>Training</h2>", f"<h2>Training of {html.escape(name)}</h2>")
        for name, book in logbooks.items()
    )
    sections = [
        _verdict(outcomes),
        _contents(study),
        *(section for outcome in outcomes for section in outcome.sections),
        training,
        report_run.throughput(first),
        *(report_run.provenance(study.survey, book, name) for name, book in logbooks.items()),
    ]
    facts = {"Galaxies": _split_counts(study)}
    path.parent.mkdir(parents=True, exist_ok=True)
    header = _run_header(title, study.survey, first, facts)
    write_text(path, page(f"{title} on {study.survey.name}", header, sections))


def _split_counts(study: Study) -> str:
    said = []
    for split, use in ((study.train_split, "to fit on"), (study.test_split, "to judge on")):
        try:
            said.append(f"{len(study.rows(split)):,} {use}")
        except ValueError:  # the sets have no galaxy of this split in common; the tasks say so
            said.append(f"none {use}")
    return ", ".join(said)


def _verdict(outcomes: Sequence[Outcome]) -> str:
    items = "".join(
        item("note", f"{outcome.task} is left out", outcome.left_out)
        if outcome.left_out
        else outcome.verdict or "".join(item("note", outcome.task, line) for line in outcome.lines)
        for outcome in outcomes
    )
    heads = "".join(outcome.headline for outcome in outcomes)
    return f'<h2>What was found</h2><section class="card">{heads}<ul class="verdict">{items}</ul></section>'


def _contents(study: Study) -> str:
    rows = ""
    for one in study.features.values():
        e = one.embeddings
        kind = f"predictions of {', '.join(one.targets)}" if one.targets else f"{e.vector.shape[1]} dimensions"
        aligned = "yes" if one.space else "no"
        rows += (
            f"<tr><td>{html.escape(one.name)}</td><td>{one.modality}</td><td>{html.escape(kind)}</td>"
            f"<td>{'' if one.targets else aligned}</td><td>{html.escape(e.metadata.get('run', ''))}</td>"
            f"<td>{len(e):,}</td></tr>"
        )
    return (
        '<h2>What is compared</h2><p class="quiet">All encoders are frozen; every predictor is fitted on the training split '
        "and judged on the test split, on the same galaxies. Supervised models were trained on the labels of the training "
        'split.</p><section class="card"><div class="scroll"><table><thead><tr><th>Features</th><th>made of</th><th></th>'
        f"<th>aligned</th><th>run</th><th>galaxies</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _run_header(title: str, survey: Survey, logbook: RunLog, more: Mapping[str, str]) -> str:
    record = logbook.record
    facts: dict[str, str] = {"Survey": _size(survey), **more}
    if steps := logbook.series.get("step"):
        facts["Steps trained"] = f"{int(steps[1][-1]):,}"
    if commit := record.get("commit"):
        facts["Commit"] = str(commit)[:12] + ("+changes" if "+changes" in str(commit) else "")
    versions = record.get("versions") or {}
    if "torch" in versions:
        facts["Versions"] = ", ".join(
            f"{k} {versions[k]}" for k in ("armillary", "torch", "deepspeed") if versions.get(k)
        )
    if device := record.get("device") or record.get("run", {}).get("device"):
        facts["Device"] = str(device)
    facts["Evaluated"] = _now()
    cells = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    command = record.get("command")
    shown = shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")
    line = f'<p class="quiet"><code>{html.escape(shown)}</code></p>' if shown else ""
    return (
        f'<header><div class="brand">Armillary</div><h1>{html.escape(title)}</h1>'
        f"{line}<dl class='facts'>{cells}</dl></header>"
    )


def _size(survey: Survey) -> str:
    """Name, size and modalities of a survey in a line."""
    count = f"{survey.name}, {survey.count():,}"
    if survey.spectrum is None:
        return f"{count} cutouts in {''.join(survey.bands)}"
    return f"{count} {'pairs of ' + ''.join(survey.bands) + ' cutout and spectrum' if survey.bands else 'spectra'}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
