r"""The input side of a mixture of geometry experts: gate logits and the hyperbolic row scale, in one read of x.

    logits = (x Wg^T + bg) / tau
    v = log_0(project(i x)) = s x,   s = i artanh(a) / a,   a = min(sqrt(c) i |x|, A_MAX)

The hyperbolic expert lives on the Poincare ball of curvature -c, and a row of a LayerNorm has norm sqrt(D), far outside
it: the input scale i brings the row in (0.5 / sqrt(D) puts it at radius 0.5), what is still outside is projected onto the
outermost shell, and log_0 takes the point to the tangent space at 0. All three are one factor s of the row, which
commutes with a linear layer: v W^T = s (x W^T), so that three experts share one GEMM over x.

Shapes: x [M, D]; Wg [3, D], bg [3] or None; tau and c [] float32; logits [M, 3] and scale [3, M] float32, whose rows are
1, 1 and s, as `up_projection` takes them. The operation returns x as well: the experts read that one, so that its
gradient arrives here and dx is finished in one pass, with p = r dlog-scale/dr of curvature.py and L = dlogits / tau:

    dx = dx' + i p / |x|^2 ds x + L Wg        dWg = L^T x      dbg = sum_rows L
    dtau = -sum_rows logits . L               dc = sum_rows ds i p / (2 c)

1 pass forward, 3 backward. Arithmetic is float32. Saved for backward: x and the logits (12 bytes a row); the parameters
are partial sums of each program, added in order.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.geometry.curvature import log_coefficients, log_scale_reference
from armillary.kernels.launch import FLOATS, INTERPRETER, Impl, Launch, check_tensor, refuse, settings, use_triton
from armillary.kernels.rows import MAX_WIDTH, programs, scalar, warps, wide

__all__ = ["geometry_rows", "geometry_rows_reference"]


def geometry_rows_reference(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, temperature: Tensor, c: Tensor, *, input_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch, any float dtype: the oracle of the tests and the CPU path."""
    rows = x.to(wide(x))
    logits = F.linear(rows, gate_weight.to(wide(x)), None if gate_bias is None else gate_bias.to(wide(x)))
    scale = input_scale * log_scale_reference(c * input_scale**2 * rows.square().sum(1))
    one = torch.ones_like(scale)
    return x, logits / temperature, torch.stack([one, one, scale])


@triton.jit(do_not_specialize=["rows"])
def _rows_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    temperature_ptr,
    c_ptr,
    logit_ptr,
    scale_ptr,
    input_scale,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
):  # one program: ROWS rows
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    valid = row < rows
    x = tl.load(x_ptr + row[:, None] * D + col[None, :], mask=valid[:, None] & (col < D)[None, :], other=0.0)
    x = x.to(tl.float32)
    s, p = log_coefficients(input_scale * input_scale * tl.sum(x * x, 1), tl.load(c_ptr))
    tl.store(scale_ptr + row, tl.full([ROWS], 1.0, tl.float32), mask=valid)
    tl.store(scale_ptr + rows + row, tl.full([ROWS], 1.0, tl.float32), mask=valid)
    tl.store(scale_ptr + 2 * rows + row, input_scale * s, mask=valid)
    temperature = tl.load(temperature_ptr)
    for k in tl.static_range(3):
        weight = tl.load(weight_ptr + k * D + col, mask=col < D, other=0.0).to(tl.float32)
        logit = tl.sum(x * weight[None, :], 1)
        if BIAS:
            logit += tl.load(bias_ptr + k).to(tl.float32)
        tl.store(logit_ptr + row * 3 + k, logit / temperature, mask=valid)


@triton.jit(do_not_specialize=["rows"])
def _rows_bwd_kernel(
    x_ptr,
    weight_ptr,
    temperature_ptr,
    c_ptr,
    logit_ptr,
    dy_ptr,
    dlogit_ptr,
    dscale_ptr,
    dx_ptr,
    dweight_ptr,
    scalar_ptr,
    input_scale,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOGITS: tl.constexpr,
    SCALE: tl.constexpr,
    DY: tl.constexpr,
):  # one program: every num_programs-th row; dweight [programs, 3, D], scalar [programs, 5]: dbias, dtemperature, dc
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_D)
    inside = col < D
    c = tl.load(c_ptr)
    cooling = 1.0 / tl.load(temperature_ptr)
    w0 = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + D + col, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + 2 * D + col, mask=inside, other=0.0).to(tl.float32)
    dw0 = tl.zeros([BLOCK_D], tl.float32)
    dw1 = tl.zeros([BLOCK_D], tl.float32)
    dw2 = tl.zeros([BLOCK_D], tl.float32)
    db0 = 0.0
    db1 = 0.0
    db2 = 0.0
    dtemperature = 0.0
    dc = 0.0
    for index in range(program, rows, tl.num_programs(0)):
        row = tl.full([], index, tl.int64)
        x = tl.load(x_ptr + row * D + col, mask=inside, other=0.0).to(tl.float32)
        dx = tl.zeros([BLOCK_D], tl.float32)
        if DY:
            dx += tl.load(dy_ptr + row * D + col, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            r2 = tl.sum(x * x, 0)
            s, p = log_coefficients(input_scale * input_scale * r2, c)
            pull = tl.load(dscale_ptr + 2 * rows + row) * input_scale * p
            dx += pull / tl.maximum(r2, 1e-30) * x
            dc += pull / (2.0 * c)
        if LOGITS:
            l0 = tl.load(dlogit_ptr + row * 3) * cooling
            l1 = tl.load(dlogit_ptr + row * 3 + 1) * cooling
            l2 = tl.load(dlogit_ptr + row * 3 + 2) * cooling
            dx += l0 * w0 + l1 * w1 + l2 * w2
            dw0 += l0 * x
            dw1 += l1 * x
            dw2 += l2 * x
            db0 += l0
            db1 += l1
            db2 += l2
            logit = logit_ptr + row * 3
            dtemperature -= l0 * tl.load(logit) + l1 * tl.load(logit + 1) + l2 * tl.load(logit + 2)
        tl.store(dx_ptr + row * D + col, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    dweight_ptr += program * 3 * D
    tl.store(dweight_ptr + col, dw0, mask=inside)
    tl.store(dweight_ptr + D + col, dw1, mask=inside)
    tl.store(dweight_ptr + 2 * D + col, dw2, mask=inside)
    scalar_ptr += program * 5
    tl.store(scalar_ptr, db0)
    tl.store(scalar_ptr + 1, db1)
    tl.store(scalar_ptr + 2, db2)
    tl.store(scalar_ptr + 3, dtemperature)
    tl.store(scalar_ptr + 4, dc)


_READ = "not measured; compiled ahead of time for D = 1024: {} registers, no spills up to D = 4096"

# num_warps is for rows of up to 1,024 columns; wider rows take proportionally more. ROWS share one read of the gate.
LAUNCH_FORWARD = {
    INTERPRETER: Launch({"ROWS": 4}),
    80: Launch({"ROWS": 4}, source=_READ.format(56)),
    90: Launch({"ROWS": 4}, source=_READ.format(56)),
    100: Launch({"ROWS": 4}, num_warps=8, source=_READ.format(40)),  # with 4 Triton 3.6 spills 8 bytes
}
LAUNCH_BACKWARD = {  # PROGRAMS: programs a multiprocessor, each of which leaves one partial sum
    INTERPRETER: Launch({"PROGRAMS": 3}),
    80: Launch({"PROGRAMS": 4}, source=_READ.format(95)),
    90: Launch({"PROGRAMS": 4}, source=_READ.format(95)),
    100: Launch({"PROGRAMS": 4}, source=_READ.format(96)),
}


class _GeometryRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_weight, gate_bias, temperature, c, input_scale):
        rows, dim = x.shape
        logits = torch.empty(rows, 3, dtype=torch.float32, device=x.device)
        scale = torch.empty(3, rows, dtype=torch.float32, device=x.device)
        if rows:
            launch = settings(LAUNCH_FORWARD, x)
            tile = launch.blocks["ROWS"]
            _rows_fwd_kernel[(triton.cdiv(rows, tile),)](
                *(x, gate_weight, gate_bias, temperature, c, logits, scale, input_scale, rows),
                D=dim,
                BLOCK_D=triton.next_power_of_2(dim),
                ROWS=tile,
                BIAS=gate_bias is not None,
                num_warps=warps(launch, dim),
            )
        ctx.save_for_backward(x, gate_weight, gate_bias, temperature, c, logits)
        ctx.input_scale = input_scale
        ctx.set_materialize_grads(False)
        return x.view_as(x), logits, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlogits, dscale):
        x, gate_weight, gate_bias, temperature, c, logits = ctx.saved_tensors
        rows, dim = x.shape
        launch = settings(LAUNCH_BACKWARD, x)
        count = programs(launch, x, rows)
        new = torch.empty if rows else torch.zeros
        dx = torch.empty_like(x)
        dweight = new(count, 3, dim, dtype=torch.float32, device=x.device)
        scalars = new(count, 5, dtype=torch.float32, device=x.device)
        if rows:
            _rows_bwd_kernel[(count,)](
                *(x, gate_weight, temperature, c, logits),
                *(None if g is None else g.contiguous() for g in (dy, dlogits, dscale)),
                *(dx, dweight, scalars, ctx.input_scale, rows),
                D=dim,
                BLOCK_D=triton.next_power_of_2(dim),
                LOGITS=dlogits is not None,
                SCALE=dscale is not None,
                DY=dy is not None,
                num_warps=warps(launch, dim),
            )
        scalars = scalars.sum(0)
        dbias = None if gate_bias is None else scalars[:3].to(gate_bias.dtype)
        return dx, dweight.sum(0).to(gate_weight.dtype), dbias, scalars[3], scalars[4], None


def check_gate(
    operation: str,
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    temperature: Tensor | float,
    input_scale: float,
) -> Tensor:
    """The temperature as a 0-d tensor; ValueError unless input and gate are what `geometry_rows` takes."""
    check_tensor(operation, "x", x, ["M", "D"], dtypes=(*FLOATS, torch.float64))
    dim, dtypes = x.shape[1], (x.dtype, wide(x))
    if not 1 <= dim <= MAX_WIDTH:
        refuse(operation, "D", f"must be 1 to {MAX_WIDTH}", dim)
    check_tensor(operation, "gate_weight", gate_weight, [3, dim], like=x, dtypes=dtypes)
    if gate_bias is not None:
        check_tensor(operation, "gate_bias", gate_bias, [3], like=x, dtypes=dtypes)
    if not input_scale > 0:
        refuse(operation, "input_scale", "must be positive", input_scale)
    return scalar(operation, "temperature", temperature, x, positive=True)


def geometry_rows(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    temperature: Tensor | float,
    c: Tensor | float,
    *,
    input_scale: float,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate logits and row scales of three geometry experts, from one read of their input.

    Args:
        x: [M, D], float32, bfloat16, float16, or float64 on the reference path. D at most 8,192.
        gate_weight: [3, D] (Euclidean, spherical, hyperbolic), in the dtype of x or float32.
        gate_bias: [3] likewise, or None.
        temperature: A number or a 0-d float32 or float64 tensor, > 0.
        c: Likewise: the ball has curvature -c.
        input_scale: Factor that brings x into the ball.
        impl: See `armillary.kernels.launch`. "triton" is differentiable once, "reference" any number of times.

    Returns:
        x, for the experts to read, so that dx is finished in one pass; logits [M, 3], divided by the temperature; scale
        [3, M], rows of 1, 1 and the factor of the hyperbolic expert's input. Logits and scale are float32.

    Raises:
        ValueError: Wrong shape, dtype, device or layout; c or temperature <= 0 (not looked at in a tensor on a GPU).

    Source:
        Galaxy-Walker (arXiv:2503.18578), equations 6 and 7.
    """
    name = "geometry_rows"
    temperature = check_gate(name, x, gate_weight, gate_bias, temperature, input_scale)
    c = scalar(name, "c", c, x, positive=True)
    if not use_triton(name, impl, x):
        return geometry_rows_reference(x, gate_weight, gate_bias, temperature, c, input_scale=input_scale)
    return _GeometryRows.apply(x, gate_weight, gate_bias, temperature, c, float(input_scale))
