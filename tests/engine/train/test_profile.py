"""Traces of steps: the right ones, whole files, and a run that ends in between."""

import gzip
import json
from dataclasses import replace

import pytest
import torch

from armillary.engine.config.run import Profile
from armillary.engine.train.profile import StepProfile

CPU = torch.device("cpu")


def traced(run, steps, upto, rank=0):
    said = []
    trace = StepProfile(replace(run, profile=Profile(steps)), rank, CPU, said.append)
    for done in range(upto):
        trace.before(done)
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        trace.after(done + 1)
    trace.close(upto)
    return said, sorted((run.folder / "profile").glob("*"))


def test_a_trace_of_the_named_steps(run):
    said, files = traced(run, "1:3", 5)
    assert [f.name for f in files] == ["steps-2-3.json.gz"]
    products = [
        e for e in json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"] if e.get("name") == "aten::mm"
    ]
    assert len(products) == 2
    assert "aten::mm" in said[0] and str(files[0]) in said[1]


@pytest.mark.parametrize(
    "steps, upto, rank, names",
    [("3:9", 5, 0, ["steps-4-5.json.gz"]), ("", 3, 0, []), ("1:3", 5, 1, []), ("7:9", 5, 0, [])],
)
def test_a_run_that_ends_early_or_is_not_asked(run, steps, upto, rank, names):
    assert [f.name for f in traced(run, steps, upto, rank)[1]] == names


@pytest.mark.parametrize("steps", ["5", "a:b", "6:6", "-1:3"])
def test_spans_that_are_none(steps):
    with pytest.raises(ValueError, match='must be two whole numbers like "20:26"'):
        Profile(steps).span  # noqa: B018
