"""The demo as `make demo` runs it: simulate, train on two ranks under ZeRO-2, evaluate; and what it may claim."""

import json

import pytest
from processes import armillary, recipe, run

COSINE = "16-NN cosine"


@pytest.mark.slow
@pytest.mark.dist
def test_demo_learns_redshift_without_labels(tmp_path):
    survey, training = tmp_path / "survey", tmp_path / "training"
    armillary("data", "simulate", "--out", survey, "--count", 5000, "--no-progress")
    armillary("data", "check", survey)
    smoke = ["--preset", "smoke", "--device", "cpu"]
    run(recipe(*smoke, "--data.path", survey, "--out", tmp_path, "--name", "training"))
    assert "no collapse" in armillary("evaluate", training, "--data", survey, "--out", tmp_path)

    found = json.loads((tmp_path / "metrics.json").read_text())
    r2 = {m["features"]: m["r2"] for m in found["methods"] if m["probe"] == COSINE}
    assert r2["trained encoder"] >= r2["untrained encoder"] + 0.04
    assert r2["trained encoder"] >= r2["PCA-64 of the encoder's input"] + 0.08

    lines = [json.loads(line) for line in (training / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    last = [line for line in lines if "monitor/effective_rank" in line][-1]
    assert last["monitor/effective_rank"] > 5
    assert last["monitor/prototypes_in_use"] > 512
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 50
