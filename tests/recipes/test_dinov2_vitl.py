"""The DINOv2 recipe with its real model, loader and views, in real processes."""

import json
import os
import time
from dataclasses import replace

import processes
import pytest
import torch
from processes import kill, recipe, run, start

from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.simulate.survey import SimulatedSurvey
from armillary.engine.train.checks import problems

TINY = ("--preset", "smoke", "--device", "cpu", "--train.global-batch", "16", "--train.micro-batch", "8",
        "--train.steps", "8", "--checkpoint.every-steps", "3", "--method.vit.dim", "48", "--method.vit.depth", "2",
        "--schedule.learning-rate.warmup-steps", "2", "--schedule.teacher-temperature.warmup-steps", "4",
        "--telemetry.every-steps", "1")  # fmt: skip


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "survey"
    build(SimulatedSurvey(90, seed=5, size=32), folder, name="simulated", samples_per_shard=16, progress=False)
    return folder


@pytest.fixture(scope="module")
def presets():
    return processes.presets("dinov2_vitl")


def pieces(folder, step):
    """Contents of a checkpoint's tensor files; they hold weights, moments, average, buffers and random states."""
    return {p.name: p.read_bytes() for p in (folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_presets_are_whole(presets):
    """On a survey with the right pixels, a preset breaks no rule but that of a GPU; settings are the published ones."""
    assert set(presets) == {"RECIPE", "PAPER", "SMOKE", "PICTURES"}
    released = presets["RECIPE"]
    assert released.scalars(0)["learning_rate"] == 0
    assert released.scalars(40_000)["learning_rate"] == pytest.approx(2e-4 * (1440 / 1024) ** 0.5)
    assert released.scalars(249_999)["ema_momentum"] == pytest.approx(1.0, abs=1e-6)
    assert released.scalars(0)["ema_momentum"] == 0.992
    assert presets["PAPER"].scalars(100_000)["learning_rate"] == pytest.approx(0.004)
    inputs = released.views.input_spec(3)
    with torch.device("meta"):
        method = released.method.build(inputs)
    assert sum(p.numel() for p in method.student.backbone.parameters()) == 302_954_496
    assert sum(p.numel() for p in method.student.dino_head.parameters()) == 23_662_848


def test_presets_fit_their_surveys(presets, survey, tmp_path):
    described = Survey.load(survey)
    assert presets["SMOKE"].views.problems(described) == []
    pictures = presets["PICTURES"]
    found = problems(replace(pictures, device="cpu", data=replace(pictures.data, path=tmp_path)), 2)
    assert len(found) == 1 and found[0].startswith("data.path: must be a packed survey, got")


@pytest.mark.dist
def test_full_recipe_on_a_machine_without_gpu_says_what_to_do(survey):
    said = run(recipe("--data.path", survey, ranks=1, launcher=True), code=2)
    assert "--preset smoke" in said and "--device cpu" in said and "Traceback" not in said


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "precision"), [(2, "fp32"), (3, "bf16")], ids=["zero2-fp32", "zero3-bf16"])
def test_killed_run_continues_to_the_same_bits(survey, tmp_path, stage, precision):
    options = (*TINY, "--train.zero-stage", stage, "--train.precision", precision, "--data.path", survey)
    options += ("--out", tmp_path)
    run(recipe(*options, "--name", "whole", launcher=stage == 2))
    process = start(recipe(*options, "--name", "killed"))
    latest, deadline = tmp_path / "killed" / "checkpoints" / "latest", time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(process)
    assert latest.read_text().strip() in ("step-00000003", "step-00000006")
    assert "continuing" in run(recipe(*options, "--name", "killed"))
    assert pieces(tmp_path / "killed", 8) == pieces(tmp_path / "whole", 8) != {}
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert min(losses(tmp_path / "whole")) < losses(tmp_path / "whole")[0]


@pytest.mark.dist
def test_readers_and_ranks_see_the_same_batches(survey, tmp_path):
    """DALI and webdataset train to the same bits; a corrupt sample ends the run by name, or is replaced and counted."""
    options = (*TINY, "--data.path", survey, "--out", tmp_path)
    for reader in ("dali", "webdataset"):
        run(recipe(*options, "--data.reader", reader, "--name", reader))
    assert losses(tmp_path / "dali") == losses(tmp_path / "webdataset")

    shard = survey / Survey.load(survey).shards[0].name
    whole = shard.read_bytes()
    try:
        with open(shard, "r+b") as f:
            f.seek(900)  # inside the first blob
            f.write(bytes(b ^ 0xFF for b in whole[900:904]))
            f.flush()
            os.fsync(f.fileno())
        said = run(recipe(*options, "--name", "corrupt"), code=1)
        assert shard.name in said and "on_corrupt" in said
        run(recipe(*options, "--name", "skipped", "--data.on-corrupt", "skip"))
    finally:
        shard.write_bytes(whole)
