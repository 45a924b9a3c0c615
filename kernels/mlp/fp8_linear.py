r"""Linear layer whose three products are made of 8-bit floats; every tensor has one scale, found anew in each call.

    y  = s_x s_w X W'^T + b       X = fp8(x / s_x),   s_x = 2^ceil(log2(max |x| / 448));  W' and s_w likewise     (e4m3)
    dx = s_g s_w G W'             G = fp8(dy / s_g),  s_g = 2^ceil(log2(max |dy| / 57344))                       (e5m2)
    dW = s_g s_x G^T X,           db = sum_m dy

Shapes: x [M, K], weight [N, K], y and dy [M, N]. Scales are powers of two: dividing by them rounds nothing. X and W' are saved for the
backward pass, half the bytes of x in bfloat16.

Formats: Micikevicius et al. 2022, FP8 formats for deep learning (arXiv:2209.05433): e4m3 where precision is short, e5m2 for
gradients, whose range is wide.

On a GPU the products are torch._scaled_mm: rows of both factors lie along the sum, whose length is a multiple of 16. Elsewhere they are
emulated: the 8-bit numbers are cast to the dtype of x, in which they are exact, and multiplied there. What differs from a GPU is
the order of the sums, and forward their width, as its faster accumulation is taken.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.launch import Impl, check_tensor, refuse, untraced

__all__ = ["CAPABILITY", "MULTIPLE", "fp8_linear", "fp8_problem", "to_fp8"]

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
CAPABILITY = 89
"""Compute capability from which a GPU multiplies 8-bit floats (8.9: Ada)."""
MULTIPLE = 16
"""What widths and the length of each sum must be a multiple of."""
SMALLEST = 2.0**-100  # a scale of zeros


def fp8_problem(capability: int) -> str:
    """Why a GPU cannot, as a sentence's end; empty where it can.

    Args:
        capability: Compute capability, 90 for 9.0.
    """
    if capability >= CAPABILITY:
        return ""
    return (
        f"needs a GPU of compute capability 8.9 or later for 8-bit products, got {capability // 10}.{capability % 10}"
    )


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor as 8-bit floats, and the power of two (float32, no dimensions) that they are multiples of.

    What is not finite in x makes all of the result's products so.
    """
    largest = torch.linalg.vector_norm(x, math.inf, dtype=torch.float32)
    scale = torch.exp2(torch.ceil(torch.log2((largest / torch.finfo(dtype).max).clamp(min=SMALLEST))))
    return (x * scale.reciprocal().to(x.dtype)).to(dtype).contiguous(), scale


def _transposed(x: Tensor) -> Tensor:
    """x^T with contiguous rows, which zeros make a multiple of 16 long."""
    rows = -(-len(x) // MULTIPLE) * MULTIPLE
    if rows == len(x):
        return x.t().contiguous()
    padded = torch.zeros(x.shape[1], rows, dtype=torch.uint8, device=x.device)
    padded[:, : len(x)] = x.view(torch.uint8).t()
    return padded.view(x.dtype)


def _product(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, native: bool, fast: bool
) -> Tensor:
    """a b^T of two scaled tensors whose rows lie along the sum."""
    (x, x_scale), (y, y_scale) = a, b
    if native:
        return torch._scaled_mm(x, y.t(), x_scale, y_scale, out_dtype=dtype, use_fast_accum=fast)
    return (x.to(dtype) @ y.to(dtype).t()) * (x_scale * y_scale).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, native: bool) -> Tensor:
        eight, scale = to_fp8(x, FORWARD)
        weights, weight_scale = to_fp8(weight, FORWARD)
        ctx.save_for_backward(eight, scale, weights, weight_scale)
        ctx.native = native
        y = _product((eight, scale), (weights, weight_scale), x.dtype, native, True)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        g, scale = to_fp8(dy, BACKWARD)
        dx = _product((g, scale), (_transposed(weight), weight_scale), dy.dtype, ctx.native, False) if for_x else None
        dw = None
        if for_weight:
            dw = _product((_transposed(g), scale), (_transposed(x), x_scale), dy.dtype, ctx.native, False)
        return dx, dw, dy.sum(0, dtype=torch.float32).to(dy.dtype) if for_bias else None, None


@untraced
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, impl: Impl = "auto") -> Tensor:
    """y = x W^T + b with 8-bit products, forward and backward.

    Args:
        x: [M, K] float32 or bfloat16; K a multiple of 16.
        weight: [N, K], dtype of x; N a multiple of 16.
        bias: [N], dtype of x, or None.
        impl: "reference" emulates on any device; otherwise a GPU multiplies 8-bit floats and a CPU emulates.

    Returns:
        [M, N] in the dtype of x.

    Raises:
        ValueError: Wrong shape, dtype or device, or a GPU without 8-bit products.
    """
    dtypes = (torch.float32, torch.bfloat16)
    check_tensor("fp8_linear", "x", x, ["M", "K"], dtypes=dtypes)
    check_tensor("fp8_linear", "weight", weight, ["N", x.shape[1]], like=x, dtypes=[x.dtype])
    if bias is not None:
        check_tensor("fp8_linear", "bias", bias, [weight.shape[0]], like=x, dtypes=[x.dtype])
    if any(n % MULTIPLE for n in weight.shape):
        refuse("fp8_linear", "weight", f"must have sides that are multiples of {MULTIPLE}", list(weight.shape))
    native = impl != "reference" and x.is_cuda
    if native:
        major, minor = torch.cuda.get_device_capability(x.device.index or 0)
        if problem := fp8_problem(10 * major + minor):
            refuse("fp8_linear", "x", problem.partition(", got")[0], f"{major}.{minor}")
    return _Fp8Linear.apply(x, weight, bias, native)
