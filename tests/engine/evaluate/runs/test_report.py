import html
import json
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from html_page import check_self_contained

from armillary.engine.cli import main as command
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.evaluate import cli
from armillary.engine.evaluate.baselines.embed import embed_features
from armillary.engine.evaluate.baselines.judge import (
    AIMS,
    COSINE,
    PCA_ASINH,
    PCA_INPUT,
    TRAINED,
    UNTRAINED,
    judge_label,
)
from armillary.engine.evaluate.embedding.cutouts import read_cutouts
from armillary.engine.evaluate.embedding.embed import Pipeline
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.page.run_log import RunLog
from armillary.engine.evaluate.probes.baselines import asinh_pixels
from armillary.engine.evaluate.probes.probes import KNN
from armillary.engine.evaluate.runs import report
from armillary.engine.evaluate.runs.evaluate import report_study
from armillary.engine.evaluate.study.options import Options
from armillary.engine.evaluate.study.study import FeatureSet, Study
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import Batch, Readout

pytestmark = pytest.mark.whole_task

QUICK = Options(resamples=50)


class Found:
    """What the tasks of a report found, by task, with its files."""

    def __init__(self, folder, features, log, page, options=QUICK, encoders=()):
        (name, head), *others = features.items()
        splits = {"train_split": options.train_split, "test_split": options.test_split}
        study = Study.open(folder, [FeatureSet(name, "image", head)], baselines=dict(others), log=log, **splits)
        reasons = dict.fromkeys(("baselines", "collapse", "pictures"), "")
        outcomes = report_study(study, reasons, options, page, {log.name: log}, encoders)
        self.of = {o.task: o for o in outcomes}
        self.record = json.loads(page.with_name("metrics.json").read_text())
        self.lines = self.record["lines"]

    def value(self, features, metric, model=COSINE.name):
        rows = self.of["baselines"].measures
        (found,) = [m.value for m in rows if (m.features, m.metric, m.model) == (features, metric, model)]
        return found


def batches_of(folder):
    splits = np.array(pq.read_table(folder / "catalog.parquet")["split"].to_pylist())

    def batches(name):
        rows = np.flatnonzero(splits == name)
        for i in range(0, len(rows), 16):
            images = [image for image, _ in read_cutouts(folder, rows[i : i + 16])]
            yield Batch(row=torch.from_numpy(rows[i : i + 16]), image=torch.from_numpy(np.stack(images)))

    return batches


def good_encoder(batch):
    """Colours: what tells the redshift."""
    x = batch["crop"]
    flux = x.clamp(-1, 20).sum((2, 3))
    ratio = flux / flux.norm(dim=1, keepdim=True)
    corners = torch.cat([x[:, :, :3, :3], x[:, :, -3:, -3:]], 1)  # noise, so that the rank is not that of two colours
    return {"e": torch.cat([ratio, 0.15 * corners.flatten(1)], 1)}


@pytest.fixture(scope="session")
def encoders():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 8, 5)

    def untrained(batch):
        return {"e": layer(batch["crop"]).flatten(1)[:, ::7]}

    return good_encoder, untrained


@pytest.fixture(scope="session")
def features(survey_dir, encoders):
    view = asinh_pixels(Survey.load(survey_dir))
    return embed_features(
        survey_dir,
        {TRAINED: Pipeline(view, encoders[0]), UNTRAINED: Pipeline(view, encoders[1])},
        batches_of(survey_dir),
        QUICK,
        metadata={TRAINED: {"run": "toy"}},
    )


def test_features_cover_both_splits_and_the_baselines(survey_dir, features):
    survey = Survey.load(survey_dir)
    assert list(features) == [TRAINED, UNTRAINED, PCA_INPUT, PCA_ASINH]
    for name, e in features.items():
        assert (e.split == "train").sum() == survey.count("train")
        assert (e.split == "test").sum() == survey.count("test")
        assert e.metadata["features"] == name
    assert features[TRAINED].metadata["run"] == "toy"


def test_samples_are_limited(survey_dir, encoders):
    view = asinh_pixels(Survey.load(survey_dir))
    few = embed_features(
        survey_dir, {TRAINED: Pipeline(view, encoders[0])}, batches_of(survey_dir), Options(samples=19)
    )
    assert len(few[TRAINED]) == 38


def test_report_with_labels(survey_dir, features, run_dir, tmp_path):
    out = tmp_path / "out" / "report.html"

    def augment(batch, key):
        return Batch(global_crops=torch.cat([batch["image"]] * 2), local_crops=batch["image"][:, :, 4:12, 4:12])

    views = types.SimpleNamespace(build=lambda survey, device: augment, modalities=("image",))
    method, run = torch.nn.Linear(1, 1), types.SimpleNamespace(views=views)
    encoder = Encoder(method, asinh_pixels(Survey.load(survey_dir)), {}, run)
    found = Found(survey_dir, features, RunLog.read(run_dir), out, encoders=[encoder])
    words, text = check_self_contained(out)
    for expected in (
        "toy <run>",
        "0123456789ab+changes",
        "recipes/toy.py --name",
        "PCA-64 of the encoder's input",
        "PCA-8 of the encoder's input",
        "aims reached",
        "No collapse",
        "60 of 64 prototypes are in use",
        "half of 64",
        "images a second",
        "method.head.prototypes",
        "local crops",
        "samples without it were left out",
        "NMAD",
        "outliers > 0.05, %",
    ):
        assert expected in words, expected
    assert "<run>" not in text.replace("&lt;run&gt;", "")
    assert found.value("", "train samples", "") + found.value("", "test samples", "") == 64  # every fifth has no label
    assert found.value("", "dropped samples", "") == 16
    assert found.value(TRAINED, "r2") > 0.8
    of_trained = [m for m in found.record["measures"] if (m["features"], m["metric"]) == (TRAINED, "r2")]
    assert of_trained[0]["value"] == pytest.approx(found.value(TRAINED, "r2")) and of_trained[0]["error"] > 0
    for other, margin in AIMS.items():
        difference, reached = (found.value(f"{TRAINED} - {other}", m) for m in ("r2 difference", "reached"))
        assert difference == pytest.approx(found.value(TRAINED, "r2") - found.value(other, "r2"))
        low, high = (found.value(f"{TRAINED} - {other}", f"r2 difference, {end} end of 95%") for end in ("low", "high"))
        assert low <= difference <= high
        assert reached == 1 if low >= margin else reached == 0 if high < margin else np.isnan(reached)
    assert found.record["collapsed"] is False and not found.record["left_out"]


def test_the_head_of_the_page_says_what_a_run_started_from(survey_dir):
    method = {"$type": "a:B", "image_from": {"$path": "runs/dinov2"}, "prompt": {"$type": "a:P", "prompt_from": None}}
    log = RunLog({"run": {"name": "tuned", "method": method}, "command": ["tune.py", "--init-from", "whole.pth"]})
    survey = Survey.load(survey_dir)
    assert "<dt>Started from</dt><dd>runs/dinov2, whole.pth</dd>" in report._run_header("tuned", survey, log, {})
    assert "Started from" not in report._run_header("tuned", survey, RunLog({"run": {"name": "x"}}), {})
    steps = {"step": (np.array([1, 9]), np.array([1, 9]))}
    of_checkpoint = RunLog({}, steps, checkpoint=4)
    assert "<dt>Steps trained</dt><dd>4 of 9</dd>" in report._run_header("tuned", survey, of_checkpoint, {})


def test_missed_aims_are_said(survey_dir, features, run_dir, tmp_path):
    swapped = {TRAINED: features[UNTRAINED], UNTRAINED: features[TRAINED]}
    found = Found(survey_dir, swapped, RunLog.read(run_dir), tmp_path / "r.html")
    words, _ = check_self_contained(tmp_path / "r.html")
    assert found.value("trained encoder - untrained encoder", "reached") == 0
    assert "Aim missed" in words
    assert any(line.startswith("NOT reached") for line in found.lines)
    assert "What the encoder sees" not in words


def test_report_without_labels(make_survey, encoders, tmp_path):
    folder = make_survey(count=30, labelled=False, bands=("r",))
    view = asinh_pixels(Survey.load(folder))
    features = embed_features(
        folder, {TRAINED: Pipeline(view, lambda x: {"e": x["crop"].flatten(1)})}, batches_of(folder), QUICK
    )
    (tmp_path / "run.json").write_text("{}")
    found = Found(folder, features, RunLog.read(tmp_path), tmp_path / "r.html")
    words, _ = check_self_contained(tmp_path / "r.html")
    assert "label 'redshift': must be one of the survey's labels (none)" in words
    assert "holds no metrics.jsonl" in words
    assert "unnamed run" in words
    assert "redshift" in found.record["left_out"]["baselines"]


def test_display_pictures(make_survey, run_dir, tmp_path):
    folder = make_survey(count=60, unit="count", bands=("R", "G", "B"), pixel_scale_arcsec=None)
    view = asinh_pixels(Survey.load(folder))
    features = embed_features(folder, {TRAINED: Pipeline(view, good_encoder)}, batches_of(folder), QUICK)
    found = Found(folder, {TRAINED: features[TRAINED]}, RunLog.read(run_dir), tmp_path / "r.html")
    words, _ = check_self_contained(tmp_path / "r.html")
    assert "Display pictures, as they are." in words
    assert not [m for m in found.of["baselines"].measures if m.metric == "reached"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(labels=("kind",)), "must be numbers"),
        (Options(labels=("mass",)), "label 'mass': must be one of the survey's labels"),
        (Options(test_split="holdout"), "has no embeddings of split 'holdout'"),
    ],
)
def test_labels_that_cannot_be_predicted(survey_dir, features, run_dir, tmp_path, options, said):
    small = {TRAINED: features[TRAINED]}
    found = Found(survey_dir, small, RunLog.read(run_dir), tmp_path / "r.html", options)
    assert said in found.record["left_out"]["baselines"] and len(found.record["left_out"]) == 1
    assert said in html.unescape((tmp_path / "r.html").read_text())


def test_collapse_sets_the_exit_code(survey_dir, features, run_dir, tmp_path):
    e = features[TRAINED]
    flat = np.outer(np.arange(len(e)), np.ones(4)).astype(np.float32)
    collapsed = {TRAINED: Embeddings(e.key, e.split, flat)}
    found = Found(survey_dir, collapsed, RunLog.read(run_dir), tmp_path / "r.html")
    assert found.of["collapse"].collapsed and found.record["collapsed"]
    assert "Collapsed" in check_self_contained(tmp_path / "r.html")[0]


def test_a_narrow_survey_is_no_collapse_of_an_encoder_that_was_sound(survey_dir, features, run_dir, tmp_path):
    """Where the survey is another than the run's, and the rank was high in training."""
    with open(run_dir / "metrics.jsonl", "a") as f:
        f.write('\n{"step": 40, "loss": 1.0, "monitor/effective_rank": 17.0}\n')
    log, e = RunLog.read(run_dir), features[TRAINED]
    log.record["survey"] = "another"
    flat = np.outer(np.arange(len(e)), np.ones(4)) + 1e-3 * np.random.default_rng(0).normal(size=(len(e), 4))
    narrow = {TRAINED: Embeddings(e.key, e.split, flat.astype(np.float32))}
    found = Found(survey_dir, narrow, log, tmp_path / "r.html")
    assert not found.of["collapse"].collapsed
    assert found.of["collapse"].lines[0].startswith("not collapsed, but narrow: effective rank 1")
    assert "Narrow" in check_self_contained(tmp_path / "r.html")[0]


@pytest.mark.parametrize(("rows", "collapsed"), [(None, True), (64, True), (40, False)])
def test_few_prototypes_are_a_collapse(survey_dir, features, run_dir, tmp_path, rows, collapsed):
    """Twenty of 64 in use: few where all can show, half of what a window of 40 samples can show."""
    shown = "" if rows is None else f', "monitor/window_rows": {rows}'
    with open(run_dir / "metrics.jsonl", "a") as f:
        f.write(f'\n{{"step": 40, "loss": 1.0, "monitor/prototypes_in_use": 20.0{shown}}}\n')
    found = Found(survey_dir, {TRAINED: features[TRAINED]}, RunLog.read(run_dir), tmp_path / "r.html")
    assert found.of["collapse"].collapsed == collapsed
    assert not collapsed or "20 of 64 prototypes" in found.of["collapse"].lines[0]


def test_embeddings_of_another_survey(survey_dir, run_dir, tmp_path):
    stranger = Embeddings(np.array(["x"], object), np.array(["test"], object), np.ones((1, 3), np.float32))
    with pytest.raises(ValueError, match="1 of 1 embeddings are not of survey"):
        Found(survey_dir, {TRAINED: stranger}, RunLog.read(run_dir), tmp_path / "r.html")


def test_too_few_labels_give_a_page_without_them(make_survey, run_dir, tmp_path):
    folder = make_survey(count=8)
    view = asinh_pixels(Survey.load(folder))
    features = embed_features(folder, {TRAINED: Pipeline(view, good_encoder)}, batches_of(folder), QUICK)
    found = Found(folder, features, RunLog.read(run_dir), tmp_path / "r.html")
    assert "20 are needed" in found.record["left_out"]["baselines"]
    check_self_contained(tmp_path / "r.html")


def test_constant_label_leaves_aims_unreached(features):
    train, test = (features[TRAINED].vector[features[TRAINED].split == s] for s in ("train", "test"))
    result = judge_label(
        {TRAINED: (train, test), UNTRAINED: (train, test)},
        np.full(len(train), 0.2),
        np.full(len(test), 0.2),
        label="redshift",
        redshift=True,
        probes={TRAINED: (KNN(3),), UNTRAINED: (KNN(3),)},
        resamples=20,
    )
    assert np.isnan(result.methods[0].scores.r2)
    assert not result.aims[0].reached


def test_report_command(survey_dir, features, run_dir, tmp_path, capsys):
    paths = []
    for number, name in enumerate((TRAINED, UNTRAINED)):
        paths.append(tmp_path / f"{number}.parquet")
        features[name].save(paths[-1])
    arguments = [str(run_dir), "--data", str(survey_dir), "--embeddings", *map(str, paths), "--resamples", "20"]
    out = tmp_path / "page.html"
    assert command(["report", *arguments, "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "no collapse: effective rank" in said
    assert "over the untrained encoder" in said
    check_self_contained(out)
    twice = [str(run_dir), "--data", str(survey_dir), "--embeddings", str(paths[0]), str(paths[0])]
    assert command(["report", *twice]) == 2
    assert "two files hold the same kind" in capsys.readouterr().err


def test_a_checkpoint_is_evaluated_beside_those_of_its_run(run_dir, tmp_path, monkeypatch):
    kept = run_dir / "checkpoints" / "step-00000010"
    kept.mkdir(parents=True)
    (kept / "manifest.json").write_text("{}")
    asked = []
    monkeypatch.setattr(
        "armillary.engine.evaluate.runs.evaluate.evaluate_study", lambda *args, **_: asked.append(args) or []
    )
    for run in (run_dir, kept):
        assert command(["evaluate", str(run), "--data", "sky", "--device", "cpu"]) == 0
    assert [out for _, _, out, _ in asked] == [run_dir / "evaluation", run_dir / "evaluation-step-00000010"]
    assert [runs for runs, *_ in asked] == [(run_dir,), (kept,)]


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="use --device cpu"):
        cli.choose_device("cuda")


def test_run_to_report(monkeypatch, survey_dir, run_dir, tmp_path, encoders, capsys):
    """`armillary evaluate` and `embed` with the real loader; only the encoder is a toy."""

    class Crop:
        packed = False

        def __call__(self, image, valid):
            return asinh_pixels(Survey.load(survey_dir))(Batch(row=image, image=image))["crop"]

    view = EvalView(Crop())
    views = types.SimpleNamespace(
        build=lambda survey, device: lambda batch, key: Batch(global_crops=batch["image"]), modalities=("image",)
    )
    run = types.SimpleNamespace(views=views, name="toy")

    class Toy(torch.nn.Linear):
        def __init__(self, encode):
            super().__init__(1, 1)
            self.encode = encode

        def readouts(self):
            return {"e": Readout("toy", "image")}

        def encoders(self):
            return {}

    def load(folder, survey, device, *, trained=True):
        return Encoder(Toy(encoders[0 if trained else 1]), view, {"run": "toy", "trained": str(trained)}, run)

    monkeypatch.setattr(TrainedEncoder, "open", lambda folder: types.SimpleNamespace(path=folder, is_published=False))
    monkeypatch.setattr(Encoder, "load", load)
    common = [str(run_dir), "--data", str(survey_dir), "--batch", "13", "--device", "cpu"]
    tasks = ["--tasks", "baselines", "collapse", "pictures"]
    assert command(["evaluate", *common, *tasks, "--resamples", "20"]) == 0
    folder = run_dir / "evaluation"
    assert {p.name for p in folder.iterdir()} == {
        "embeddings-toy.parquet",
        "embeddings-untrained-encoder.parquet",
        "embeddings-pca-64-of-the-encoders-input.parquet",
        "embeddings-pca-64-of-asinh-pixels.parquet",
        "metrics.json",
        "metrics.parquet",
        "report.html",
    }
    assert "global crops" in check_self_contained(folder / "report.html")[0]

    out = tmp_path / "embedded.parquet"
    assert command(["embed", *common, "-o", str(out)]) == 0
    assert f"{Survey.load(survey_dir).count()} embeddings" in capsys.readouterr().out
    again, first = Embeddings.load(out), Embeddings.load(folder / "embeddings-toy.parquet")
    np.testing.assert_allclose(again.aligned(first.key), first.vector, atol=1e-6)
    assert command(["embed", *common, "-o", str(out), "--split", "test", "--untrained"]) == 0
    only = Embeddings.load(out)
    assert set(only.split) == {"test"}
    assert only.metadata["features"] == UNTRAINED
    assert command(["embed", *common, "-o", str(out), "--split", "nowhere"]) == 2
    assert "no samples in 'nowhere'; the survey has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bands", "spectrum", "said"),
    [
        (("g", "r"), None, "sky, 1,200 cutouts in gr"),
        (("g", "r"), object(), "sky, 1,200 pairs of gr cutout and spectrum"),
        ((), object(), "sky, 1,200 spectra"),
        ((), None, "sky, 1,200 galaxies as vectors"),
    ],
)
def test_a_survey_is_said_by_what_it_holds(bands, spectrum, said):
    survey = types.SimpleNamespace(name="sky", bands=bands, spectrum=spectrum, count=lambda: 1200)
    assert report._size(survey) == said
