r"""Linear layer whose three products are made of 8-bit floats; every tensor has one scale, found anew in each call.

    y  = s_x s_w X W'^T + b       X = fp8(x / s_x),   s_x = 2^ceil(log2(max |x| / 448));  W' and s_w likewise     (e4m3)
    dx = s_g s_w G W'             G = fp8(dy / s_g),  s_g = 2^ceil(log2(max |dy| / 57344))                       (e5m2)
    dW = s_g s_x G^T X,           db = sum_m dy

Shapes: x [M, K], weight [N, K], y and dy [M, N]. Scales are powers of two: dividing by them rounds nothing. X^T and W'^T are saved for
the backward pass, half the bytes of x in bfloat16. A kernel reads a matrix and writes its 8-bit floats and their transpose at once.

Formats: Micikevicius et al. 2022, FP8 formats for deep learning (arXiv:2209.05433): e4m3 where precision is short, e5m2 for
gradients, whose range is wide.

On a GPU the products are torch._scaled_mm: rows of both factors lie along the sum, whose length is a multiple of 16. Elsewhere they are
emulated: the 8-bit numbers are cast to the dtype of x, in which they are exact, and multiplied there. What differs from a GPU is
the order of the sums, and forward their width, as its faster accumulation is taken.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.column_sums import column_sums
from armillary.kernels.launch import INTERPRETER, Impl, Launch, check_tensor, refuse, settings, untraced, use_triton

__all__ = ["CAPABILITY", "MULTIPLE", "Scaled", "fp8_linear", "fp8_problem", "to_fp8"]

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


class Scaled(NamedTuple):
    """A matrix [M, N] as 8-bit floats, in both layouts that products ask for.

    Attributes:
        rows: [M, N].
        columns: [N, M'] its transpose; zeros make M' a multiple of 16.
        scale: Power of two that both are multiples of; float32, no dimensions.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor


@triton.jit
def _cast_kernel(x_ptr, inverse_ptr, rows_ptr, columns_ptr, M, N, PADDED, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile of x, scaled and cast, into both layouts."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    place = row[:, None] * N + column[None, :]
    inside = (row[:, None] < M) & (column[None, :] < N)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) * tl.load(inverse_ptr)
    eight = x.to(rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + place, eight, mask=inside)
    across = column[:, None] * PADDED + row[None, :]
    tl.store(columns_ptr + across, tl.trans(eight), mask=(column[:, None] < N) & (row[None, :] < PADDED))


LAUNCH = {
    INTERPRETER: Launch({"ROWS": 32, "COLUMNS": 32}, source="small, so that small inputs have borders"),
    90: Launch({"ROWS": 64, "COLUMNS": 64}, source="not measured; compiled ahead of time: no spills"),
}


def to_fp8(x: Tensor, dtype: torch.dtype, impl: Impl = "reference") -> Scaled:
    """A matrix as 8-bit floats. What is not finite in it makes all products with it so.

    Args:
        x: [M, N] float32 or bfloat16.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        impl: One pass by Triton, or PyTorch's operations; the same bits.
    """
    x = x.contiguous()
    largest = torch.linalg.vector_norm(x, math.inf, dtype=torch.float32)
    scale = torch.exp2(torch.ceil(torch.log2((largest / torch.finfo(dtype).max).clamp(min=SMALLEST))))
    (m, n), inverse = x.shape, scale.reciprocal()
    padded = -(-m // MULTIPLE) * MULTIPLE
    if m and use_triton("fp8_linear", impl, x):
        rows = torch.empty(m, n, dtype=dtype, device=x.device)
        columns = torch.empty(n, padded, dtype=dtype, device=x.device)
        row = settings(LAUNCH, x)
        grid = triton.cdiv(padded, row.blocks["ROWS"]), triton.cdiv(n, row.blocks["COLUMNS"])
        _cast_kernel[grid](x, inverse, rows, columns, m, n, padded, **row.blocks, num_warps=row.num_warps)
        return Scaled(rows, columns, scale)
    rows = (x * inverse.to(x.dtype)).to(dtype)
    columns = torch.zeros(n, padded, dtype=torch.uint8, device=x.device)
    columns[:, :m] = rows.view(torch.uint8).t()
    return Scaled(rows, columns.view(dtype), scale)


def _product(x: Tensor, y: Tensor, scales: Tensor, dtype: torch.dtype, native: bool, fast: bool) -> Tensor:
    """x y^T of two matrices whose rows lie along the sum, times their scales [2]."""
    if native:
        return torch._scaled_mm(x, y.t(), scales[0], scales[1], out_dtype=dtype, use_fast_accum=fast)
    return (x.to(dtype) @ y.to(dtype).t()) * scales.prod().to(dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, native: bool, impl: Impl) -> Tensor:
        of_x, of_weight = to_fp8(x, FORWARD, impl), to_fp8(weight, FORWARD, impl)
        ctx.save_for_backward(of_x.columns, of_x.scale, of_weight.columns, of_weight.scale)
        ctx.native, ctx.impl = native, impl
        y = _product(of_x.rows, of_weight.rows, torch.stack([of_x.scale, of_weight.scale]), x.dtype, native, True)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        g = to_fp8(dy, BACKWARD, ctx.impl)

        def with_g(rows: Tensor, other: Tensor, scale: Tensor) -> Tensor:
            return _product(rows, other, torch.stack([g.scale, scale]), dy.dtype, ctx.native, False)

        return (
            with_g(g.rows, weight, weight_scale) if for_x else None,
            with_g(g.columns, x, x_scale) if for_weight else None,
            column_sums(dy).to(dy.dtype) if for_bias else None,
            None,
            None,
        )


@untraced
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, impl: Impl = "auto") -> Tensor:
    """y = x W^T + b with 8-bit products, forward and backward.

    Args:
        x: [M, K] float32 or bfloat16; K a multiple of 16.
        weight: [N, K], dtype of x; N a multiple of 16.
        bias: [N], dtype of x, or None.
        impl: "reference" emulates on any device; otherwise a GPU multiplies 8-bit floats, which Triton makes, and a CPU emulates.

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
    return _Fp8Linear.apply(x, weight, bias, native, impl)
