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

pytestmark = pytest.mark.slow  # starts processes that import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu"
MEASURED = ("_ms", "_mib", "_percent", "_gb_s", "_tflop_s", "ms_per_image", "seconds")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    given = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=given, cwd=ROOT)


def read(folder: Path) -> list[dict[str, str]]:
    with open(folder / "gpu.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.filterwarnings("default")  # as where nobody tests
def test_smoke_walks_through_the_kernels_and_the_step_and_times_nothing(tmp_path, monkeypatch, capsys):
    """Of the engine test_gpu_engine.py has more, in less time. Jobs are done here, but for the first: in a process of its own."""
    from cases import OPERATIONS
    from gpu.run import Run
    from gpu.work import run as run_job

    in_a_process, tested = Run.work, []

    def work(self, jobs):
        if jobs[0].kind == "limits":
            in_a_process(self, jobs)
        else:
            self.add(row for job in jobs for row in run_job(job, torch.device(self.device), self.smoke))

    monkeypatch.setattr(Run, "work", work)
    monkeypatch.setattr(Run, "pytest", lambda self, file, end: tested.append(file) or (True, "1 skipped"))
    arguments = ["--device", "cpu", "--smoke", "--out", str(tmp_path), "--only", *OPERATIONS, "step"]
    code = main(arguments, monkeypatch)
    said, rows = capsys.readouterr().out, read(tmp_path)
    assert [row for row in rows if row["status"] != "ok"] == []
    assert code == 0
    assert {row["operation"] for row in rows} == {*OPERATIONS, "limits", "step", "profile", "specformer"}
    assert {row["variant"] for row in rows if row["kind"] == "spectra"} == {"fp32", "tf32", "bf16"}
    assert {row["variant"] for row in rows if row["kind"] == "step"} == {"eager", "triton", "compiled"}
    assert all(row["error"] for row in rows if row["kind"] == "case" and row["variant"] == "triton")
    assert not [(name, value) for row in rows for name, value in row.items() if name.endswith(MEASURED) and value]
    table = (tmp_path / "gpu.md").read_text()
    assert "**Nothing was timed.**" in table and "not measured" in table and table in said
    assert "met" not in table.split() and "missed" not in table.split()
    assert len(tested) == 1 and (ROOT / tested[0]).is_file()


def main(arguments, monkeypatch):
    """What the script ends with: an exit code, or the reason."""
    for name, value in {"TRITON_INTERPRET": "1", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)  # the script changes some of them, and the path
    monkeypatch.setattr(sys, "path", [str(SCRIPT), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT / "__main__.py"), run_name="__main__")
    return ended.value.code


def test_tests_of_a_file_that_need_a_gpu_are_run(tmp_path):
    from gpu.run import Run

    run, path = Run("cpu", True, tmp_path, time.monotonic() + 60), tmp_path / "test_made.py"
    for mark, text, passed in (
        ("gpu", "assert True", True),
        ("gpu", "assert 1 == 2", False),
        ("skip", "assert 3", True),
    ):
        path.write_text(f"import pytest\n\n\n@pytest.mark.{mark}\ndef test_made():\n    {text}\n")
        found, said = run.pytest(str(path), time.monotonic() + 60)
        assert found == passed and ("1 == 2" in said) == (not passed), said
    path.write_text("import time\n\nimport pytest\n\n\n@pytest.mark.gpu\ndef test_made():\n    time.sleep(60)\n")
    assert run.pytest(str(path), time.monotonic() + 0.5)[0] is False
    assert run.pytest(str(path), time.monotonic()) == (None, str(path))


def test_tests_have_their_share_and_those_that_were_not_reached_bar_nothing(tmp_path, monkeypatch):
    from cases import OPERATIONS
    from gpu import run as gpu_run

    names, ends = list(OPERATIONS)[:3], set()
    wrong, late = (OPERATIONS[name].tests[0] for name in names[:2])

    def pytest_of(self, file, end):
        ends.add(end)
        return {wrong: (False, "1 failed"), late: (None, file)}.get(file, (True, "1 passed"))

    monkeypatch.setattr(gpu_run.Run, "pytest", pytest_of)
    begin = time.monotonic()
    run = gpu_run.Run("cpu", False, tmp_path, begin + 100)
    assert run.test(names) == set(names[1:]) and run.failed
    assert len(ends) == 1 and 29 < ends.pop() - begin < 31
    status = {row["variant"]: row["status"] for row in read(tmp_path)}
    assert status.pop(wrong) == "FAILED: its tests" and status.pop(late) == "not run: the time is used up"
    assert set(status.values()) == {"ok"}


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
    code = main(arguments, monkeypatch)
    said = capsys.readouterr().err if isinstance(code, int) else code
    assert code not in (0, None) and message in said


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path):
    for name in ("torch", "numpy", "pytest"):  # of the packages that are needed, triton alone can be found
        (tmp_path / name).mkdir()
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)"
    (tmp_path / "sitecustomize.py").write_text(hide)
    ran = run("--device", "cpu", "--smoke", "--out", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert ran.returncode == 1 and "benchmarks/gpu needs triton" in ran.stderr and "-m pip install triton" in ran.stderr


BARE = """
    import importlib.abc, importlib.metadata, importlib.util, re, sys

    def plain(name):
        return re.sub("[-_.]+", "-", name).lower()

    here = {"torch", "triton", "numpy", "pytest"}
    seen = set()
    while here - seen:
        name = (here - seen).pop()
        seen.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        here |= {plain(re.split(r"[^\\w.-]", need)[0]) for need in needs if "extra ==" not in need}
    owned = importlib.metadata.packages_distributions().items()
    gone = {module for module, owners in owned if not {*map(plain, owners)} & {*here, "armillary"}}

    class Gone(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name.partition(".")[0] in gone:
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Gone())
    import gpu.run, gpu.work
    from cases import OPERATIONS, load

    assert "deepspeed" in gone and "scipy" in gone, gone
    for name, operation in OPERATIONS.items():
        load(name, True)
        for file in operation.tests:
            spec = importlib.util.spec_from_file_location(re.sub(r"\\W", "_", file), file)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def test_all_of_it_can_be_imported_where_only_what_it_needs_is():
    """Else an operation's tests would fail on a rented machine, for want of a package, and it would not be timed."""
    folders = [ROOT, ROOT / "benchmarks", ROOT / "tests" / "support"]
    given = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BARE)], cwd=ROOT, env=given, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


STUB = """
    import os, time

    def work(pipe, jobs, device, smoke):
        for job in jobs:
            pipe.send(("begin", None))
            if job.operation == "dies":
                os._exit(3)
            if job.operation == "hangs":
                time.sleep(60)
            pipe.send(("row", {**job.row("ok"), "error": 1e-7}))
            if job.operation == "hangs later":
                time.sleep(60)
            pipe.send(("end", None))
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
    names = ("first", "dies", "second", "hangs", "last words", "third", "hangs later", "dies")
    run.work([stub.Job("case", name, f"{i}", limit_s=1.0) for i, name in enumerate(names)])
    status = [(row["operation"], row["status"]) for row in read(tmp_path / "out")]
    died, late = "FAILED: the process died", "FAILED: not done after 1 s"
    expected = ["ok", died, "ok", late, "ok", "ok", "ok", died]
    expected = list(zip(names, expected, strict=True))
    expected.insert(-1, ("hangs later", late))  # what it had found is kept
    assert status == expected and run.failed
    assert "not done after 1 s" in (tmp_path / "out" / "gpu.md").read_text()


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
    step = [("step", 0, variant) for variant in ("eager", "triton")] + [("profile", 0, "triton")]
    compiled = [("step", 0, "compiled")]
    spectra = [("specformer", 0, precision) for precision in ("fp32", "tf32", "bf16")]
    first, second = ([(name, i, "triton") for name in "abc"] for i in range(2))
    assert got == first[:2] + step + first[2:] + spectra + compiled + second


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
    rows = list(tune_rows(load("linear_gelu", True)[1], torch.device("cpu"), True))
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
    rows = list(case_rows(case, device_of_clocks, False))
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
