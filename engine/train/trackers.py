"""Where a run's numbers go beside metrics.jsonl: TensorBoard, and one of Weights & Biases, MLflow and Trackio.

The last three are packages that a run imports when it asks for them (`telemetry.tracker`). Where they keep what they get is theirs
to know, by their own settings: WANDB_MODE=offline, MLFLOW_TRACKING_URI=sqlite:////shared/mlflow.db, TRACKIO_DIR. Rank 0 alone
writes. The run's name there, its id, is kept in trackers.json in the run's folder, so that a resumed run goes on in the same
curves; steps that a killed run does again are there twice, with the same numbers. A tracker that fails is said once and left out:
nothing here ends a training.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from armillary.engine.atomic_file import write_json
from armillary.engine.config.config_json import to_json
from armillary.engine.config.run import Run

__all__ = ["KEPT", "Trackers", "tracker_problems"]

KEPT = "trackers.json"
"""Ids of a run by tracker, in its folder."""

WAIT_S = 60
"""How long a tracker's server may keep the start or the end of a run waiting, where the tracker lets that be said."""


class _Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write finite numbers of a step."""

    def close(self, done: bool) -> None:
        """Write what waits; `done`: the run has come to its end."""


class _TensorBoard:
    def __init__(self, run: Run, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, done: bool) -> None:
        self._writer.close()


class _WandB:
    """Steps are a number beside the others, since the server refuses to go back to an earlier one."""

    def __init__(self, run: Run, known: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=run.telemetry.project,
            name=run.name,
            id=known,
            resume=None if known is None else "allow",
            dir=str(run.folder),
            config=to_json(run),
            allow_val_change=True,
            settings=wandb.Settings(console="off", login_timeout=WAIT_S, init_timeout=WAIT_S),
        )
        self.id = str(self._run.id)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class _MLflow:
    def __init__(self, run: Run, known: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(run.telemetry.project)
        self.id = str(mlflow.start_run(run_id=known, run_name=run.name, log_system_metrics=False).info.run_id)
        if known is None:  # they cannot be changed
            mlflow.log_params(_settings(run))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step, synchronous=False)

    def close(self, done: bool) -> None:
        self._mlflow.end_run("FINISHED" if done else "KILLED")


class _Trackio:
    """Its runs are told apart by name."""

    def __init__(self, run: Run, known: str | None) -> None:
        import uuid

        import trackio

        self.id = known or f"{run.name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(
            project=run.telemetry.project, name=self.id, resume="allow", config=_settings(run), embed=False
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, done: bool) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[Run, str | None], Any]] = {"wandb": _WandB, "mlflow": _MLflow, "trackio": _Trackio}


def tracker_problems(run: Run) -> list[str]:
    """Whether the package of the run's tracker is there, as `telemetry.tracker: rule, got value`."""
    name = run.telemetry.tracker
    if name is None or importlib.util.find_spec(name) is not None:
        return []
    return [f"telemetry.tracker: must be installed, `pip install 'armillary[{name}]'`, got {name!r}, which is not"]


class Trackers:
    """The trackers of a run, on rank 0.

    Args:
        run: The run.
        first_step: Steps already done.
        say: Takes lines for the screen.
    """

    def __init__(self, run: Run, first_step: int, say: Callable[..., None]) -> None:
        self._run, self._say = run, say
        self._open: dict[str, _Tracker] = {}
        if run.telemetry.tensorboard:
            self._guarded("tensorboard", lambda: self._begin("tensorboard", _TensorBoard(run, first_step)))
        if (name := run.telemetry.tracker) is not None:
            self._guarded(name, lambda: self._begin(name, self._resumed(name)))

    def log(self, line: Mapping[str, float | int]) -> None:
        """Write a step's numbers; those that are not finite are left out."""
        step = int(line["step"])
        values = {name: float(value) for name, value in line.items() if name != "step" and math.isfinite(value)}
        for name, tracker in list(self._open.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(step, values))  # type: ignore[misc]

    def close(self, done: bool) -> None:
        """Close all of them; `done`: the run has come to its end."""
        for name, tracker in list(self._open.items()):
            self._guarded(name, lambda tracker=tracker: tracker.close(done))  # type: ignore[misc]
        self._open = {}

    def _begin(self, name: str, tracker: _Tracker) -> None:
        self._open[name] = tracker

    def _resumed(self, name: str) -> _Tracker:
        """The tracker under the run's id there, which is kept."""
        path, known = self._run.folder / KEPT, {}
        with suppress(OSError, ValueError):
            known = dict(json.loads(path.read_text()))
        key = f"{name}/{self._run.telemetry.project}"
        tracker = _KINDS[name](self._run, known.get(key))
        self._say(f"{name}: {self._run.telemetry.project}/{tracker.id}")
        write_json(path, {**known, key: tracker.id})
        return tracker

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        """Do something with a tracker; where it fails, it is said, and the tracker is left out from then on."""
        try:
            action()
        except Exception as error:  # whatever a package of somebody else's comes up with
            self._open.pop(name, None)
            text = " ".join(str(error).split()) or type(error).__name__
            self._say(f"WARNING: {name} fails: {text[:300]}; the run goes on without it", loud=True)


def _settings(run: Run) -> dict[str, str]:
    """A run's record by dotted names; MLflow takes 6,000 characters a value."""
    from armillary.engine.evaluate.page.run_log import flatten

    return {name: value[:6000] for name, value in flatten(to_json(run))}
