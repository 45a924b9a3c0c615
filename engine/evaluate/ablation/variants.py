"""Runs that differ in a few settings, as variants: the same settings but for the seed are one variant.

Shape legend: M test galaxies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from armillary.engine.evaluate.page.run_log import flatten

__all__ = ["MeasureName", "RunResult", "Variant", "earlier_measures", "settings_of", "variants"]

ASIDE = (
    "name", "seed", "out", "device", "telemetry", "checkpoint", "train.zero_stage", "data.threads", "data.prefetch", "data.reader",
)  # fmt: skip
"""Settings that change nothing a run learns but by chance."""


class MeasureName(NamedTuple):
    """What a number of an earlier evaluation is called."""

    task: str
    features: str
    target: str
    model: str
    metric: str


@dataclass(frozen=True)
class RunResult:
    """What is known of one run.

    Attributes:
        name: Its name.
        seed: Its seed.
        settings: All other settings by dotted name, see `settings_of`.
        predictions: [M] by target, on the study's test galaxies.
        measures: Numbers of an earlier evaluation of this run alone.
    """

    name: str
    seed: int
    settings: Mapping[str, str]
    predictions: Mapping[str, np.ndarray]
    measures: Mapping[MeasureName, float]


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seeds alone.

    Attributes:
        name: How it differs from the first variant, "as the first run" for that one.
        changes: Settings that differ from the first variant's: name and value, "-" where there is none.
        runs: By seed.
    """

    name: str
    changes: tuple[tuple[str, str], ...]
    runs: Mapping[int, RunResult]


def settings_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Settings of a run's record (JSON types) that decide what it learns, by dotted name."""
    found = dict(flatten(record))
    return {k: v for k, v in found.items() if not any(k == a or k.startswith(f"{a}.") for a in ASIDE)}


def earlier_measures(folder: Path, run: str) -> dict[MeasureName, float]:
    """Numbers of RUN/evaluation/metrics.json, of whole test sets; nothing where there is no such file.

    Args:
        folder: The run's.
        run: Its name, which is taken out of the names of feature sets.

    Raises:
        ValueError: The file is not what an evaluation writes.
    """
    path = folder / "evaluation" / "metrics.json"
    if not path.is_file():
        return {}
    found: dict[MeasureName, float] = {}
    try:
        for row in json.loads(path.read_text())["measures"]:
            if row["stratum"] == "all" and row["value"] is not None and row["task"] != "ablation":
                features = row["features"].replace(f" ({run})", "")
                name = MeasureName(row["task"], features, row["target"], row["model"], row["metric"])
                found[name] = float(row["value"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the numbers of an evaluation: {error!r}") from error
    return found


def variants(runs: Sequence[RunResult]) -> list[Variant]:
    """Group runs by settings, in the order of the first run of each.

    Raises:
        ValueError: Fewer than two variants, or two runs of one have the same seed.
    """
    groups: dict[tuple[tuple[str, str], ...], dict[int, RunResult]] = {}
    for run in runs:
        mine = groups.setdefault(tuple(sorted(run.settings.items())), {})
        if run.seed in mine:
            raise ValueError(
                f"{run.name} and {mine[run.seed].name} have the same settings and the same seed, {run.seed}; give one of them"
            )
        mine[run.seed] = run
    if len(groups) < 2:
        raise ValueError(f"all {len(runs)} runs have the same settings but for the seed; compare runs that differ")
    first = dict(next(iter(groups)))
    found = []
    for key, mine in groups.items():
        own = dict(key)
        changes = tuple((k, own.get(k, "-")) for k in {**first, **own} if own.get(k) != first.get(k))
        name = ", ".join(f"{k} {v}" for k, v in changes) or "as the first run"
        found.append(Variant(name, changes, mine))
    return found
