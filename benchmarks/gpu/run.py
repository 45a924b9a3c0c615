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
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
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
TESTS_SECONDS = 120.0  # of one file
TESTS_SHARE = 0.3  # of the time that is left when they begin, for all of them
GRACE_S = 20.0  # past the budget, for the job that is running
IDLE_S = 60.0  # for a process to start, and between jobs
STEP_TOLERANCE = 0.03  # of the first step's loss and gradient norm in bf16, relative to eager's


def order(cases: dict[str, list[Job]]) -> list[Job]:
    """Jobs by importance: the first case of the leading two operations, the step and its profile, the other first cases, SpecFormer,
    the compiled step, whose compilation may take a minute or two, the rest.
    """
    firsts = [jobs[0] for jobs in cases.values() if jobs]
    rest = [job for jobs in cases.values() for job in jobs[1:]]
    step = [Job("step", "step", variant=variant) for variant in VARIANTS]
    spectra = [Job("spectra", "specformer", variant=precision) for precision in PRECISIONS]
    return [*firsts[:2], *step[:2], Job("profile", "profile"), *firsts[2:], *spectra, *step[2:], *rest]


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
        self.work([Job("limits", "limits", variant="", limit_s=60.0)])
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
        """Run the gpu-marked tests of operations, a process for each file; returns the operations of which none failed."""
        files = list(
            dict.fromkeys(file for name in operations for file in OPERATIONS[name].tests if (ROOT / file).exists())
        )
        if self.smoke:  # all are skipped without a GPU: one file shows that they are found and run
            files = files[:1]
        now = time.monotonic()
        end = now + TESTS_SHARE * max(self.deadline - now, 0.0)
        sound = set(operations)
        with ThreadPoolExecutor(TESTS_AT_ONCE) as pool:
            running = {pool.submit(self.pytest, file, end): file for file in files}
            for done in as_completed(running):
                passed, text = done.result()
                if passed is False:
                    print(text)
                status = {True: "ok", False: "FAILED: its tests", None: "not run: the time is used up"}[passed]
                last = " ".join(text.split("\n")[-2:]).strip()[-200:]
                of = [name for name in operations if running[done] in OPERATIONS[name].tests]
                row = {"kind": "tests", "variant": running[done], "status": status, "detail": last}
                self.add({**row, "operation": name} for name in of)
                sound -= set() if passed is not False else set(of)
        return sound

    def pytest(self, file: str, end: float) -> tuple[bool | None, str]:
        """Whether the gpu-marked tests of a file pass, None where there is no time left for them; and the end of what pytest says.

        Args:
            file: The file.
            end: `time.monotonic()` at which it has to be done.
        """
        limit = min(TESTS_SECONDS, end - time.monotonic())
        if limit <= 0:
            return None, file
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=0", file]
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
        done, running, end = 0, False, time.monotonic() + IDLE_S
        while done < len(jobs):
            now, last = time.monotonic(), self.deadline + GRACE_S
            try:
                if not pipe.poll(max(min(end, last) - now, 0.0)):
                    limit = jobs[done].limit_s if running else IDLE_S
                    late = "not run: the time is used up" if last < end else f"FAILED: not done after {limit:.0f} s"
                    self.add([jobs[done].row(late)])
                    return done + 1
                kind, content = pipe.recv()
            except EOFError:
                if done and not running:  # it gave up after a failure that it has reported
                    return done
                self.add([jobs[done].row("FAILED: the process died")])
                return done + 1
            if kind == "row":
                self.add([content])
            elif kind == "end":
                done, running, end = done + 1, False, time.monotonic() + IDLE_S
            elif time.monotonic() > self.deadline:
                break
            else:
                job, running = jobs[done], True
                end = time.monotonic() + job.limit_s
                print(
                    f"{self.deadline - time.monotonic():4.0f} s left: {job.operation} {job.shape or job.variant}",
                    flush=True,
                )
        return done

    def add(self, rows: Iterable[Row]) -> None:
        """Complete rows, append them to the results and write the tables anew."""
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
            self._keep_table()

    def _keep_table(self) -> None:
        """Write the tables of what there is so far, so that a run that is cut off leaves them; what is wrong with them shows at the end."""
        with suppress(Exception):
            write_table(self.out)

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
