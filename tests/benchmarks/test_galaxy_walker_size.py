"""Counts of stage 2 at a real size: known totals, and what ZeRO shares out."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "galaxy_walker" / "size.py"


def test_qwen2_vl_2b(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parents[1]))
    spec = importlib.util.spec_from_file_location("galaxy_walker_size", SCRIPT)
    size = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, size)  # dataclasses look their module up
    spec.loader.exec_module(size)
    Step, build, qwen2_vl_2b, rows_of = size.Step, size.build, size.qwen2_vl_2b, size.rows_of
    rows = rows_of(build(qwen2_vl_2b(), every=4), Step(128, False), 4)
    # 2,208,985,600 parameters as published, of which seven feed-forward layers of 3 x 1536 x 8960 become the experts'
    assert rows[0]["frozen_parameters"] == 2_208_985_600 - 7 * 3 * 1536 * 8960
    assert rows[0]["trained_parameters"] == pytest.approx(7 * 9 * 1536 * 8960, rel=0.01)
    by_setup = {(r["zero_stage"], r["ranks"], r["recomputed"]): r for r in rows}
    one, eight, cut = (by_setup[s] for s in ((2, 1, False), (2, 8, False), (3, 8, False)))
    assert one["optimizer_gib"] == pytest.approx(8 * eight["optimizer_gib"])
    assert eight["frozen_weights_gib"] == pytest.approx(8 * cut["frozen_weights_gib"])
    assert by_setup[2, 1, True]["activations_gib"] < one["activations_gib"] / 5
    assert one["checkpoint_gib"] == pytest.approx(12 * one["trained_parameters"] / 2**30)
