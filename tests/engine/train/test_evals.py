"""Evaluations while training: the right score on any number of ranks, the best checkpoint, and no trace in the bits."""

import json
import math
from dataclasses import replace
from pathlib import Path

import fork_server
import frozen_toy
import numpy as np
import processes
import pytest
import torch

from armillary.engine.config.evals import KNN
from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.embedding.embed import Pipeline, embed_readouts, open_batches
from armillary.engine.evaluate.probes import probes
from armillary.engine.evaluate.probes.scores import r2
from armillary.engine.train.checks import problems
from armillary.engine.train.evals import Evals, readout_problems
from armillary.engine.user_code import trust
from armillary.engine.weights.checkpoint import read_best
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.engine.zero.processes import Ranks
from armillary.models.method import Readout

trust("frozen_toy")
SCRIPT = Path(frozen_toy.__file__)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    return frozen_toy.make_survey(tmp_path_factory.mktemp("survey") / "survey")


@pytest.fixture
def run(survey, tmp_path):
    evals = (KNN("z", every_steps=4, split="test", neighbours=3),)
    return replace(frozen_toy.frozen_run(tmp_path, survey), evals=evals)


def train(survey, out, *arguments, world=2, **environment):
    ranks = fork_server.start(
        SCRIPT, arguments, world, at_once=True, FROZEN_OUT=str(out), FROZEN_SURVEY=str(survey), **environment
    )
    said = [rank.communicate(120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), said
    return said[0]


def expected(run, knn, method=None):
    """The score, by a method, or by that of the run as it was built."""
    survey = Survey.load(run.data.path)
    method = (method or run.method.build(run.views.input_spec(survey))).eval()
    labels = read_catalog(survey, ["z"])["z"].to_numpy()
    view, found = run.views.eval_view(survey, CPU), {}
    for split in (run.data.split, knn.split):
        batches = open_batches(survey.folder, split, view, 5, CPU)
        found[split] = embed_readouts(Pipeline(view, method.encode), batches)[knn.readout or "image_tokens"]
    (rows, vectors), (test_rows, test) = found[run.data.split], found[knn.split]
    rows, vectors = rows[: knn.references], vectors[: knn.references]
    guess = probes.KNN(knn.neighbours, knn.metric).predict(vectors, labels[rows], test)
    return r2(labels[test_rows][: knn.samples], guess[: knn.samples])


@pytest.mark.dist
def test_evals_leave_no_trace_in_the_bits_and_are_logged_beside_the_loss(survey, run, tmp_path):
    train(survey, tmp_path / "without")
    said = train(survey, tmp_path / "with", "--preset", "evals")
    for step in (10, 12):
        bits = [processes.tensor_files(tmp_path / kind / "frozen", step) for kind in ("without", "with")]
        assert bits[0] == bits[1]
    lines = processes.metrics(tmp_path / "with" / "frozen")
    told = {line["step"]: line["eval/knn/z"] for line in lines if "eval/knn/z" in line}
    # the toy's encoders are frozen, so every step has the score of the first
    assert told == pytest.approx(dict.fromkeys((4, 8, 12), expected(run, run.evals[0])), abs=1e-5)
    assert all(0 < line["eval/share"] < 1 and line["eval/seconds"] > 0 for line in lines if line["step"] in told)
    assert [line["loss"] for line in lines] == processes.losses(tmp_path / "without" / "frozen")
    assert "step 4: knn/z R2 " in said and "of the time" in said


@pytest.mark.dist
def test_evals_leave_no_trace_in_weights_that_are_cut_and_see_all_of_them(survey, run, tmp_path):
    options = ("--train.zero-stage", "3", "--method.train-encoders", "--checkpoint.keep", "9")
    train(survey, tmp_path / "without", *options)
    # 25 references are 3 batches for one rank and 4 for the other, which must not wait for each other
    options += ("--preset", "evals", "--checkpoint.keep-best", "knn/z", "--evals.0.references", "25")
    said = train(survey, tmp_path / "with", *options)
    with_evals = tmp_path / "with" / "frozen"
    for step in (5, 10, 12):
        bits = [processes.tensor_files(tmp_path / kind / "frozen", step) for kind in ("without", "with")]
        assert bits[0] == bits[1] != {}
    lines = processes.metrics(with_evals)
    told = {line["step"]: line["eval/knn/z"] for line in lines if "eval/knn/z" in line}
    assert [line["loss"] for line in lines] == processes.losses(tmp_path / "without" / "frozen")
    best = read_best(with_evals / "checkpoints")
    assert sorted(told) == [4, 8, 12] and best.score == max(told.values()) and "is the best so far" in said
    for step in {best.step, 12}:
        method = TrainedEncoder.open(with_evals / "checkpoints" / f"step-{step:08d}").method
        assert told[step] == pytest.approx(expected(run, replace(run.evals[0], references=25), method), abs=1e-5)


@pytest.mark.dist
def test_the_best_checkpoint_stays_and_opens(survey, tmp_path):
    options = ["--preset", "evals", "--checkpoint.keep-best", "knn/z", "--checkpoint.keep", "1", "--train.steps", "16"]
    said = train(survey, tmp_path, *options, world=1, SCORES="0.1,0.5,nan,0.5")
    folder = tmp_path / "frozen" / "checkpoints"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000008", "step-00000016"]
    assert read_best(folder) == ("knn/z", 0.5, 8)
    assert "best by knn/z: 0.500 at step 8" in said
    assert TrainedEncoder.open(folder / "step-00000008").record["step"] == 8
    assert TrainedEncoder.open(tmp_path / "frozen").record["step"] == 16
    longer = [*options[:-1], "24"]
    said = train(survey, tmp_path, *longer, world=1, SCORES="0.4,0.6")  # goes on with what was best before
    assert read_best(folder).step == 24 and "step 20 is the best" not in said
    (folder / "best.json").write_text(json.dumps({"name": "knn/z", "score": 1.0, "step": 99}))
    assert read_best(folder) is None  # its checkpoint is gone


@pytest.mark.dist
def test_a_run_ends_where_its_score_gets_no_better_and_stays_ended(survey, tmp_path):
    options = [
        "--preset",
        "evals",
        "--checkpoint.keep-best",
        "knn/z",
        "--checkpoint.patience",
        "2",
        "--train.steps",
        "24",
    ]
    said = train(survey, tmp_path, *options, world=1, SCORES="0.1,0.5,0.4,nan,0.9,0.9")
    assert "ended early at step 16: 2 evaluations brought no better knn/z" in said and "done: 16 steps" in said
    assert "done: 16 steps" in train(survey, tmp_path, *options, world=1, SCORES="0.9,0.9")
    options[options.index("2")] = "3"  # more patience goes on
    assert "done: 24 steps" in train(survey, tmp_path, *options, world=1, SCORES="0.6,0.7")


def test_scores_are_those_of_the_probe(run, one_process):
    evals = (
        KNN("z", 1, "test", neighbours=3),
        KNN("z", 2, "test", samples=4, references=9, neighbours=2, metric="euclidean", readout="spectrum_tokens"),
    )
    run = replace(run, evals=evals)
    survey, said = Survey.load(run.data.path), []
    method = run.method.build(run.views.input_spec(survey)).train()
    method.dropout.eval()
    before = torch.get_rng_state()
    watching = Evals(run, method, survey, CPU, Ranks(0, 0, 1), lambda text, **_: said.append(text))
    assert [len(watching.due(step)) for step in (1, 2, 12)] == [1, 2, 2]
    found = watching.results(2)
    assert torch.equal(before, torch.get_rng_state())
    assert method.training and not method.dropout.training
    shortened = expected(run, replace(evals[1], readout="spectrum_tokens"))
    assert found["eval/knn/z/spectrum_tokens"] == pytest.approx(shortened, abs=1e-6)
    assert found["eval/knn/z"] == pytest.approx(expected(run, evals[0]), abs=1e-6)
    assert said[0].startswith("step 2: knn/z R2 ") and "evals take" in said[0]
    assert (
        watching.results(13) != {}
        and Evals(replace(run, evals=()), method, survey, CPU, Ranks(0, 0, 1), print).results(12) == {}
    )


def test_an_evaluation_that_cannot_be_made_ends_no_run(run, one_process):
    survey, said = Survey.load(run.data.path), []
    method = run.method.build(run.views.input_spec(survey))
    method.image.weight.data.fill_(float("nan"))
    watching = Evals(run, method, survey, CPU, Ranks(0, 0, 1), lambda text, **_: said.append(text))
    assert math.isnan(watching.results(4)["eval/knn/z"])
    assert "left out: ValueError" in said[0] and "not finite" in said[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "mass"}, "evals.0.label: must be a numeric label of the survey (z), got 'mass'"),
        ({"split": "train"}, "evals.0.split: must be a split beside the training split (test), got 'train'"),
        ({"every_steps": 0}, "evals.0.every_steps: must be at least 1, got 0"),
        ({"references": 2}, "evals.0.references: must be at least 3, got 2"),
    ],
)
def test_evals_that_make_no_sense_are_refused_before_the_start(run, change, said):
    assert problems(run, 1) == []
    assert problems(replace(run, evals=(replace(run.evals[0], **change),)), 1) == [said]


def test_what_does_not_go_together_is_refused(run):
    twice = replace(run, evals=run.evals * 2)
    assert problems(twice, 1) == ["evals: must have different labels or readouts, got knn/z twice"]
    best = replace(run, checkpoint=replace(run.checkpoint, keep_best="knn/mass"))
    assert problems(best, 1) == ["checkpoint.keep_best: must be one of the run's evals (knn/z), got 'knn/mass'"]
    assert problems(replace(best, evals=()), 1) == [
        "checkpoint.keep_best: must be one of the run's evals (none), got 'knn/mass'"
    ]
    patient = replace(run, checkpoint=replace(run.checkpoint, patience=2))
    assert problems(patient, 1) == [
        "checkpoint.patience: must go with checkpoint.keep_best, whose score it waits for, got 2 alone"
    ]
    assert problems(replace(run, train=replace(run.train, zero_stage=3)), 1) == []
    method = run.method.build(run.views.input_spec(Survey.load(run.data.path)))
    method.readouts = lambda: {"cls": Readout("x", "image")}
    asked = replace(run, evals=(replace(run.evals[0], readout="patch"),))
    assert readout_problems(asked, method) == ["evals.0.readout: must be one of cls, got 'patch'"]


def test_constant_labels_have_no_score(run, one_process, monkeypatch):
    survey = Survey.load(run.data.path)
    method = run.method.build(run.views.input_spec(survey))
    monkeypatch.setattr(Evals, "_label", lambda self, name: np.full(40, 0.5))
    assert math.isnan(Evals(run, method, survey, CPU, Ranks(0, 0, 1), lambda *_, **__: None).results(4)["eval/knn/z"])
