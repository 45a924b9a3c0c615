"""A run: which jobs, in which order, in which processes, and what is written."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from cases import OPERATIONS, load
from common import append_rows
from gpu.engine import SMOKE_TRIALS, TRIALS, Trial, engine_rows
from gpu.job import Job, Row
from gpu.table import read_rows, write_table
from gpu.whole_steps import PRECISIONS
from gpu.work import VARIANTS, work

__all__ = ["Run", "order"]

ROOT = Path(__file__).resolve().parents[2]
TESTS_AT_ONCE = 6  # they mostly compile
TESTS_SECONDS = 180.0
GRACE_S = 20.0  # past the budget, for the job that is running
IDLE_S = 60.0  # for a process to start, and between jobs
STEP_TOLERANCE = 0.03  # of the first step's loss and gradient norm in bf16, relative to eager's


def order(cases: dict[str, list[Job]]) -> list[Job]:
    """Jobs by importance: the first case of the leading two operations, the step and its profile, the other first cases, SpecFormer,
    the rest.
    """
    firsts = [jobs[0] for jobs in cases.values() if jobs]
    rest = [job for jobs in cases.values() for job in jobs[1:]]
    step = [Job("step", "step", variant=variant) for variant in VARIANTS]
    spectra = [Job("spectra", "specformer", variant=precision) for precision in PRECISIONS]
    return [*firsts[:2], *step, Job("profile", "profile"), *firsts[2:], *spectra, *rest]


class Run:
    """One run.

    Args:
        device: "cuda", "cuda:1", ... or "cpu".
        smoke: Tiny sizes, nothing timed.
        out: Folder of the results.
        deadline: `time.monotonic()` after which no job starts.
    """

    def __init__(self, device: str, smoke: bool, out: Path, deadline: float) -> None:
        self.device, self.smoke, self.out, self.deadline = device, smoke, out, deadline
        self.id = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.limits: tuple[float, float] | None = None
        self.first_step: Row | None = None
        self.failed = False

    def everything(self, only: Sequence[str] | None) -> int:
        """Tests, cases and step; then the tables. 1 where something failed.

        Args:
            only: Operations, "step" or "engine"; all if absent.
        """
        unknown = [name for name in only or () if name not in (*OPERATIONS, "step", "engine")]
        if unknown:
            raise SystemExit(
                f"--only: no such operation: {', '.join(unknown)}; there are {', '.join(OPERATIONS)}, step, engine"
            )
        wanted = [name for name in OPERATIONS if only is None or name in only]
        sound = self.test(wanted)
        jobs: dict[str, list[Job]] = {}
        for name in wanted:
            if name in sound:
                jobs[name] = self.jobs_of(name, "case")
        queue = order(jobs)
        if only is not None and "step" not in only:
            queue = [job for job in queue if job.kind == "case"]
        trials = SMOKE_TRIALS if self.smoke else TRIALS
        trials = trials if only is None or "engine" in only else ()
        self.work([Job("limits", "limits", variant="")])
        with tempfile.TemporaryDirectory() as folder:
            self.engine(Path(folder), trials[:2])
            self.work(queue)
            self.engine(Path(folder), trials[2:])
        print(f"\n{write_table(self.out)}")
        return int(self.failed)

    def engine(self, folder: Path, trials: Sequence[Trial]) -> None:
        """Run recipes on the device."""
        for row in engine_rows(folder, trials, self.deadline, self.smoke):
            self.add([row])

    def tune(self, operation: str) -> int:
        """Search launch settings of an operation, for each of its shapes."""
        if operation not in OPERATIONS:
            raise SystemExit(f"--tune: no such operation: {operation}; there are {', '.join(OPERATIONS)}")
        self.work(self.jobs_of(operation, "tune"))
        for row in read_rows(self.out):
            if row["kind"] == "tune" and row["run"] == self.id:
                print(f"{row['shape']:44} {row['variant']}: {row.get('settings') or row['status']}")
        return int(self.failed)

    def jobs_of(self, operation: str, kind: str) -> list[Job]:
        """Jobs of an operation's cases; none, and a FAILED row, where they cannot be made."""
        try:
            cases = load(operation, self.smoke)
        except Exception as error:
            traceback.print_exc()
            self.add([Job(kind, operation).row(f"FAILED: {type(error).__name__}: {error}")])
            return []
        limit = self.deadline - time.monotonic() if kind == "tune" else Job.limit_s
        return [Job(kind, operation, case.shape, index, limit_s=limit) for index, case in enumerate(cases)]

    def test(self, operations: Sequence[str]) -> set[str]:
        """Run the gpu-marked tests of operations, a process for each file; returns the operations whose tests pass."""
        files = list(
            dict.fromkeys(file for name in operations for file in OPERATIONS[name].tests if (ROOT / file).exists())
        )
        if self.smoke:  # all are skipped without a GPU: one file shows that they are found and run
            files = files[:1]
        with ThreadPoolExecutor(TESTS_AT_ONCE) as pool:
            results = dict(zip(files, pool.map(self.pytest, files), strict=True))
        for passed, text in results.values():
            if not passed:
                print(text)
        sound = set(operations)
        for name in operations:
            for file in OPERATIONS[name].tests:
                passed, text = results.get(file, (True, ""))
                if text:
                    last = " ".join(text.split("\n")[-2:]).strip()[-200:]
                    status = "ok" if passed else "FAILED: its tests"
                    self.add([{"kind": "tests", "operation": name, "variant": file, "status": status, "detail": last}])
                if not passed:
                    sound.discard(name)
        return sound

    def pytest(self, file: str) -> tuple[bool, str]:
        """Whether the gpu-marked tests of a file pass, and the end of what pytest says."""
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=0", file]
        limit = min(TESTS_SECONDS, max(self.deadline - time.monotonic(), 1.0))
        # Plugins that happen to be installed may warn, and warnings are errors here.
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        try:
            ran = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            return False, f"{file}: not done after {limit:.0f} s"
        # 5: no test of the file is marked gpu
        return ran.returncode in (0, 5), (ran.stderr[-1000:] + ran.stdout[-3000:]).strip() or file

    def work(self, jobs: list[Job]) -> None:
        """Run jobs in child processes, one after the other, until the deadline; adds their rows."""
        spawn = multiprocessing.get_context("spawn")
        while jobs and time.monotonic() < self.deadline:
            ours, theirs = spawn.Pipe()
            child = spawn.Process(target=work, args=(theirs, jobs, self.device, self.smoke))
            child.start()
            theirs.close()
            try:
                done = self.listen(ours, jobs)
            finally:
                child.kill()
                child.join()
            jobs = jobs[done:]
        self.add(job.row("not run: the time is used up") for job in jobs)

    def listen(self, pipe: Connection, jobs: Sequence[Job]) -> int:
        """Take rows from a child until it ends or has to be ended; returns how many jobs are settled.

        Args:
            pipe: From the child.
            jobs: What it was given.
        """
        done, running = 0, False
        while done < len(jobs):
            left = self.deadline + GRACE_S - time.monotonic()
            limit = jobs[done].limit_s if running else IDLE_S
            try:
                if not pipe.poll(max(min(limit, left), 0.0)):
                    late = "not run: the time is used up" if left < limit else f"FAILED: not done after {limit:.0f} s"
                    self.add([jobs[done].row(late)])
                    return done + 1
                kind, content = pipe.recv()
            except EOFError:
                if done and not running:  # it gave up after a failure that it has reported
                    return done
                self.add([jobs[done].row("FAILED: the process died")])
                return done + 1
            if kind == "rows":
                self.add(content)
                done, running = done + 1, False
            elif time.monotonic() > self.deadline:
                break
            else:
                running = True
                job = jobs[done]
                print(
                    f"{self.deadline - time.monotonic():4.0f} s left: {job.operation} {job.shape or job.variant}",
                    flush=True,
                )
        return done

    def add(self, rows: Iterable[Row]) -> None:
        """Complete rows and append them to the results."""
        finished = []
        for row in rows:
            row = {"benchmark": "gpu", "run": self.id, **row}
            if self.device == "cpu":
                row["device"] = "cpu (interpreter)"
            if row["kind"] == "limits" and "copy_gb_s" in row:
                self.limits = (row["copy_gb_s"], row["gemm_tflop_s"])
            if row["kind"] == "step":
                self._compare_step(row)
            if self.limits is not None:
                row |= self._shares(row)
            if row["status"].startswith("FAILED"):
                self.failed = True
                print(f"  {row['operation']} {row.get('shape', '')} {row['variant']}: {row['status']}", flush=True)
            finished.append(row)
        if finished:
            append_rows(self.out / "gpu.csv", finished)

    def _compare_step(self, row: Row) -> None:
        """The first step's loss and gradient must be eager's: a whole step has no other oracle."""
        if row["variant"] == "eager":
            self.first_step = row
        elif self.first_step and "grad_norm" in row and row.get("batch") == self.first_step.get("batch"):
            for name in ("loss", "grad_norm"):
                expected = self.first_step[name]
                if not abs(row[name] - expected) <= STEP_TOLERANCE * abs(expected):
                    row["status"] = f"FAILED: {name} of the first step is {row[name]:.6g}, eager's is {expected:.6g}"

    def _shares(self, row: Row) -> Row:
        """Share of the device's measured limit that each pass reaches: its bytes or FLOP alone, whichever takes longer."""
        copy, gemm = self.limits or (math.nan, math.nan)
        if row["kind"] == "step" and "ms_per_image" in row:
            return {"gemm_percent": 100 * row["gflop_per_image"] / row["ms_per_image"] / gemm}
        if "forward_ms" not in row:
            return {}
        floors = {}
        for name in ("forward", "backward"):
            floors[name] = max(1e3 * row[f"{name}_gb"] / copy, row[f"{name}_gflop"] / gemm)
        floors["whole"] = sum(floors.values())
        found: Row = {
            f"{name}_percent": 100 * floor / row[f"{name}_ms"] for name, floor in floors.items() if f"{name}_ms" in row
        }
        found["limit"] = "copy" if 1e3 * row["forward_gb"] / copy > row["forward_gflop"] / gemm else "GEMM"
        if row["output_gb"]:
            found["output_percent"] = 100 * 1e3 * row["output_gb"] / copy / row["forward_ms"]
        return found
