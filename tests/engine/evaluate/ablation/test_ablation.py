"""Variants by settings, scores by hand, intervals that cover and that know of seeds, earlier numbers, the page."""

import json
import math

import numpy as np
import pytest

from armillary.engine.evaluate.ablation.differences import difference, is_classes, score_runs
from armillary.engine.evaluate.ablation.task import compare
from armillary.engine.evaluate.ablation.variants import (
    MeasureName,
    RunResult,
    earlier_measures,
    settings_of,
    variants,
)
from armillary.engine.evaluate.page.html import header, page

N = 400
RNG = np.random.default_rng(0)
TRUE = RNG.normal(size=N)
NAME = MeasureName("questions", "stage 2", "bar", "", "f1")


def run(name, seed, settings, values=None, target="z", measures=None):
    return RunResult(name, seed, settings, {} if values is None else {target: values}, measures or {})


def noisy(scale, seed):
    return TRUE + scale * np.random.default_rng([7, seed]).normal(size=N)


def study(scales=(0.5, 0.3)):
    """Three seeds of each; a third scale has other draws than the first."""
    return [
        run(f"{k}-{seed}", seed, {"k": str(k), "same": "1"}, noisy(scale, 10 * k + seed))
        for k, scale in enumerate(scales)
        for seed in range(3)
    ]


def test_settings_leave_chance_and_place_out():
    record = {
        "$type": "a:Run",
        "name": "x",
        "seed": 3,
        "out": {"$path": "runs"},
        "telemetry": {"every_steps": 10},
        "data": {"threads": 2, "path": {"$path": "survey"}},
        "method": {"$type": "a:M", "spaces": ["a", "b"]},
    }
    assert settings_of(record) == {"data.path": "survey", "method.spaces": "a, b"}


def test_variants_are_runs_but_for_the_seed():
    found = variants(study())
    assert [v.name for v in found] == ["as the first run", "k 1"] and found[1].changes == (("k", "1"),)
    assert [sorted(v.runs) for v in found] == [[0, 1, 2]] * 2
    extra = variants([run("a", 0, {"k": "1"}), run("b", 0, {"k": "1", "new": "2"})])
    assert extra[1].changes == (("new", "2"),) and variants([extra[1].runs[0], extra[0].runs[0]])[1].changes == (
        ("new", "-"),
    )
    with pytest.raises(ValueError, match="all 2 runs have the same settings but for the seed"):
        variants([run("a", 0, {}), run("b", 1, {})])
    with pytest.raises(ValueError, match="b and a have the same settings and the same seed, 0"):
        variants([run("a", 0, {}), run("b", 0, {})])


def test_scores_by_hand():
    true = np.array([0.5, 1.5, 2.5, 5.5, np.nan])  # whole numbers would be classes
    scored = score_runs("z", true, {"a": np.array([0.5, 1.5, 2.5, 4.5, 9.0])}, resamples=0, seed=0)
    assert (scored.metric, scored.samples, scored.baseline) == ("r2", 4, 0.0)
    assert scored.values["a"] == pytest.approx(1 - 1 / 14)


def test_classes_are_scored_by_weighted_f1():
    from sklearn.metrics import f1_score

    true = np.random.default_rng(1).integers(0, 3, N).astype(float)
    guess = np.where(np.random.default_rng(2).random(N) < 0.6, true, 1.0)
    assert is_classes(true) and not is_classes(TRUE) and not is_classes(np.arange(30.0))
    scored = score_runs("kind", true, {"a": guess}, resamples=50, seed=0)
    assert scored.metric == "f1" and scored.values["a"] == pytest.approx(f1_score(true, guess, average="weighted"))
    common = np.full(N, np.bincount(true.astype(int)).argmax())
    assert scored.baseline == pytest.approx(f1_score(true, common, average="weighted"))
    assert scored.drawn["a"].std() == pytest.approx(math.sqrt(0.75 * 0.25 / N), rel=0.4)


def test_a_difference_is_found_and_none_is_not():
    runs = study((0.5, 0.3, 0.5))
    found = variants(runs)
    scored = score_runs("z", TRUE, {r.name: r.predictions["z"] for r in runs}, resamples=300, seed=0)
    clear, none = (difference(scored, v, found[0]) for v in found[1:])
    assert clear.verdict == "better" and clear.value == pytest.approx(0.25 - 0.09, abs=0.06) and clear.seeds == 3
    assert none.verdict == "no difference found" and abs(none.value) < none.half < 0.2


def test_the_interval_holds_the_scatter_of_seeds():
    """Training that scatters by .1: three seeds cannot tell a difference of .02, whatever the number of galaxies."""
    values = {
        f"{v}-{s}": x for v, row in {"a": (0.5, 0.6, 0.7), "b": (0.6, 0.55, 0.69)}.items() for s, x in enumerate(row)
    }
    found = variants([run(name, int(name[-1]), {"k": name[0]}) for name in values])
    from armillary.engine.evaluate.ablation.differences import Scored

    gap = difference(Scored("z", "r2", values, {}, 0), found[1], found[0])
    gaps = np.array([0.1, -0.05, -0.01])
    assert gap.value == pytest.approx(gaps.mean())
    assert gap.half == pytest.approx(4.3027 * gaps.std(ddof=1) / math.sqrt(3), rel=1e-4) and not gap.clear
    one = difference(Scored("z", "r2", {k: v for k, v in values.items() if k[-1] == "0"}, {}, 0), found[1], found[0])
    assert math.isnan(one.half) and one.verdict == "one seed"
    apart = variants([run("a", 0, {"k": "1"}), run("b", 1, {"k": "2"})])
    assert difference(Scored("z", "r2", {"a": 0.1, "b": 0.2}, {}, 0), apart[1], apart[0]) is None


def test_the_outcome_and_its_page():
    outcome = compare(study((0.5, 0.3, 0.5)), {"z": TRUE}, resamples=100)
    better, same = outcome.lines
    assert better.startswith("k 1: R\u00b2 of z +0.") and better.endswith("(3 seeds): better")
    assert same.endswith("no difference found")
    metrics = {(m.features, m.metric): m for m in outcome.measures}
    assert set(metrics) >= {("as the first run", "r2"), ("k 1", "r2"), ("k 1", "r2 difference")}
    assert metrics["k 1", "r2"].samples == N
    text = page("t", header("t"), outcome.sections)
    assert "no difference was found" in text and "<svg" in text and "k 1" in text


def test_a_fine_tuned_network_is_held_against_the_same_one_from_scratch():
    ways = {"runs/dinov2": 0.3, "None": 0.5}
    runs = [
        run(f"{source}-{seed}", seed, {"method.image_from": source}, noisy(scale, seed))
        for source, scale in ways.items()
        for seed in range(3)
    ]
    (line,) = compare(runs, {"z": TRUE}, resamples=100).lines
    assert line.startswith("the same network from scratch (image from None): R\u00b2 of z -0.")
    assert line.endswith("(3 seeds): worse")


def test_numbers_of_earlier_evaluations(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    row = {
        "task": "questions",
        "features": "stage 2 (mine)",
        "target": "bar",
        "model": "",
        "metric": "f1",
        "value": 0.7,
    }
    rows = [row | {"stratum": "all"}, row | {"stratum": "z 0-1"}, row | {"task": "ablation", "stratum": "all"}]
    (folder / "metrics.json").write_text(json.dumps({"measures": [*rows, rows[0] | {"metric": "n", "value": None}]}))
    assert earlier_measures(tmp_path, "mine") == {NAME: 0.7}
    assert earlier_measures(tmp_path / "none", "mine") == {}
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="not the numbers of an evaluation"):
        earlier_measures(tmp_path, "mine")
    runs = [
        run(f"{k}{s}", s, {"k": k}, measures={NAME: 0.5 + 0.1 * (k == "b") + 0.001 * s}) for k in "ab" for s in range(3)
    ]
    outcome = compare(runs, {})
    assert {m.metric for m in outcome.measures} == {"f1", "f1 difference"} and len(outcome.sections) == 1
    gap = next(m for m in outcome.measures if m.metric == "f1 difference")
    assert gap.value == pytest.approx(0.1) and gap.error < 1e-9


def test_what_cannot_be_compared():
    with pytest.raises(
        ValueError, match="the runs have no predictions of the same labels and no evaluation/metrics.json"
    ):
        compare([run("a", 0, {"k": "1"}), run("b", 0, {"k": "2"})], {})
    with pytest.raises(ValueError, match="names must differ, got a, a"):
        compare([run("a", 0, {"k": "1"}, TRUE), run("a", 0, {"k": "2"}, TRUE)], {"z": TRUE})
