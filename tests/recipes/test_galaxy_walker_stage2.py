"""The recipe of stage 2: presets; a checkpoint's model is adapted, trained on any ranks, resumed to the bits, and read back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from tiny_vlm import write_checkpoint
from transformers import AutoModelForImageTextToText

from armillary.engine.config.config_json import from_json, to_json
from armillary.engine.data.building.build import build
from armillary.engine.data.building.sky_graph import build_graph
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sky_graph.graph import GraphOptions
from armillary.engine.data.sources.source import Sample
from armillary.engine.data.views.vector_files import read_vectors
from armillary.engine.evaluate.embedding.embed import embed_readouts, open_batches
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.weights.init_weights import init_encoder
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.galaxy_walker.adapter import attach
from armillary.models.galaxy_walker.vlm import hashes


class ToyGalaxies:
    """Galaxies of one hidden number, which is the redshift, and brightness, and how many see a bar."""

    pixel_scale_arcsec, unit, bands = 0.262, "nanomaggy", ("g", "r", "z")
    labels = {
        "redshift": "spectroscopic",
        "bar_yes": "share",
        "bar_no": "share",
        "bar_votes": "votes",
    }

    def __len__(self):
        return 60

    def read(self, index):
        rng = np.random.default_rng(index)
        z = rng.uniform(0, 1)
        y, x = np.mgrid[:24, :24] - 11.5
        image = z * np.exp(-(x**2 + y**2) / 18) + rng.normal(0, 0.01, (3, 24, 24))
        labels = {"redshift": z, "bar_yes": z, "bar_no": 1 - z, "bar_votes": 40.0 if index % 5 else 0.0}
        return Sample(
            key=f"t{index:04d}", image=image.astype(np.float32), valid=None, ra=float(index), dec=0.0, labels=labels,
            source=f"toy:{index}",
        )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with a survey, embeddings of spectra and neighbourhoods, and a checkpoint."""
    folder = tmp_path_factory.mktemp("site")
    build(ToyGalaxies(), folder / "survey", name="toy", samples_per_shard=20, test_fraction=0.4, progress=False)
    keys = np.array([f"t{i:04d}" for i in range(60)], object)
    rng, split = np.random.default_rng(0), np.full(60, "train", object)
    Embeddings(keys[:50], split[:50], rng.normal(size=(50, 16)).astype(np.float32)).save(folder / "spectrum.parquet")
    Embeddings(keys, split, rng.normal(size=(60, 24)).astype(np.float32)).save(folder / "geometry.parquet")
    write_checkpoint(folder / "vlm")
    return folder


def options(site, name):
    words = f"--preset smoke --device cpu --telemetry.no-tensorboard --out {site} --name {name}"
    words += f" --data.path {site / 'survey'} --views.spectrum {site / 'spectrum.parquet'}"
    words += f" --views.geometry {site / 'geometry.parquet'} --views.targets redshift --views.questions bar"
    words += f" --views.image.global-size 24 --method.base {site / 'vlm'} --train.global-batch 8 --train.micro-batch 2"
    return [
        *words.split(),
        "--schedule.learning-rate.warmup-steps",
        "1",
        "--train.steps",
        "4",
        "--checkpoint.every-steps",
        "2",
    ]


def train(site, name, *arguments, ranks=2, code=0):
    """Run the smoke preset on the toy's checkpoint; returns its losses, or what it said."""
    said = processes.run(
        processes.recipe(*options(site, name), *arguments, ranks=ranks, name="galaxy_walker_stage2"), code
    )
    if code:
        return said
    return [json.loads(line)["loss"] for line in (site / name / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path, step: int) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")}


def test_presets():
    presets = processes.presets("galaxy_walker_stage2")
    assert set(presets) == {"RECIPE", "PUBLISHED", "LIVE", "SMOKE", "SMOKE_LIVE"}
    for name, preset in presets.items():
        assert from_json(json.loads(json.dumps(to_json(preset)))) == preset, name
    published = presets["PUBLISHED"]
    assert (published.optim.lr, published.scalars(9)["weight_decay"], published.train.global_batch) == (2e-5, 0.01, 1)
    assert published.scalars(250)["learning_rate"] == pytest.approx(1e-5, rel=0.01)
    assert published.method.adapter.experts == "published" and not published.method.standardise
    assert presets["RECIPE"].method.adapter.every == published.method.adapter.every == 4
    first = processes.presets("galaxy_walker_stage1")
    for live, stage1, features in (("LIVE", "RECIPE", 1024), ("SMOKE_LIVE", "SMOKE", 5)):
        assert presets[live].method.prompt == first[stage1].method.prompt(features)
        assert presets[live].views.neighbours.graphs == first[stage1].views.neighbours.graphs


@pytest.mark.dist
@pytest.mark.slow
def test_a_checkpoint_is_adapted_trained_resumed_and_opened_again(site):
    """ZeRO 3 on two ranks with recomputed blocks against ZeRO 2 on one."""
    base, before = site / "vlm", hashes(site / "vlm")
    losses = train(site, "whole", "--train.zero-stage", 3, "--method.activation-checkpointing")
    assert len(losses) == 4 and np.isfinite(losses).all()
    whole, cut = site / "whole", site / "cut"

    # checkpoints and the export hold what is trained, and name the rest
    held = TrainedEncoder.open(whole)
    names = {key.partition("/")[2] for key in held._archive.pieces if not key.startswith("rng/")}
    assert names and not any(n.startswith("reader.vlm.") and ".mlp.experts." not in n for n in names)
    assert held.record["base"] == before == hashes(base)
    exported = TrainedEncoder.open(whole / "export" / "teacher.safetensors")
    assert exported.record["base"] == before
    assert exported.path.stat().st_size < 4.5 * sum(p.numel() for p in exported.method.parameters())

    shutil.copytree(whole, cut)  # as if it had died after step 2
    shutil.rmtree(cut / "checkpoints" / "step-00000004")
    (cut / "checkpoints" / "latest").write_text("step-00000002")
    assert train(site, "cut", "--train.zero-stage", 3, "--method.activation-checkpointing") == losses
    assert tensors(cut, 4) == tensors(whole, 4) != {}

    one = train(site, "one", ranks=1)
    assert one == pytest.approx(losses, rel=1e-4)  # they differ by rounding

    # predictions, from a run and by transformers with the adapters as a file of their own
    pipeline = Encoder.load(held, Survey.load(site / "survey"), torch.device("cpu")).pipeline()
    found = embed_readouts(pipeline, open_batches(site / "survey", "test", pipeline.view, 16, torch.device("cpu")))
    assert found["properties"][1].shape[1] == 1 and found["hidden"][1].shape[1] == 64
    report = ("--tasks", "questions", "--resamples", 50, "--device", "cpu", "-o", site / "report")
    assert "the likeliest option is right in" in processes.armillary("evaluate", whole, *report)
    metrics = json.loads((site / "report" / "metrics.json").read_text())
    assert "gate token image" in json.dumps(metrics)
    theirs = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    attach(theirs, exported.path)
    method = exported.method
    ids = torch.randint(0, 250, (2, 9))
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, method.reader.vlm(input_ids=ids).logits)

    # another base is refused
    write_checkpoint(base, seed=1)
    said = train(site, "whole", "--train.zero-stage", 3, "--method.activation-checkpointing", ranks=1, code=2)
    assert "method.base: must be the files that" in said and "their hashes differ" in said
    with pytest.raises(ValueError, match="was trained on other frozen weights than those in"):
        TrainedEncoder.open(exported.path).untrained()
    write_checkpoint(base)


@pytest.mark.dist
@pytest.mark.slow
def test_trains_in_bfloat16_with_frozen_weights_in_it(site):
    losses = train(site, "bf16", "--train.precision", "bf16", "--train.steps", 2, "--method.loss-weights", "learned")
    assert len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.dist
@pytest.mark.slow
def test_takes_over_the_prompt_of_stage_1(site):
    """What a frozen prompt makes of neighbours is what stage 1 wrote into its file, to the last bit; a trained one moves."""
    survey = site / "survey"
    for space in ("euclidean", "hyperbolic", "spherical"):
        build_graph(survey, GraphOptions(space=space, mode="leak-free"))
    columns = ("--views.neighbours.columns", "bar_yes", "bar_no", "bar_votes")
    first = f"--preset smoke --device cpu --telemetry.no-tensorboard --out {site} --data.path {survey} --name stage1"
    first += " --views.targets redshift --train.steps 2 --train.global-batch 8 --train.micro-batch 8"
    first += " --schedule.learning-rate.warmup-steps 1"
    processes.run(processes.recipe(*first.split(), *columns, ranks=1, name="galaxy_walker_stage1"))
    words = f"--preset smoke_live --device cpu --telemetry.no-tensorboard --out {site} --data.path {survey}"
    words += f" --views.targets redshift --views.questions bar --views.image.global-size 24 --method.prompt-from {site / 'stage1'}"
    words += " --train.steps 2 --train.global-batch 8 --train.micro-batch 4 --schedule.learning-rate.warmup-steps 1"
    for name, more in (("frozen", []), ("trained", ["--method.train-prompt"])):
        arguments = (*words.split(), *columns, "--name", name, *more)
        processes.run(processes.recipe(*arguments, ranks=1, name="galaxy_walker_stage2"))
    processes.armillary(
        "embed", site / "stage1", "--data", survey, "--readout", "geometry", "-o", site / "live.parquet"
    )
    wanted = read_vectors(site / "live.parquet", Survey.load(survey))
    made = {}
    for name in ("frozen", "trained"):
        encoder = Encoder.load(TrainedEncoder.open(site / name), Survey.load(survey), torch.device("cpu"))
        batches = open_batches(survey, "test", encoder.view, 16, torch.device("cpu"))
        found = [encoder.method.embed_neighbours(encoder.view(batch)) for batch in batches]
        rows = torch.cat([batch["row"] for batch in found])
        made[name] = torch.cat([batch["geometry_vectors"] for batch in found]).flatten(1)
    assert torch.equal(made["frozen"], wanted[rows])
    assert not torch.allclose(made["trained"], wanted[rows], atol=1e-4)
    report = ("--tasks", "questions", "--resamples", 20, "--device", "cpu", "-o", site / "report-live")
    assert "the likeliest option is right in" in processes.armillary("evaluate", site / "frozen", *report)
    source, method, views = TrainedEncoder.open(site / "stage1"), encoder.method, encoder.run.views
    other = replace(views, neighbours=replace(views.neighbours, columns=("bar_no", "bar_yes", "bar_votes")))
    with pytest.raises(ValueError, match="views.neighbours.columns: must be those of its training, "):
        init_encoder(method, "prompt", source, other, Survey.load(survey))
    method.prompt.config = replace(method.prompt.config, curvature=0.5)
    with pytest.raises(ValueError, match="method.prompt: must be that of its training, "):
        init_encoder(method, "prompt", source, views, Survey.load(survey))
