"""Methods, readers and tasks outside of armillary: the walks of CONTRIBUTING.md, in a folder outside of the checkout."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest

from armillary.engine import user_code
from armillary.engine.config.run import Run
from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.runs.tasks import TASKS

EXAMPLE = Path(processes.__file__).with_name("outside")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with the example's package and recipe; what this process learns of them is forgotten afterwards."""
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(user_code, "_trusted", {"armillary"})
    tasks = dict(TASKS)
    yield tmp_path
    TASKS.clear()
    TASKS.update(tasks)
    for name in [n for n in sys.modules if n.split(".")[0] in ("colours", "reader", "train_colours", "json_")]:
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.dist
def test_a_reader_a_method_and_a_task_of_ones_own(outside, monkeypatch):
    files, survey, runs = outside / "files", outside / "survey", outside / "runs"
    files.mkdir()
    y, x = np.indices((16, 16)) - 7.5
    for number in range(90):
        rng = np.random.default_rng(number)
        z = rng.uniform(0.05, 0.5)
        image = np.exp(-z * np.array([6, 3, 0]))[:, None, None] * np.exp(-(x**2 + y**2) / 8)
        np.savez(files / f"o{number:02d}.npz", image=image + 0.02 * rng.normal(size=image.shape), redshift=z)
    kind = f"{outside / 'colours' / 'reader.py'}:Arrays"
    options = ("--option", "scale=0.3", "--samples-per-shard", 20, "--test-fraction", 0.4)
    options += ("--processes", 1, "--no-progress")
    processes.armillary("data", "build", files, "-o", survey, "--kind", kind, *options)
    assert Survey.load(survey).pixel_scale_arcsec == 0.3 and Survey.load(survey).count() == 90

    def train(*arguments, ranks):
        recipe = processes.recipe(
            "--data.path", survey, "--out", runs, *arguments, ranks=ranks, name=outside / "train_colours"
        )
        return processes.start(recipe)

    wide = ("--preset", "wide", "--train.micro-batch", 8)
    for job in (train(ranks=2), train(*wide, ranks=1)):
        codes, said = job.wait()
        assert not any(codes), said
    record = json.loads((runs / "wide" / "run.json").read_text())
    assert record["run"]["method"]["$type"] == "train_colours:Wide"  # not __main__, which is another file elsewhere
    continued = train(*wide, "--train.steps", 4, ranks=1)

    out, data = outside / "vectors.parquet", ("--data", survey)
    said = processes.armillary("embed", runs / "colours", *data, "-o", out, code=2)
    assert (
        "class colours.method:Colours is not part of armillary; if you trust its code, give --package colours" in said
    )
    said = processes.armillary("embed", runs / "colours", *data, "-o", out, "--package", "colours", code=2)
    assert "colours: cannot be imported (No module named 'colours'); install it, add its folder to PYTHONPATH" in said
    monkeypatch.chdir(outside)
    processes.armillary("embed", runs / "colours", *data, "-o", out, "--package", "colours")
    package = ("--package", outside / "colours")
    assert Embeddings.load(out).vector.shape == (90, 16)
    exported = outside / "colours.safetensors"
    processes.armillary("export", runs / "colours", "-o", exported, *package)
    processes.armillary("embed", exported, *data, "-o", outside / "again.parquet", *package)
    np.testing.assert_array_equal(Embeddings.load(out).vector, Embeddings.load(outside / "again.parquet").vector)
    key = Embeddings.load(out).key[0]
    assert key not in processes.armillary("search", out, "--query", key, *package).splitlines()[-1]
    of_own = ("--run", runs / "colours", "--kind", kind, "--option", "scale=0.3", *package)
    said = processes.armillary("search", out, "--query", files / "o07.npz", *of_own, "-k", 1)
    assert "o07 " in said and "1.0000" in said

    codes, said = continued.wait()
    assert codes == [0] and "continuing" in said and "done: 4 steps" in said
    packages = (*package, "--package", "colours.tasks", "--package", outside / "train_colours.py")
    tasks = ("--tasks", "correlation", "--compare", runs / "wide")
    said = processes.armillary("evaluate", runs / "colours", *data, *packages, *tasks)
    assert "correlation: largest correlation 0.9" in said and "left out" not in said
    metrics = json.loads((runs / "colours" / "evaluation" / "metrics.json").read_text())
    assert {f["run"] for f in metrics["features"].values()} == {"colours", "wide"}
    page = (runs / "colours" / "evaluation" / "report.html").read_text()
    assert "Correlation with the redshift" in page
    processes.armillary(
        "report", runs / "wide", "--embeddings", out, "-o", outside / "page.html", "--tasks", "baselines"
    )
    monkeypatch.setattr(user_code, "_trusted", {"armillary"})
    with pytest.raises(ValueError, match="class train_colours:Wide is not part of armillary"):
        Run.load(runs / "wide")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package", "no_such_package: cannot be imported"),
        ("nowhere/train.py", "nowhere/train.py: there is no such file or folder"),
        ("{}/json.py", "another module has the name 'json'.* rename the file"),
        ("{}/json_.py:Nothing", "there is no Nothing in"),
        ("{}/json_.py:Thing.Nothing", "there is no Thing.Nothing in"),
    ],
    ids=["name", "path", "taken", "object", "attribute"],
)
def test_what_cannot_be_found(outside, name, message):
    for file in ("json.py", "json_.py"):
        (outside / file).write_text("class Thing: ...\n")
    find = user_code.load_object if ":" in name else user_code.trust
    with pytest.raises(ValueError, match=message):
        find(name.format(outside))
    assert user_code.load_object(f"{outside}/json_.py:Thing").__name__ == "Thing"


def test_a_class_of_the_script_that_runs_has_the_name_of_its_file(outside):
    (outside / "script.py").write_text(
        "from dataclasses import dataclass\n"
        "from armillary.engine.config.config_json import from_json, packages_of, to_json\n"
        "from armillary.engine.user_code import trust\n"
        "@dataclass(frozen=True)\nclass Own:\n    a: int = 3\n"
        "record = to_json(Own())\n"
        "trust(*packages_of(record))\n"
        "assert from_json(record) == Own()  # this very class: the file is not imported a second time\n"
        "print(record['$type'])\n"
    )
    for words in (["script.py"], ["-m", "script"]):
        done = subprocess.run([sys.executable, *words], cwd=outside, capture_output=True, text=True, check=True)
        assert done.stdout == "script:Own\n"


def test_classes_of_a_notebook_say_so():
    with pytest.raises(ValueError, match="class __main__:Own was defined in a notebook or at a prompt"):
        user_code.load_class("__main__:Own")
