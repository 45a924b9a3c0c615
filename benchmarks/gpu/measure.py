"""How long a computation takes.

Times come from CUDA events. Between two repeats the second-level cache is emptied by reading a buffer larger than it (reading
leaves nothing to be written back in the next repeat's time), and the device is kept busy for a moment, so that the host is
ahead with its launches and gaps between kernels are no part of the time. That is how a step at training sizes runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from cases.case import Outputs, Problem, Way
from common import Timing, summary
from gpu.check import as_tuple, gradients_of, leaves, upstream
from torch import Tensor

__all__ = ["Limits", "Measurement", "Passes", "device_limits", "measure", "passes_of"]

WARMUP = 3
REPEATS = (5, 100)  # least and most
AHEAD_CYCLES = 2_000_000  # about a millisecond
FLUSH_BYTES = 256 << 20  # or four times the second-level cache, if that is more
MIB = 2.0**20


class Limits(NamedTuple):
    """What the device can do, measured: bytes a second of a copy (read and written) and bf16 FLOP a second."""

    copy: float
    gemm: float


class Passes(NamedTuple):
    """A computation in two parts: `forward` returns what `backward` takes; no backward where there is none to time."""

    forward: Callable[[], object]
    backward: Callable[[object], object] | None = None


@dataclass(frozen=True)
class Measurement:
    """Seconds of the passes (backward and whole are None where only one is timed) and MiB above what was there.

    Attributes:
        forward: First pass.
        backward: Second pass.
        whole: Both, begun together.
        peak_mib: Most memory at once, results included.
        saved_mib: Memory held between the passes.
    """

    forward: Timing
    backward: Timing | None
    whole: Timing | None
    peak_mib: float
    saved_mib: float


def passes_of(way: Way, problem: Problem) -> Passes:
    """Forward and backward pass of a way on the problem's inputs, to be timed."""
    if not problem.wrt:

        def forward() -> object:
            with torch.no_grad():
                return way(**problem.inputs)

        return Passes(forward)
    inputs = leaves(problem)
    grads: list[Tensor] = []

    def run() -> Outputs:
        outputs = way(**inputs)
        if not grads:
            grads.extend(upstream([x for x in as_tuple(outputs) if x.requires_grad]))
        return outputs

    return Passes(run, lambda outputs: gradients_of(outputs, inputs, grads))


class _Flush:
    def __init__(self, device: torch.device) -> None:
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.buffer: Tensor = torch.ones(max(4 * size, FLUSH_BYTES) // 4, device=device)

    def __call__(self) -> None:
        self.buffer.sum()
        torch.cuda._sleep(AHEAD_CYCLES)


def measure(passes: Passes, device: torch.device, seconds: float = 0.4) -> Measurement:
    """Time the passes of a computation.

    Args:
        passes: What to time; called until warm, then for about `seconds`, 5 to 100 times.
        device: A CUDA device.
        seconds: Time to spend on repeats.
    """

    def run() -> list[torch.cuda.Event]:
        events = [_event()]
        state = passes.forward()
        events.append(_event())
        if passes.backward is not None:
            passes.backward(state)
            events.append(_event())
        return events

    for _ in range(WARMUP):
        run()
    torch.cuda.synchronize(device)
    peak, saved = _memory(passes, device)
    first = run()
    torch.cuda.synchronize(device)
    once = first[0].elapsed_time(first[-1]) / 1e3
    repeats = min(max(int(seconds / max(once, 1e-6)), REPEATS[0]), REPEATS[1])
    flush = _Flush(device)
    runs = []
    for _ in range(repeats):
        flush()
        runs.append(run())
    torch.cuda.synchronize(device)
    spans = [(0, 1), (1, 2), (0, 2)] if passes.backward is not None else [(0, 1)]
    times = [summary([r[a].elapsed_time(r[b]) / 1e3 for r in runs]) for a, b in spans]
    forward, backward, whole = [*times, None, None][:3]
    return Measurement(forward, backward, whole, peak, saved)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _memory(passes: Passes, device: torch.device) -> tuple[float, float]:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    state = passes.forward()
    saved = torch.cuda.memory_allocated(device) - before
    result = passes.backward(state) if passes.backward is not None else None
    peak = torch.cuda.max_memory_allocated(device) - before
    del state, result
    return peak / MIB, saved / MIB


def device_limits(device: torch.device, copy_bytes: int = 1 << 30, side: int = 8192) -> Limits:
    """Measure the device's limits on random data: a large copy, and a large bf16 matrix product.

    Args:
        device: A CUDA device.
        copy_bytes: Size of what is copied.
        side: Of the square matrices.
    """
    x = torch.randn(copy_bytes // 4, device=device)
    y = torch.empty_like(x)
    copy = measure(Passes(lambda: y.copy_(x)), device).forward.median
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    gemm = measure(Passes(lambda: a @ b), device).forward.median
    return Limits(2 * copy_bytes / copy, 2 * side**3 / gemm)
