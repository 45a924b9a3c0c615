"""Trackers: what they get, under which id, and that nothing they do ends a run."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from armillary.engine.config.run import Telemetry
from armillary.engine.train.checks import problems
from armillary.engine.train.trackers import KEPT, Trackers, tracker_problems

KINDS = ("wandb", "mlflow", "trackio")
LINES = [{"step": 1, "loss": 2.0, "lr": 0.5}, {"step": 2, "loss": math.nan, "lr": 0.25}]


class Package:
    """What the three packages have in common, as Trackers calls them: runs by id, with what was logged and how they ended."""

    def __init__(self):
        self.runs, self.broken = {}, ""
        self.Settings = dict

    def _call(self, name):
        if name in self.broken:
            raise RuntimeError(f"{name}: no route to host")

    def init(self, *, project, name, id=None, resume=None, config, **_):
        self._call("init")
        assert config and (resume == "allow" or id is None)
        self.id = id or (name if resume else f"made-{len(self.runs)}")  # Trackio's runs are told apart by name
        self.log_of = self.runs.setdefault((project, self.id), [])
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values, step=None):
        self._call("log")
        self.log_of.append({"step": step, **values} if step is not None else values)

    def finish(self, exit_code=None):
        self._call("finish")
        self.log_of.append(f"ended {exit_code}")

    def set_experiment(self, project):
        self.project = project

    def start_run(self, *, run_id, run_name, log_system_metrics):
        self.init(project=self.project, name=run_name, id=run_id, resume="allow" if run_id else None, config={1: 1})
        return SimpleNamespace(info=SimpleNamespace(run_id=self.id))

    def log_params(self, values):
        assert values["train.steps"] == "8" and "$type" not in str(values)

    def log_metrics(self, values, step, synchronous):
        self.log(values, step)

    def end_run(self, status):
        self.finish(status)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def package(kind, monkeypatch):
    package = Package()
    monkeypatch.setitem(sys.modules, kind, package)
    return package


@pytest.fixture
def tracked(run, kind):
    run.folder.mkdir(parents=True)
    return replace(run, telemetry=Telemetry(tensorboard=False, tracker=kind, project="galaxies"))


def test_a_run_is_logged_and_resumed_under_the_same_id(tracked, package, kind):
    said = []
    first = Trackers(tracked, 0, lambda text, **_: said.append(text))
    for line in LINES:
        first.log(line)
    first.close(done=False)
    ((project, run_id),) = package.runs
    assert project == "galaxies" and said == [f"{kind}: galaxies/{run_id}"]
    assert json.loads((tracked.folder / KEPT).read_text()) == {f"{kind}/galaxies": run_id}
    Trackers(tracked, 2, lambda *_, **__: None).close(done=True)
    (logged,) = package.runs.values()
    ended = {"wandb": (1, 0), "mlflow": ("KILLED", "FINISHED"), "trackio": (None, None)}[kind]
    assert logged == [
        {"step": 1, "loss": 2.0, "lr": 0.5},
        {"step": 2, "lr": 0.25},  # numbers that are not finite are left out
        f"ended {ended[0]}",
        f"ended {ended[1]}",
    ]
    other = replace(tracked, telemetry=replace(tracked.telemetry, project="others"))
    Trackers(other, 0, print).close(done=True)
    assert len(package.runs) == 2


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_ends_nothing(tracked, package, kind, where):
    said = []
    package.broken = where
    trackers = Trackers(tracked, 0, lambda text, loud=False: said.append(text) if loud else None)
    for line in LINES:
        trackers.log(line)
    trackers.close(done=True)
    assert said == [f"WARNING: {kind} fails: {where}: no route to host; the run goes on without it"]


def test_a_package_that_is_not_there_is_named_before_the_start(tracked, kind, monkeypatch):
    monkeypatch.setattr("armillary.engine.train.trackers.importlib.util.find_spec", lambda name: None)
    expected = f"telemetry.tracker: must be installed, `pip install 'armillary[{kind}]'`, got '{kind}', which is not"
    assert expected in problems(tracked, world=1)
    assert tracker_problems(replace(tracked, telemetry=Telemetry())) == []


def test_an_id_that_cannot_be_read_begins_a_new_run(tracked, package):
    (tracked.folder / KEPT).write_text("{")
    Trackers(tracked, 0, lambda *_, **__: None).close(done=True)
    assert len(json.loads((tracked.folder / KEPT).read_text())) == 1


def track_twice(run):
    """A run that is killed after step 2, and goes on from step 1 with the same numbers."""
    said = []
    for first, lines in ((0, LINES), (1, [*LINES[1:], {"step": 3, "loss": 1.0}])):
        trackers = Trackers(run, first, lambda text, **_: said.append(text))
        for line in lines:
            trackers.log(line)
        trackers.close(done=first > 0)
    assert len(said) == 2 and said[0] == said[1], said
    return said[0].rpartition("/")[2]


@pytest.mark.filterwarnings("default")
def test_weights_and_biases_offline(run, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run.folder.mkdir(parents=True)
    found = track_twice(replace(run, telemetry=Telemetry(tensorboard=False, tracker="wandb")))
    files = list((run.folder / "wandb").glob(f"offline-run-*/run-{found}.wandb"))
    assert len(files) == 2 and all(b"loss" in file.read_bytes() for file in files)


@contextmanager
def mlflow_server(store, folder):
    """MLflow's own server on the loopback address; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["server", "--host", "127.0.0.1", "--port", port, "--backend-store-uri", store, "--workers", "1"]
    with (
        open(folder / "server.log", "wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "mlflow", *map(str, words)],
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < end, (folder / "server.log").read_text()
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("store", ["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def test_mlflow(run, tmp_path, monkeypatch, store):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.chdir(tmp_path)
    run.folder.mkdir(parents=True)
    file = f"sqlite:///{tmp_path}/mlflow.db"
    with mlflow_server(file, tmp_path) if store == "server" else nullcontext(file) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        found = track_twice(replace(run, telemetry=Telemetry(tensorboard=False, tracker="mlflow")))
        client = mlflow.MlflowClient()
        assert [(m.step, m.value) for m in client.get_metric_history(found, "loss")] == [(1, 2.0), (3, 1.0)]
        kept = client.get_run(found)
        assert kept.info.status == "FINISHED" and kept.data.params["train.steps"] == "8"


@pytest.mark.filterwarnings("default")
def test_trackio_on_this_machine(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="needs the extra trackio")
    run.folder.mkdir(parents=True)
    found = track_twice(replace(run, telemetry=Telemetry(tensorboard=False, tracker="trackio")))
    kept = trackio.Api().runs("armillary")
    assert [r.name for r in kept] == [found]
