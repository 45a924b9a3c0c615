import numpy as np
import pytest

from armillary.engine.evaluate.page.run_log import RunLog, flatten


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


def test_flatten_unwraps_records():
    nested = {"$type": "x:Y", "a": {"$path": "/p"}, "b": [1, 2], "c": [{"d": None}], "e": {}}
    assert dict(flatten(nested)) == {"a": "/p", "b": "1, 2", "c[0].d": "None"}
