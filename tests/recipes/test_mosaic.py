"""The MOSAIC recipe: presets fit their surveys; a toy trains alike on any ranks, resumes to the bits, is calibrated and asked."""

import json
import re
from dataclasses import replace

import numpy as np
import processes
import pyarrow.parquet as pq
import pytest
import torch

from armillary.engine.config.config_json import from_json, to_json
from armillary.engine.data.building.build import build
from armillary.engine.data.building.splits import ByKey
from armillary.engine.data.format.survey import Survey, VectorRecord
from armillary.engine.data.sources.source import Sample
from armillary.engine.evaluate.embedding.embed import embed_readouts, open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.weights.trained_encoder import CALIBRATION, TrainedEncoder
from armillary.models.method import BatchKey, InputSpec
from armillary.models.quantities import Quantity, Scaling


class ToySurvey:
    """Vectors and labels named as the recipe has them, of one hidden number; every seventh galaxy has no SPHEREx."""

    pixel_scale_arcsec, unit, bands = None, "uJy", ()
    labels = {"redshift": "", "stellar_mass": "Msun", "halo_mass": "Msun"}
    vectors = tuple(
        VectorRecord(name, components, unit)
        for name, components, unit in (
            ("photometry_lsst", tuple("ugrizy"), "uJy"),
            ("photometry_lsst_err", tuple("ugrizy"), "uJy"),
            ("photometry_spherex", tuple(f"{i + 1}.0 um" for i in range(12)), "uJy"),
            ("photometry_spherex_err", tuple(f"{i + 1}.0 um" for i in range(12)), "uJy"),
            ("sfh", tuple(f"{i}.5 t/t(z)" for i in range(36)), "Msun/yr"),
            ("sed", tuple(f"{i + 1}.0 um" for i in range(40)), "uJy"),
        )
    )

    def __len__(self):
        return 300

    def read(self, index):
        rng = np.random.default_rng(index)
        z = rng.uniform(0.1, 1)
        sizes = {v.name: v.size for v in self.vectors}
        vectors = {n: np.exp(z + 0.1 * rng.normal(size=size)).astype(np.float32) for n, size in sizes.items()}
        for name in ("photometry_lsst", "photometry_spherex"):
            vectors[f"{name}_err"] = np.full(sizes[name], 0.1, np.float32)
        if index % 7 == 0:
            del vectors["photometry_spherex"]
        return Sample(
            key=f"t{index:04d}",
            image=None,
            valid=None,
            ra=float(index),
            dec=0.0,
            labels={"redshift": z, "stellar_mass": 10 ** (9 + z), "halo_mass": 10 ** (11 + z)},
            source=f"toy:{index}",
            vectors=vectors,
        )


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "survey"
    rule = ByKey(test_fraction=0.2, validation_fraction=0.3)
    build(ToySurvey(), folder, name="toy", samples_per_shard=50, split=rule, progress=False)
    return folder


def train(survey, out, name, *arguments, ranks=2):
    """Run the smoke preset, made small; returns its losses."""
    options = f"--preset smoke --device cpu --telemetry.no-tensorboard --data.path {survey} --out {out} --name {name}"
    options += " --train.global-batch 16 --train.micro-batch 4 --method.dim 16 --method.depth 1"
    options += " --schedule.learning-rate.warmup-steps 1"
    processes.run(processes.recipe(*options.split(), *arguments, ranks=ranks, name="mosaic"))
    return processes.losses(out / name)


def declared(view):
    """A quantity of the right size, as a fitted view would give it."""
    sizes = {
        "photometry_lsst": 6,
        "photometry_spherex": 102,
        "sfh": 36,
        "sed": 500 if view.runs == 20 else 120,
        "magnitudes": 7,
    }
    size = sizes.get(view.name, 1)
    entries = size + view.runs * view.levels
    scaling = Scaling(view.scaling, (0.0,) * entries, (1.0,) * entries, (1.0,) * size, view.runs * view.levels)
    return Quantity(view.name, "", tuple(map(str, range(size))), scaling=scaling, runs=view.runs)


def test_presets(presets):
    assert set(presets) == {"RECIPE", "IMPROVED", "SMOKE", "HEADLINE", "WITHOUT_NOISE", "PHOTOZ"}
    for name, preset in presets.items():
        inputs = InputSpec(n_global=1, quantities=tuple(declared(q) for q in preset.views.quantities))
        assert preset.method.problems(inputs) == [], name
        assert from_json(json.loads(json.dumps(to_json(preset)))) == preset, name
    published = presets["RECIPE"]
    assert published.train.steps == 36_100 and published.optim.lr == 3e-4 and not published.views.augmented
    with torch.device("meta"):
        method = published.method.build(
            InputSpec(n_global=1, quantities=tuple(declared(q) for q in published.views.quantities))
        )
    assert 4.7e6 < sum(p.numel() for p in method.network.blocks.parameters()) < 4.8e6
    assert presets["SMOKE"].views.augmented  # noise is drawn anew
    assert not presets["WITHOUT_NOISE"].views.augmented


@pytest.mark.parametrize("name", ["RECIPE", "IMPROVED"])
def test_full_sizes_make_a_step(presets, name):
    preset = presets[name]
    method = preset.method.build(InputSpec(n_global=1, quantities=tuple(declared(q) for q in preset.views.quantities)))
    entries = torch.randn(3, method.layout.entries, generator=torch.Generator().manual_seed(0))
    batch = {"row": torch.arange(3), "position": torch.arange(3), "quantities": entries}
    prepared = method.prepare(batch | {"quantity_errors": torch.full_like(entries, 0.1)}, BatchKey(0, 0, 0, 3))
    total = method(prepared, {}).total
    total.backward()
    assert total.isfinite() and all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_smoke_fits_its_survey_and_bad_ones_are_named_before_work(presets, survey, tmp_path):
    from armillary.engine.train.checks import problems

    smoke = replace(presets["SMOKE"], device="cpu", out=tmp_path)
    assert problems(replace(smoke, data=replace(smoke.data, path=survey)), 2) == []
    quantities = smoke.views.quantities
    bad = {
        "photometry_lsst.components": replace(quantities[3], components=("u", "g", "r", "i", "z", "Y")),
        "photometry_spherex.runs": replace(quantities[4], runs=5),
        "photometry_spherex.unit": replace(quantities[4], unit="AB mag"),
    }
    for field, quantity in bad.items():
        views = replace(smoke.views, quantities=(*quantities[:3], quantity))
        found = problems(replace(smoke, views=views, data=replace(smoke.data, path=survey)), 2)
        assert any(p.startswith(f"views.quantities.{field}:") for p in found), (field, found)


@pytest.mark.dist
@pytest.mark.slow
def test_trains_alike_on_any_ranks_resumes_to_the_same_bits_and_is_asked(survey, tmp_path):
    """Two ranks under ZeRO 3 against one under ZeRO 1; their losses differ by rounding, 2e-6 as for other recipes."""
    options = ("--train.steps", 6, "--checkpoint.every-steps", 3, "--train.zero-stage", 3, "--seed", 3)
    losses = train(survey, tmp_path, "whole", *options)
    whole, one, cut = tmp_path / "whole", tmp_path / "one", tmp_path / "cut"
    assert len(losses) == 6 and np.isfinite(losses).all()
    alone = (*options, "--train.zero-stage", 1)
    found = train(survey, tmp_path, "one", *alone, ranks=1)
    assert found == pytest.approx(losses, rel=2e-5)
    processes.cut_after(one, 3, cut)
    assert train(survey, tmp_path, "cut", *alone, ranks=1) == found
    assert processes.tensor_files(cut, 6) == processes.tensor_files(one, 6) != {}

    said = processes.armillary("calibrate", whole, "--given", "photometry_lsst", "--want", "redshift", "--steps", "10")
    assert "redshift given photometry_lsst: 68 % intervals held" in said and (whole / CALIBRATION).is_file()
    for arguments, message in (
        (
            ("--split", "train", "--given", "sfh"),
            "split: must be one of toy .* that whole was not trained on, got 'train'",
        ),
        (("--given", "sfh[40:50]"), r"'sfh\[40:50\]': must be components of 36"),
        (("--given", "dinov2"), "'dinov2': must be one of redshift, stellar_mass"),
    ):
        assert re.search(message, processes.armillary("calibrate", whole, *arguments, code=2))
    exported = TrainedEncoder.open(whole / "export" / "teacher.safetensors")
    assert set(exported.method.corrections) == {frozenset(["photometry_lsst"])}
    encoder = Encoder.load(exported, Survey.load(survey), torch.device("cpu"))
    pipeline = encoder.pipeline()
    found = embed_readouts(pipeline, open_batches(survey, "test", pipeline.view, 16, torch.device("cpu")))
    assert found["quantities"][1].shape[1] == 16
    batch = pipeline.view(next(iter(open_batches(survey, "test", pipeline.view, 16, torch.device("cpu")))))
    for path in (whole, whole / "export" / "teacher.safetensors"):
        method = TrainedEncoder.open(path).method
        answer = method.answer(batch, ("photometry_lsst",), ("redshift", "sfh"), 4, 0)
        assert answer.draws["sfh"].shape == (16, 4, 36) and answer.draws["redshift"].isfinite().all()
    out = tmp_path / "answers.parquet"
    processes.armillary(
        "query", whole, survey, "-o", out, "--given", "photometry_lsst", "--want", "redshift", "--split", "test"
    )
    assert len(pq.read_table(out)) == Survey.load(survey).count("test")


def test_corrections_are_kept_in_a_run_s_folder(tmp_path):
    said = processes.armillary("calibrate", tmp_path / "none", "--given", "sfh", code=2)
    assert "must be a run's folder" in said
