"""`armillary runs`: states, numbers and differences of what lies in a folder."""

import json
from dataclasses import replace

import pytest

from armillary.engine import cli
from armillary.engine.config.config_json import to_json
from armillary.engine.evaluate.runs_cli import differences, list_runs
from armillary.engine.exclusive import exclusive


@pytest.fixture
def folder(run, tmp_path):
    """Three runs: finished, stopped with a cut last line, and one that has logged nothing."""
    top = tmp_path / "all"
    for name, steps, changes in (("a", 4, {}), ("b/inner", 2, {"seed": 7}), ("c", 0, {})):
        where = top / name
        where.mkdir(parents=True)
        made = replace(run, name=name, train=replace(run.train, steps=4), **changes)
        facts = {"commit": "0123456789abcdef", "versions": {"torch": "2.13.0" if name == "a" else "2.14.0"}}
        (where / "run.json").write_text(json.dumps({"run": to_json(made), **facts}))
        if steps:
            lines = [json.dumps({"step": i + 1, "loss": 2.0 - i / 2, "images_per_s": 30.0 + i}) for i in range(steps)]
            (where / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
    return top


def test_states_and_numbers(folder):
    with exclusive(folder / "c"):
        (a, b, c), unread = list_runs(folder)
    assert [(r.folder, r.state, r.step, r.steps, r.seed) for r in (a, b, c)] == [
        ("a", "finished", 4, 4, a.seed),
        ("b/inner", "stopped", 2, 4, 7),
        ("c", "running", 0, 4, a.seed),
    ]
    assert (a.loss, a.samples_per_s, a.commit) == (0.5, 33.0, "0123456789")
    assert c.loss != c.loss and not unread
    assert list_runs(folder / "c")[0][0].state == "stopped"  # its owner has gone


def test_measures_of_its_evaluation(folder):
    row = {"task": "properties", "features": "DINOv2 (a)", "target": "redshift", "model": "64-NN", "metric": "r2"}
    (folder / "a/evaluation").mkdir()
    measures = [row | {"value": 0.75, "stratum": "all"}, row | {"value": 0.5, "stratum": "r 20 to 21"}]
    (folder / "a/evaluation/metrics.json").write_text(json.dumps({"measures": measures}))
    assert list_runs(folder)[0][0].measures == {"DINOv2 redshift 64-NN r2": 0.75}


def test_two_runs_differ_by_field(folder, tmp_path, capsys):
    found = {d.field: (d.first, d.second) for d in differences(folder / "a", folder / "b/inner")}
    assert found["name"] == ("a", "b/inner") and found["seed"][1] == "7"
    assert found["versions.torch"] == ("2.13.0", "2.14.0")
    assert set(found) == {"name", "seed", "versions.torch"}
    assert cli.main(["runs", str(folder / "a"), str(folder / "b/inner"), "-o", str(tmp_path / "d.json")]) == 0
    assert "versions.torch" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "d.json").read_text())) == 3


def test_scores_of_evaluations_while_training(folder, capsys):
    with open(folder / "c" / "metrics.jsonl", "w") as file:
        print(
            json.dumps({"step": 2, "loss": 1.0, "eval/knn/z": 0.5, "eval/seconds": 3.0, "eval/share": 0.1}), file=file
        )
        print(
            json.dumps({"step": 4, "loss": 1.0, "eval/knn/z": 0.25, "eval/seconds": 3.0, "eval/share": 0.1}), file=file
        )
    (folder / "c/checkpoints/step-00000002").mkdir(parents=True)
    (folder / "c/checkpoints/best.json").write_text('{"name": "knn/z", "score": 0.5, "step": 2}')
    rows, _ = list_runs(folder)
    assert [(row.evals, row.best_step) for row in rows] == [({}, None), ({}, None), ({"knn/z": 0.25}, 2)]
    assert cli.main(["runs", str(folder)]) == 0
    assert "c: while training knn/z R2 0.250; best checkpoint at step 2" in capsys.readouterr().out


def test_the_table_says_it(folder, capsys):
    assert cli.main(["runs", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "b/inner" in said and "stopped" in said and "2/4" in said
    assert said.split("\n")[0].split() == ["folder", "method", "state", "step", "loss", "samples/s", "seed", "figures"]


def test_a_record_that_cannot_be_read_hides_no_other(folder, capsys):
    (folder / "a/run.json").write_text('{"run": {"name": "x"}}')
    assert cli.main(["runs", str(folder)]) == 0
    said = capsys.readouterr()
    assert "b/inner" in said.out and "a/run.json: not a run's record" in said.err


@pytest.mark.parametrize(
    ("place", "said"),
    [("none", "none: no such folder"), ("empty", "empty: no runs here"), ("broken", "run.json: not a run's record")],
)
def test_what_is_no_run_is_named(tmp_path, capsys, place, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/run.json").write_text('{"run": {"name": "x"}}')
    assert cli.main(["runs", str(tmp_path / place)]) == 2
    assert said in capsys.readouterr().err
