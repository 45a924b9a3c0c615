"""AstroCLIP's three stages and every evaluation, as `make demo-astroclip` chains them, on a few pairs for a few steps."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from processes import armillary, recipe, run

TASKS = ("search", "properties", "posterior", "morphology", "masking", "attention")
SETS = ("AstroCLIP image", "AstroCLIP spectrum", "unaligned image", "unaligned spectrum", "photometry MLP")
TITLES = ("What was found", "What is compared", "Filling gaps in spectra", "What the alignment looks at in spectra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A survey of pairs and the runs of the chain on it."""
    folder = tmp_path_factory.mktemp("chain")
    run(armillary("data", "simulate", "--spectra", "--out", folder / "survey", "--count", 400, "--no-progress"))

    def train(name, preset, run_name, *more):
        place = ["--data.path", folder / "survey", "--out", folder, "--name", run_name, "--device", "cpu"]
        warmup = ["--schedule.learning-rate.warmup-steps", 1]
        return run(recipe("--preset", preset, *place, *warmup, *more, name=name))

    train("dinov2_vitl", "smoke", "dinov2", "--train.steps", 4, "--schedule.teacher-temperature.warmup-steps", 2)
    train("specformer", "smoke", "specformer", "--train.steps", 4)
    start = ["--method.image-from", folder / "dinov2", "--method.spectrum-from", folder / "specformer"]
    train("astroclip", "smoke", "astroclip", "--train.steps", 30, *start, "--data.token-cache", folder / "features")
    train("supervised", "smoke_photometry", "photometry", "--train.steps", 30)
    return folder


@pytest.mark.slow
@pytest.mark.dist
def test_every_task_is_in_the_report(folder):
    said = run(armillary("evaluate", folder / "astroclip", "--compare", folder / "photometry", "--out", folder / "out"))
    rows = pq.read_table(folder / "out" / "metrics.parquet").to_pylist()
    assert {row["task"] for row in rows} == set(TASKS) - {"attention"}  # that one is a picture
    record = json.loads((folder / "out" / "metrics.json").read_text())
    assert tuple(record["features"]) == SETS and len(record["measures"]) == len(rows)
    for line in record["lines"]:
        assert line in said
    page = (folder / "out" / "report.html").read_text()
    for title in TITLES:
        assert f"<h2>{title}</h2>" in page
    for words in ("Training of astroclip", "Training of photometry", "data:image/png;base64,", "<svg"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    for metric in ("recall@10", "r2", "accuracy"):
        assert [row for row in rows if row["metric"] == metric and np.isfinite(row["value"])], metric


@pytest.mark.slow
@pytest.mark.dist
def test_searching_and_embedding(folder):
    for readout in ("image", "spectrum"):
        out = folder / f"{readout}.parquet"
        run(armillary("embed", folder / "astroclip", "--readout", readout, "-o", out))
    key = pq.read_table(folder / "survey" / "catalog.parquet")["key"][3].as_py()
    said = run(armillary("search", folder / "image.parquet", "--query", key, "-k", 3))
    assert key in said
    across = ["--query-embeddings", folder / "image.parquet"]
    assert key in run(armillary("search", folder / "spectrum.parquet", "--query", key, "-k", 400, *across))


@pytest.mark.slow
@pytest.mark.dist
def test_bad_input_ends_before_work_starts(folder, tmp_path):
    place = ["--data.path", folder / "survey", "--out", tmp_path, "--device", "cpu"]
    said = run(recipe("--preset", "smoke", *place, "--method.image-from", tmp_path / "none", name="astroclip"), code=2)
    assert f"method.image_from: image encoder: {tmp_path / 'none'}: no such run or file; train it first" in said
    evaluate = ["evaluate", folder / "astroclip", "--out", tmp_path / "out"]
    said = run(armillary(*evaluate, "--tasks", "telepathy"), code=2)
    assert "tasks: must be of search, properties, posterior, morphology, masking, attention, got telepathy" in said
    said = run(armillary(*evaluate, "--tasks", "properties", "--labels", "colour"), code=2)
    assert "properties: the survey has no label 'colour'; its labels: redshift" in said
    said = run(armillary("evaluate", folder / "photometry", "--tasks", "masking", "--out", tmp_path / "out"), code=2)
    assert "masking: it needs a survey with spectra and a run with a spectrum encoder" in said
    assert not (tmp_path / "out").exists()
