"""The report of a study: one self-contained page with what every task found, and the same numbers as JSON and Parquet."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from armillary.engine.atomic_file import atomic_path, write_text
from armillary.engine.evaluate.page.run_log import RunLog
from armillary.engine.evaluate.runs import report_run
from armillary.engine.evaluate.runs.report import page, run_header
from armillary.engine.evaluate.study.study import Measure, Outcome, Study

__all__ = ["save_measures", "write_study_report"]


def save_measures(folder: Path, study: Study, outcomes: Sequence[Outcome]) -> None:
    """Write metrics.json and metrics.parquet: every number of every task, a row each.

    Args:
        folder: Where to.
        study: What was studied.
        outcomes: What the tasks found.
    """
    rows = [asdict(m) for outcome in outcomes for m in outcome.measures]
    record = {
        "survey": study.survey.name,
        "splits": {"train": study.train_split, "test": study.test_split},
        "features": {
            f.name: {"modality": f.modality, "dimensions": f.embeddings.vector.shape[1], **f.embeddings.metadata}
            for f in study.features.values()
        },
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


def write_study_report(
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
    header = run_header(title, study.survey, first, facts)
    write_text(path, page(f"{title} on {study.survey.name}", header, sections))


def _split_counts(study: Study) -> str:
    counts = [len(study.rows(split)) for split in (study.train_split, study.test_split)]
    return f"{counts[0]:,} to fit on, {counts[1]:,} to judge on"


def _verdict(outcomes: Sequence[Outcome]) -> str:
    items = "".join(
        f'<li class="note"><b>{html.escape(outcome.task)}</b><span>{html.escape(line)}</span></li>'
        for outcome in outcomes
        for line in outcome.lines
    )
    return f'<h2>What was found</h2><section class="card"><ul class="verdict">{items}</ul></section>'


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
