"""Whole steps beside the timed one: where its time goes on the device, and SpecFormer's in three precisions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from gpu.job import Row
from step_methods import SPECTRA, SpecFormerSubject
from step_training import Training, phase_columns
from torch.profiler import ProfilerActivity, profile

from armillary.models.method import InputSpec
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.specformer.specformer_pretraining import SpecFormerPretraining

__all__ = ["PRECISIONS", "profile_rows", "spectra_row"]

PRECISIONS = ("fp32", "tf32", "bf16")
WARMUP, STEPS, KERNELS = 3, 3, 20
BATCH = 64  # spectra, as in the recipe
TINY = SpecFormerPretraining(SpecFormer(dim=32, depth=1, heads=2), chunks=2, chunk_tokens=5)


def profile_rows(training: Training, smoke: bool) -> list[Row]:
    """One row for each of the kernels that take most of a step's time on the device; in a walk through the code their names alone.

    Args:
        training: Freshly made.
        smoke: One step, nothing timed.
    """
    cuda = training.device.type == "cuda"
    batches = [training.prepared(i) for i in range(2)]
    for i in range(0 if smoke else WARMUP):
        training.step(batches[i % 2])
    steps = 1 if smoke else STEPS
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        for i in range(steps):
            training.step(batches[i % 2])
    # On a GPU the kernels themselves: an operation's own entry has the time of those it launched once more.
    events = [e for e in trace.key_averages() if not cuda or e.device_type == torch.autograd.DeviceType.CUDA]
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    calls, total = {e.key: e.count for e in events}, sum(times.values())
    rows = []
    for name in sorted(times, key=lambda name: -times[name])[:KERNELS]:
        row: Row = {"operation": "profile", "variant": "triton", "shape": name[:90], "status": "ok"}
        if not smoke:
            row |= {"calls": calls[name] / steps, "device_ms": times[name] / steps / 1e3}
            row |= {"time_percent": 100 * times[name] / total, "batch": training.batch}
        rows.append(row)
    return rows


def spectra_row(precision: str, device: torch.device, smoke: bool) -> Row:
    """SpecFormer's step.

    Args:
        precision: One of `PRECISIONS`.
        device: Where.
        smoke: A tiny model, one step, nothing timed.
    """
    inputs = InputSpec(pixels=400) if smoke else SPECTRA
    subject = SpecFormerSubject(TINY if smoke else SpecFormerPretraining(), inputs)
    batch = 2 if smoke else BATCH
    with _products(precision):
        training = Training(subject, "fp32" if smoke or precision == "tf32" else precision, device, batch)
        batches = [training.prepared(i) for i in range(2)]
        for i in range(1 if smoke else WARMUP):
            training.step(batches[i % 2])
        row: Row = {"operation": "specformer", "variant": precision, "status": "ok", "batch": batch}
        row |= {"shape": "tiny" if smoke else "SpecFormer, 7781 pixels", "loss": training.loss}
        if not smoke:
            torch.cuda.reset_peak_memory_stats(device)
            timed = [training.step(batches[i % 2]) for i in range(3 * STEPS)]
            row |= phase_columns(timed, batch, subject) | {"peak_mib": torch.cuda.max_memory_allocated(device) / 2**20}
    return row


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Round the factors of float32 products where tf32 is asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
