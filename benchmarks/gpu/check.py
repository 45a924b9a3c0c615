"""Whether an operation is right.

The error may be twice that of eager PyTorch in the same dtype, both against the reference on the same numbers in float64
(float32 where that does not fit into memory). The error of a tensor is the larger of two: of the whole, |x - expected| /
|expected|, and of the worst row, relative to that row or the average one, whichever is longer. A result of fewer than 64
numbers (a loss, a curvature's gradient) can come out of eager with a lucky error, so it is held to the largest error of
eager's results; and the gradient of a scalar is a sum over everything, in which much cancels, so the root of the dtype's
unit is allowed on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cases.case import Outputs, Problem, Way
from torch import Tensor

__all__ = ["Checked", "Wrong", "as_tuple", "check", "gradients_of", "leaves", "run_once", "upstream"]

FEW = 64
FLOOR = 2e-6  # float32 sums of a few thousand numbers, taken in another order
POISON_BYTES = 2 << 30


class Wrong(Exception):
    """A result is not what the reference says."""


@dataclass(frozen=True)
class Checked:
    """Largest error over results and gradients, of ours and of eager, and the oracle's dtype."""

    ours: float
    eager: float
    oracle: str


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
