"""The engine's part of the GPU benchmark: a recipe that dies, hangs or fails costs its own row and nothing else."""

import textwrap
import time

import pytest

RECIPE = """
    import argparse, json, os, signal, sys, time
    from pathlib import Path

    parser = argparse.ArgumentParser()
    for name in ("out", "name", "data.path", "train.steps"):
        parser.add_argument("--" + name)
    given, _ = parser.parse_known_args()
    folder, steps = Path(given.out) / given.name, int(vars(given)["train.steps"])
    assert (Path(vars(given)["data.path"]) / "survey.json").exists()
    if given.name == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if given.name == "hangs":
        time.sleep(60)
    if given.name == "fails":
        sys.exit("no kernel image is available")
    if given.name == "saves_nothing":
        sys.exit(0)
    checkpoint = folder / "checkpoints" / "step-7"
    again = checkpoint.exists()
    checkpoint.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "latest").write_text("step-7")
    bits = "other" if given.name == "differs" else "same"
    manifest = {"shard-0.safetensors": {"sha256": bits}, "state.json": {"sha256": given.name}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    line = {"images_per_s": 200.0, "peak_gib": 2.0, "loss": 1.5}
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    (folder / "metrics.jsonl").write_text((json.dumps(line) + "\\n") * steps)
    while given.name == "stopped" and not again and not told:
        time.sleep(0.01)
    sys.exit(75 if told else 0)
"""


@pytest.fixture
def engine(monkeypatch):
    from gpu import engine

    def survey(folder, smoke):
        folder.mkdir()
        (folder / "survey.json").touch()

    monkeypatch.setattr(engine, "_simulate", survey)
    return engine


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(textwrap.dedent(RECIPE))
    return path


def test_trials_fail_alone_and_say_how(engine, recipe, tmp_path):
    names = ("first", "dies", "hangs", "fails", "saves_nothing", "stopped", "differs", "last")
    like = {"stopped": "first", "differs": "first"}
    trials = tuple(
        engine.Trial(name, stops=(10, 12) if name == "stopped" else (12,), like=like.get(name), limit_s=1.0 if name == "hangs" else 300.0)
        for name in names
    )  # fmt: skip
    rows = list(engine.engine_rows(tmp_path, trials, time.monotonic() + 600, True, recipe))
    status = {row["shape"]: row["status"] for row in rows}
    assert status.pop("saves_nothing").startswith("FAILED: FileNotFoundError")
    assert status == {
        "first": "ok",
        "dies": "FAILED: SIGSEGV: ",
        "hangs": "FAILED: not done after 1 s",
        "fails": "FAILED: exit code 1: no kernel image is available",
        "stopped": "ok",
        "differs": "FAILED: other bits than first",
        "last": "ok",
    }
    assert [row["shape"] for row in rows if row.get("same_bits")] == ["stopped"]
    assert not any("images_per_s" in row for row in rows)  # nothing is timed in a walk through the code


def test_figures_are_those_of_the_steps_after_the_first(engine, tmp_path):
    slow, fast = (
        '{"images_per_s": 1.0, "peak_gib": 3.0, "loss": 9}',
        '{"images_per_s": 250.0, "peak_gib": 2.0, "loss": 8}',
    )
    (tmp_path / "metrics.jsonl").write_text("\n".join([slow] * engine.WARMUP + [fast] * 3))
    assert engine._figures(tmp_path) == {"images_per_s": 250.0, "ms_per_image": 4.0, "peak_mib": 2048.0, "loss": 8}


def test_no_survey_is_made_for_nobody(engine, tmp_path):
    assert list(engine.engine_rows(tmp_path, (), time.monotonic() + 60, True)) == []
    assert not (tmp_path / "survey").exists()


def test_what_cannot_be_run_says_why(engine, recipe, tmp_path, monkeypatch):
    trials = (engine.Trial("late"),)
    (late,) = engine.engine_rows(tmp_path, trials, time.monotonic() - 1, True, recipe)
    assert late["status"] == "not run: the time is used up"
    monkeypatch.setattr(engine, "NEEDED", ("no_such_package",))
    (row,) = engine.engine_rows(tmp_path, trials, time.monotonic() + 60, True, recipe)
    assert row["status"] == "not run: no no_such_package here"


def test_the_trials_are_command_lines_of_the_recipe(engine):
    import processes

    from armillary.engine.train import start

    recipe = processes.presets("dinov2_vitl")
    for trial in engine.TRIALS:
        run = start._override(recipe["RECIPE"], {}, list(trial.options))
        assert run.train.global_batch == run.train.micro_batch
    assert {"--preset", "smoke"} < set(engine.SMOKE_TRIALS[0].options)
