"""Comparison of a kernel and of eager PyTorch with the float64 oracle, by rows: the 2x rule."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BF16_AND_FP16 = (torch.bfloat16, torch.float16)


def evaluate(op: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor, impl: str) -> list[Tensor]:
    """The result and the gradient of every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = op(*inputs, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, inputs, cotangent.to(y))]


def error(got: Tensor, oracle: Tensor) -> float:
    """Largest error of an element relative to the largest element of its row; a scalar is a row."""
    assert got.shape == oracle.shape
    assert got.isfinite().all(), "not finite"
    if not got.numel():
        return 0.0
    rows = oracle.unsqueeze(-1) if oracle.dim() < 2 else oracle
    scale = rows.abs().amax(-1)
    difference = (got.to(oracle) - oracle).reshape(rows.shape).abs().amax(-1)
    return float((difference / scale.where(scale > 0, 1.0)).max())


def assert_as_good_as_eager(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor, names: Sequence[str], floor: float = 5e-7
) -> dict[str, float]:
    """Error of impl="triton" <= 2x that of impl="reference" + floor, for the result and every gradient.

    Args:
        op: The operation; takes the inputs and impl.
        inputs: Tensors in the precision to test, all with gradients.
        cotangent: Gradient of the result.
        names: Names of the inputs.
        floor: Relative error that is always allowed; 4 times it for a scalar (a sum over rows of coefficients good to
            1.5e-6), a unit of the dtype for half results.

    Returns:
        The errors of impl="triton", by name.
    """
    dtype = inputs[0].dtype
    half = dtype in BF16_AND_FP16
    cotangent = cotangent.to(dtype)
    oracle = evaluate(op, [x.double() for x in inputs], cotangent.double(), "reference")
    ours = evaluate(op, inputs, cotangent, "triton")
    eager = evaluate(op, inputs, cotangent, "reference")
    found = {}
    for name, mine, theirs, truth in zip(("result", *names), ours, eager, oracle, strict=True):
        assert mine.dtype == theirs.dtype, name
        least = torch.finfo(mine.dtype).eps if half and mine.dtype == dtype else floor if truth.dim() else 4 * floor
        found[name], limit = error(mine, truth), 2 * error(theirs, truth) + least
        assert found[name] <= limit, f"{name}: error {found[name]:.2e}, eager's {error(theirs, truth):.2e}"
    return found
