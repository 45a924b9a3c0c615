"""The supervised recipe: presets are the published ones, train in real processes, resume and export exactly."""

import json
from dataclasses import replace

import numpy as np
import processes
import pyarrow.parquet as pq
import pytest
import torch
from processes import cut_after, losses, metrics, recipe, run, tensor_files
from safetensors.torch import load_file

from armillary.engine.config.config_json import from_json, to_json
from armillary.engine.data.building.build import build
from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, Survey, WaveGrid
from armillary.engine.data.sources.source import Sample
from armillary.engine.evaluate.embedding.embed import embed, open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.train.checks import problems
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import Batch

LABELS = ("redshift", "log_mstar", "ln_z_mw", "tage_mw", "log_ssfr")
SMOKES = ("SMOKE", "SMOKE_CONV_ATTENTION", "SMOKE_PHOTOMETRY")


class ToyPairs:
    """Galaxies of one hidden number: it sets magnitudes, colour, the place of a line, and every label."""

    pixel_scale_arcsec, unit, bands = 0.262, "nanomaggy", ("g", "r", "z")
    spectrum = SpectrumRecord(WaveGrid("linear", 3600.0, 0.8, 7781), "1e-17 erg/s/cm2/angstrom")
    labels = {name: name for name in (*LABELS, "mag_g", "mag_r", "mag_z")}

    def __len__(self):
        return 80

    def read(self, index):
        rng = np.random.default_rng(index)
        hidden = rng.uniform(0, 1)
        magnitudes = np.array([20.5, 19.5, 19.0]) - hidden * np.array([1.0, 1.5, 2.0])
        y, x = np.mgrid[:48, :48] - 23.5
        profile = np.exp(-(x**2 + y**2) / 18) / (18 * np.pi)
        flux = 10 ** (-0.4 * (magnitudes - 22.5))
        image = flux[:, None, None] * profile + rng.normal(0, 0.01, (3, 48, 48))
        pixel = np.arange(7781)
        light = 2 + 5 * np.exp(-((pixel - 1000 - 5000 * hidden) ** 2) / 200) + rng.normal(0, 0.3, 7781)
        ivar = np.full(7781, 11.0)
        ivar[3000:3010] = light[3000:3010] = 0
        labels = {name: (k + 1) * hidden for k, name in enumerate(LABELS)}
        if index % 3 == 0:
            labels["tage_mw"] = float("nan")
        labels |= {f"mag_{b}": float(m) for b, m in zip("grz", magnitudes, strict=True)}
        return Sample(
            key=f"t{index:04d}",
            image=image.astype(np.float32),
            valid=None,
            ra=float(index),
            dec=0.0,
            labels=labels,
            source=f"toy:{index}",
            spectrum=Spectrum(light.astype(np.float32), ivar.astype(np.float32)),
        )


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "survey"
    build(ToyPairs(), folder, name="toy", samples_per_shard=20, test_fraction=0.2, progress=False)
    return folder


def supervised(*arguments, ranks=2):
    """Command line of the recipe."""
    options = "--device", "cpu", "--telemetry.no-tensorboard", *map(str, arguments)
    return recipe(*options, ranks=ranks, name="supervised")


def test_presets_are_the_published_ones(presets):
    assert set(presets) == {"RECIPE", "PAPER", "CONV_ATTENTION", "PHOTOMETRY", *SMOKES}
    released = presets["RECIPE"]
    assert released.train.steps == 61_759 and presets["PAPER"].train.steps == 30_879
    for name in ("RECIPE", "CONV_ATTENTION", "PHOTOMETRY"):
        run_ = presets[name]
        assert run_.train.global_batch == run_.train.micro_batch == 128 and run_.optim.clip_norm is None
        assert run_.scalars(0) == {"learning_rate": 5e-4, "weight_decay": 0.0}
        assert run_.scalars(run_.train.steps)["learning_rate"] == 0
        assert run_.views.targets == LABELS
    assert presets["PHOTOMETRY"].views.columns == ("mag_g", "mag_r", "mag_z")


def test_presets_fit_a_survey_of_pairs(presets, survey):
    """On cutouts of 152 pixels, as described here, the full image recipes fit too."""
    described = Survey.load(survey)
    large = replace(described, height=152, width=152)
    for name, preset in presets.items():
        fits = large if name in ("RECIPE", "PAPER") else described
        assert preset.views.problems(fits) == [], name
        inputs = preset.views.input_spec(fits)
        assert preset.method.problems(inputs) == [], name
        with torch.device("meta"):
            assert preset.method.build(inputs).flops_per_sample() > 0
    smokes = [replace(presets[n], device="cpu", data=replace(presets[n].data, path=survey)) for n in SMOKES]
    tiny = [replace(s, train=replace(s.train, global_batch=16, micro_batch=8)) for s in smokes]
    assert [problems(run_, 2) for run_ in tiny] == [[], [], []]


def test_records_round_trip(presets):
    for preset in presets.values():
        assert from_json(json.loads(json.dumps(to_json(preset)))) == preset


def test_wrong_surveys_are_refused_by_name(presets, survey):
    described = Survey.load(survey)
    dumb = replace(described, spectrum=None)
    assert any("views.spectrum" in p for p in presets["CONV_ATTENTION"].views.problems(dumb))
    unlabelled = replace(presets["SMOKE"].views, targets=("halo_mass",))
    assert any("views.targets" in p and "'halo_mass'" in p for p in unlabelled.problems(described))
    small = replace(presets["SMOKE"].views, image=replace(presets["SMOKE"].views.image, global_size=24))
    assert any("views.image.global_size" in p for p in presets["SMOKE"].method.problems(small.input_spec(described)))


@pytest.mark.dist
@pytest.mark.slow
def test_resnet_resumes_to_the_same_bits_and_exports_rank_0s_statistics(survey, tmp_path):
    options = ("--preset", "smoke", "--data.path", survey, "--out", tmp_path, "--train.steps", "6")
    options += ("--train.global-batch", "16", "--train.micro-batch", "4", "--checkpoint.every-steps", "3")
    options += ("--method.network.width", "4", "--views.image.global-size", "32")
    run(supervised(*options, "--name", "whole"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert len(losses(whole)) == 6 and all(map(np.isfinite, losses(whole)))
    assert all(sum(line[n] for n in LABELS) == pytest.approx(line["loss"], rel=1e-5) for line in metrics(whole))

    cut_after(whole, 3, cut)
    assert "continuing" in run(supervised(*options, "--name", "cut"))
    assert tensor_files(cut, 6) == tensor_files(whole, 6) != {}
    assert losses(cut) == losses(whole)

    own = [load_file(whole / "checkpoints" / "step-00000006" / f"shard-0000{r}.safetensors") for r in (0, 1)]
    mean, count = "buffer/network.bn1.running_mean", "buffer/network.bn1.num_batches_tracked"
    assert not torch.equal(own[0][mean], own[1][mean])  # each rank's own batches
    assert own[0][count] == own[1][count] == 12  # micro-batches
    exported = load_file(whole / "export" / "teacher.safetensors")
    torch.testing.assert_close(exported["network.bn1.running_mean"], own[0][mean], rtol=0, atol=0)
    method = TrainedEncoder.open(whole / "export" / "teacher.safetensors").method
    prediction = method.encode(Batch(crop=torch.randn(3, 3, 32, 32)))["prediction"]
    assert prediction.shape == (3, 5) and not method.training


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "steps", "lr"),
    [("smoke_conv_attention", 60, 0.02), ("smoke_photometry", 200, 0.01)],
    ids=["spectra", "magnitudes"],
)
def test_other_networks_learn_the_toy(survey, tmp_path, preset, steps, lr):
    options = ("--preset", preset, "--data.path", survey, "--out", tmp_path, "--name", "toy", "--optim.lr", lr)
    run(
        supervised(*options, "--train.steps", steps, "--train.global-batch", "16", "--train.micro-batch", "16", ranks=1)
    )
    trained = TrainedEncoder.open(tmp_path / "toy")
    pipeline = Encoder.load(trained, Survey.load(survey), torch.device("cpu")).pipeline()
    batches = open_batches(survey, "test", pipeline.view, 8, torch.device("cpu"))
    rows, found = embed({"": pipeline}, batches)
    table = pq.read_table(survey / "catalog.parquet")
    truth = table["redshift"].to_numpy()[rows]  # the hidden number itself
    error = found[""][:, 0] - truth
    # Over four seeds shares of the variance were .0001 to .007 here and .0002 to .009 below.
    assert len(rows) > 5 and np.square(error).mean() < 0.05 * truth.var()
    age = table["tage_mw"].to_numpy()[rows]  # learnt although a third of it is unknown
    assert np.nanmean(np.square(found[""][:, 3] - age)) < 0.05 * np.nanvar(age)

    said = processes.armillary("evaluate", tmp_path / "toy", "--resamples", 50, "-o", tmp_path / "out").splitlines()
    assert any(line.startswith("properties: redshift from") for line in said)
    for task in ("baselines", "collapse", "search", "posterior", "morphology"):
        (why,) = [line for line in said if line.startswith(f"{task} is left out: ")]
        assert "predictions" in why
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("left out: ") >= 5 and "Predicted against true redshift" in page
