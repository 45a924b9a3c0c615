r"""The output side of a mixture of geometry experts: three tangent vectors and a gate become one row, in one pass.

    y = g_E u_E + g_S kappa u_S / |u_S| + g_H f_H,   g = softmax(logits)
    f_H = exp_0(u_H), or exp_0(u_H) (+)_c b with a Moebius bias b

exp_0 is the exponential map of the Poincare ball of curvature -c. It saturates: tanh(5) is 1 in bfloat16, and a row out
there gets no radial gradient at all. So u_H is first cut to sqrt(c) |u_H| <= clip, and f_H stays at tanh(clip) of the way
to the boundary. A spherical row shorter than 1e-15 has no direction: it gives 0 and no gradient.

Shapes: u [3, M, D] (E, S, H), logits [M, 3] float32, kappa and c [] float32, b [D], y [M, D]. With `expert` set, u is
[1, M, D], that expert's alone, and y = g_k F_k: what a router that sends a token to one expert needs.

Backward, with r = |u|, G = dL/dy, t = tanh(a) / a, a = sqrt(c) r, q = r dt/dr (see curvature.py):

    du_E = g_E G                               dlogit_i = g_i (G . f_i - sum_j g_j G . f_j)
    du_S = g_S kappa / r (G - (G . u) u / r^2)         dkappa = sum_rows g_S G . u_S / r
    du_H = g_H (t G + q (G . u) u / r^2)               dc     = sum_rows g_H (G . u) q / (2 c)

and with the Moebius bias, h = t u, d = h . b, n = |h|^2, m = |b|^2, A = 1 + 2 c d + c m, B = 1 - c n = sech^2 a,
N = 1 + 2 c d + c^2 n m, f = (A h + B b) / N, the derivatives of G . f for d, n, m and c take the place of G . u:

    L_d = 2c (G.h - G.f) / N        L_n = (-c G.b - c^2 m G.f) / N        L_m = (c G.h - c^2 n G.f) / N
    L_c = ((2d + m) G.h - n G.b - (2d + 2cnm) G.f) / N
    dh = A / N G + L_d b + 2 L_n h,   db = B / N G + L_d h + 2 L_m b

Only per-row scalars couple the columns, so both passes read and write every element once: 4 rows forward, 7 backward.
Arithmetic is float32. Saved for backward: the inputs. Column sums are partial sums of each program, added in order.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.geometry.curvature import exp_coefficients, exp_scale_reference, sech_squared
from armillary.kernels.geometry.radial_map import NO_DIRECTION
from armillary.kernels.launch import FLOATS, INTERPRETER, Impl, Launch, check_tensor, refuse, settings, use_triton
from armillary.kernels.rows import MAX_WIDTH, scalar, wide

__all__ = ["CLIP", "EXPERTS", "geometry_combine", "geometry_combine_reference"]

EXPERTS = ("euclidean", "spherical", "hyperbolic")
CLIP = 2.3
"""Default of `clip`: tanh(2.3) = 0.98, near the boundary and inside it in any dtype (arXiv:2107.11472)."""


def _exp_scale(a2: Tensor, clip: float) -> Tensor:
    """t of the clipped exponential map from a^2, differentiable everywhere but at the clip."""
    if clip == math.inf:
        return exp_scale_reference(a2)
    beyond = a2 > clip * clip
    t = exp_scale_reference(torch.where(beyond, clip * clip, a2))
    return torch.where(beyond, t * clip * torch.where(beyond, a2, 1.0).rsqrt(), t)


def geometry_combine_reference(
    u: Tensor,
    logits: Tensor,
    kappa: Tensor,
    c: Tensor,
    moebius_bias: Tensor | None = None,
    *,
    expert: int | None = None,
    clip: float = CLIP,
) -> Tensor:
    """The same in plain PyTorch, any float dtype: the oracle of the tests and the CPU path."""
    gates = logits.softmax(-1)
    y = torch.zeros((), dtype=wide(u), device=u.device)
    for plane, k in zip(u.to(wide(u)), range(3) if expert is None else (expert,), strict=True):
        r2 = (plane * plane).sum(-1, keepdim=True)
        if k == 0:
            f = plane
        elif k == 1:
            long = r2 > NO_DIRECTION
            f = kappa * torch.where(long, plane, 0.0) * torch.where(long, r2, 1.0).rsqrt()
        else:
            f = _exp_scale(c * r2, clip) * plane
            if moebius_bias is not None:
                b = moebius_bias.to(wide(u))
                d, n, m = (f * b).sum(-1, keepdim=True), (f * f).sum(-1, keepdim=True), (b * b).sum()
                f = ((1 + 2 * c * d + c * m) * f + (1 - c * n) * b) / (1 + 2 * c * d + c * c * n * m)
        y = y + gates[:, k : k + 1] * f
    return y.to(u.dtype)


@triton.jit
def _softmax_of_three(logit_ptr):
    l0 = tl.load(logit_ptr).to(tl.float32)
    l1 = tl.load(logit_ptr + 1).to(tl.float32)
    l2 = tl.load(logit_ptr + 2).to(tl.float32)
    top = tl.maximum(l0, tl.maximum(l1, l2))
    e0, e1, e2 = tl.exp(l0 - top), tl.exp(l1 - top), tl.exp(l2 - top)
    total = e0 + e1 + e2
    return e0 / total, e1 / total, e2 / total


@triton.jit
def _inverse_norm(r2):
    return tl.where(r2 > 1e-30, tl.rsqrt(tl.maximum(r2, 1e-30)), 0.0)


@triton.jit
def _clipped_exp(r2, c, clip):
    """t, q and sech^2 of exp_0 at a row cut to sqrt(c) r <= clip; beyond, t falls as 1 / r and so q = -t."""
    a2 = c * r2
    inner = tl.minimum(a2, clip * clip)
    t, q = exp_coefficients(inner, 1.0)
    beyond = a2 > clip * clip
    t = tl.where(beyond, t * clip * tl.rsqrt(tl.maximum(a2, 1e-30)), t)
    return t, tl.where(beyond, -t, q), sech_squared(inner, 1.0)


# With top-1 routing the rows differ from step to step, and with them the alignment of an expert's logits: nothing is to be
# compiled again for that. The alignment of u follows from D.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["logit_ptr"])
def _combine_fwd_kernel(
    u_ptr,
    logit_ptr,
    kappa_ptr,
    c_ptr,
    bias_ptr,
    y_ptr,
    clip,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXPERT: tl.constexpr,
    MOEBIUS: tl.constexpr,
):  # one program: one row; EXPERT is the only one, or -1
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    inside = col < D
    plane = rows.to(tl.int64) * D  # elements of one expert
    here = u_ptr + row * D + col
    g0, g1, g2 = _softmax_of_three(logit_ptr + row * 3)
    y = tl.zeros([BLOCK_D], tl.float32)
    if EXPERT == -1 or EXPERT == 0:
        y += g0 * tl.load(here, mask=inside, other=0.0).to(tl.float32)
        here += plane
    if EXPERT == -1 or EXPERT == 1:
        u = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        y += g1 * tl.load(kappa_ptr) * _inverse_norm(tl.sum(u * u, 0)) * u
        here += plane
    if EXPERT == -1 or EXPERT == 2:
        u = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(c_ptr)
        r2 = tl.sum(u * u, 0)
        t, q, sech2 = _clipped_exp(r2, c, clip)
        if MOEBIUS:
            b = tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
            m = tl.sum(b * b, 0)
            d = t * tl.sum(u * b, 0)
            n = t * t * r2
            scale = g2 / (1.0 + 2.0 * c * d + c * c * n * m)
            y += scale * (1.0 + 2.0 * c * d + c * m) * t * u + scale * sech2 * b
        else:
            y += g2 * t * u
    tl.store(y_ptr + row * D + col, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["logit_ptr"])
def _combine_bwd_kernel(
    dy_ptr,
    u_ptr,
    logit_ptr,
    kappa_ptr,
    c_ptr,
    bias_ptr,
    du_ptr,
    dlogit_ptr,
    du_sum_ptr,  # [programs, experts, D]
    db_ptr,  # [programs, D]
    scalar_ptr,  # [programs, 2]: dkappa, dc
    clip,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXPERT: tl.constexpr,
    MOEBIUS: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
):  # one program: every num_programs-th row
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_D)
    inside = col < D
    plane = rows.to(tl.int64) * D
    kappa = tl.load(kappa_ptr)
    c = tl.load(c_ptr)
    sum_e = tl.zeros([BLOCK_D], tl.float32)
    sum_s = tl.zeros([BLOCK_D], tl.float32)
    sum_h = tl.zeros([BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_D], tl.float32)
    dkappa = 0.0
    dc = 0.0
    dm = 0.0
    if MOEBIUS:
        b = tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
        m = tl.sum(b * b, 0)
    for index in range(program, rows, tl.num_programs(0)):
        row = tl.full([], index, tl.int64)
        here = u_ptr + row * D + col
        there = du_ptr + row * D + col
        g0, g1, g2 = _softmax_of_three(logit_ptr + row * 3)
        grad = tl.load(dy_ptr + row * D + col, mask=inside, other=0.0).to(tl.float32)
        f0 = 0.0  # grad . f of each expert
        f1 = 0.0
        f2 = 0.0
        if EXPERT == -1 or EXPERT == 0:
            f0 = tl.sum(grad * tl.load(here, mask=inside, other=0.0).to(tl.float32), 0)
            du = g0 * grad
            tl.store(there, du.to(du_ptr.dtype.element_ty), mask=inside)
            if COLUMN_SUMS:
                sum_e += du
            here += plane
            there += plane
        if EXPERT == -1 or EXPERT == 1:
            u = tl.load(here, mask=inside, other=0.0).to(tl.float32)
            inverse = _inverse_norm(tl.sum(u * u, 0))
            along = tl.sum(grad * u, 0) * inverse
            f1 = kappa * along
            dkappa += g1 * along
            du = g1 * kappa * inverse * (grad - along * inverse * u)
            tl.store(there, du.to(du_ptr.dtype.element_ty), mask=inside)
            if COLUMN_SUMS:
                sum_s += du
            here += plane
            there += plane
        if EXPERT == -1 or EXPERT == 2:
            u = tl.load(here, mask=inside, other=0.0).to(tl.float32)
            r2 = tl.sum(u * u, 0)
            gu = tl.sum(grad * u, 0)
            t, q, sech2 = _clipped_exp(r2, c, clip)
            radial = q / tl.maximum(r2, 1e-30)
            if MOEBIUS:
                ub = tl.sum(u * b, 0)
                gb = tl.sum(grad * b, 0)
                d = t * ub
                n = t * t * r2
                a = 1.0 + 2.0 * c * d + c * m
                over = 1.0 / (1.0 + 2.0 * c * d + c * c * n * m)
                gh = t * gu
                f2 = (a * gh + sech2 * gb) * over
                l_d = 2.0 * c * (gh - f2) * over
                l_n = (-c * gb - c * c * m * f2) * over
                l_c = ((2.0 * d + m) * gh - n * gb - (2.0 * d + 2.0 * c * n * m) * f2) * over
                dh_u = a * over * gu + l_d * ub + 2.0 * l_n * t * r2
                du = g2 * (t * a * over * grad + t * l_d * b + (2.0 * t * t * l_n + radial * dh_u) * u)
                dc += g2 * (l_c + dh_u * q / (2.0 * c))
                db += g2 * (sech2 * over * grad + l_d * t * u)
                dm += g2 * (c * gh - c * c * n * f2) * over
            else:
                f2 = t * gu
                du = g2 * (t * grad + radial * gu * u)
                dc += g2 * gu * q / (2.0 * c)
            tl.store(there, du.to(du_ptr.dtype.element_ty), mask=inside)
            if COLUMN_SUMS:
                sum_h += du
        mean = g0 * f0 + g1 * f1 + g2 * f2
        tl.store(dlogit_ptr + row * 3, g0 * (f0 - mean))
        tl.store(dlogit_ptr + row * 3 + 1, g1 * (f1 - mean))
        tl.store(dlogit_ptr + row * 3 + 2, g2 * (f2 - mean))
    if COLUMN_SUMS:
        if EXPERT == -1:
            du_sum_ptr += program * 3 * D
            tl.store(du_sum_ptr + col, sum_e, mask=inside)
            tl.store(du_sum_ptr + D + col, sum_s, mask=inside)
            tl.store(du_sum_ptr + 2 * D + col, sum_h, mask=inside)
        else:
            tl.store(du_sum_ptr + program * D + col, sum_e + sum_s + sum_h, mask=inside)
    if MOEBIUS:
        tl.store(db_ptr + program * D + col, db + 2.0 * dm * b, mask=inside)
    tl.store(scalar_ptr + program * 2, dkappa)
    tl.store(scalar_ptr + program * 2 + 1, dc)


_READ = (
    "not measured; compiled ahead of time for D = 1024: {} registers, {} with a Moebius bias, no spills up to D = 4096"
)

# num_warps is for rows of up to 1,024 columns; wider rows take proportionally more.
LAUNCH_FORWARD = {
    INTERPRETER: Launch(num_warps=1),
    80: Launch(num_warps=1, source=_READ.format(96, 96)),
    90: Launch(num_warps=1, source=_READ.format(96, 128)),
    100: Launch(num_warps=1, source=_READ.format(72, 123)),
}
# PROGRAMS: programs a multiprocessor. Each leaves one partial sum, so they are as few as keep the memory busy.
LAUNCH_BACKWARD = {
    INTERPRETER: Launch({"PROGRAMS": 3}),
    80: Launch({"PROGRAMS": 4}, source=_READ.format(80, 128)),
    90: Launch({"PROGRAMS": 4}, source=_READ.format(80, 128)),
    100: Launch({"PROGRAMS": 4}, source=_READ.format(80, 126)),
}


def warps(launch: Launch, dim: int) -> int:
    """Warps for rows of `dim` columns, so that the registers a thread stay as the launch table has them."""
    return min(launch.num_warps * max(1, triton.next_power_of_2(dim) // 1024), 16)


def programs(launch: Launch, x: Tensor, rows: int) -> int:
    """Programs of a kernel that walks over the rows: as many as the device holds at a time, at most one a row."""
    multiprocessors = _multiprocessors(x.device.index or 0) if x.is_cuda else 1
    return max(1, min(launch.blocks["PROGRAMS"] * multiprocessors, rows))


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def combine_forward(
    u: Tensor,
    logits: Tensor,
    kappa: Tensor,
    c: Tensor,
    moebius_bias: Tensor | None,
    expert: int | None,
    clip: float,
) -> Tensor:
    """y [M, D] by the Triton kernel, without a gradient; callers have checked the arguments."""
    _, rows, dim = u.shape
    y = torch.empty(rows, dim, dtype=u.dtype, device=u.device)
    if rows:
        _combine_fwd_kernel[(rows,)](
            u,
            logits,
            kappa,
            c,
            moebius_bias,
            y,
            clip,
            rows,
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            EXPERT=-1 if expert is None else expert,
            MOEBIUS=moebius_bias is not None,
            num_warps=warps(settings(LAUNCH_FORWARD, u), dim),
        )
    return y


def combine_backward(
    dy: Tensor,
    u: Tensor,
    logits: Tensor,
    kappa: Tensor,
    c: Tensor,
    moebius_bias: Tensor | None,
    expert: int | None,
    clip: float,
    *,
    column_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients by the Triton kernel.

    Returns:
        du (as u), dlogits [M, 3], dkappa [], dc [], db (as moebius_bias) or None, and with `column_sums` the sums of du
        over the rows, [experts, D]; float32 where nothing else is said.
    """
    experts, rows, dim = u.shape
    launch = settings(LAUNCH_BACKWARD, u)
    count = programs(launch, u, rows)
    moebius = moebius_bias is not None and expert in (None, 2)

    def partial(*shape: int) -> Tensor:
        new = torch.empty if rows else torch.zeros
        return new(count, *shape, dtype=torch.float32, device=u.device)

    du = torch.empty_like(u)
    dlogits = torch.empty(rows, 3, dtype=torch.float32, device=u.device)
    sums = partial(experts, dim) if column_sums else None
    db = partial(dim) if moebius else None
    scalars = partial(2)
    if rows:
        _combine_bwd_kernel[(count,)](
            dy,
            u,
            logits,
            kappa,
            c,
            moebius_bias,
            du,
            dlogits,
            sums,
            db,
            scalars,
            clip,
            rows,
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            EXPERT=-1 if expert is None else expert,
            MOEBIUS=moebius,
            COLUMN_SUMS=column_sums,
            num_warps=warps(launch, dim),
        )
    dkappa, dc = scalars.sum(0).unbind()
    if moebius_bias is not None:
        bias_gradient = torch.zeros_like(moebius_bias) if db is None else db.sum(0).to(moebius_bias.dtype)
    else:
        bias_gradient = None
    return du, dlogits, dkappa, dc, bias_gradient, None if sums is None else sums.sum(0)


class _GeometryCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, logits, kappa, c, moebius_bias, expert, clip):
        ctx.save_for_backward(u, logits, kappa, c, moebius_bias)
        ctx.expert, ctx.clip = expert, clip
        return combine_forward(u, logits, kappa, c, moebius_bias, expert, clip)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, logits, kappa, c, bias = ctx.saved_tensors
        du, dlogits, dkappa, dc, db, _ = combine_backward(
            dy.contiguous(), u, logits, kappa, c, bias, ctx.expert, ctx.clip, column_sums=False
        )
        return du, dlogits, dkappa, dc, db, None, None


def check_maps(
    operation: str, like: Tensor, kappa: Tensor | float, c: Tensor | float, moebius_bias: Tensor | None, clip: float
) -> tuple[Tensor, Tensor]:
    """kappa and c as 0-d tensors; ValueError unless they and the others are what the maps take.

    Args:
        operation: Name for the error.
        like: [..., D], for device, dtype and width.
        kappa: A number or 0-d.
        c: Likewise, > 0. The value of a tensor on a GPU is not looked at: the host would have to wait for it.
        moebius_bias: [D] or None.
        clip: Positive.
    """
    if not 1 <= like.shape[-1] <= MAX_WIDTH:
        refuse(operation, "D", f"must be 1 to {MAX_WIDTH}", like.shape[-1])
    if moebius_bias is not None:
        dtypes = (like.dtype, wide(like))
        check_tensor(operation, "moebius_bias", moebius_bias, [like.shape[-1]], like=like, dtypes=dtypes)
    if not clip > 0:
        refuse(operation, "clip", "must be positive", clip)
    return (
        scalar(operation, "kappa", kappa, like, positive=False),
        scalar(operation, "c", c, like, positive=True),
    )


def geometry_combine(
    u: Tensor,
    logits: Tensor,
    kappa: Tensor | float,
    c: Tensor | float,
    moebius_bias: Tensor | None = None,
    *,
    expert: int | None = None,
    clip: float = CLIP,
    impl: Impl = "auto",
) -> Tensor:
    """Mix the Euclidean, spherical and hyperbolic expert's output by a softmax gate.

    Args:
        u: [3, M, D] tangent vectors: Euclidean, spherical, hyperbolic; float32, bfloat16, float16, or float64 on the
            reference path. [1, M, D] with `expert`. D at most 8,192.
        logits: [M, 3] of the gate, already divided by its temperature, float32.
        kappa: Radius of the sphere, a number or a 0-d float32 or float64 tensor.
        c: Likewise, > 0: the ball has curvature -c.
        moebius_bias: [D] point of the ball added to the hyperbolic expert's, in the dtype of u or float32; or None.
        expert: 0, 1 or 2 where every row goes to that expert alone: y = softmax(logits)[expert] F(u).
        clip: Where sqrt(c) |u_H| is cut; math.inf for the plain exponential map.
        impl: See `armillary.kernels.launch`. "triton" is differentiable once, "reference" any number of times.

    Returns:
        [M, D] in the dtype of u.

    Raises:
        ValueError: Wrong shape, dtype, device or layout; c <= 0 (not looked at in a tensor on a GPU); clip <= 0.

    Source:
        Galaxy-Walker (arXiv:2503.18578), equations 4 to 7; Moebius addition: Ganea et al. 2018 (arXiv:1805.09112).
    """
    name = "geometry_combine"
    if expert not in (None, 0, 1, 2):
        refuse(name, "expert", "must be 0, 1, 2 or None", expert)
    check_tensor(name, "u", u, [3 if expert is None else 1, "M", "D"], dtypes=(*FLOATS, torch.float64))
    rows = u.shape[1]
    check_tensor(name, "logits", logits, [rows, 3], like=u, dtypes=(wide(u),))
    kappa, c = check_maps(name, u, kappa, c, moebius_bias, clip)
    if not use_triton(name, impl, u):
        return geometry_combine_reference(u, logits, kappa, c, moebius_bias, expert=expert, clip=clip)
    return _GeometryCombine.apply(u, logits, kappa, c, moebius_bias, expert, float(clip))
