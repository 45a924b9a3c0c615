"""The recipe of stage 1: presets; toy galaxies train alike on any ranks, resume to the bits, are read back and compared."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from armillary.engine import cli
from armillary.engine.config.config_json import from_json, to_json
from armillary.engine.data.building.build import build
from armillary.engine.data.building.sky_graph import build_graph
from armillary.engine.data.building.splits import ByHealpix
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sky_graph.graph import GraphOptions
from armillary.engine.data.sources.tables.rows import TableRows
from armillary.engine.evaluate.embedding.embed import embed_readouts, open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.train.checks import problems
from armillary.engine.weights.trained_encoder import TrainedEncoder

SPACES = ("euclidean", "hyperbolic", "spherical")


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Pairs of galaxies on the sky share a redshift; their own magnitudes tell a little of it."""
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    n = 400
    z = np.repeat(rng.uniform(0, 1, n // 8), 8)
    ra, dec = (np.repeat(rng.uniform(low, high, n // 8), 8) for low, high in ((100, 160), (-20, 20)))
    table = {"ra": ra + rng.normal(0, 0.01, n), "dec": dec + rng.normal(0, 0.01, n), "redshift": z}
    table |= {f"mag_{band}": z + rng.normal(0, 1.0, n) for band in "grz"}
    table |= {"log_mstar": z + rng.normal(0, 0.3, n), "log_ssfr": rng.normal(0, 1, n)}
    pq.write_table(pa.table(table), folder / "toy.parquet")
    source = TableRows(folder / "toy.parquet", vectors={"magnitudes": ("mag_g", "mag_r", "mag_z")}, labels=[*table][2:])
    build(source, folder / "survey", name="toy", split=ByHealpix(0.3, nside=16), samples_per_shard=100, progress=False)
    for space in SPACES:
        for shuffle in (None, 0):
            build_graph(folder / "survey", GraphOptions(space=space, mode="leak-free", shuffle_seed=shuffle))
    return folder / "survey"


@pytest.fixture(scope="module")
def presets():
    return processes.presets("galaxy_walker_stage1")


def train(preset, survey, out, name, *arguments, ranks=2):
    """Run a preset on the toy; returns its losses."""
    options = (
        f"--preset {preset} --device cpu --telemetry.no-tensorboard --data.path {survey} --out {out} --name {name}"
        " --train.global-batch 32 --train.micro-batch 8 --schedule.learning-rate.warmup-steps 1"
    )
    processes.run(processes.recipe(*options.split(), *arguments, ranks=ranks, name="galaxy_walker_stage1"))
    return [json.loads(line)["loss"] for line in (Path(out) / name / "metrics.jsonl").read_text().splitlines()]


def shards(folder: Path, step: int) -> dict[str, bytes]:
    """Contents of a checkpoint's tensor files; they hold weights, moments and random states."""
    return {p.name: p.read_bytes() for p in (folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")}


def test_presets(presets, survey, tmp_path):
    assert set(presets) == {"RECIPE", "PUBLISHED", "PRODUCT", "SMOKE", "SMOKE_PRODUCT"}
    prompt = presets["PUBLISHED"].method.prompt(1024)
    assert (prompt.hidden, prompt.out, prompt.tokens, prompt.dropout, prompt.curvature) == (512, 256, 1536, 0.1, 1.0)
    assert prompt.layers == "released" and not prompt.learn_curvature
    assert presets["PUBLISHED"].views.neighbours.graphs == tuple(f"{space}-k5-published" for space in SPACES)
    product = presets["PRODUCT"].method
    assert product.out == 3 and product.link_weight > 0 and product.learn_curvature
    for name, preset in presets.items():
        assert from_json(json.loads(json.dumps(to_json(preset)))) == preset, name
        here = replace(preset, device="cpu", data=replace(preset.data, path=survey), out=tmp_path)
        found = problems(here, 1)
        if name.startswith("SMOKE"):
            assert found == [], name
        else:  # the toy has neither the labels nor the embeddings of the real survey
            assert any(p.startswith("views.targets: must be labels of the survey") for p in found), name
    other = replace(presets["SMOKE"].views.neighbours, graphs=("none",))
    smoke = replace(presets["SMOKE"], views=replace(presets["SMOKE"].views, neighbours=other))
    assert any(
        "has no graph 'none', only euclidean-k5-leak-free" in p for p in smoke.views.problems(Survey.load(survey))
    )


@pytest.mark.dist
@pytest.mark.slow
def test_trains_alike_on_any_ranks_resumes_to_the_same_bits_and_is_read_back(survey, tmp_path, capsys):
    """Two ranks under ZeRO 3 against one under ZeRO 1; their losses differ by rounding, 1e-6 as measured."""
    options = ("--train.steps", 6, "--checkpoint.every-steps", 3, "--seed", 3, "--method.dropout", 0.1)
    losses = train("smoke_product", survey, tmp_path, "whole", *options, ranks=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert len(losses) == 6 and np.isfinite(losses).all()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for x in lines:
        assert sum(x[k] for k in ("redshift", "log_mstar", "log_ssfr", "link")) == pytest.approx(x["loss"], rel=1e-5)

    shutil.copytree(whole, cut)  # as if it had died after step 3
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    (cut / "checkpoints" / "latest").write_text("step-00000003")
    assert train("smoke_product", survey, tmp_path, "cut", *options, ranks=1) == losses
    assert shards(cut, 6) == shards(whole, 6) != {}

    still = ("--train.steps", 3, "--seed", 3)  # without dropout, whose draws are those of a rank
    two = train("smoke", survey, tmp_path, "two", *still, "--train.zero-stage", 3)
    one = train("smoke", survey, tmp_path, "one", *still, "--train.zero-stage", 1, ranks=1)
    assert one == pytest.approx(two, rel=2e-5)
    train("smoke", survey, tmp_path, "alone", *still, "--views.neighbours.fan-outs", 0, 0, ranks=1)

    exported = TrainedEncoder.open(whole / "export" / "teacher.safetensors")
    assert len(exported.inputs.node_mean) == 4  # of magnitudes and shown redshifts, kept with the run
    encoder = Encoder.load(exported, Survey.load(survey), torch.device("cpu"))
    batches = open_batches(survey, "test", encoder.view, 64, torch.device("cpu"))
    found = embed_readouts(encoder.pipeline(), batches)
    assert {name: v.shape[1] for name, (_, v) in found.items()} == {
        "geometry": 96, "euclidean": 32, "hyperbolic": 32, "spherical": 32, "prediction": 3,
    }  # fmt: skip

    runs = [str(tmp_path / name) for name in ("one", "two", "alone")]
    compared = ["evaluate", runs[0], "--compare", runs[2], "--tasks", "ablation", "-o", str(tmp_path / "table")]
    assert cli.main(compared) == 0
    said = capsys.readouterr().out
    assert "ablation: fan outs 0, 0: R\u00b2 of redshift" in said and "(one seed)" in said
    page = (tmp_path / "table" / "report.html").read_text()
    assert "What is each setting worth?" in page
    measures = json.loads((tmp_path / "table" / "metrics.json").read_text())["measures"]
    assert {m["metric"] for m in measures} == {"r2", "r2 difference"}
