"""Kernels of `residual_norm`, forward and backward."""

import triton
import triton.language as tl

from armillary.kernels.launch import INTERPRETER, Launch

__all__ = ["LAUNCH", "residual_norm_bwd_kernel", "residual_norm_fwd_kernel", "row_shape"]


@triton.jit
def _packed_row(token, sample_ptr, place_ptr, start_ptr):
    """Row of a token in a branch's packed rows; negative where its sample skips the branch."""
    row = token
    if start_ptr is not None:
        start = tl.load(start_ptr + tl.load(sample_ptr + token))
        row = tl.where(start < 0, -1, start + tl.load(place_ptr + token)).to(tl.int64)
    return row


# `ran` and `runs` are rows of one tensor for all branches and begin anywhere: no variant for each alignment.
@triton.jit(do_not_specialize_on_alignment=["ran_ptr", "runs_ptr"])
def residual_norm_fwd_kernel(
    x_ptr,  # [tokens, width]
    y_ptr,  # [rows of the last branch, width]; None: x' is x
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    out_ptr,  # x' [tokens, width]
    n_ptr,  # [rows of the next branch, width]; None: no norm
    mean_ptr,  # float32 [rows of the next branch]; None: not wanted
    rstd_ptr,  # likewise
    sample_ptr,  # int32 [tokens]
    place_ptr,  # int32 [tokens]
    ran_ptr,  # int32 [samples], `start` of the last branch; None: all ran it, with factor 1
    scale_ptr,  # float32 [samples]
    runs_ptr,  # int32 [samples], `start` of the next branch; None: all run it
    width,
    eps,
    COLUMNS: tl.constexpr,
):
    """One program: one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    real = column < width
    x = tl.load(x_ptr + token * width + column, mask=real, other=0.0).to(tl.float32)
    if y_ptr is not None:
        row = _packed_row(token, sample_ptr, place_ptr, ran_ptr)
        y = tl.load(y_ptr + row * width + column, mask=real & (row >= 0), other=0.0).to(tl.float32)
        if ran_ptr is not None:
            y *= tl.load(scale_ptr + tl.load(sample_ptr + token))
        rounded = (x + y).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * width + column, rounded, mask=real)
        x = rounded.to(tl.float32)
    if n_ptr is not None:
        row = _packed_row(token, sample_ptr, place_ptr, runs_ptr)
        weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=real, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=0) / width
        mean += tl.sum(tl.where(real, x - mean, 0.0), axis=0) / width  # what rounding left
        centred = tl.where(real, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
        n = centred * rstd * weight + bias
        tl.store(n_ptr + row * width + column, n.to(n_ptr.dtype.element_ty), mask=real & (row >= 0))
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, mask=row >= 0)
            tl.store(rstd_ptr + row, rstd, mask=row >= 0)


@triton.jit(do_not_specialize_on_alignment=["ran_ptr", "runs_ptr"])
def residual_norm_bwd_kernel(
    d_out_ptr,  # [tokens, width]; None: 0
    d_n_ptr,  # [rows of the next branch, width]; None: 0
    out_ptr,  # x' [tokens, width]
    weight_ptr,  # [width]
    mean_ptr,  # float32 [rows of the next branch]
    rstd_ptr,  # likewise
    d_x_ptr,  # [tokens, width]; None: not wanted
    d_y_ptr,  # [rows of the last branch, width]; None: not wanted, or d_x where all ran it
    sums_ptr,  # float32 [2, programs, width], of d_weight and d_bias; None: not wanted
    y_sums_ptr,  # float32 [programs, width], of d_y; None: not wanted
    sample_ptr,  # the maps as in the forward kernel
    place_ptr,
    ran_ptr,
    scale_ptr,
    runs_ptr,
    tokens,
    width,
    COLUMNS: tl.constexpr,
):
    """One program: every n-th token, n the number of programs, and its share of the sums."""
    column = tl.arange(0, COLUMNS)
    real = column < width
    if d_n_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
        d_weight = tl.zeros([COLUMNS], tl.float32)
        d_bias = tl.zeros([COLUMNS], tl.float32)
    if y_sums_ptr is not None:
        y_sum = tl.zeros([COLUMNS], tl.float32)
    for index in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        d_x = tl.zeros([COLUMNS], tl.float32)
        if d_out_ptr is not None:
            d_x = tl.load(d_out_ptr + token * width + column, mask=real, other=0.0).to(tl.float32)
        if d_n_ptr is not None:
            row = _packed_row(token, sample_ptr, place_ptr, runs_ptr)
            if row >= 0:
                d_n = tl.load(d_n_ptr + row * width + column, mask=real, other=0.0).to(tl.float32)
                x = tl.load(out_ptr + token * width + column, mask=real, other=0.0).to(tl.float32)
                rstd = tl.load(rstd_ptr + row)
                normal = (x - tl.load(mean_ptr + row)) * rstd
                g = d_n * weight
                along_one = tl.sum(g, axis=0) / width
                along_normal = tl.sum(g * normal, axis=0) / width
                d_x += (g - along_one - normal * along_normal) * rstd
                d_weight += d_n * normal
                d_bias += d_n
        if d_x_ptr is not None:
            tl.store(d_x_ptr + token * width + column, d_x.to(d_x_ptr.dtype.element_ty), mask=real)
        if d_y_ptr is not None:
            row = _packed_row(token, sample_ptr, place_ptr, ran_ptr)
            d_y = tl.where(row >= 0, d_x * tl.load(scale_ptr + tl.load(sample_ptr + token)), 0.0)
            tl.store(d_y_ptr + row * width + column, d_y.to(d_y_ptr.dtype.element_ty), mask=real & (row >= 0))
            if y_sums_ptr is not None:
                y_sum += d_y
        elif y_sums_ptr is not None:
            y_sum += d_x
    if sums_ptr is not None:
        to = sums_ptr + tl.program_id(0).to(tl.int64) * width + column
        tl.store(to, d_weight, mask=real)
        tl.store(to + tl.num_programs(0).to(tl.int64) * width, d_bias, mask=real)
    if y_sums_ptr is not None:
        tl.store(y_sums_ptr + tl.program_id(0).to(tl.int64) * width + column, y_sum, mask=real)


# ELEMENTS: of a row, for each warp. WARPS: of the backward kernel in all, 20 for each multiprocessor of the largest
# such device, which up to 102 registers lets in at once; each of its programs writes partial sums.
_SOURCE = (
    "not measured; compiled ahead of time for bf16 rows of 1024 and 384: {} registers forward and backward, no spills"
)
LAUNCH = {
    INTERPRETER: Launch({"ELEMENTS": 256, "WARPS": 12}),
    80: Launch({"ELEMENTS": 256, "WARPS": 108 * 20}, source=_SOURCE.format("38 and 90")),
    90: Launch({"ELEMENTS": 256, "WARPS": 132 * 20}, source=_SOURCE.format("32 and 89")),
    100: Launch({"ELEMENTS": 256, "WARPS": 148 * 20}, source=_SOURCE.format("32 and 92")),
}


def row_shape(launch: Launch, width: int) -> dict[str, int]:
    """Size of a row and warps of its program."""
    columns = triton.next_power_of_2(width)
    return {"COLUMNS": columns, "num_warps": min(max(columns // launch.blocks["ELEMENTS"], 1), 16)}
