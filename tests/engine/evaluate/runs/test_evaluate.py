"""From runs to a study: names, reuse of embeddings, tasks that cannot be done."""

import json
import types
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from armillary.engine.cli import main as command
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.evaluate import Encoder, Options, evaluate_study, feature_sets
from armillary.engine.evaluate.page.html import section
from armillary.engine.evaluate.runs import evaluate as evaluate_module
from armillary.engine.evaluate.runs import tasks as tasks_module
from armillary.engine.evaluate.study.study import Measure, Outcome
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import Readout


class Colours(nn.Module):
    """Embeds an image as its bands' mean fluxes, and predicts a redshift from them."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.calls = names, 0

    def readouts(self):
        about = {
            "flux": Readout("fluxes", "image", aligned=True),
            "light": Readout("light", "image"),
            "spectrum": Readout("spectra", "spectrum", aligned=True),
            "prediction": Readout("net", "image", targets=("redshift",)),
        }
        return {name: about[name] for name in self.names}

    def encoders(self):
        return {"image": "encoder."}

    def encode(self, batch):
        self.calls += 1
        flux = batch["crop"].mean((2, 3))
        return {"flux": flux, "light": flux.sum(1, keepdim=True), "prediction": flux[:, :1]}


class Crop:
    packed = False

    def __call__(self, image, valid):
        return image


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Folders of two runs on images; their encoders by name."""
    methods = {"one": Colours("flux", "light", "spectrum"), "two": Colours("light", "prediction")}

    def load(folder, survey, device, **_):
        views = types.SimpleNamespace(modalities=("image", "spectrum"))
        run = types.SimpleNamespace(name=folder.name, views=views)
        return Encoder(methods[folder.name], EvalView(Crop()), {"run": folder.name, "encoder": folder.name * 8}, run)

    monkeypatch.setattr(TrainedEncoder, "open", lambda folder: folder)
    monkeypatch.setattr(evaluate_module.Encoder, "load", load)
    folders = [tmp_path / name for name in methods]
    for folder in folders:
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"run": {"name": folder.name}}))
    return folders, methods


def test_sets_of_all_runs_under_names_that_differ(runs, survey_dir, tmp_path):
    sets = feature_sets(runs[0], survey_dir, tmp_path / "out", Options())
    names = [s.name for s in sets]
    assert names == ["fluxes", "light (one)", "light (two)", "net"]  # spectra are not there to be embedded
    assert [s.space for s in sets] == ["one" * 8, "", "", ""]
    assert [s.targets for s in sets] == [(), (), (), ("redshift",)]
    assert {len(s.embeddings) for s in sets} == {Survey.load(survey_dir).count()}


def test_two_checkpoints_of_a_run_are_told_apart_by_their_steps(runs):
    run = types.SimpleNamespace(name="one", views=types.SimpleNamespace(modalities=("image",)))
    survey = types.SimpleNamespace(modalities=("image",))
    made = [Encoder(Colours("light"), EvalView(Crop()), {}, run, None, step) for step in (800, 1200)]
    names = [w.name for w in evaluate_module._wanted(made, survey)]
    assert names == ["light (one, step 800)", "light (one, step 1,200)"]


def test_embeddings_are_used_again_where_nothing_changed(runs, survey_dir, tmp_path):
    folders, methods = runs
    first = feature_sets(folders, survey_dir, tmp_path / "out", Options())
    calls = methods["one"].calls
    second = feature_sets(folders, survey_dir, tmp_path / "out", Options(seed=3))
    assert methods["one"].calls == calls
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.embeddings.vector, b.embeddings.vector)
    fewer = feature_sets(folders, survey_dir, tmp_path / "out", Options(samples=5))
    assert methods["one"].calls > calls and len(fewer[0].embeddings) == 10  # five of each split


class Count(tasks_module.Task):
    """Counts the samples."""

    def run(self, study, options, encoders):
        assert torch.get_num_threads() == 1
        count = len(study.rows("test"))
        measure = Measure("count", "fluxes", "", "", "samples", float(count), samples=count)
        return Outcome("count", (measure,), (f"{count} & counting",), (section("Counted"),))


class Never(tasks_module.Task):
    def impossible(self, survey, methods, options):
        return "it never is"

    def run(self, study, options, encoders):
        raise AssertionError


class Breaks(tasks_module.Task):
    def __init__(self, error):
        self.error = error

    def run(self, study, options, encoders):
        raise self.error


@pytest.fixture
def tasks(monkeypatch):
    found = {"breaks": Breaks(ValueError("half <way> through")), "count": Count(), "never": Never()}
    found["diverges"] = Breaks(FloatingPointError("the loss is nan"))
    monkeypatch.setattr(evaluate_module, "TASKS", found)
    monkeypatch.setattr(tasks_module, "TASKS", found)


def test_report_and_numbers(runs, tasks, survey_dir, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    outcomes = evaluate_study(runs[0], survey_dir, tmp_path / "out", Options())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    left_out = {"breaks": "half <way> through", "never": "it never is", "diverges": "the loss is nan"}
    assert {o.task: o.left_out for o in outcomes} == left_out | {"count": ""}
    page = (tmp_path / "out" / "report.html").read_text()
    for words in (
        "<h2>Counted</h2>",
        "&amp; counting",
        "left out: it never is",
        "half &lt;way&gt; through",
        "light (two)",
        "predictions of redshift",
        "Where two comes from",
    ):
        assert words in page
    (row,) = pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()
    assert row["value"] == Survey.load(survey_dir).count("test")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["left_out"] == left_out


def test_a_task_that_was_asked_for_and_cannot_be_done_ends_it_before_any_work(runs, tasks, survey_dir, tmp_path):
    for name, message in (
        ("never", "tasks: never: it never is"),
        ("what", "must be of breaks, count, never, diverges, got what"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_study(runs[0], survey_dir, tmp_path / "out", Options(tasks=(name,)))
    assert not (tmp_path / "out").exists() and runs[1]["one"].calls == 0


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("properties", Options(labels=("colour",)), "the survey has no label 'colour'; its labels: redshift"),
        ("posterior", Options(labels=("age",)), "no label 'age'"),
        ("morphology", Options(), "no votes of Galaxy Zoo"),
        ("masking", Options(), "needs a survey with spectra and a run with a spectrum encoder"),
        ("attention", Options(), "needs a survey with spectra and a run that aligns them"),
    ],
    ids=["label", "one label", "votes", "spectra", "alignment"],
)
def test_what_tasks_need(survey_dir, task, options, message):
    assert message in tasks_module.TASKS[task].impossible(Survey.load(survey_dir), [Colours("flux")], options)


@pytest.mark.parametrize("task", ["search", "posterior", "morphology"])
def test_tasks_on_embeddings_leave_predictions_out(survey_dir, task):
    survey = Survey.load(survey_dir)
    assert "only predictions" in tasks_module.TASKS[task].impossible(survey, [Colours("prediction")], Options())
    assert "only predictions" not in tasks_module.TASKS[task].impossible(survey, [Colours("flux")], Options())


@pytest.mark.parametrize("task", ["baselines", "collapse"])
def test_predictions_are_not_judged_as_embeddings(survey_dir, task):
    survey = Survey.load(survey_dir)
    assert "gives predictions" in tasks_module.TASKS[task].impossible(survey, [Colours("prediction")], Options())
    assert "images alone" in tasks_module.TASKS[task].impossible(survey, [Colours("spectrum")], Options())
    assert "images alone" in tasks_module.TASKS[task].impossible(survey, [Colours("light", "spectrum")], Options())
    assert tasks_module.TASKS[task].impossible(survey, [Colours("light", "prediction")], Options()) == ""


def test_properties_are_those_that_a_run_was_trained_for(survey_dir):
    survey = replace(Survey.load(survey_dir), labels={"axis_ratio": "", "kind": ""})
    task, run = tasks_module.TASKS["properties"], Colours("prediction")
    assert "none of the labels redshift" in task.impossible(survey, [run], Options())
    run.readouts = lambda: {"prediction": Readout("toy", "image", targets=("axis_ratio",))}
    assert task.impossible(survey, [run], Options()) == ""
    assert "no label 'age'" in task.impossible(survey, [run], Options(labels=("age",)))


class Foreign(Colours):
    """Has a spectrum encoder that is none of ours."""

    def __init__(self):
        super().__init__("flux")
        self.net = nn.Linear(2, 2)

    def encoders(self):
        return {"image": "net.", "spectrum": "net."}


@pytest.mark.parametrize("task", ["masking", "attention"])
def test_a_method_of_ones_own_is_left_out(pairs_dir, task):
    assert "it needs" in tasks_module.TASKS[task].impossible(Survey.load(pairs_dir), [Foreign()], Options())


@pytest.mark.parametrize(
    "options",
    [{"samples": 1}, {"test_split": "train"}, {"seed": -1}, {"outlier_threshold": float("nan")}, {"resamples": 0}],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Options(**options)


@pytest.mark.parametrize("options", [{"labels": ("mass",)}, {"test_split": "nowhere"}, {"train_split": "nowhere"}])
def test_names_that_the_survey_lacks_end_before_work(runs, survey_dir, tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: must be .* of the survey"):
        evaluate_study(runs[0], survey_dir, tmp_path / "out", Options(**options))
    assert not (tmp_path / "out").exists()


def test_the_command(runs, tasks, survey_dir, tmp_path, capsys):
    one, two = map(str, runs[0])
    common = ["--data", str(survey_dir), "--device", "cpu"]
    assert command(["evaluate", one, *common]) == 0
    said = capsys.readouterr().out
    for words in ("count: ", "never is left out: it never is", "breaks is left out: half", "report: "):
        assert words in said
    assert command(["evaluate", one, *common, "--compare", two, "-o", str(tmp_path / "o"), "--readout", "flux"]) == 0
    assert list(json.loads((tmp_path / "o" / "metrics.json").read_text())["features"]) == ["fluxes", "light", "net"]
    assert command(["evaluate", one, *common, "--readout", "none"]) == 2
    assert "'none' is none of this encoder's embeddings" in capsys.readouterr().err
    assert torch.is_grad_enabled()


def test_help_names_the_tasks(capsys):
    assert command(["evaluate", "--help"]) == 0
    said = capsys.readouterr().out
    for name in tasks_module.TASKS:
        assert name in said
