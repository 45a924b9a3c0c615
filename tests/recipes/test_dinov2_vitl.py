"""The DINOv2 recipe with its real model, loader and views, in real processes."""

import os
import time
from dataclasses import replace

import pytest
import torch
from processes import cut_after, kill, losses, recipe, run, start, tensor_files

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
    said = run(recipe("--data.path", survey, ranks=1), code=2)
    assert "--preset smoke" in said and "--device cpu" in said and "Traceback" not in said


def reading(survey, out, *arguments):
    """Command line of a tiny run that is read by DALI."""
    return recipe(*TINY, "--data.path", survey, "--out", out, "--data.reader", "dali", *arguments)


@pytest.fixture(scope="module")
def whole(survey, tmp_path_factory):
    """A run that nothing disturbed, under the preset's ZeRO-2."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(reading(survey, out, "--name", "whole"))
    return out / "whole"


@pytest.mark.dist
@pytest.mark.parametrize("stage", ["2-fp32", "3-bf16"])
def test_killed_run_continues_to_the_same_bits(survey, whole, tmp_path, stage):
    options = ("--train.zero-stage", stage[0], "--train.precision", stage[2:])
    killed = reading(survey, tmp_path, *options, "--name", "killed")
    if stage[0] == "3":
        run(reading(survey, tmp_path, *options, "--name", "whole"))
        whole = tmp_path / "whole"
        cut_after(whole, 6, tmp_path / "killed")  # which has been kept
    else:
        process = start(killed)
        latest, deadline = tmp_path / "killed" / "checkpoints" / "latest", time.monotonic() + 120
        while not latest.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        kill(process)
        assert latest.read_text().strip() in ("step-00000003", "step-00000006")
    assert "continuing" in run(killed)
    assert tensor_files(tmp_path / "killed", 8) == tensor_files(whole, 8) != {}
    assert losses(tmp_path / "killed") == losses(whole)
    assert min(losses(whole)) < losses(whole)[0]


@pytest.mark.dist
def test_readers_and_ranks_see_the_same_batches(survey, whole, tmp_path):
    """DALI and webdataset train to the same bits; a corrupt sample ends the run by name, or is replaced and counted."""
    options = (*TINY, "--data.path", survey, "--out", tmp_path)
    run(recipe(*options, "--data.reader", "webdataset", "--name", "webdataset"))
    assert losses(whole) == losses(tmp_path / "webdataset")

    shard = survey / Survey.load(survey).shards[0].name
    before = shard.read_bytes()
    try:
        with open(shard, "r+b") as f:
            f.seek(900)  # inside the first blob
            f.write(bytes(b ^ 0xFF for b in before[900:904]))
            f.flush()
            os.fsync(f.fileno())
        said = run(recipe(*options, "--name", "corrupt", ranks=1), code=1)
        assert shard.name in said and "on_corrupt" in said
        run(recipe(*options, "--name", "skipped", "--data.on-corrupt", "skip", ranks=1))
    finally:
        shard.write_bytes(before)
