"""AstroCLIP: presets fit the published settings and each other; the chain of runs and every evaluation, as in the demo."""

import json
from dataclasses import replace

import numpy as np
import processes
import pyarrow.parquet as pq
import pytest
import torch
from processes import armillary, losses, recipe, run, tensor_files

from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.embedding.embed import embed_readouts, open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.train.checks import problems
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import InputSpec

PAIRS = 200
TASKS = ("search", "properties", "posterior", "morphology", "masking", "attention", "patches")
SETS = ("AstroCLIP image", "AstroCLIP spectrum", "unaligned image", "unaligned spectrum", "photometry MLP")
TITLES = ("What was found", "What is compared", "Filling gaps in spectra", "What the alignment looks at in spectra")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "survey"
    made = ("--count", PAIRS, "--processes", 1, "--no-progress")  # processes of its own would import all anew
    armillary("data", "simulate", "--spectra", "--out", folder, *made)
    return folder


@pytest.fixture(scope="module")
def chain(pairs, tmp_path_factory):
    """Runs of both encoders and of a network on magnitudes."""
    folder = tmp_path_factory.mktemp("chain")
    common = ("--data.path", pairs, "--out", folder, "--schedule.learning-rate.warmup-steps", 1)
    small = ("--train.steps", 4, "--train.global-batch", 16, "--train.micro-batch", 8)
    warmup = ("--schedule.teacher-temperature.warmup-steps", 2)
    run(command("dinov2_vitl", *common, *small, *warmup, "--name", "dinov2", ranks=1))
    run(command("specformer", *common, *small, "--name", "specformer", ranks=1))
    photometry = ("--train.steps", 30, "--name", "photometry")
    run(command("supervised", *common, *photometry, preset="smoke_photometry", ranks=1))
    return folder


def alignment(chain, pairs, *arguments):
    """Command line of the alignment of the chain's encoders."""
    common = ("--data.path", pairs, "--out", chain, "--train.steps", 4, "--checkpoint.every-steps", 2)
    batch = ("--train.global-batch", 64, "--train.micro-batch", 32, "--schedule.learning-rate.warmup-steps", 2)
    start = ("--method.image-from", chain / "dinov2", "--method.spectrum-from", chain / "specformer")
    return command("astroclip", *common, *batch, *start, *arguments)


@pytest.fixture(scope="module")
def aligned(chain, pairs):
    """The run "astroclip" on cached tokens; how it was started."""
    cached = ("--data.token-cache", chain / "tokens", "--data.token-cache-dtype", "float32")
    run(alignment(chain, pairs, *cached, "--name", "astroclip"))
    return cached


def command(name, *arguments, preset="smoke", ranks=2):
    """Command line of a recipe's preset."""
    options = ("--preset", preset, "--device", "cpu", "--telemetry.no-tensorboard", *arguments)
    return recipe(*options, ranks=ranks, name=name)


def test_presets_are_the_published_settings(presets):
    assert set(presets) == {"RECIPE", "PAPER", "SMOKE"}
    released, paper = presets["RECIPE"], presets["PAPER"]
    assert released.scalars(0)["learning_rate"] == 0
    assert released.scalars(1_000)["learning_rate"] == pytest.approx(1e-4)
    assert released.scalars(9_999)["learning_rate"] < 1e-9
    assert released.scalars(5_000)["weight_decay"] == 0.05 and paper.scalars(5_000)["weight_decay"] == 0.01
    assert released.accumulation(4) == 1 and not released.method.gather  # 256 negatives a GPU
    assert paper.accumulation(8) == 1 and paper.method.gather  # 1,024
    assert not released.views.augmented and paper.views.augmented
    with torch.device("meta"):
        method = released.method.build(InputSpec(channels=3, global_size=144, n_global=1, pixels=7781))
    trained = sum(p.numel() for g in method.parameter_groups() for p in g.params.values())
    assert (trained, sum(p.numel() for p in method.parameters())) == (24_666_112, 370_798_358)


@pytest.mark.parametrize("preset", ["RECIPE", "PAPER", "SMOKE"])
def test_presets_continue_those_of_the_encoders(presets, preset):
    """Shapes and stretch of the runs they start from, and the names of these runs' folders."""
    images, spectra = processes.presets("dinov2_vitl")[preset], processes.presets("specformer")[preset]
    alignment = presets[preset]
    assert replace(alignment.method.image, drop_path=0) == replace(images.method.vit, drop_path=0)
    assert alignment.method.spectrum == spectra.method.encoder
    assert alignment.views.image.stretch == images.views.stretch
    assert alignment.views.image.global_size == images.views.global_size
    if preset != "SMOKE":  # whose names the demo chooses
        assert alignment.method.image_from == images.folder
        assert alignment.method.spectrum_from == spectra.folder


@pytest.mark.slow
def test_presets_fit_simulated_pairs(presets, pairs):
    smoke = presets["SMOKE"]
    here = replace(
        smoke, device="cpu", data=replace(smoke.data, path=pairs), train=replace(smoke.train, global_batch=64)
    )
    assert problems(replace(here, train=replace(here.train, micro_batch=32)), 2) == []


@pytest.mark.dist
@pytest.mark.slow
def test_the_chain_of_three_runs(chain, aligned, pairs):
    """Encoders, then their alignment: on cached tokens and without, the same again, and embedded."""
    run(alignment(chain, pairs, "--data.token-cache", "None", "--name", "direct"))
    np.testing.assert_allclose(losses(chain / "astroclip"), losses(chain / "direct"), rtol=1e-4)
    assert losses(chain / "astroclip")[0] == pytest.approx(
        2 * np.log(64) / 2, rel=0.3
    )  # chance, among both ranks' pairs

    run(alignment(chain, pairs, *aligned, "--name", "again"))  # a filled cache
    assert tensor_files(chain / "again", 4) == tensor_files(chain / "astroclip", 4) != {}

    method = TrainedEncoder.open(chain / "direct").method
    before = TrainedEncoder.open(chain / "dinov2").method
    for name, p in before.teacher.backbone.named_parameters():
        assert torch.equal(method.image_encoder.backbone.get_parameter(name), p), name
    survey = Survey.load(pairs)
    pipeline = Encoder.load(TrainedEncoder.open(chain / "direct"), survey, torch.device("cpu")).pipeline()
    found = embed_readouts(pipeline, open_batches(pairs, "test", pipeline.view, 16, torch.device("cpu")))
    assert {name: vectors.shape[1] for name, (_, vectors) in found.items()} == {
        "image": 128, "spectrum": 128, "image_backbone": 96, "spectrum_backbone": 96}  # fmt: skip
    assert all(len(rows) == survey.count("test") for rows, _ in found.values())


@pytest.mark.slow
@pytest.mark.dist
def test_every_task_is_in_the_report(chain, aligned, pairs):
    said = armillary(
        "evaluate", chain / "astroclip", "--compare", chain / "photometry", "--resamples", 50, "--out", chain / "out"
    )
    rows = pq.read_table(chain / "out" / "metrics.parquet").to_pylist()
    assert {row["task"] for row in rows} == set(TASKS) - {"attention"}  # that one is a picture
    record = json.loads((chain / "out" / "metrics.json").read_text())
    assert tuple(record["features"]) == SETS and len(record["measures"]) == len(rows)
    for line in record["lines"]:
        assert line in said
    page = (chain / "out" / "report.html").read_text()
    for title in TITLES:
        assert f"<h2>{title}</h2>" in page
    for words in ("Training of astroclip", "Training of photometry", "data:image/png;base64,", "<svg"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    for metric in ("recall@10", "r2", "accuracy"):
        assert [row for row in rows if row["metric"] == metric and np.isfinite(row["value"])], metric


@pytest.mark.slow
@pytest.mark.dist
def test_searching_and_embedding(chain, aligned, pairs):
    for readout in ("image", "spectrum"):
        out = chain / f"{readout}.parquet"
        armillary("embed", chain / "astroclip", "--readout", readout, "-o", out)
    key = pq.read_table(pairs / "catalog.parquet")["key"][3].as_py()
    said = armillary("search", chain / "image.parquet", "--query", key, "-k", 3)
    assert key in said
    across = ["--query-embeddings", chain / "image.parquet"]
    assert key in armillary("search", chain / "spectrum.parquet", "--query", key, "-k", PAIRS, *across)


@pytest.mark.slow
@pytest.mark.dist
def test_bad_input_ends_before_work_starts(chain, aligned, pairs, tmp_path):
    place = [
        "--data.path",
        pairs,
        "--out",
        tmp_path,
        "--device",
        "cpu",
        "--train.global-batch",
        64,
        "--train.micro-batch",
        32,
    ]
    said = run(recipe("--preset", "smoke", *place, "--method.image-from", tmp_path / "none", name="astroclip"), code=2)
    assert f"method.image_from: {tmp_path / 'none'}: no such run or file" in said
    evaluate = ["evaluate", chain / "astroclip", "--out", tmp_path / "out"]
    said = armillary(*evaluate, "--tasks", "telepathy", code=2)
    assert "tasks: must be of " in said and "baselines, collapse, search" in said and "got telepathy" in said
    said = armillary(*evaluate, "--tasks", "properties", "--labels", "colour", code=2)
    assert "labels: must be labels of the survey (redshift, " in said and "got 'colour'" in said
    said = armillary("evaluate", chain / "photometry", "--tasks", "masking", "--out", tmp_path / "out", code=2)
    assert "masking: it needs a survey with spectra and a run with a spectrum encoder" in said
    assert not (tmp_path / "out").exists()
