"""Whether an operation is right, and how long it takes.

Error: at most twice that of eager PyTorch in the same dtype, both against the reference on the same numbers in float64
(float32 where that does not fit into memory). The error of a tensor is the larger of two: of the whole, |x - expected| /
|expected|, and of the worst row, relative to that row or the average one, whichever is longer. A result of fewer than 64
numbers (a loss, a curvature's gradient) can come out of eager with a lucky error, so it is held to the largest error of
eager's results; and the gradient of a scalar is a sum over everything, in which much cancels, so the root of the dtype's
unit is allowed on top.

Time: from CUDA events. Between two repeats the second-level cache is emptied by reading a buffer larger than it (reading
leaves nothing to be written back in the next repeat's time), and the device is kept busy for a moment, so that the host is
ahead with its launches and gaps between kernels are no part of the time. That is how a step at training sizes runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from cases.case import Outputs, Problem, Way
from common import Timing, summary
from torch import Tensor

__all__ = [
    "Checked",
    "Limits",
    "Measurement",
    "Passes",
    "Wrong",
    "check",
    "device_limits",
    "measure",
    "passes_of",
    "run_once",
]

FEW = 64
FLOOR = 2e-6  # float32 sums of a few thousand numbers, taken in another order
POISON_BYTES = 2 << 30
WARMUP = 3
REPEATS = (5, 100)  # least and most
AHEAD_CYCLES = 2_000_000  # about a millisecond
FLUSH_BYTES = 256 << 20  # or four times the second-level cache, if that is more
MIB = 2.0**20


class Wrong(Exception):
    """A result is not what the reference says."""


@dataclass(frozen=True)
class Checked:
    """Largest error over results and gradients, of ours and of eager, and the oracle's dtype."""

    ours: float
    eager: float
    oracle: str


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


def leaves(problem: Problem, wide: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """The inputs with gradients asked for, copied where they will be written to, in `wide` where given."""

    def leaf(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if wide is not None and x.is_floating_point():
            x = x.to(wide)
        x = x.detach().clone() if problem.in_place else x.detach()
        return x.requires_grad_() if name in problem.wrt else x

    return {name: leaf(name, x) for name, x in problem.inputs.items()}


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """Results as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def upstream(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of the results, the same for the same shapes whatever the dtype: 1 for a scalar, else Gaussian."""
    if not outputs:
        return []
    g = torch.Generator(outputs[0].device).manual_seed(seed)
    return [
        torch.ones_like(x)
        if x.dim() == 0
        else torch.randn(x.shape, generator=g, device=x.device).to(torch.bfloat16).to(x.dtype)
        for x in outputs
    ]


def gradients_of(outputs: Outputs, inputs: dict[str, Tensor | None], grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the inputs that ask for one."""
    results = [x for x in as_tuple(outputs) if x.requires_grad]
    asked = [x for x in inputs.values() if x is not None and x.requires_grad]
    return [x for x in torch.autograd.grad(results, asked, list(grads), allow_unused=True)]


def run_once(way: Way, problem: Problem, wide: torch.dtype | None = None) -> list[tuple[str, Tensor]]:
    """Results and gradients of a way, by name."""
    inputs = leaves(problem, wide)
    with torch.set_grad_enabled(bool(problem.wrt)):
        outputs = way(**inputs)
    found = [
        (f"result {i}", x.detach() if x.is_floating_point() else x.float()) for i, x in enumerate(as_tuple(outputs))
    ]
    if problem.wrt:
        grads = upstream([x for x in as_tuple(outputs) if x.requires_grad])
        for name, x in zip(problem.wrt, gradients_of(outputs, inputs, grads), strict=True):
            found.append((f"gradient of {name}", inputs[name].new_full((), math.nan) if x is None else x))
    return found


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


def check(problem: Problem) -> Checked:
    """Run ours, eager and the oracle once.

    Raises:
        Wrong: A result or gradient of ours is further from the oracle than allowed; all of them are named.
    """
    expected, oracle = _oracle(problem)
    eager = _errors(run_once(problem.reference, problem), expected)
    _poison(next(x for x in problem.inputs.values() if x is not None).device)
    results = run_once(problem.ours, problem)
    ours = _errors(results, expected)
    worst = max(eager.values())
    floats = [x for x in problem.inputs.values() if x is not None and x.is_floating_point()]
    unit = max((torch.finfo(x.dtype).eps for x in floats), default=0.0)
    wrong = []
    for name, x in results:
        allowed = 2 * (worst if x.numel() < FEW else eager[name]) + max(torch.finfo(x.dtype).eps / 4, FLOOR)
        if x.dim() == 0 and name.startswith("gradient"):
            allowed += unit**0.5
        if not (math.isfinite(ours[name]) and ours[name] <= allowed):
            wrong.append(f"{name} {list(x.shape)}: error {ours[name]:.2g}, at most {allowed:.2g}")
    if wrong:
        raise Wrong("; ".join(wrong))
    return Checked(max(ours.values()), worst, oracle)


def _oracle(problem: Problem) -> tuple[list[tuple[str, Tensor]], str]:
    oracle = problem.oracle or problem.reference
    try:
        return run_once(oracle, problem, torch.float64), "float64"
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # here, where the exception no longer holds what filled the memory
    return run_once(oracle, problem, torch.float32), "float32"


def _errors(found: list[tuple[str, Tensor]], expected: list[tuple[str, Tensor]]) -> dict[str, float]:
    return {name: _error(x, y) for (name, x), (_, y) in zip(found, expected, strict=True)}


def _error(x: Tensor, expected: Tensor) -> float:
    if x.shape != expected.shape:
        return math.inf
    if not x.numel():
        return 0.0
    rows = expected.reshape(-1, expected.shape[-1]) if expected.dim() > 1 else expected.reshape(1, -1)
    away = (x.to(rows.dtype).view_as(rows) - rows).norm(dim=1)
    length = rows.norm(dim=1)
    tiny = torch.finfo(torch.float32).tiny
    average = length.square().mean().sqrt().clamp_min(tiny)
    error = max(float(away.norm() / length.norm().clamp_min(tiny)), float((away / length.clamp_min(average)).max()))
    return error if math.isfinite(error) else math.inf


def _poison(device: torch.device) -> None:
    """Fill free memory with NaN, so that an element that a kernel leaves unwritten shows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.full((POISON_BYTES // 4,), math.nan, device=device)


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
