"""The MMAE recipe: presets are the published ones; toy pairs train alike on any ranks, resume to the bits and are read back."""

import json
from dataclasses import replace

import numpy as np
import processes
import pytest
import torch

from armillary.engine.config.config_json import from_json, to_json
from armillary.engine.data.building.build import build
from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, Survey, WaveGrid
from armillary.engine.data.sources.source import Sample
from armillary.engine.evaluate.embedding.embed import embed_readouts, open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.train.checks import method_problems, problems
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import InputSpec


class ToyPairs:
    """Galaxies of one hidden number: it sets brightness and the place of a line, and is the redshift."""

    pixel_scale_arcsec, unit, bands = 0.262, "nanomaggy", ("g", "r", "z")
    spectrum = SpectrumRecord(WaveGrid("linear", 3600.0, 10.0, 400), "1e-17 erg/s/cm2/angstrom")
    labels = {"redshift": "spectroscopic"}

    def __len__(self):
        return 100

    def read(self, index):
        rng = np.random.default_rng(index)
        z = rng.uniform(0, 1)
        y, x = np.mgrid[:24, :24] - 11.5
        image = 10 * z * np.exp(-(x**2 + y**2) / 18) + rng.normal(0, 0.05, (3, 24, 24))
        flux = 2 + 5 * np.exp(-((np.arange(400) - 50 - 300 * z) ** 2) / 200) + rng.normal(0, 0.1, 400)
        return Sample(
            key=f"t{index:04d}",
            image=image.astype(np.float32),
            valid=None,
            ra=float(index),
            dec=0.0,
            labels={"redshift": z if index % 9 else float("nan")},
            source=f"toy:{index}",
            spectrum=Spectrum(flux.astype(np.float32), np.full(400, 100.0, np.float32)) if index % 7 else None,
        )


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "survey"
    build(ToyPairs(), folder, name="toy", samples_per_shard=20, test_fraction=0.2, progress=False)
    return folder


def train(preset, survey, out, name, *arguments, ranks=2):
    """Run a small preset on the toy; returns its losses."""
    options = (
        f"--preset {preset} --device cpu --telemetry.no-tensorboard --data.path {survey} --out {out} --name {name}"
    )
    options += " --train.global-batch 16 --train.micro-batch 4 --method.dim 16 --views.image.global-size 16"
    options += " --method.bin-pixels 10 --method.token-bins 8 --views.spectrum-optional --schedule.learning-rate.warmup-steps 1"
    processes.run(processes.recipe(*options.split(), *arguments, ranks=ranks, name="mmae"))
    return processes.losses(out / name)


def test_presets_are_the_published_ones(presets):
    assert set(presets) == {"RECIPE", "RESTARTS", "IMPROVED", "SMOKE", "SMOKE_IMPROVED"}
    published, restarts = presets["RECIPE"], presets["RESTARTS"]
    inputs = InputSpec(channels=5, global_size=64, n_global=1, pixels=7783, targets=("redshift",))
    with torch.device("meta"):
        method = published.method.build(inputs)
    assert sum(p.numel() for p in method.parameters()) == 16_364_036
    for run in (published, restarts):
        assert (run.optim.lr, run.optim.betas, run.optim.eps, run.optim.clip_norm) == (1e-4, (0.9, 0.999), 1e-8, 1.0)
        assert (run.train.global_batch, run.train.micro_batch, run.train.precision) == (256, 256, "fp32")
        assert run.train.steps == 100 * 367 and run.scalars(9)["weight_decay"] == 0.01
        assert not run.views.augmented
    assert {published.scalars(s)["learning_rate"] for s in (0, 1, 36_699)} == {1e-4}
    rates = {0: 1e-5, 9: 9.1e-5, 10: 1e-4, 34: 1.39e-6, 35: 1e-4, 84: 1.098e-6, 99: 9.53e-5}  # an epoch, as published
    for epoch, rate in rates.items():
        for step in (367 * epoch, 367 * epoch + 366):
            assert restarts.scalars(step)["learning_rate"] == pytest.approx(rate, rel=3e-3)


def test_presets_fit_their_surveys(presets, survey, tmp_path):
    toy = Survey.load(survey)
    desi = replace(toy.spectrum, grid=WaveGrid("linear", 3600.0, 0.8, 7783))
    hsc = replace(toy, bands=("g", "r", "i", "z", "y"), height=64, width=64, spectrum=desi)
    simulated = replace(toy, height=72, width=72, spectrum=desi)
    for name, preset in presets.items():
        described = simulated if name.startswith("SMOKE") else hsc
        assert preset.views.problems(described) == [], name
        assert preset.method.problems(preset.views.input_spec(described)) == [], name
        assert from_json(json.loads(json.dumps(to_json(preset)))) == preset, name
    here = replace(presets["SMOKE"], device="cpu", data=replace(presets["SMOKE"].data, path=survey), out=tmp_path)
    assert any(p.startswith("views.image.global_size: must be in 1 .. 24") for p in problems(here, 2))


def test_optional_spectra_need_a_method_that_does_without(presets):
    smoke = presets["SMOKE"]
    optional = replace(smoke, views=replace(smoke.views, spectrum_optional=True))
    inputs = InputSpec(channels=3, global_size=48, n_global=1, pixels=7781, targets=("redshift",))
    method = smoke.method.build(inputs)
    assert method_problems(optional, method) == []
    method.takes_missing_spectra = False
    assert method_problems(optional, method) == [
        "views.spectrum_optional: must be off for MMAE, which needs every spectrum"
    ]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["smoke", "smoke_improved"])
def test_trains_alike_on_any_ranks_resumes_to_the_same_bits_and_is_read_back(survey, tmp_path, preset):
    """Two ranks under ZeRO 3 against one under ZeRO 1; their losses differ by rounding, 2e-6 as measured."""
    options = ("--train.steps", 6, "--checkpoint.every-steps", 3, "--train.zero-stage", 3, "--seed", 3)
    losses = train(preset, survey, tmp_path, "whole", *options)
    whole, one, cut = tmp_path / "whole", tmp_path / "one", tmp_path / "cut"
    assert len(losses) == 6 and np.isfinite(losses).all()
    lines = processes.metrics(whole)
    for x in lines:
        assert x["image"] + x["spectrum"] + x["redshift"] == pytest.approx(x["loss"], rel=1e-5)
    if preset == "smoke":
        assert {x["spectrum"] == 0 for x in lines} == {True, False}  # steps without spectra

    alone = (*options, "--train.zero-stage", 1)
    found = train(preset, survey, tmp_path, "one", *alone, ranks=1)
    assert found == pytest.approx(losses, rel=2e-5)
    processes.cut_after(one, 3, cut)
    assert train(preset, survey, tmp_path, "cut", *alone, ranks=1) == found
    assert processes.tensor_files(cut, 6) == processes.tensor_files(one, 6) != {}

    if preset == "smoke_improved":  # weights of 8 bits move the first losses by 1.3e-4, as measured
        low = "--train.steps", 3, "--seed", 3, "--train.precision", "bf16", "--train.zero-stage", 2
        assert train(preset, survey, tmp_path, "bf16", *low, ranks=1) == pytest.approx(losses[:3], rel=2e-3)

    exported = TrainedEncoder.open(whole / "export" / "teacher.safetensors")
    assert exported.inputs.target_mean[0] == pytest.approx(0.5, abs=0.1)  # the redshift's, kept with the run
    pipeline = Encoder.load(exported, Survey.load(survey), torch.device("cpu")).pipeline()
    found = embed_readouts(pipeline, open_batches(survey, "train", pipeline.view, 16, torch.device("cpu")))
    width, names = (32, ("image", "both")) if preset == "smoke" else (16, ("image", "spectrum", "both"))
    assert {name: v.shape[1] for name, (_, v) in found.items()} == {
        name + end: size for name in names for end, size in (("", width), ("_redshift", 1))
    }
    rows = {name: set(r.tolist()) for name, (r, _) in found.items()}
    assert rows["both"] == rows["both_redshift"] < rows["image"]  # some have no spectrum
