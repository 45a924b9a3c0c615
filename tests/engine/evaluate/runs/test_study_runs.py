"""From runs to a study: names, reuse of embeddings, tasks that cannot be done."""

import json
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from armillary.engine.cli import main as command
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.evaluate import Encoder, StudyOptions, evaluate_study, feature_sets
from armillary.engine.evaluate.runs import study_runs, study_tasks
from armillary.engine.evaluate.study.options import Options
from armillary.engine.evaluate.study.study import Measure, Outcome
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
        views = types.SimpleNamespace(modalities=("image",))
        run = types.SimpleNamespace(name=folder.name, views=views)
        return Encoder(methods[folder.name], EvalView(Crop()), {"run": folder.name, "encoder": folder.name * 8}, run)

    monkeypatch.setattr(study_runs.Encoder, "load", load)
    folders = [tmp_path / name for name in methods]
    for folder in folders:
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"run": {"name": folder.name}}))
    return folders, methods


def test_sets_of_all_runs_under_names_that_differ(runs, survey_dir, tmp_path):
    sets = feature_sets(runs[0], survey_dir, tmp_path / "out", StudyOptions())
    names = [s.name for s in sets]
    assert names == ["fluxes", "light (one)", "light (two)", "net"]  # spectra are not there to be embedded
    assert [s.space for s in sets] == ["one" * 8, "", "", ""]
    assert [s.targets for s in sets] == [(), (), (), ("redshift",)]
    assert {len(s.embeddings) for s in sets} == {Survey.load(survey_dir).count()}


def test_embeddings_are_used_again_where_nothing_changed(runs, survey_dir, tmp_path):
    folders, methods = runs
    first = feature_sets(folders, survey_dir, tmp_path / "out", StudyOptions())
    calls = methods["one"].calls
    second = feature_sets(folders, survey_dir, tmp_path / "out", StudyOptions(seed=3))
    assert methods["one"].calls == calls
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.embeddings.vector, b.embeddings.vector)
    fewer = feature_sets(folders, survey_dir, tmp_path / "out", StudyOptions(common=Options(samples=5)))
    assert methods["one"].calls > calls and len(fewer[0].embeddings) == 10  # five of each split


class Count(study_tasks.Task):
    """Counts the samples."""

    def run(self, study, options, encoders):
        assert torch.get_num_threads() == 1
        count = len(study.rows("test"))
        measure = Measure("count", "fluxes", "", "", "samples", float(count), samples=count)
        return Outcome("count", (measure,), (f"{count} & counting",), ("<h2>Counted</h2>",))


class Never(study_tasks.Task):
    def impossible(self, survey, methods, options):
        return "it never is"

    def run(self, study, options, encoders):
        raise AssertionError


@pytest.fixture
def tasks(monkeypatch):
    found = {"count": Count(), "never": Never()}
    monkeypatch.setattr(study_runs, "TASKS", found)
    monkeypatch.setattr(study_tasks, "TASKS", found)


def test_report_and_numbers(runs, tasks, survey_dir, tmp_path, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    outcomes = evaluate_study(runs[0], survey_dir, tmp_path / "out", StudyOptions())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert [o.task for o in outcomes] == ["count"]
    assert "never is left out: it never is" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    for words in (
        "<h2>Counted</h2>",
        "&amp; counting",
        "light (two)",
        "predictions of redshift",
        "Where two comes from",
    ):
        assert words in page
    (row,) = pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()
    assert row["value"] == Survey.load(survey_dir).count("test")


def test_a_task_that_was_asked_for_and_cannot_be_done_ends_it_before_any_work(runs, tasks, survey_dir, tmp_path):
    for name, message in (("never", "tasks: never: it never is"), ("what", "must be of count, never, got what")):
        with pytest.raises(ValueError, match=message):
            evaluate_study(runs[0], survey_dir, tmp_path / "out", StudyOptions(tasks=(name,)))
    assert not (tmp_path / "out").exists() and runs[1]["one"].calls == 0


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("properties", StudyOptions(labels=("colour",)), "the survey has no label 'colour'; its labels: redshift"),
        ("posterior", StudyOptions(common=Options(label="age")), "no label 'age'"),
        ("morphology", StudyOptions(), "no votes of Galaxy Zoo"),
        ("masking", StudyOptions(), "needs a survey with spectra and a run with a spectrum encoder"),
        ("attention", StudyOptions(), "needs a survey with spectra and a run that aligns them"),
    ],
    ids=["label", "one label", "votes", "spectra", "alignment"],
)
def test_what_tasks_need(survey_dir, task, options, message):
    assert message in study_tasks.left_out(task, Survey.load(survey_dir), [Colours("flux")], options)


def test_predictions_alone_cannot_be_searched(survey_dir):
    survey = Survey.load(survey_dir)
    assert "only predictions" in study_tasks.left_out("search", survey, [Colours("prediction")], StudyOptions())
    assert study_tasks.left_out("search", survey, [Colours("flux")], StudyOptions()) == ""


def test_bad_options():
    with pytest.raises(ValueError, match="seed: must be at least 0"):
        StudyOptions(seed=-1)


def test_the_command_chooses_between_one_encoder_and_a_study(runs, tasks, survey_dir, tmp_path, monkeypatch, capsys):
    from armillary.engine.evaluate import cli

    views = types.SimpleNamespace(modalities=("image",))
    record = types.SimpleNamespace(views=views, data=types.SimpleNamespace(path=survey_dir))
    monkeypatch.setattr(cli.Run, "load", lambda folder: record)
    monkeypatch.setattr(cli, "evaluate_run", lambda *a, **k: (_ for _ in ()).throw(ValueError("one encoder")))
    one, two = map(str, runs[0])
    assert command(["evaluate", one]) == 2
    assert "one encoder" in capsys.readouterr().err
    assert command(["evaluate", one, "--tasks", "count", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "count: " in said and f"report: {runs[0][0] / 'evaluation' / 'report.html'}" in said
    assert command(["evaluate", one, "--compare", two, "-o", str(tmp_path / "o"), "--device", "cpu"]) == 0
    assert command(["evaluate", one, "--compare", two, "--readout", "flux", "--device", "cpu"]) == 2
    assert "a study takes all of the method's embeddings" in capsys.readouterr().err
    assert command(["evaluate", one, "--compare", two, "--redshift", "True", "--device", "cpu"]) == 2
    assert "a study knows the redshift by the label's name" in capsys.readouterr().err
    assert torch.is_grad_enabled()
