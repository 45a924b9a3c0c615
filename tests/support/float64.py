"""Comparison of a kernel and of eager PyTorch with the float64 oracle, by rows: the 2x rule."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

BF16_AND_FP16 = (torch.bfloat16, torch.float16)


def evaluate(op: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor, impl: str) -> list[Tensor]:
    """The result and the gradient of every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = op(*inputs, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, inputs, cotangent.to(y))]


def error(got: Tensor, oracle: Tensor, scale: Tensor | None = None) -> float:
    """Largest error of an element relative to the largest element of its row, or to `scale`."""
    assert got.shape == oracle.shape
    assert got.isfinite().all(), "not finite"
    if not got.numel():
        return 0.0
    rows = oracle.unsqueeze(-1) if oracle.dim() < 2 else oracle
    scale = rows.abs().amax(-1) if scale is None else scale
    difference = (got.to(oracle) - oracle).reshape(rows.shape).abs().amax(-1)
    return float((difference / scale.where(scale > 0, 1.0)).max())


def terms(op: Callable[..., Tensor], inputs: Sequence[Tensor], which: int, cotangent: Tensor) -> Tensor:
    """Sum of the absolute terms of a scalar input's gradient: what its rounding errors are proportional to."""

    def along(value: Tensor) -> Tensor:
        return op(*inputs[:which], value, *inputs[which + 1 :], impl="reference")

    _, change = torch.autograd.functional.jvp(along, inputs[which], torch.ones_like(inputs[which]))
    return (cotangent * change).abs().sum()


def assert_as_good_as_eager(
    op: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    cotangent: Tensor,
    names: Sequence[str],
    floor: float = 1e-6,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Error of impl="triton" <= 2x that of impl="reference" + floor, for the result and every gradient.

    Args:
        op: The operation; takes the inputs and impl.
        inputs: Tensors in the precision to test, all with gradients; a 0-d one's gradient is a sum over the rows.
        cotangent: Gradient of the result.
        names: Names of the inputs.
        floor: Relative error that is always allowed, some 16 roundings; 4 times it for a 0-d input (coefficients
            are good to 1.5e-6), a unit of the dtype for half results.
        scales: What errors are relative to, by name, where it is neither the row nor the sum of the absolute terms.

    Returns:
        The errors of impl="triton", by name.
    """
    dtype = inputs[0].dtype
    half = dtype in BF16_AND_FP16
    cotangent = cotangent.to(inputs[0])
    exact = [x.double() for x in inputs]
    oracle = evaluate(op, exact, cotangent.double(), "reference")
    ours = evaluate(op, inputs, cotangent, "triton")
    eager = evaluate(op, inputs, cotangent, "reference")
    found = {}
    for i, (name, mine, theirs, truth) in enumerate(zip(("result", *names), ours, eager, oracle, strict=True)):
        assert mine.dtype == theirs.dtype, name
        scalar = i > 0 and truth.dim() == 0
        scale = (scales or {}).get(name)
        if scalar and scale is None:
            scale = terms(op, exact, i - 1, cotangent.double())
        least = torch.finfo(dtype).eps if half and mine.dtype == dtype else 4 * floor if scalar else floor
        found[name], reference = error(mine, truth, scale), error(theirs, truth, scale)
        assert found[name] <= 2 * reference + least, f"{name}: error {found[name]:.2e}, eager's {reference:.2e}"
    return found
