"""The report: one self-contained page with what every task found, and the same numbers as JSON and Parquet.

Nothing is loaded from elsewhere: pictures are data URIs, charts are inline SVG.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from armillary.engine.atomic_file import atomic_path, write_text
from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.page.html import card, header, now, section, table, verdicts, write_page
from armillary.engine.evaluate.page.run_log import RunLog, flatten
from armillary.engine.evaluate.runs import report_run
from armillary.engine.evaluate.study.study import Measure, Outcome, Study

__all__ = ["save_measures", "write_report"]


def save_measures(folder: Path, study: Study, outcomes: Sequence[Outcome]) -> None:
    """Write metrics.json and metrics.parquet: every number of every task, a row each."""
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
    """Write the page: what the tasks found, in order, then curves and records of the runs, the studied one first."""
    first = next(iter(logbooks.values()))
    sections = [
        _verdict(outcomes),
        _contents(study),
        *(section for outcome in outcomes for section in outcome.sections),
        *(part(book, name) for name, book in logbooks.items() for part in (report_run.evals, report_run.training)),
        report_run.throughput(first),
        *(report_run.provenance(study.survey, book, name) for name, book in logbooks.items()),
    ]
    head = _run_header(title, study.survey, first, {"Galaxies": _split_counts(study)})
    write_page(path, f"{title} on {study.survey.name}", head, sections)


def _split_counts(study: Study) -> str:
    said = []
    for split, use in ((study.train_split, "to fit on"), (study.test_split, "to judge on")):
        try:
            said.append(f"{len(study.rows(split)):,} {use}")
        except ValueError:  # the sets have no galaxy of this split in common; the tasks say so
            said.append(f"none {use}")
    return ", ".join(said)


def _verdict(outcomes: Sequence[Outcome]) -> Markup:
    items: list[tuple[str, str, str]] = []
    for outcome in outcomes:
        if outcome.left_out:
            items.append(("note", outcome.task, f"left out: {outcome.left_out}"))
        else:
            items += outcome.verdict or [("note", outcome.task, line) for line in outcome.lines]
    return section("What was found", "", card(*(o.headline for o in outcomes if o.headline), verdicts(items)))


def _contents(study: Study) -> Markup:
    rows = []
    for one in study.features.values():
        e = one.embeddings
        kind = f"predictions of {', '.join(one.targets)}" if one.targets else f"{e.vector.shape[1]} dimensions"
        aligned = "" if one.targets else "yes" if one.space else "no"
        rows.append((one.name, one.modality, kind, aligned, e.metadata.get("run", ""), f"{len(e):,}"))
    return section(
        "What is compared",
        "All encoders are frozen; every predictor is fitted on the training split and judged on the test split, on the same "
        "galaxies. Supervised models were trained on the labels of the training split.",
        card(table(("Features", "made of", "", "aligned", "run", "galaxies"), [("", rows)])),
    )


def _run_header(title: str, survey: Survey, logbook: RunLog, more: Mapping[str, str]) -> Markup:
    record = logbook.record
    facts: dict[str, str] = {"Survey": _size(survey), **more}
    if steps := logbook.series.get("step"):
        last = int(steps[1][-1])
        facts["Steps trained"] = (
            f"{last:,}" if logbook.checkpoint in (None, last) else f"{logbook.checkpoint:,} of {last:,}"
        )
    if starts := _starts_from(record):
        facts["Started from"] = starts
    if commit := record.get("commit"):
        facts["Commit"] = str(commit)[:12] + ("+changes" if "+changes" in str(commit) else "")
    versions = record.get("versions") or {}
    if "torch" in versions:
        facts["Versions"] = ", ".join(
            f"{k} {versions[k]}" for k in ("armillary", "torch", "deepspeed") if versions.get(k)
        )
    if device := record.get("device") or record.get("run", {}).get("device"):
        facts["Device"] = str(device)
    facts["Evaluated"] = now()
    command = record.get("command")
    shown = shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")
    return header(title, command=shown, facts=facts)


def _starts_from(record: Mapping[str, Any]) -> str:
    """What the run took weights from, as its record names it."""
    method, command = record.get("run", {}).get("method", {}), record.get("command")
    found = [value for name, value in flatten(method) if name.endswith("_from") and value != "None"]
    words = list(map(str, command)) if isinstance(command, list) else []
    found += [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--init-from"]
    return ", ".join(found)


def _size(survey: Survey) -> str:
    """Name, size and modalities of a survey in a line."""
    bands = "".join(survey.bands)
    if survey.spectrum is not None:
        what = f"pairs of {bands} cutout and spectrum" if bands else "spectra"
    else:
        what = f"cutouts in {bands}" if bands else "galaxies as vectors"
    return f"{survey.name}, {survey.count():,} {what}"
