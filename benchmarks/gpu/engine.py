"""The engine itself on the device: recipes as a user starts them, each a process that is ended when its time is up.

What no kernel's case shows: that the whole of it starts, that DeepSpeed, the loader and the checkpoints work there, how many
images a second and how much memory a run takes, and that one that was stopped continues to the bits of one that was not. The
survey is simulated once, at the recipes' size; it lies in the page cache, so storage is no part of the figures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu.job import Row

__all__ = ["SMOKE_TRIALS", "TRIALS", "Trial", "engine_rows"]

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("deepspeed", "tyro", "webdataset", "rich", "safetensors")
GRACE_S = 20.0  # past the deadline, for the trial that is running
WARMUP = 8  # steps
GALAXIES = 480


@dataclass(frozen=True)
class Trial:
    """Runs of one recipe.

    Attributes:
        name: For the row.
        options: Of the recipe's command line, its length excepted.
        stops: Steps after which it is told to stop, and its length last; it is started once for each, and continues.
        like: Trial whose last checkpoint must have the same bits.
        limit_s: Seconds that all its starts may take.
    """

    name: str
    options: tuple[str, ...] = ()
    stops: tuple[int, ...] = (20,)
    like: str | None = None
    limit_s: float = 60.0


def _batch(size: int) -> tuple[str, ...]:
    return "--train.global-batch", str(size), "--train.micro-batch", str(size)


TRIALS = (
    Trial("ViT-L/12, 90 images", _batch(90), (30,)),
    Trial("the same, stopped at 25", _batch(90), (25, 30), like="ViT-L/12, 90 images", limit_s=90.0),
    Trial("240 images", _batch(240)),
    Trial("480 images", _batch(480)),
    Trial("90 images, tanh GELU", (*_batch(90), "--method.vit.gelu", "tanh")),
    Trial("90 images, 8-bit products", (*_batch(90), "--method.vit.products", "fp8")),
    Trial("90 images, kernels off", (*_batch(90), "--method.impl", "reference", "--optim.impl", "reference")),
)
TINY = ("--preset", "smoke", "--device", "cpu", "--method.vit.dim", "48", "--method.vit.depth", "2", *_batch(8),
        "--schedule.learning-rate.warmup-steps", "1", "--schedule.teacher-temperature.warmup-steps", "1")  # fmt: skip
SMOKE_TRIALS = (
    Trial("tiny", TINY, (12,), limit_s=300.0),
    Trial("the same, stopped at 2", TINY, (2, 12), like="tiny", limit_s=300.0),
)


def engine_rows(
    folder: Path,
    trials: tuple[Trial, ...],
    deadline: float,
    smoke: bool,
    recipe: Path = ROOT / "recipes" / "dinov2_vitl.py",
) -> Iterator[Row]:
    """Run trials one after the other; one row each, as soon as it is there.

    Args:
        folder: For the survey, the runs and what they say.
        trials: What to run.
        deadline: `time.monotonic()` after which no trial starts.
        smoke: A tiny survey, nothing timed.
        recipe: The recipe.
    """
    if not trials:
        return
    trouble, saved = _trouble(folder / "survey", smoke), {}
    for trial in trials:
        row: Row = {"kind": "engine", "operation": "engine", "shape": trial.name, "variant": "engine"}
        if trouble or time.monotonic() > deadline:
            yield row | {"status": trouble or "not run: the time is used up"}
            continue
        run = folder / re.sub(r"\W+", "_", trial.name)
        row["status"] = _run(
            recipe, trial, folder / "survey", run, min(deadline + GRACE_S, time.monotonic() + trial.limit_s)
        )
        try:
            if row["status"] == "ok":
                saved[trial.name] = _digests(run)
                if trial.like in saved:
                    same = saved[trial.like] == saved[trial.name]
                    row |= {"same_bits": "yes"} if same else {"status": f"FAILED: other bits than {trial.like}"}
                row |= {} if smoke else _figures(run)
        except Exception as error:  # what it wrote is not what is expected here; the others may be
            row["status"] = f"FAILED: {type(error).__name__}: {error}"
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # five gigabytes each
        yield row


def _trouble(survey: Path, smoke: bool) -> str | None:
    """Make the survey; why no trial can be run, or None."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        return f"not run: no {', '.join(lacking)} here"
    try:
        _simulate(survey, smoke)
    except Exception as error:
        return f"FAILED: no survey: {type(error).__name__}: {error}"
    return None


def _simulate(survey: Path, smoke: bool) -> None:
    from armillary.engine.data.building.build import build
    from armillary.engine.data.simulate.survey import SimulatedSurvey

    count, size = (32, 32) if smoke else (GALAXIES, 160)
    build(SimulatedSurvey(count, seed=0, size=size), survey, name="simulated", samples_per_shard=16, progress=False)


def _run(recipe: Path, trial: Trial, survey: Path, run: Path, end: float) -> str:
    """Start a trial once for each of its stops; returns the status of its row."""
    length = ("--train.steps", str(trial.stops[-1]), "--telemetry.every-steps", "1")
    places = ("--data.path", str(survey), "--out", str(run.parent), "--name", run.name, "--data.reader", "webdataset")
    command, said = [sys.executable, str(recipe), *trial.options, *places, *length], run.parent / f"{run.name}.log"
    for steps in trial.stops:
        stopped = steps != trial.stops[-1]
        code = _until(command, said, run, steps, stopped, end)
        if code is None:
            return f"FAILED: not done after {trial.limit_s:.0f} s"
        if code != (75 if stopped else 0):
            last = said.read_text(errors="replace").strip().splitlines()[-1:]
            what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"FAILED: {what}: {' '.join(last)[:200]}"
    return "ok"


def _until(command: list[str], said: Path, run: Path, steps: int, stopped: bool, end: float) -> int | None:
    """Run a command, told to stop once its run has so many steps where it is to be stopped; None where it took too long."""
    with open(said, "ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        asked = False
        while (code := process.poll()) is None and time.monotonic() < end:
            if stopped and not asked and len(_lines(run)) >= steps:
                process.terminate()
                asked = True
            time.sleep(0.02)
        return code
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _lines(run: Path) -> list[Row]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _digests(run: Path) -> Row:
    """Hashes of the files of a run's newest checkpoint: weights, moments, averages, random states."""
    checkpoints = run / "checkpoints"
    manifest = json.loads((checkpoints / (checkpoints / "latest").read_text().strip() / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".safetensors")}


def _figures(run: Path) -> Row:
    """Medians of the steps after the first few, and the most memory."""
    lines = _lines(run)[WARMUP:]
    rate = statistics.median(line["images_per_s"] for line in lines)
    peak = max(line["peak_gib"] for line in lines)
    return {"images_per_s": rate, "ms_per_image": 1e3 / rate, "peak_mib": 1024 * peak, "loss": lines[-1]["loss"]}
