"""The process that uses the device: runs one job after the other and sends the rows of each to the parent.

A kernel that reads out of bounds or never ends takes its process with it. So the work is done in a child that the parent
can end, and that ends itself once the device refuses all further work; the parent goes on in a new one.
"""

from __future__ import annotations

import gc
import traceback
from multiprocessing.connection import Connection

import torch
from cases import load
from cases.case import Case, Way
from gpu_check import Wrong, check, passes_of, run_once
from gpu_job import Job, Row
from gpu_step import step_rows
from gpu_timing import Measurement, device_limits, measure
from gpu_tune import tune_rows

__all__ = ["work"]


def work(pipe: Connection, jobs: list[Job], device: str, smoke: bool) -> None:
    """Run jobs: sends ("begin", None) and ("rows", rows) for each.

    Args:
        pipe: To the parent.
        jobs: What to do, in order.
        device: Where.
        smoke: Tiny sizes, nothing timed.
    """
    if device != "cpu":
        torch.cuda.set_device(device)  # CUDA events and Triton use the current one
    for job in jobs:
        pipe.send(("begin", None))
        rows = run(job, torch.device(device), smoke)
        pipe.send(("rows", rows))
        gc.collect()  # models and their hooks refer to each other
        if device != "cpu":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:  # after an illegal access every later call fails too
                return


def run(job: Job, device: torch.device, smoke: bool) -> list[Row]:
    """Rows of one job, whatever happens in it."""
    torch.manual_seed(0)
    rows: list[Row] = []
    try:
        if job.kind == "limits":
            rows.append(_limits(device, smoke))
        elif job.kind == "step":
            rows += step_rows(job.variant, device, smoke)
        else:
            case = load(job.operation, smoke)[job.index]
            (case_rows if job.kind == "case" else tune_rows)(case, device, smoke, rows)
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError | Wrong):
            traceback.print_exc()
        rows.append(job.row(status_of(error)))
    return [{"kind": job.kind, **row} for row in rows]


def status_of(error: Exception) -> str:
    """What a row says of an exception."""
    if isinstance(error, torch.OutOfMemoryError):
        return "not run: out of memory"
    text = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
    return f"FAILED: {' '.join(text.split())[:300]}"


def _limits(device: torch.device, smoke: bool) -> Row:
    row: Row = {"operation": "limits", "variant": "", "status": "ok"}
    if smoke:
        return row
    limits = device_limits(device)
    return row | {"copy_gb_s": limits.copy / 1e9, "gemm_tflop_s": limits.gemm / 1e12}


def case_rows(case: Case, device: torch.device, smoke: bool, rows: list[Row]) -> None:
    """Check a case, then time its ways: one row each, as soon as it is there.

    Args:
        case: The case.
        device: Where.
        smoke: Run every way once, timing nothing.
        rows: Where they go.

    Raises:
        Wrong: Ours is not right; nothing was timed.
    """
    problem = case.build(device)
    checked = check(problem)
    common: Row = {
        "operation": case.operation,
        "shape": case.shape,
        "dtype": str(next(x for x in problem.inputs.values() if x is not None).dtype).removeprefix("torch."),
        "forward_gb": case.traffic[0] / 1e9,
        "backward_gb": case.traffic[1] / 1e9,
        "forward_gflop": case.flop[0] / 1e9,
        "backward_gflop": case.flop[1] / 1e9,
        "output_gb": case.output_bytes / 1e9,
    }
    ways = {
        "triton": problem.ours,
        **({"eager": problem.reference} if problem.time_reference else {}),
        **problem.others,
    }
    if case.compiled:
        ways["compiled"] = _compiled(problem.reference, device)
    for variant, way in ways.items():
        row: Row = {**common, "variant": variant, "status": "ok"}
        if variant == "triton":
            row |= {"error": checked.ours, "eager_error": checked.eager, "oracle": checked.oracle}
        if variant in case.predicted_ms:
            row["predicted_ms"] = case.predicted_ms[variant]
        try:
            if smoke:
                run_once(way, problem)
            else:
                row |= columns(measure(passes_of(way, problem), device))
        except Exception as error:  # the others can still be timed
            row["status"] = status_of(error)
        rows.append(row)
    torch.compiler.reset()


def _compiled(way: Way, device: torch.device) -> Way:
    """The reference through torch.compile, made for these very shapes; by Inductor where there is something to time."""
    return torch.compile(way, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")


def columns(found: Measurement) -> Row:
    """Milliseconds of each pass, and memory."""
    row: Row = {"peak_mib": found.peak_mib, "saved_mib": found.saved_mib}
    for name, timing in (("forward", found.forward), ("backward", found.backward), ("whole", found.whole)):
        if timing is not None:
            for suffix, seconds in zip(("", "_p20", "_p80"), timing, strict=True):
                row[f"{name}_ms{suffix}"] = 1e3 * seconds
    return row
