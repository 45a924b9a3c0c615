"""The fine-tuning recipe: starts from a run's encoder, trains on ranks, resumes exactly, is read back and evaluated."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import armillary, cut_after, losses, recipe, run, tensor_files

from armillary.engine.config.config_json import from_json, to_json
from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.source import Sample
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.weights.tensors import Archive
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.supervised.finetune import FineTune

ENCODER = ("--method.vit.dim", 24, "--method.vit.depth", 2, "--method.vit.heads", 2)


class Colours:
    """Galaxies whose colour is their redshift."""

    pixel_scale_arcsec, unit, bands = 0.262, "nanomaggy", ("g", "r", "z")
    labels = {"redshift": "redshift"}

    def __len__(self):
        return 60

    def read(self, index):
        rng = np.random.default_rng(index)
        z = rng.uniform(0, 1)
        y, x = np.mgrid[:32, :32] - 15.5
        profile = np.exp(-(x**2 + y**2) / 18)
        image = np.array([1 - 0.8 * z, 1, 1 + z])[:, None, None] * profile + rng.normal(0, 0.02, (3, 32, 32))
        labels = {"redshift": z if index % 7 else float("nan")}
        return Sample(f"t{index:03d}", image.astype(np.float32), None, float(index), 0.0, labels, f"toy:{index}", None)


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "survey"
    build(Colours(), folder, name="toy", samples_per_shard=20, test_fraction=0.2, progress=False)
    return folder


def test_presets_fit_a_survey_and_round_trip(presets, survey):
    described = Survey.load(survey)
    labels = {name: "share" for name in presets["VOTES"].views.targets}
    large = replace(described, height=160, width=160)
    for name, preset in presets.items():
        assert from_json(json.loads(json.dumps(to_json(preset)))) == preset
        assert isinstance(preset.method, FineTune)
        if name != "VOTES":
            fits = described if name == "SMOKE" else large
            assert preset.method.problems(preset.views.input_spec(fits)) == [], name
    assert len(labels) == 3 + 2 + 2 + 3 == len(presets["VOTES"].views.targets)


def merged_as_unmerged(folder, before):
    """What reads a run with adapters back has them merged, and says what the training said."""
    source, kept = (
        TrainedEncoder.open(folder),
        Archive([*(folder / "checkpoints" / "step-00000002").glob("*.safetensors")]),
    )
    trained = source.untrained().eval()
    for name, p in trained.named_parameters():
        key = next(k for k in (f"weight/{name}", f"frozen/{name}") if k in kept.pieces)
        p.data.copy_(kept.whole(key))
    qkv = trained.encoder.blocks[1].attn.qkv
    first = TrainedEncoder.open(before).part("image")
    assert qkv.adapter.up.abs().max() > 0 and torch.equal(qkv.weight, first["blocks.1.attn.qkv.weight"])
    crop = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    said = source.method.encode({"crop": crop})["prediction"]
    torch.testing.assert_close(said, trained.encode({"crop": crop})["prediction"], rtol=1e-5, atol=1e-6)
    exported = TrainedEncoder.open(folder / "export" / "teacher.safetensors")
    torch.testing.assert_close(exported.method.encode({"crop": crop})["prediction"], said, rtol=1e-5, atol=1e-6)
    assert set(exported.part("image")) == set(first)


@pytest.mark.dist
@pytest.mark.slow
def test_starts_from_a_run_resumes_to_the_same_bits_and_is_evaluated(survey, tmp_path):
    places = (
        "--preset",
        "smoke",
        "--device",
        "cpu",
        "--telemetry.no-tensorboard",
        "--data.path",
        survey,
        "--out",
        tmp_path,
    )
    steps = ("--train.global-batch", 16, "--train.micro-batch", 8)
    run(recipe(*places, *steps, *ENCODER, "--train.steps", 2, "--name", "dinov2", ranks=1, name="dinov2_vitl"))
    shape = [str(word).replace("method.vit", "method.encoder") for word in ENCODER]
    tune = (*places, *steps, *shape, "--method.image-from", tmp_path / "dinov2", "--checkpoint.every-steps", 3)
    tune = (*tune, "--train.steps", 6, "--train.zero-stage", 2)
    run(recipe(*tune, "--name", "whole", ranks=2, name="finetune"))
    cut_after(tmp_path / "whole", 3, tmp_path / "cut")
    assert "continuing" in run(recipe(*tune, "--name", "cut", ranks=2, name="finetune"))
    assert tensor_files(tmp_path / "cut", 6) == tensor_files(tmp_path / "whole", 6) != {}
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")

    lora = (*tune, "--method.trained", "lora", "--method.mixup", 0.4, "--train.steps", 2, "--name", "lora")
    run(recipe(*lora, "--train.zero-stage", 3, ranks=2, name="finetune"))
    merged_as_unmerged(tmp_path / "lora", tmp_path / "dinov2")

    armillary("embed", tmp_path / "whole", "-o", tmp_path / "said.parquet", "--device", "cpu")
    said = Embeddings.load(tmp_path / "said.parquet")
    assert said.vector.shape == (60, 1) and np.isfinite(said.vector).all()
    none = [tmp_path / "none" if word == tmp_path / "dinov2" else word for word in tune]
    wrong = run(recipe(*none, "--name", "none", ranks=1, name="finetune"), code=2)
    assert "method.image_from" in wrong and "no such run or file" in wrong
