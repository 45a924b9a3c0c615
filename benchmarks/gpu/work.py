"""The process that uses the device: runs one job after the other and sends the rows of each to the parent.

A kernel that reads out of bounds or never ends takes its process with it. So the work is done in a child that the parent
can end, and that ends itself once the device refuses all further work; the parent goes on in a new one.

A job is a case of an operation, or the whole DINOv2 step of a ViT-L/12 in bf16 by phase: PyTorch, PyTorch compiled, and
the Triton kernels. torch.compile runs on each block, as torchtitan does it: the blocks are alike, so that one compilation
serves all of the student's and one all of the teacher's. The last block and the heads, which compute a few tokens in a
number that changes from step to step, stay as they are. All variants run the same batches from the same seed. Masks are
not timed: the loader makes them ahead, in a thread of its own.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from cases import load
from cases.case import Case, word
from gpu.check import Wrong, check, run_once
from gpu.job import Job, Row
from gpu.measure import Measurement, device_limits, measure, passes_of
from gpu.tune import tune_rows
from gpu.whole_steps import profile_rows, spectra_row
from step_methods import CROPS, MODELS, DINOv2Subject
from step_training import Training, phase_columns

from armillary.models.dinov2.dino_head import Head
from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.method import InputSpec
from armillary.models.vit.vit import ViT

__all__ = ["VARIANTS", "case_rows", "step_rows", "work"]

VARIANTS = ("eager", "triton", "compiled")
PREDICTED_MS = {"eager": 253.0, "compiled": 227.0}  # of 96 images
BATCHES = (96, 72, 48)
STEPS = 10
WARMUP = 4

TINY = DINOv2(
    vit=ViT(image_size=8, patch_size=4, dim=32, depth=2, heads=2, layer_scale=0.1),
    head=Head(64, 32, 16),
    koleo_weight=0.0,
)
TINY_INPUTS = InputSpec(channels=3, global_size=8, n_global=2, local_size=4, n_local=1)


def work(pipe: Connection, jobs: list[Job], device: str, smoke: bool) -> None:
    """Run jobs: sends ("begin", None), a ("row", row) as soon as each is there, and ("end", None) for each.

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
        for row in run(job, torch.device(device), smoke):
            pipe.send(("row", row))
        pipe.send(("end", None))
        gc.collect()  # models and their hooks refer to each other
        if device != "cpu":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:  # after an illegal access every later call fails too
                return


def run(job: Job, device: torch.device, smoke: bool) -> Iterator[Row]:
    """Rows of one job, each as soon as it is there, whatever happens in it."""
    torch.manual_seed(0)
    try:
        for row in _rows(job, device, smoke):
            yield {"kind": job.kind, **row}
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError | Wrong):
            traceback.print_exc()
        yield job.row(status_of(error))


def _rows(job: Job, device: torch.device, smoke: bool) -> Iterator[Row]:
    if job.kind == "limits":
        yield _limits(device, smoke)
    elif job.kind == "step":
        yield from step_rows(job.variant, device, smoke)
    elif job.kind == "profile":
        yield from profile_rows(_training("triton", device, 1 if smoke else BATCHES[-1], smoke), smoke)
    elif job.kind == "spectra":
        yield spectra_row(job.variant, device, smoke)
    else:
        case = load(job.operation, smoke)[job.index]
        yield from (case_rows if job.kind == "case" else tune_rows)(case, device, smoke)


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


def case_rows(case: Case, device: torch.device, smoke: bool) -> Iterator[Row]:
    """Check a case, then time its ways: one row each, as soon as it is there.

    Args:
        case: The case.
        device: Where.
        smoke: Run every way once, timing nothing.

    Raises:
        Wrong: Ours is not right; nothing was timed.
    """
    problem = case.build(device)
    checked = check(problem)
    common: Row = {
        "operation": case.operation,
        "shape": case.shape,
        "dtype": word(next(x for x in problem.inputs.values() if x is not None).dtype),
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
        # made for these very shapes
        ways["compiled"] = torch.compile(problem.reference, dynamic=False, backend=_backend(device))
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
        yield row
    torch.compiler.reset()


def _backend(device: torch.device) -> str:
    """What torch.compile compiles with: Inductor where there is something to time."""
    return "inductor" if device.type == "cuda" else "eager"


def columns(found: Measurement) -> Row:
    """Milliseconds of each pass, and memory."""
    row: Row = {"peak_mib": found.peak_mib, "saved_mib": found.saved_mib}
    for name, timing in (("forward", found.forward), ("backward", found.backward), ("whole", found.whole)):
        if timing is not None:
            for suffix, seconds in zip(("", "_p20", "_p80"), timing, strict=True):
                row[f"{name}_ms{suffix}"] = 1e3 * seconds
    return row


def configuration(variant: str, smoke: bool) -> DINOv2:
    """The method: impl "reference" for eager and compiled, "triton" for ours."""
    config = TINY if smoke else DINOv2(vit=MODELS["vitl"])
    # Without flash-attn "auto" means "torch"; said outright, torch.compile need not trace the search for the package.
    attention = "auto" if importlib.util.find_spec("flash_attn") else "torch"
    return replace(config, attention=attention, impl="triton" if variant == "triton" else "reference")


def step_rows(variant: str, device: torch.device, smoke: bool) -> list[Row]:
    """One row: the largest micro-batch that fits, milliseconds an image of each phase, memory; first loss and gradient.

    Args:
        variant: One of `VARIANTS`.
        device: Where.
        smoke: A tiny model, one step, nothing timed.

    Raises:
        torch.OutOfMemoryError: Not even the smallest micro-batch fits.
    """
    for batch in (1,) if smoke else BATCHES:
        try:
            return [_step_row(variant, device, batch, smoke)]
        except torch.OutOfMemoryError:
            if batch == BATCHES[-1]:
                raise
        gc.collect()
        torch.cuda.empty_cache()
    raise AssertionError("unreachable")


def _training(variant: str, device: torch.device, batch: int, smoke: bool) -> Training:
    torch.manual_seed(0)
    subject = DINOv2Subject(configuration(variant, smoke), TINY_INPUTS if smoke else CROPS)
    training = Training(subject, "fp32" if smoke else "bf16", device, batch)
    if variant == "compiled":
        _compile_blocks(training, device)
    return training


def _step_row(variant: str, device: torch.device, batch: int, smoke: bool) -> Row:
    training = _training(variant, device, batch, smoke)
    batches = [training.prepared(i) for i in range(2)]
    training.step(batches[0])  # its loss and gradient norm are those of the same weights for every variant
    first = {"loss": training.loss, "grad_norm": math.hypot(*training.optimizer.norms.values())}
    for i in range(1, 1 if smoke else WARMUP):
        training.step(batches[i % 2])
    row: Row = {
        "operation": "step",
        "variant": variant,
        "shape": "tiny" if smoke else "ViT-L/12 2x144 + 8x60 V=65536",
        "dtype": "float32" if smoke else "bfloat16",
        "status": "ok",
        "batch": batch,
        "gflop_per_image": training.method.flops_per_sample() / 1e9,
        **first,
    }
    if not smoke:
        torch.cuda.reset_peak_memory_stats(device)
        steps = [training.step(batches[i % 2]) for i in range(STEPS)]
        row |= phase_columns(steps, batch, training.subject) | {
            "peak_mib": torch.cuda.max_memory_allocated(device) / 2**20
        }
        if variant in PREDICTED_MS:
            row["predicted_ms"] = PREDICTED_MS[variant] * batch / 96
    if variant == "compiled":
        torch.compiler.reset()
    return row


def _compile_blocks(training: Training, device: torch.device) -> None:
    for network in (training.method.student, training.method.teacher):
        for block in network.backbone.blocks[:-1]:
            block.compile(backend=_backend(device), dynamic=False)
