"""The ahead-of-time compiler of the tests: a result that is kept never passes for another kernel's."""

import json
import zlib
from dataclasses import replace

import aot
import pytest
from aot import Helper

KERNEL = """
import triton
import triton.language as tl

FACTOR = tl.constexpr({factor})

@triton.jit
def _inner(x):
    return {inner}

@triton.jit
def _kernel(x_ptr, n, BLOCK: tl.constexpr):
    at = n + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, _inner(tl.load(x_ptr + at)) * FACTOR)
"""
JOB = {
    "signature": {"x_ptr": "*fp32", "n": "i32"},
    "constexprs": {"BLOCK": 512},
    "divisible": [],
    "options": {"num_warps": 4},
    "architectures": [90],
}


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """PTX of the kernel of the given source from a helper, and how many results are kept then.

    One helper does for all sources, each a module of its own, as its results are found again on disk only; one that has
    died is replaced.
    """
    monkeypatch.syspath_prepend(str(tmp_path))
    cache = tmp_path / "cache"
    helpers = []

    def compile(inner="x + 3.0", factor=2.0, **changed):
        if not helpers or helpers[-1].process.poll() is not None:
            helpers.append(Helper(cache))
        source = KERNEL.format(inner=inner, factor=factor)
        name = f"made_kernel_{zlib.crc32(source.encode())}"
        (tmp_path / f"{name}.py").write_text(source)
        ptx = helpers[-1].compile(json.dumps(JOB | {"kernel": f"{name}:_kernel"} | changed))[90].ptx
        return ptx, len(list(cache.iterdir()))

    compile.cache = cache
    yield compile
    for helper in helpers:
        helper.close()


def test_whatever_decides_the_code_is_in_the_key(compiled):
    first, kept = compiled()
    assert kept == 1 and compiled() == (first, 1)
    seen = {first}
    for changed in (
        {"inner": "x + 4.0"},  # a function that it calls
        {"factor": 5.0},  # a constant of its module
        {"constexprs": {"BLOCK": 1024}},
        {"signature": {"x_ptr": "*fp16", "n": "i32"}},
        {"divisible": ["n"]},
        {"options": {"num_warps": 2}},
    ):
        ptx, kept = compiled(**changed)
        seen.add(ptx)
        assert kept == len(seen), changed


def test_damaged_results_are_compiled_again_and_errors_are_said(compiled):
    first, _ = compiled()
    (kept,) = compiled.cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-9] + b"123456789")
    assert compiled() == (first, 1)
    with pytest.raises(RuntimeError, match=r"made_kernel_\d+:_kernel does not compile(?s:.*)no_such_name"):
        compiled(inner="no_such_name(x)")
    with pytest.raises(RuntimeError, match="described were"):
        compiled(signature={"x_ptr": "*fp32"})


def test_serialized_products_are_refused(monkeypatch):
    """As ptxas says it of two accumulators in one loop (C7515); the kernel works, at half its rate."""
    said = "info: (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient"
    good = aot.Resources(128, 0, 0, 1024, 0, "wgmma", "")
    monkeypatch.setattr(aot, "_asked", lambda job: {80: good, 90: replace(good, log=said)})
    with pytest.raises(RuntimeError, match="made:kernel: ptxas serializes wgmma on sm_90:\ninfo: .C7515"):
        aot.resources("made:kernel", {})


def test_a_helper_that_dies_fails_its_job_only(compiled):
    with pytest.raises(RuntimeError, match="the compiler died"):
        compiled(inner="x\nimport os; os._exit(3)\n")
    assert compiled()[1] == 1
