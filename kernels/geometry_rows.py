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
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.curvature import A_MAX, log_coefficients
from armillary.kernels.geometry_combine import MAX_DIM, programs, warps
from armillary.kernels.launch import FLOATS, INTERPRETER, Impl, Launch, check_tensor, refuse, settings, use_triton

__all__ = ["geometry_rows", "geometry_rows_reference"]


def log_scale(r2: Tensor, c: Tensor) -> Tensor:
    """artanh(a) / a of project and log_0 from r^2, in plain PyTorch; its derivative is accurate at 0 too."""
    a2 = c * r2
    small = a2 < 0.04
    inner = torch.where(small, a2, 0.0)
    series = torch.zeros_like(inner)
    for k in range(11, -1, -1):  # at 0.04 the next term is below float64's resolution
        series = series * inner + 1 / (2 * k + 1)
    a = torch.where(small, 0.5, a2).sqrt()
    return torch.where(small, series, a.clamp(max=A_MAX).atanh() / a)


def geometry_rows_reference(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, temperature: Tensor, c: Tensor, *, input_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch, any float dtype: the oracle of the tests and the CPU path."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    logits = rows @ gate_weight.to(wide).t()
    if gate_bias is not None:
        logits = logits + gate_bias.to(wide)
    scale = input_scale * log_scale(input_scale**2 * (rows * rows).sum(1), c.to(wide))
    one = torch.ones_like(scale)
    return x, logits / temperature.to(wide), torch.stack([one, one, scale])


@triton.jit
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
    A_MAX: tl.constexpr,
):  # one program: ROWS rows
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    valid = row < rows
    x = tl.load(x_ptr + row[:, None] * D + col[None, :], mask=valid[:, None] & (col < D)[None, :], other=0.0)
    x = x.to(tl.float32)
    s, p = log_coefficients(input_scale * input_scale * tl.sum(x * x, 1), tl.load(c_ptr), A_MAX)
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


@triton.jit
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
    A_MAX: tl.constexpr,
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
            s, p = log_coefficients(input_scale * input_scale * r2, c, A_MAX)
            pull = tl.load(dscale_ptr + 2 * rows + row) * input_scale * p
            dx += pull / tl.maximum(r2, 1e-24) * x
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


_READ = "not measured; compiled ahead of time for D = 768, 1024, 1536"

# num_warps is for rows of up to 1,024 columns; wider rows take proportionally more. ROWS share one read of the gate.
LAUNCH_FORWARD = {
    INTERPRETER: Launch({"ROWS": 4}, num_warps=4, source="Triton's interpreter"),
    80: Launch({"ROWS": 4}, num_warps=4, source=_READ),
    90: Launch({"ROWS": 4}, num_warps=4, source=_READ),
    100: Launch({"ROWS": 4}, num_warps=4, source=_READ),
}
LAUNCH_BACKWARD = {  # PROGRAMS: programs a multiprocessor, each of which leaves one partial sum
    INTERPRETER: Launch({"PROGRAMS": 3}, num_warps=4, source="Triton's interpreter"),
    80: Launch({"PROGRAMS": 4}, num_warps=4, source=_READ),
    90: Launch({"PROGRAMS": 4}, num_warps=4, source=_READ),
    100: Launch({"PROGRAMS": 4}, num_warps=4, source=_READ),
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
                x,
                gate_weight,
                gate_bias,
                temperature,
                c,
                logits,
                scale,
                input_scale,
                rows,
                D=dim,
                BLOCK_D=triton.next_power_of_2(dim),
                ROWS=tile,
                BIAS=gate_bias is not None,
                A_MAX=A_MAX,
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
                x,
                gate_weight,
                temperature,
                c,
                logits,
                *(None if g is None else g.contiguous() for g in (dy, dlogits, dscale)),
                dx,
                dweight,
                scalars,
                ctx.input_scale,
                rows,
                D=dim,
                BLOCK_D=triton.next_power_of_2(dim),
                LOGITS=dlogits is not None,
                SCALE=dscale is not None,
                DY=dy is not None,
                A_MAX=A_MAX,
                num_warps=warps(launch, dim),
            )
        scalars = scalars.sum(0)
        dbias = None if gate_bias is None else scalars[:3].to(gate_bias.dtype)
        return dx, dweight.sum(0).to(gate_weight.dtype), dbias, scalars[3], scalars[4], None


def check_rows(
    operation: str, x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, temperature: Tensor, input_scale: float
) -> None:
    """Raise ValueError unless the input and the gate are what the operation takes.

    Args:
        operation: Name for the error.
        x: [M, D].
        gate_weight: [3, D].
        gate_bias: [3] or None.
        temperature: [], > 0. The value of a tensor on a GPU is not looked at: the host would have to wait for it.
        input_scale: Positive.
    """
    check_tensor(operation, "x", x, ["M", "D"], dtypes=(*FLOATS, torch.float64))
    wide = torch.promote_types(x.dtype, torch.float32)
    dim = x.shape[1]
    if not 1 <= dim <= MAX_DIM:
        refuse(operation, "D", f"must be 1 to {MAX_DIM}", dim)
    check_tensor(operation, "gate_weight", gate_weight, [3, dim], like=x, dtypes=(x.dtype, wide))
    if gate_bias is not None:
        check_tensor(operation, "gate_bias", gate_bias, [3], like=x, dtypes=(x.dtype, wide))
    check_tensor(operation, "temperature", temperature, [], like=x, dtypes=(wide,))
    if not temperature.is_cuda and not float(temperature.detach()) > 0:
        refuse(operation, "temperature", "must be positive", float(temperature.detach()))
    if not input_scale > 0:
        refuse(operation, "input_scale", "must be positive", input_scale)


def geometry_rows(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    temperature: Tensor,
    c: Tensor,
    *,
    input_scale: float,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate logits and row scales of three geometry experts, from one read of their input.

    Args:
        x: [M, D], float32, bfloat16, float16, or float64 on the reference path. D at most 8,192.
        gate_weight: [3, D] (Euclidean, spherical, hyperbolic), in the dtype of x or float32.
        gate_bias: [3] likewise, or None.
        temperature: [] float32, > 0.
        c: [] float32, > 0: the ball has curvature -c.
        input_scale: Factor that brings x into the ball.
        impl: See `armillary.kernels.launch`. "triton" is differentiable once, "reference" any number of times.

    Returns:
        x, for the experts to read, so that dx is finished in one pass; logits [M, 3], divided by the temperature; scale
        [3, M], rows of 1, 1 and the factor of the hyperbolic expert's input. Logits and scale are float32.

    Raises:
        ValueError: Wrong shape, dtype, device or layout; c or temperature <= 0 (looked at on a CPU only).

    Source:
        Galaxy-Walker (arXiv:2503.18578), equations 6 and 7.
    """
    name = "geometry_rows"
    check_rows(name, x, gate_weight, gate_bias, temperature, input_scale)
    check_tensor(name, "c", c, [], like=x, dtypes=(temperature.dtype,))
    if not c.is_cuda and not float(c.detach()) > 0:
        refuse(name, "c", "must be positive", float(c.detach()))
    if not use_triton(name, impl, x):
        return geometry_rows_reference(x, gate_weight, gate_bias, temperature, c, input_scale=input_scale)
    return _GeometryRows.apply(x, gate_weight, gate_bias, temperature, c, float(input_scale))
