"""The AstroCLIP recipe: presets fit the published settings and each other; the chain of three runs in real processes."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import ROOT, recipe, run

from armillary.engine.config.run import Run
from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.simulate.pairs import SimulatedPairs
from armillary.engine.evaluate.embedding.embed import embed_readouts, open_batches
from armillary.engine.evaluate.embedding.encoder import load_pipeline
from armillary.engine.train.checks import problems
from armillary.engine.weights.export import load_encoder
from armillary.models.method import InputSpec

PAIRS = 96


def presets_of(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: value for name, value in vars(module).items() if isinstance(value, Run)}


@pytest.fixture(scope="module")
def presets():
    return presets_of("astroclip")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "survey"
    build(SimulatedPairs(PAIRS, seed=5), folder, name="pairs", samples_per_shard=32, test_fraction=0.25, progress=False)
    return folder


def command(name, *arguments):
    """Command line of a recipe's smoke preset on two ranks."""
    found = recipe("--preset", "smoke", "--device", "cpu", "--telemetry.no-tensorboard", *arguments)
    return [part.replace("dinov2_vitl.py", f"{name}.py") for part in found]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def shards(folder):
    """Contents of the last checkpoint's tensor files: weights, moments, frozen encoders, random states."""
    return {p.name: p.read_bytes() for p in (folder / "checkpoints" / "step-00000004").glob("*.safetensors")}


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
    images, spectra = presets_of("dinov2_vitl")[preset], presets_of("specformer")[preset]
    alignment = presets[preset]
    assert replace(alignment.method.image, drop_path=0) == replace(images.method.vit, drop_path=0)
    assert alignment.method.spectrum == spectra.method.encoder
    assert alignment.views.image.stretch == images.views.stretch
    assert alignment.views.image.global_size == images.views.global_size
    if preset != "SMOKE":  # whose names the demo chooses
        assert alignment.method.image_from == images.folder
        assert alignment.method.spectrum_from == spectra.folder


def test_presets_fit_simulated_pairs(presets, pairs):
    smoke = presets["SMOKE"]
    here = replace(
        smoke, device="cpu", data=replace(smoke.data, path=pairs), train=replace(smoke.train, global_batch=64)
    )
    assert problems(replace(here, train=replace(here.train, micro_batch=32)), 2) == []


@pytest.mark.dist
@pytest.mark.slow
def test_the_chain_of_three_runs(pairs, tmp_path):
    """Encoders, then their alignment: on cached tokens and without, the same again, and embedded."""
    common = ("--data.path", pairs, "--out", tmp_path, "--train.steps", 4, "--checkpoint.every-steps", 2)
    small = ("--train.global-batch", 16, "--train.micro-batch", 8)
    run(command("dinov2_vitl", *common, *small, "--name", "dinov2", "--schedule.learning-rate.warmup-steps", 2))
    run(command("specformer", *common, *small, "--name", "specformer", "--schedule.learning-rate.warmup-steps", 2))

    align = (*common, "--train.global-batch", 64, "--train.micro-batch", 32, "--schedule.learning-rate.warmup-steps", 2)
    align += ("--method.image-from", tmp_path / "dinov2", "--method.spectrum-from", tmp_path / "specformer")
    features = ("--data.token-cache", tmp_path / "features", "--data.token-cache-dtype", "float32")
    run(command("astroclip", *align, *features, "--name", "cached"))
    run(command("astroclip", *align, "--data.token-cache", "None", "--name", "direct"))
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "direct"), rtol=1e-4)
    assert losses(tmp_path / "cached")[0] == pytest.approx(
        2 * np.log(64) / 2, rel=0.3
    )  # chance, among both ranks' pairs

    run(command("astroclip", *align, *features, "--name", "again"))  # a filled cache
    assert shards(tmp_path / "again") == shards(tmp_path / "cached") != {}

    method, _ = load_encoder(tmp_path / "direct")
    before, _ = load_encoder(tmp_path / "dinov2")
    for name, p in before.teacher.backbone.named_parameters():
        assert torch.equal(method.image_encoder.backbone.get_parameter(name), p), name
    survey = Survey.load(pairs)
    pipeline, _, _ = load_pipeline(tmp_path / "direct", survey, torch.device("cpu"))
    found = embed_readouts(pipeline, open_batches(pairs, "test", pipeline.view, 16, torch.device("cpu")))
    assert {name: vectors.shape[1] for name, (_, vectors) in found.items()} == {
        "image": 128, "spectrum": 128, "image_backbone": 96, "spectrum_backbone": 96}  # fmt: skip
    assert all(len(rows) == survey.count("test") for rows, _ in found.values())
