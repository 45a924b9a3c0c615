"""What a run's folder says of itself: run.json with its provenance, and metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from armillary.engine.weights.checkpoint import Best

__all__ = ["RunLog", "flatten", "run_of_checkpoint"]

NOT_LOSSES = {
    "step", "epoch", "loss", "loss_max", "images_per_s", "tokens_per_s", "mfu", "data_wait", "peak_gib", "skipped",
    "nonfinite", "learning_rate", "weight_decay", "ema_momentum", "teacher_temperature", "seconds",
}  # fmt: skip


@dataclass(frozen=True)
class RunLog:
    """A run's record and its numbers over the steps.

    Attributes:
        record: Contents of run.json: "run" and, beside it, commit, command, versions and the like. Empty if unknown.
        series: By name, steps and values; steps at which a number was not logged are left out.
        best: The checkpoint that the run keeps as its best, by an evaluation of itself; None where it keeps none.
        checkpoint: Step of the checkpoint by whose folder it was read; None where it was the run's.
    """

    record: dict[str, Any] = field(default_factory=dict)
    series: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    best: Best | None = None
    checkpoint: int | None = None

    @classmethod
    def read(cls, run_dir: Path) -> RunLog:
        """Read a run's folder, or that of one of its checkpoints; a missing metrics.jsonl gives no series.

        Raises:
            FileNotFoundError: There is no run.json.
            ValueError: run.json is not JSON.
        """
        given, run_dir = run_dir, run_of_checkpoint(run_dir)
        step = given.name.removeprefix("step-")
        path = run_dir / "run.json"
        if not path.is_file():
            raise FileNotFoundError(f"{run_dir}: no run here (run.json is missing)")
        try:
            record = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a run's record: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("run", {}), dict):
            raise ValueError(f"{path}: not a run's record")
        checkpoint = int(step) if given != run_dir and step.isdigit() else None
        return cls(record, _series(run_dir / "metrics.jsonl"), _best(run_dir / "checkpoints"), checkpoint)

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.record.get("run", {}).get("name", "unnamed run"))

    def last(self, name: str) -> float | None:
        """Last logged value of a number, also where it is filed under monitor/; None if never logged."""
        for key in (name, f"monitor/{name}"):
            if key in self.series:
                return float(self.series[key][1][-1])
        return None

    def prototypes(self) -> float | None:
        """How many prototypes the method has: logged, or set in the record; None if it has none."""
        if (logged := self.last("prototypes")) is not None:
            return logged
        for name, value in flatten(self.record.get("run", {}).get("method", {})):
            if name.rpartition(".")[2] == "prototypes" and value.isdigit():
                return float(value)
        return None

    def losses(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The named terms of the loss."""
        return {k: v for k, v in self.series.items() if k not in NOT_LOSSES and "/" not in k}

    def evals(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Scores of the evaluations that the run made of itself while it was trained, by their names."""
        found = {k.removeprefix("eval/"): v for k, v in self.series.items() if k.startswith("eval/")}
        return {k: v for k, v in found.items() if k not in ("seconds", "share")}

    def monitors(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The method's health measures, without their prefix."""
        return {k.removeprefix("monitor/"): v for k, v in self.series.items() if k.startswith("monitor/")}


def run_of_checkpoint(path: Path) -> Path:
    """The run's folder above a checkpoint's own, RUN/checkpoints/step-N; any other path as it is."""
    return path.absolute().parents[1] if (path / "manifest.json").is_file() else path


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of a nested record; class marks and path wrappers are taken off."""
    if isinstance(value, dict) and set(value) == {"$path"}:
        value = value["$path"]
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "$type":
                yield from flatten(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        for i, inner in enumerate(value):
            yield from flatten(inner, f"{name}[{i}]")
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _best(checkpoints: Path) -> Best | None:
    if not (checkpoints / "best.json").is_file():
        return None
    from armillary.engine.weights.checkpoint import read_best  # brings torch, which most readers of a log do without

    return read_best(checkpoints)


def _series(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    steps: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    if not path.is_file():
        return {}
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was cut short
        for name, value in entry.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
                steps.setdefault(name, []).append(step)
                values.setdefault(name, []).append(value)
    return {name: (np.array(steps[name]), np.array(values[name])) for name in values}
