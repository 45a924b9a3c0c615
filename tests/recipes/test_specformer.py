"""The SpecFormer recipe: published presets, real processes under two stages of ZeRO, and real spectra."""

import json
from dataclasses import replace

import numpy as np
import processes
import pytest
import torch
from processes import losses, recipe, run

from armillary.engine.config.config_json import from_json, to_json
from armillary.engine.data.building.build import build
from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, Survey, WaveGrid
from armillary.engine.data.loading.loader import Loader
from armillary.engine.data.sources.source import Sample
from armillary.engine.data.sources.surveys.desi import DESI_GRID, DesiCoadds
from armillary.engine.data.sources.surveys.sdss import SDSS_GRID, SdssSpectra
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.train.checks import problems
from armillary.engine.weights.export import export_specformer
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import BatchKey, InputSpec
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.specformer.specformer_pretraining import SpecFormerPretraining
from armillary.models.specformer.spectrum_filling import fill_hidden

DESI = InputSpec(n_global=1, pixels=7781)


class ToySpectra:
    """Spectra of 400 pixels: a slope, a bump and a gap, each at a place of its own."""

    spectrum = SpectrumRecord(WaveGrid("linear", 4000.0, 10.0, 400), "nJy")
    pixel_scale_arcsec, unit, bands = None, "", ()
    labels = {"place": "of the bump"}

    def __len__(self):
        return 60

    def read(self, index):
        rng = np.random.default_rng(index)
        at, place = np.arange(400), rng.uniform(50, 350)
        flux = 3 + rng.normal() * at / 200 + 4 * np.exp(-(((at - place) / 60) ** 2)) + rng.normal(0, 0.1, 400)
        ivar = np.full(400, 100.0)
        gap = int(rng.integers(0, 380))
        ivar[gap : gap + 15] = flux[gap : gap + 15] = 0
        return Sample(
            key=f"t{index:03d}",
            image=None,
            valid=None,
            ra=float(index),
            dec=0.0,
            labels={"place": place},
            source=f"toy:{index}",
            spectrum=Spectrum(flux.astype(np.float32), ivar.astype(np.float32)),
        )


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "survey"
    build(ToySpectra(), folder, name="toy", samples_per_shard=20, test_fraction=0.2, progress=False)
    return folder


def specformer(*arguments):
    """Command line of the recipe on two ranks."""
    return recipe("--preset", "smoke", "--device", "cpu", "--telemetry.no-tensorboard", *arguments, name="specformer")


def test_presets_are_the_published_ones(presets):
    assert set(presets) == {"RECIPE", "RELEASED_500K", "PAPER", "SMOKE"}
    released, whole = presets["RECIPE"], presets["RELEASED_500K"]
    assert released.scalars(0)["learning_rate"] == 0
    for step in (1_999, 10_000, 29_999):  # the line stands for the first steps of the cosine
        assert released.scalars(step)["learning_rate"] == pytest.approx(whole.scalars(step)["learning_rate"], rel=4e-3)
    assert whole.scalars(499_999)["learning_rate"] < 1e-14
    assert {r.scalars(7)["weight_decay"] for r in (released, whole, presets["PAPER"])} == {0.1}
    assert (released.optim.lr, released.optim.betas, released.optim.clip_norm) == (1e-5, (0.9, 0.95), 1.0)
    with torch.device("meta"):
        method = released.method.build(DESI)
    assert sum(p.numel() for p in method.parameters()) == 43_177_750
    hidden = {
        name: int(
            presets[name]
            .method.build(DESI)
            .prepare({"position": torch.arange(1)}, BatchKey(0, 0, 0, 1))["token_mask"]
            .sum()
        )
        for name in ("PAPER", "SMOKE")
    }
    assert hidden == {"PAPER": 180, "SMOKE": 72}
    assert presets["PAPER"].train.steps == 308_798


def test_presets_fit_spectra_of_desi(presets, survey, tmp_path):
    described = replace(Survey.load(survey), spectrum=SpectrumRecord(DESI_GRID, "1e-17 erg/s/cm2/angstrom"))
    for name, preset in presets.items():
        assert preset.views.problems(described) == [], name
        assert preset.method.problems(preset.views.input_spec(described)) == [], name
        assert from_json(json.loads(json.dumps(to_json(preset)))) == preset, name
    smoke = replace(presets["SMOKE"], device="cpu", data=replace(presets["SMOKE"].data, path=survey), out=tmp_path)
    found = problems(smoke, 2)  # 400 pixels are 9 windows of 80
    assert found == ["method.chunks: must leave parts of at least 2 tokens, of a spectrum's 10, got 6"]
    dark = replace(Survey.load(survey), spectrum=None, bands=("g",))
    assert any(p.startswith("views.spectrum: needs a survey with spectra") for p in smoke.views.problems(dark))


@pytest.mark.dist
@pytest.mark.slow
def test_trains_alike_under_zero_2_and_3_and_exports(survey, tmp_path):
    options = ("--data.path", survey, "--out", tmp_path, "--train.steps", 12, "--train.global-batch", 16)
    options += ("--train.micro-batch", 4, "--method.encoder.window", 20, "--method.encoder.step", 10)
    options += ("--method.encoder.dim", 32, "--method.encoder.heads", 2, "--method.encoder.depth", 2)
    options += ("--method.chunks", 3, "--method.chunk-tokens", 5, "--schedule.learning-rate.warmup-steps", 2)
    run(specformer(*options, "--name", "two"))
    run(specformer(*options, "--name", "three", "--train.zero-stage", 3))
    two, three = losses(tmp_path / "two"), losses(tmp_path / "three")
    assert len(two) == 12 and two == pytest.approx(three, rel=1e-3)
    assert two[-1] < 0.9 * two[0]  # .49 to .59 over four seeds, standard deviation .04
    trained = TrainedEncoder.open(tmp_path / "three")
    method, loaded = trained.method, trained.run
    assert loaded.method.encoder.window == 20
    export_specformer(trained, tmp_path / "out.ckpt")
    stored = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(x, stored[name]) for name, x in method.encoder.state_dict().items())

    few = processes.armillary("evaluate", tmp_path / "two", "--samples", 8, "--resamples", 50, "-o", tmp_path / "few")
    assert "\nsearch is left out: 12 test samples or more must have SpecFormer, got 8\n" in few
    assert "\nmasking: gaps of " in few and "(8 spectra)" in few
    assert (tmp_path / "few" / "report.html").is_file()  # the other tasks go on


def real_spectra(real_data, kind):
    if kind == "DESI":
        path = real_data / "desi_spectra" / "quasarnp_test_coadd.fits.gz"
        return DesiCoadds(path, redrock=False, need_fibermap=False)
    return SdssSpectra(real_data / "sdss_spectra", grid=DESI_GRID if kind == "SDSS on DESI's grid" else SDSS_GRID)


@pytest.mark.parametrize("kind", ["SDSS", "SDSS on DESI's grid", "DESI"])
def test_real_spectra_with_gaps(real_data, tmp_path, kind):
    """Packed, read and encoded with the released windows: the same encoder on all of them, pixels without data or not."""
    source = real_spectra(real_data, kind)
    survey = build(source, tmp_path / "packed", name="real", test_fraction=0, progress=False, on_bad="skip")
    views = ObjectViews(spectrum=True)
    assert views.problems(survey) == []
    shape = SpecFormer(dim=48, depth=2, heads=2)
    method = SpecFormerPretraining(encoder=shape, chunks=6, chunk_tokens=30).build(views.input_spec(survey))
    loader = Loader(
        tmp_path / "packed",
        micro_batch=8,
        device="cpu",
        views=views.build(Survey.load(tmp_path / "packed"), "cpu"),
        prepare=method.prepare,
        modalities=views.modalities,
    )
    batch = next(iter(loader))
    loader.close()
    seen = batch["spectrum_ivar"] > 0
    assert batch["spectrum"].shape == (8, 4701 if kind == "SDSS" else 7781)
    assert seen.any(1).all() and seen.all() == (kind == "DESI")  # where its arms overlap, one of them has data
    total = method(batch, {}).total
    assert 0.3 < total.item() < 5
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, list(method.parameters())))
    tokens = method.encoder(batch["spectrum"], batch["spectrum_ivar"])
    assert tokens.isfinite().all() and tokens.shape == (8, shape.tokens(seen.shape[1]), 48)
    other = batch["spectrum"].masked_fill(~seen, torch.nan)
    assert torch.equal(method.encode({**batch, "spectrum": other})["mean"], method.encode(batch)["mean"])
    filled = fill_hidden(method.encoder, batch["spectrum"], batch["spectrum_ivar"], batch["token_mask"])
    assert filled.flux[filled.hidden].isfinite().all() and filled.hidden.any(1).all()
