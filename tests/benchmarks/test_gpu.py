"""The GPU benchmark without a GPU: all of its code at tiny sizes, its processes, its checks, its tables."""

import csv
import os
import runpy
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu"
MEASURED = ("_ms", "_mib", "_percent", "_gb_s", "_tflop_s", "ms_per_image", "seconds")


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    given = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=given, cwd=ROOT)


def read(folder: Path) -> list[dict[str, str]]:
    with open(folder / "gpu.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.slow
def test_smoke_walks_through_the_kernels_and_the_step_and_times_nothing(tmp_path):
    """Of the engine test_gpu_engine.py has more, in less time."""
    from cases import OPERATIONS

    ran = run("--device", "cpu", "--smoke", "--out", str(tmp_path), "--only", *OPERATIONS, "step")
    rows = read(tmp_path)
    assert [row for row in rows if row["status"] != "ok"] == []
    assert ran.returncode == 0, ran.stderr
    assert {row["operation"] for row in rows} == {*OPERATIONS, "limits", "step", "profile", "specformer"}
    assert {row["variant"] for row in rows if row["kind"] == "spectra"} == {"fp32", "tf32", "bf16"}
    assert {row["variant"] for row in rows if row["kind"] == "step"} == {"eager", "triton", "compiled"}
    assert all(row["error"] for row in rows if row["kind"] == "case" and row["variant"] == "triton")
    assert not [(name, value) for row in rows for name, value in row.items() if name.endswith(MEASURED) and value]
    table = (tmp_path / "gpu.md").read_text()
    assert "**Nothing was timed.**" in table and "not measured" in table and table in ran.stdout
    assert "met" not in table.split() and "missed" not in table.split()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cpu"], "add --smoke"),
        (["--smoke", "--device", "cpu"], "--out"),
        (["--only", "blur", "--tune", "blur"], "exclude each other"),
        (["--device", "cpu", "--smoke", "--out", "/nowhere", "--only", "sharpen"], "no such operation: sharpen"),
        (["--device", "cpu", "--smoke", "--out", "/nowhere", "--tune", "step"], "no such operation: step"),
        ([], "torch finds no GPU"),
    ],
)
def test_bad_command_lines_end_with_the_reason(arguments, message, monkeypatch, capsys):
    for name, value in {"TRITON_INTERPRET": "1", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)  # the script changes some of them, and the path
    monkeypatch.setattr(sys, "path", [str(SCRIPT), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT / "__main__.py"), run_name="__main__")
    said = capsys.readouterr().err if isinstance(ended.value.code, int) else ended.value.code
    assert ended.value.code not in (0, None) and message in said


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path):
    for name in ("torch", "numpy", "pytest"):  # of the packages that are needed, triton alone can be found
        (tmp_path / name).mkdir()
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)"
    (tmp_path / "sitecustomize.py").write_text(hide)
    ran = run("--device", "cpu", "--smoke", "--out", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert ran.returncode == 1 and "benchmarks/gpu needs triton" in ran.stderr and "-m pip install triton" in ran.stderr


STUB = """
    import os, time

    def work(pipe, jobs, device, smoke):
        for job in jobs:
            pipe.send(("begin", None))
            if job.operation == "dies":
                os._exit(3)
            if job.operation == "hangs":
                time.sleep(60)
            pipe.send(("rows", [{**job.row("ok"), "error": 1e-7}]))
            if job.operation == "last words":
                return
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """`gpu_run` with a child that does what a job's name says."""
    from gpu import run as gpu_run

    (tmp_path / "stub_of_work.py").write_text(textwrap.dedent(STUB))
    monkeypatch.syspath_prepend(str(tmp_path))
    import stub_of_work

    monkeypatch.setattr(gpu_run, "work", stub_of_work.work)
    return gpu_run


def test_a_job_that_dies_or_hangs_takes_no_other_down(stub, tmp_path):
    run = stub.Run("cpu", True, tmp_path / "out", time.monotonic() + 60)
    names = ("first", "dies", "second", "hangs", "last words", "third", "dies")
    run.work([stub.Job("case", name, f"{i}", limit_s=1.0) for i, name in enumerate(names)])
    status = [(row["operation"], row["status"]) for row in read(tmp_path / "out")]
    died, late = "FAILED: the process died", "FAILED: not done after 1 s"
    expected = ["ok", died, "ok", late, "ok", "ok", died]
    assert status == list(zip(names, expected, strict=True)) and run.failed


def test_what_the_budget_does_not_reach_is_listed(stub, tmp_path, monkeypatch):
    class Short(stub.Run):
        def add(self, rows):
            super().add(rows)
            self.deadline = min(self.deadline, time.monotonic() + 1.0)

    monkeypatch.setattr(stub, "GRACE_S", 0.5)
    run = Short("cpu", True, tmp_path / "out", time.monotonic() + 60)
    run.work([stub.Job("case", name) for name in ("first", "hangs", "second", "third")])
    late = "not run: the time is used up"
    assert [row["status"] for row in read(tmp_path / "out")] == ["ok", late, late, late]
    assert not run.failed


def test_jobs_come_by_importance():
    from gpu.job import Job
    from gpu.run import order

    jobs = {name: [Job("case", name, index=i) for i in range(2)] for name in ("a", "b", "c")}
    got = [(job.operation, job.index, job.variant) for job in order(jobs)]
    step = [("step", 0, variant) for variant in ("eager", "triton", "compiled")] + [("profile", 0, "triton")]
    spectra = [("specformer", 0, precision) for precision in ("fp32", "tf32", "bf16")]
    first, second = ([(name, i, "triton") for name in "abc"] for i in range(2))
    assert got == first[:2] + step + first[2:] + spectra + second


@pytest.fixture
def problem():
    from cases.case import Problem

    def reference(x, scale):
        return x.square() * scale

    inputs = {"x": torch.randn(65, 70), "scale": torch.tensor(2.0)}
    return Problem(inputs, reference, reference, ("x", "scale"))


def test_right_results_pass(problem):
    from gpu.check import check

    checked = check(problem)
    assert checked.ours < 3e-7 and checked.oracle == "float64"
    check(replace(problem, ours=lambda x, scale: x.square() * scale * (1 + 1e-7)))


WRONG = {
    "every number by 1e-5": (lambda x, scale: x.square() * scale * (1 + 1e-5), "result 0"),
    "a row": (lambda x, scale: (x.square() * scale).index_fill(0, torch.tensor([64]), 0.0), "result 0"),
    "not a number": (lambda x, scale: x.square() * scale + torch.tensor([torch.nan] + [0.0] * 69), "result 0"),
    "shape": (lambda x, scale: (x.square() * scale)[:64], "result 0"),
    "a gradient": (lambda x, scale: x.square() * scale + 1e-3 * (x - x.detach()), "gradient of x"),
    "a gradient that is missing": (lambda x, scale: x.square() * scale.item(), "gradient of scale"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_are_named(problem, name):
    from gpu.check import Wrong, check

    ours, what = WRONG[name]
    with pytest.raises(Wrong, match=what):
        check(replace(problem, ours=ours))


def test_what_eager_gets_wrong_is_no_excuse(problem):
    from gpu.check import Wrong, check

    nan = lambda x, scale: x.square() * scale + (torch.nan if x.dtype == torch.float32 else 0.0)  # noqa: E731
    with pytest.raises(Wrong):
        check(replace(problem, ours=nan, reference=nan))


def test_launch_settings_are_searched_and_put_back():
    from cases import load
    from gpu.tune import candidates, tables_of, tune_rows

    from armillary.kernels.launch import Launch

    got = list(candidates(Launch({"A": 16, "B": 1}, num_warps=16, num_stages=1)))
    assert [(c.blocks["A"], c.blocks["B"], c.num_warps, c.num_stages) for c in got] == [
        (8, 1, 16, 1), (32, 1, 16, 1), (16, 2, 16, 1), (16, 1, 8, 1), (16, 1, 16, 2),
    ]  # fmt: skip
    tables = tables_of("linear_gelu")
    before = {name: dict(table) for name, table in tables.items()}
    rows: list[dict] = []
    tune_rows(load("linear_gelu", True)[1], torch.device("cpu"), True, rows)
    assert before == tables
    # not the tables that are for shapes without descriptors, or for products by the library
    assert [row["variant"] for row in rows] == ["up_projection.LAUNCH", "down_gradient.LAUNCH"]
    assert all(row["status"] == "ok" and "'BM'" in row["settings"] and "ms" not in row["settings"] for row in rows)


class ClockEvent:
    """Stands in for a CUDA event where work is done when its call returns."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@pytest.fixture
def device_of_clocks(monkeypatch):
    """The CPU, with what timing asks of a CUDA device: it walks the lines that otherwise only a GPU reaches."""
    memory = iter(range(0, 1 << 40, 1 << 20))  # a MiB more at each look
    nothing = lambda *args: None  # noqa: E731
    for name, value in {
        "Event": ClockEvent,
        "synchronize": nothing,
        "_sleep": nothing,
        "empty_cache": nothing,
        "reset_peak_memory_stats": nothing,
        "memory_allocated": lambda device: next(memory),
        "max_memory_allocated": lambda device: next(memory),
        "get_device_properties": lambda device: type("Properties", (), {"L2_cache_size": 1000}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    from gpu import measure as gpu_timing

    monkeypatch.setattr(gpu_timing, "FLUSH_BYTES", 4000)
    monkeypatch.setattr(gpu_timing, "REPEATS", (5, 10))
    return torch.device("cpu")


def test_passes_are_timed_apart_and_together(device_of_clocks):
    from gpu.measure import Passes, measure

    found = measure(Passes(lambda: time.sleep(0.002), lambda state: time.sleep(0.006)), device_of_clocks, seconds=0.05)
    assert found.forward.p20 >= 2e-3 and found.backward.p20 >= 6e-3 and found.whole.p20 >= 8e-3
    assert (found.saved_mib, found.peak_mib) == (1, 2)
    alone = measure(Passes(lambda: time.sleep(0.002)), device_of_clocks, seconds=0.02)
    assert alone.backward is None and alone.whole is None and alone.forward.median >= 2e-3


def test_limits_are_rates(device_of_clocks):
    from gpu.measure import device_limits

    limits = device_limits(device_of_clocks, copy_bytes=1 << 16, side=32)
    assert 1e6 < limits.copy < 1e13 and 1e6 < limits.gemm < 1e13


def test_every_way_of_a_case_gets_a_row_and_one_that_fails_only_its_own(device_of_clocks, problem):
    from cases.case import Case
    from gpu.work import case_rows

    def broken(x, scale):
        raise RuntimeError("as it happens")

    case = Case(
        "made up", "65 x 70", lambda device: replace(problem, others={"broken": broken}), (1e6, 2e6), compiled=True
    )
    rows: list[dict] = []
    case_rows(case, device_of_clocks, False, rows)
    status = {row["variant"]: row["status"] for row in rows}
    assert status == {"triton": "ok", "eager": "ok", "broken": "FAILED: RuntimeError: as it happens", "compiled": "ok"}
    assert all(
        {"forward_ms", "backward_ms_p20", "whole_ms_p80", "peak_mib"} <= row.keys()
        for row in rows
        if row["status"] == "ok"
    )


def test_the_step_is_timed_by_phase(device_of_clocks, monkeypatch):
    from gpu import work as gpu_step
    from step_methods import DINOv2Subject

    monkeypatch.setattr(gpu_step, "configuration", lambda variant, smoke: gpu_step.TINY)
    monkeypatch.setattr(gpu_step, "CROPS", gpu_step.TINY_INPUTS)
    tried = []
    row_of = gpu_step._step_row

    def small(variant, device, batch, smoke):
        tried.append(batch)
        if batch > 72:
            raise torch.OutOfMemoryError
        return row_of(variant, device, 1, smoke)

    monkeypatch.setattr(gpu_step, "_step_row", small)
    (row,) = gpu_step.step_rows("eager", device_of_clocks, False)
    assert tried == [96, 72] and row["dtype"] == "bfloat16" and row["grad_norm"] > 0
    phases = DINOv2Subject(gpu_step.TINY).phases
    parts = sum(row[f"{phase}_ms"] for phase in phases)
    assert 0 < row["teacher_ms"] < row["ms_per_image"] and parts == pytest.approx(row["ms_per_image"], rel=0.5)


def test_the_profile_names_what_takes_the_time_and_precisions_get_a_row_each(device_of_clocks, monkeypatch):
    from gpu import whole_steps, work
    from step_methods import SpecFormerSubject

    training = work._training("eager", device_of_clocks, 1, True)
    rows = whole_steps.profile_rows(training, False)
    assert 0 < len(rows) <= whole_steps.KERNELS and all(row["device_ms"] >= 0 for row in rows)
    assert 50 < sum(row["time_percent"] for row in rows) <= 100.1
    monkeypatch.setattr(whole_steps, "SPECTRA", whole_steps.InputSpec(pixels=400))
    monkeypatch.setattr(whole_steps, "SpecFormerPretraining", lambda: whole_steps.TINY)
    row = whole_steps.spectra_row("tf32", device_of_clocks, False)
    assert row["ms_per_spectrum"] > 0 and torch.get_float32_matmul_precision() == "highest"
    assert sum(row[f"{phase}_ms"] for phase in SpecFormerSubject(whole_steps.TINY).phases) > 0


def rows_of_a_gpu(run: str = "1", faster: float = 1.0) -> list[dict]:
    """Rows as a run on a GPU would add them; the numbers are made up."""
    common = {"run": run, "status": "ok", "device": "a GPU"}
    case = {**common, "kind": "case", "forward_gb": 1.0, "backward_gb": 2.0, "forward_gflop": 500.0}
    case |= {"backward_gflop": 1000.0, "output_gb": 0.0}

    def ways(operation: str, shape: str, **ms: float) -> list[dict]:
        return [
            {**case, "operation": operation, "shape": shape, "variant": name.replace("_", " ")}
            | {"forward_ms": 0.3 * t, "backward_ms": 0.7 * t, "whole_ms": t, "peak_mib": 100 * t}
            for name, t in ms.items()
        ]

    decode = {**case, "operation": "decode", "shape": "B", "variant": "triton", "forward_ms": 0.5, "output_gb": 1.2}
    step = {**common, "kind": "step", "operation": "step", "shape": "ViT-L", "batch": 96, "gflop_per_image": 500.0}
    step |= {"loss": 10.0, "grad_norm": 2.0}
    return [
        {**common, "kind": "limits", "operation": "limits", "variant": "", "copy_gb_s": 3000.0, "gemm_tflop_s": 800.0},
        *ways("geometry_ffn", "M", triton=3.5 / faster, eager=5.25, compiled=3.85, three_plain_FFNs=3.4),
        *ways("prototype_loss", "V", triton=1.0, eager=10.0),
        decode,
        {**step, "variant": "eager", "ms_per_image": 2.6},
        {**step, "variant": "triton", "ms_per_image": 2.0 / faster},
        {**step, "variant": "compiled", "ms_per_image": 2.3},
    ]


def add(folder: Path, rows: list[dict]) -> None:
    from gpu.run import Run

    run = Run("cuda", False, folder, 0.0)
    run.id = rows[0]["run"]
    run.add(rows)


def test_targets_are_met_or_missed_as_the_rows_say(tmp_path):
    from gpu.table import read_rows, targets

    add(tmp_path, rows_of_a_gpu())
    got = [(t.measured, t.met) for t in targets(read_rows(tmp_path))]
    # 5.25 / 3.5, 3.85 / 3.5, 3.5 / 3.4 - 1, 1 / 10, 1.2 GB in 0.5 ms of 3 TB/s, 2.3 / 2, 500 GFLOP in 2 ms of 800 TFLOP/s
    assert got == [
        ("1.50x", True), ("1.10x", False), ("2.9 %", True), ("0.100", True), ("80 %", True), ("1.15x", True), ("31 %", False),
    ]  # fmt: skip


def test_shares_of_the_limits(tmp_path):
    add(tmp_path, rows_of_a_gpu())
    ours = next(row for row in read(tmp_path) if row["operation"] == "geometry_ffn")
    # 500 and 1000 GFLOP at 800 TFLOP/s are 0.625 and 1.25 ms, more than 1 and 2 GB at 3 TB/s
    assert ours["limit"] == "GEMM" and float(ours["forward_percent"]) == pytest.approx(100 * 0.625 / 1.05, rel=1e-4)
    assert float(ours["whole_percent"]) == pytest.approx(100 * 1.875 / 3.5, rel=1e-4)


def test_the_table_holds_each_operations_latest_run(tmp_path):
    from gpu.table import write_table

    add(tmp_path, rows_of_a_gpu("1"))
    add(tmp_path, [row for row in rows_of_a_gpu("2", faster=1.25) if row["operation"] in ("limits", "geometry_ffn")])
    table = write_table(tmp_path)
    assert "1.88x | met" in table and "1.50x" not in table  # of the second run
    assert "| ViT-L step: faster than torch.compile | at least 1.1x | 1.15x | met |" in table  # of the first
    assert "a GPU" in table.splitlines()[0] and "copy 3,000 GB/s" in table and "Failed" not in table


def test_a_step_that_computes_something_else_has_failed(tmp_path):
    rows = rows_of_a_gpu()
    rows[-2]["grad_norm"] = 2.1
    add(tmp_path, rows)
    from gpu.table import read_rows, targets, write_table

    status = {row["variant"]: row["status"] for row in read(tmp_path) if row["kind"] == "step"}
    assert status["triton"].startswith("FAILED: grad_norm of the first step is 2.1") and status["compiled"] == "ok"
    assert [t.met for t in targets(read_rows(tmp_path))][-2:] == [None, None]
    assert "- step ViT-L triton: FAILED" in write_table(tmp_path)
