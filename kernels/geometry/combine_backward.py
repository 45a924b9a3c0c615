r"""Backward kernel of the mixture of geometry experts (geometry_combine.py), 7 rows of traffic.

With r = |u|, G = dL/dy, t = tanh(a) / a, a = sqrt(c) r, q = r dt/dr (see curvature.py):

    du_E = g_E G                               dlogit_i = g_i (G . f_i - sum_j g_j G . f_j)
    du_S = g_S kappa / r (G - (G . u) u / r^2)         dkappa = sum_rows g_S G . u_S / r
    du_H = g_H (t G + q (G . u) u / r^2)               dc     = sum_rows g_H (G . u) q / (2 c)

and with the Moebius bias, h = t u, d = h . b, n = |h|^2, m = |b|^2, A = 1 + 2 c d + c m, B = 1 - c n = sech^2 a,
N = 1 + 2 c d + c^2 n m, f = (A h + B b) / N, the derivatives of G . f for d, n, m and c take the place of G . u:

    L_d = 2c (G.h - G.f) / N        L_n = (-c G.b - c^2 m G.f) / N        L_m = (c G.h - c^2 n G.f) / N
    L_c = ((2d + m) G.h - n G.b - (2d + 2cnm) G.f) / N
    dh = A / N G + L_d b + 2 L_n h,   db = B / N G + L_d h + 2 L_m b

A program walks over every num_programs-th row and keeps its sums over the rows (db, dkappa, dc, and the column sums of du
that the bias before the map wants) in registers until the end: one partial sum a program. Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.geometry.combine_forward import READ, clipped_exp, inverse_norm, softmax_of_three
from armillary.kernels.launch import INTERPRETER, Launch, settings
from armillary.kernels.rows import programs, warps

__all__ = ["combine_backward"]


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
        g0, g1, g2 = softmax_of_three(logit_ptr + row * 3)
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
            inverse = inverse_norm(tl.sum(u * u, 0))
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
            t, q, sech2 = clipped_exp(r2, c, clip)
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


LAUNCH = {  # PROGRAMS: programs a multiprocessor, as few as keep the memory busy: each leaves one partial sum
    INTERPRETER: Launch({"PROGRAMS": 3}),
    80: Launch({"PROGRAMS": 4}, source=READ.format(80, 128)),
    90: Launch({"PROGRAMS": 4}, source=READ.format(80, 128)),
    100: Launch({"PROGRAMS": 4}, source=READ.format(80, 126)),
}


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
    launch = settings(LAUNCH, u)
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
            *(dy, u, logits, kappa, c, moebius_bias),
            *(du, dlogits, sums, db, scalars, clip, rows),
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
