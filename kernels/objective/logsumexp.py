r"""Log-sum-exp of logits along rows and, over chunks of rows, along columns: what softmax and Sinkhorn need, in one read.

    row_logsumexp       h_r = max_v z_rv,  l_r = log sum_v exp(z_rv - h_r)              z = x + bias
    column_logsumexp_   sums_v <- log(exp(sums_v) + sum_r exp((z_rv - h_r) - l_r))      h = l = 0 where absent

h + l is the log-sum-exp of a row. They are kept apart because z - h is exact near the maximum, where at large logits the
rounding of h + l would be an error of every probability.

Shapes: x [R, V] float32, bfloat16 or float16; bias, sums [V], rows = (h, l) [2, R] float32. Arithmetic is float32. Every
lane of a program keeps a running maximum and a sum of exponentials below it, so that no logits in float32 are ever in
memory and an element costs one exponential; lanes are joined at the end, in a fixed order. No gradients.

-inf is a logit like any other; a NaN or +inf makes its row (or its column) NaN, as it does in a softmax.
"""

# Triton reads the annotations of a kernel's arguments, so they stay bare:

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import FLOATS, INTERPRETER, Impl, Launch, check_tensor, settings, use_triton

__all__ = ["column_logsumexp_", "column_logsumexp_reference", "row_logsumexp", "row_logsumexp_reference"]

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that -inf minus a running maximum is never NaN


def row_logsumexp_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch, in any float dtype: [2, R] in at least float32."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    z = z if bias is None else z + bias
    high = z.amax(1).clamp(min=torch.finfo(z.dtype).min)
    return torch.stack([high, (z - high[:, None]).exp().sum(1).log()])


def column_logsumexp_reference(
    sums: Tensor, x: Tensor, bias: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """What `column_logsumexp_` leaves in `sums`, in plain PyTorch and any float dtype."""
    z = x.to(sums.dtype)
    z = z if bias is None else z + bias
    z = z if rows is None else z - rows[0, :, None] - rows[1, :, None]
    out = torch.cat([sums[None], z]).logsumexp(0)
    return torch.where(out == torch.inf, torch.nan, out)


@triton.jit
def add_exponential(high, total, x):
    """Running maximum `high` and sum `total` of exp(x - high) after one more x, element by element, float32.

    Start with LOWEST and 0. A NaN ends up in `total`; +inf in `high`, where exp(high - high) makes NaN of it.
    """
    e = tl.exp(-tl.abs(x - high))
    above = x > high
    return tl.where(above, x, high), tl.where(above, total * e + 1.0, total + e)


@triton.jit
def row_scan(row_ptr, bias_ptr, columns, BLOCK: tl.constexpr):
    """Maximum h and l of a row of logits plus `bias_ptr`, which may be None: two float32 scalars."""
    high = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        x = tl.load(row_ptr + at, mask=inside, other=-float("inf")).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
        high, total = add_exponential(high, total, x)
    top = tl.max(high, axis=0)
    return top, tl.log(tl.sum(total * tl.exp(high - top), axis=0))


@triton.jit
def _row_logsumexp_kernel(x_ptr, bias_ptr, out_ptr, columns, BLOCK: tl.constexpr):  # one program: one row
    row = tl.program_id(0).to(tl.int64)
    high, log_total = row_scan(x_ptr + row * columns, bias_ptr, columns, BLOCK)
    tl.store(out_ptr + row, high)
    tl.store(out_ptr + tl.num_programs(0) + row, log_total)


@triton.jit
def _column_logsumexp_kernel(
    x_ptr,  # [R, V]
    bias_ptr,  # [V] or None
    rows_ptr,  # float32 [2, R] or None
    sums_ptr,  # float32 [V]
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # one program: COLUMNS columns, all rows
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    bias = tl.zeros([COLUMNS], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * columns + at[None, :]
        x = tl.load(x_ptr + place, mask=there, other=-float("inf")).to(tl.float32) + bias[None, :]
        if rows_ptr is not None:
            x -= tl.load(rows_ptr + row, mask=row < rows, other=0.0)[:, None]
            x -= tl.load(rows_ptr + rows + row, mask=row < rows, other=0.0)[:, None]
        high, total = add_exponential(high, total, x)
    top = tl.max(high, axis=0)
    new = tl.sum(total * tl.exp(high - top[None, :]), axis=0)
    old = tl.load(sums_ptr + at, mask=inside, other=0.0)
    both = tl.where(old > top, old, top)
    tl.store(sums_ptr + at, both + tl.log(new * tl.exp(top - both) + tl.exp(old - both)), mask=inside)


_COMPILED = "not measured; compiled ahead of time for bf16:"
ROW_LAUNCH = {
    INTERPRETER: Launch({"BLOCK": 64}),
    80: Launch({"BLOCK": 4096}, num_warps=16, source=f"{_COMPILED} 40 registers, no spills"),
    90: Launch({"BLOCK": 4096}, num_warps=16, source=f"{_COMPILED} 40 registers, no spills"),
    100: Launch({"BLOCK": 4096}, num_warps=16, source=f"{_COMPILED} 39 registers, no spills"),
}
COLUMN_LAUNCH = {
    INTERPRETER: Launch({"ROWS": 4, "COLUMNS": 64}),
    80: Launch({"ROWS": 16, "COLUMNS": 128}, source=f"{_COMPILED} 72 registers, no spills"),
    90: Launch({"ROWS": 16, "COLUMNS": 128}, source=f"{_COMPILED} 72 registers, no spills"),
    100: Launch({"ROWS": 16, "COLUMNS": 128}, source=f"{_COMPILED} 78 registers, no spills"),
}


@torch.no_grad()
def row_logsumexp(x: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """Log-sum-exp of every row; no gradient.

    Args:
        x: [R, V] logits, contiguous, V at least 1.
        bias: [V] float32, added to every row; none if absent.
        impl: See `armillary.kernels.launch`.

    Returns:
        [2, R] float32 (float64 for float64 logits): h and l, whose sum is the log-sum-exp. In a row of -inf, h is the
        lowest finite number and l is -inf; l is NaN where a row holds NaN or +inf.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or layout.
    """
    name = "row_logsumexp"
    check_tensor(name, "x", x, ["R", "V"])
    if bias is not None:
        check_tensor(name, "bias", bias, x.shape[1:], like=x)
    if not use_triton(name, impl, x):
        return row_logsumexp_reference(x, bias)
    if bias is not None:
        check_tensor(name, "bias", bias, x.shape[1:], dtypes=FLOATS)
    out = torch.empty(2, len(x), dtype=torch.float32, device=x.device)
    if len(x):
        row = settings(ROW_LAUNCH, x)
        _row_logsumexp_kernel[(len(x),)](x, bias, out, x.shape[1], **row.blocks, num_warps=row.num_warps)
    return out


@torch.no_grad()
def column_logsumexp_(
    sums: Tensor, x: Tensor, bias: Tensor | None = None, rows: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """Add the rows of a chunk to the log-sum-exp of every column, in place; no gradient.

    Args:
        sums: [V] float32 (float64 for float64 logits), contiguous: the result for the rows before, -inf at the start.
        x: [R, V] logits, contiguous.
        bias: [V] in the dtype of `sums`, added to every row; none if absent.
        rows: [2, R] in the dtype of `sums`, result of `row_logsumexp(x, bias)`: what is summed is then the softmax of
            the rows. None for their exponentials.
        impl: See `armillary.kernels.launch`.

    Returns:
        `sums`; a column with NaN or +inf in it is NaN.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or layout.
    """
    name = "column_logsumexp_"
    check_tensor(name, "x", x, ["R", "V"])
    wide = torch.promote_types(x.dtype, torch.float32)
    check_tensor(name, "sums", sums, x.shape[1:], like=x, dtypes=(wide,))
    if bias is not None:
        check_tensor(name, "bias", bias, x.shape[1:], like=x, dtypes=(wide,))
    if rows is not None:
        check_tensor(name, "rows", rows, [2, len(x)], like=x, dtypes=(wide,))
    if not use_triton(name, impl, x):
        return sums.copy_(column_logsumexp_reference(sums, x, bias, rows))
    if x.numel():
        row = settings(COLUMN_LAUNCH, x)
        grid = (triton.cdiv(x.shape[1], row.blocks["COLUMNS"]),)
        _column_logsumexp_kernel[grid](x, bias, rows, sums, *x.shape, **row.blocks, num_warps=row.num_warps)
    return sums
