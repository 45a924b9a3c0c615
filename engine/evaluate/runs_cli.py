"""Command `armillary runs`: what lies in a folder of runs, and how two of them differ."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from armillary.engine.atomic_file import require_writable, write_json
from armillary.engine.evaluate.ablation.variants import earlier_measures
from armillary.engine.evaluate.page.run_log import RunLog, flatten
from armillary.engine.exclusive import is_owned

__all__ = ["Difference", "RunRow", "differences", "list_runs", "runs"]

SHOWN_MEASURES = 3
"""Figures of a run under the table; all of them are in the JSON file."""


@dataclass(frozen=True)
class RunRow:
    """One run.

    Attributes:
        folder: Where it lies, below the folder that was looked through.
        name: Its name.
        method: Class of its method.
        state: "running", "finished" or "stopped" (it can be started again).
        step: Steps done.
        steps: Steps planned.
        loss: Mean of the last tenth of the logged losses, NaN before the first.
        samples_per_s: The last logged rate, over all ranks; NaN before the first.
        seed: Its seed.
        started: When, as its record has it; empty where it has not.
        commit: Commit of the program, ten characters.
        measures: Numbers of its own evaluation, by "features target model metric"; empty where there was none.
        evals: Last score of each evaluation that it made of itself while it was trained, by name.
        best_step: Step of the checkpoint that it keeps as its best; None where it keeps none.
    """

    folder: str
    name: str
    method: str
    state: str
    step: int
    steps: int
    loss: float
    samples_per_s: float
    seed: int
    started: str
    commit: str
    measures: dict[str, float]
    evals: dict[str, float]
    best_step: int | None


@dataclass(frozen=True)
class Difference:
    """A field of two records that differs; None where a record does not have it."""

    field: str
    first: str | None
    second: str | None


def list_runs(folder: Path) -> tuple[list[RunRow], list[str]]:
    """Every run below a folder, in the order of their names.

    Args:
        folder: Folder of runs, or of one.

    Returns:
        The runs, and a sentence for each record that cannot be read.

    Raises:
        FileNotFoundError: There is no such folder, or no run in it.
        ValueError: No record can be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    rows, unread = [], []
    for path in sorted(folder.glob("**/run.json")):
        try:
            rows.append(_row(path.parent, folder))
        except (OSError, ValueError) as error:
            unread.append(str(error))
    if not rows and unread:
        raise ValueError("; ".join(unread))
    if not rows:
        raise FileNotFoundError(f"{folder}: no runs here (no run.json, also not in its folders)")
    return rows, unread


def _row(run: Path, top: Path) -> RunRow:
    log = RunLog.read(run)
    try:
        record: dict[str, Any] = log.record["run"]
        step, steps = int(log.last("step") or 0), int(record["train"]["steps"])
        loss = log.series["loss"][1] if "loss" in log.series else np.array([np.nan])
        return RunRow(
            folder=run.relative_to(top).as_posix(),
            name=log.name,
            method=record["method"]["$type"].rpartition(":")[2],
            state="running" if is_owned(run) else "finished" if step >= steps else "stopped",
            step=step,
            steps=steps,
            loss=float(loss[-max(1, len(loss) // 10) :].mean()),
            samples_per_s=next(
                (v for n in ("images_per_s", "samples_per_s") if (v := log.last(n)) is not None), float("nan")
            ),
            seed=int(record["seed"]),
            started=str(log.record.get("started", "")),
            commit=str(log.record.get("commit") or "")[:10],
            measures={
                " ".join(filter(None, name[1:])): value for name, value in earlier_measures(run, log.name).items()
            },
            evals={name: float(value[-1]) for name, (_, value) in log.evals().items()},
            best_step=None if log.best is None else log.best.step,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{run / 'run.json'}: not a run's record: {error!r}") from error


def differences(first: Path, second: Path) -> list[Difference]:
    """Fields in which the records of two runs differ: settings, then commit, versions and survey.

    Args:
        first: Folder of a run.
        second: Folder of another.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: A record cannot be read.
    """
    a, b = (_facts(RunLog.read(folder).record) for folder in (first, second))
    return [Difference(name, a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)]


def _facts(record: dict[str, Any]) -> dict[str, str]:
    beside = {name: record.get(name) for name in ("commit", "versions", "survey")}
    return dict(flatten(record.get("run", {}))) | dict(flatten(beside))


def runs(
    folder: tyro.conf.Positional[Path],
    other: tyro.conf.Positional[Path | None] = None,
    *,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> int:
    """List the runs of a folder, or say in which fields two runs differ.

    Args:
        folder: Folder of runs; with a second one, the first run's.
        other: Folder of a second run.
        out: JSON file that gets the same.
    """
    if out is not None:
        require_writable(out)
    if other is None:
        rows, unread = list_runs(folder)
        _print_rows(rows)
        for sentence in unread:
            print(sentence, file=sys.stderr)
    else:
        found = differences(folder, other)
        _print_differences(found, folder, other)
    if out is not None:
        write_json(out, json.loads(json.dumps([asdict(x) for x in (rows if other is None else found)])))
    return 0


def _print_rows(rows: list[RunRow]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("folder", "method", "state", "step", "loss", "samples/s", "seed", "figures"):
        table.add_column(name, no_wrap=True, min_width=len(name))
    for row in rows:
        table.add_row(
            row.folder if row.folder != "." else row.name,
            row.method,
            row.state,
            f"{row.step:,}/{row.steps:,}",
            _number(row.loss),
            _number(row.samples_per_s),
            str(row.seed),
            str(len(row.measures) or "-"),
        )
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        if row.evals:
            scores = ", ".join(f"{name} R2 {value:.3f}" for name, value in row.evals.items())
            best = "" if row.best_step is None else f"; best checkpoint at step {row.best_step:,}"
            console.print(f"{escape(row.folder)}: while training {escape(scores)}{best}")
        for name, value in list(row.measures.items())[:SHOWN_MEASURES]:
            console.print(f"{escape(row.folder)}: {escape(name)} {value:.3g}")


def _print_differences(found: list[Difference], first: Path, second: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not found:
        print("their records are the same")
        return
    table = Table("field", escape(str(first)), escape(str(second)), box=None, pad_edge=False)
    for d in found:
        table.add_row(escape(d.field), *("-" if v is None else escape(v) for v in (d.first, d.second)))
    Console(highlight=False).print(table)


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4g}"
