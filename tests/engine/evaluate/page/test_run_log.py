import json

import numpy as np
import pytest
from html_page import Page

from armillary.engine.evaluate.page.run_log import RunLog, flatten, run_of_checkpoint
from armillary.engine.evaluate.runs import report_run


def test_log_of_a_broken_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run.json is missing"):
        RunLog.read(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not a run's record"):
        RunLog.read(tmp_path)


def test_log_reads_what_is_whole(run_dir):
    log = RunLog.read(run_dir)
    assert log.name == "toy <run>"
    assert len(log.series["loss"][0]) == 30
    assert "mfu" not in log.series
    np.testing.assert_array_equal(log.series["monitor/effective_rank"][0], [10, 20, 30])
    assert set(log.losses()) == {"dino", "koleo"}
    assert set(log.monitors()) == {"prototypes_in_use", "effective_rank"}
    assert log.prototypes() == 64
    assert log.last("effective_rank") == 10.0
    assert log.last("nothing") is None


@pytest.fixture
def judged(run_dir):
    """A run that evaluated itself twice in 30 steps, once without a score, and keeps its best checkpoint."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()[:-1]
    scores = {10: (0.7, 0.1), 20: (0.6, None), 30: (0.5, 0.2)}
    found = [json.loads(line) for line in lines]
    for entry in found:
        if entry["step"] in scores:
            z, mass = scores[entry["step"]]
            entry |= {"eval/knn/z": z, "eval/knn/mass/cls": mass, "eval/seconds": 1.0, "eval/share": 0.25}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in found))
    kept = run_dir / "checkpoints" / "step-00000010"
    kept.mkdir(parents=True)
    (kept / "manifest.json").write_text("{}")
    (kept.parent / "best.json").write_text('{"name": "knn/z", "score": 0.7, "step": 10}')
    return run_dir


def test_scores_of_evaluations_and_the_best_checkpoint(judged):
    log = RunLog.read(judged)
    assert {name: list(value) for name, (_, value) in log.evals().items()} == {
        "knn/z": [0.7, 0.6, 0.5],
        "knn/mass/cls": [0.1, 0.2],
    }
    assert log.best == ("knn/z", 0.7, 10) and log.checkpoint is None and set(log.losses()) == {"dino", "koleo"}
    kept = judged / "checkpoints" / "step-00000010"
    assert RunLog.read(kept).checkpoint == 10 and RunLog.read(kept).name == log.name
    assert run_of_checkpoint(kept) == judged and run_of_checkpoint(judged) == judged
    (kept / "manifest.json").unlink()
    kept.rmdir()
    assert RunLog.read(judged).best is None  # it is gone


def test_the_page_marks_the_best_checkpoint_where_it_was_chosen(judged):
    section = str(report_run.evals(RunLog.read(judged), "toy <run>"))
    Page(section)
    assert section.count('class="chart"') == 2 and section.count("best checkpoint, step 10") == 1
    assert "toy &lt;run&gt; was trained" in section and "25.0% of the time" in section
    assert "by knn/z is that of step 10; the newest is of step 30" in section
    assert "<td>0.500</td><td>30</td><td>0.700</td><td>10</td>" in section
    assert not report_run.evals(RunLog(), "x")


def test_flatten_unwraps_records():
    nested = {"$type": "x:Y", "a": {"$path": "/p"}, "b": [1, 2], "c": [{"d": None}], "e": {}}
    assert dict(flatten(nested)) == {"a": "/p", "b": "1, 2", "c[0].d": "None"}
