"""The benchmarks' shared timing and CSV schema."""

import csv
import importlib.util
import time
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "common.py"
MACHINE = {"date", "device", "cpu", "cores", "threads", "torch", "triton", "numpy", "commit"}


@pytest.fixture(scope="module")
def common():
    specification = importlib.util.spec_from_file_location("common", FILE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def read(path: Path) -> list[dict]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_timing_is_that_of_the_calls_after_the_warm_up(common):
    pauses = iter([0.1, 0.01, 0.02, 0.03, 0.02, 0.02])
    timing = common.timed(lambda: time.sleep(next(pauses)), repeats=5, warmup=1)
    assert timing.p20 <= timing.median <= timing.p80
    assert 0.019 < timing.median < 0.09 and next(pauses, None) is None


def test_one_repeat_is_its_own_percentiles(common):
    timing = common.timed(lambda: None, repeats=1, warmup=0)
    assert timing.median == timing.p20 == timing.p80 > 0


def test_no_repeats_are_refused(common):
    with pytest.raises(ValueError, match="repeats: must be at least 1, got 0"):
        common.timed(lambda: None, repeats=0)


def test_rows_say_where_they_were_measured(common, tmp_path):
    path = tmp_path / "new" / "results.csv"
    common.append_rows(path, [{"name": "a, b", "value": 1.23456789}, {"name": "c", "device": "other"}])
    first, second = read(path)
    assert MACHINE <= first.keys() and all(first[name] for name in MACHINE - {"triton"})
    assert (first["name"], first["value"]) == ("a, b", "1.23457")
    assert (second["device"], second["value"]) == ("other", "")


def test_appending_keeps_rows_and_adds_columns(common, tmp_path):
    path = tmp_path / "results.csv"
    common.append_rows(path, [{"name": "a"}])
    common.append_rows(path, [{"name": "b", "more": 2}])
    common.append_rows(path, [])
    assert [(row["name"], row["more"]) for row in read(path)] == [("a", ""), ("b", "2")]
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]
