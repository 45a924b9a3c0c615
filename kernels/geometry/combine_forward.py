"""Forward kernel of the mixture of geometry experts (geometry_combine.py): one program a row, 4 rows of traffic.

Each expert's row couples its columns by |u| alone, and the Moebius bias by h . b as well, so a program sums its row in
registers once and writes y. What the backward kernel shares of the maps is here, too: the gates, 1 / r and the clipped
exponential map. Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.geometry.curvature import exp_coefficients, sech_squared
from armillary.kernels.launch import INTERPRETER, Launch, settings
from armillary.kernels.rows import warps

__all__ = ["combine_forward"]


@triton.jit
def softmax_of_three(logit_ptr):
    """The three gates of a row from its logits."""
    l0 = tl.load(logit_ptr).to(tl.float32)
    l1 = tl.load(logit_ptr + 1).to(tl.float32)
    l2 = tl.load(logit_ptr + 2).to(tl.float32)
    top = tl.maximum(l0, tl.maximum(l1, l2))
    e0, e1, e2 = tl.exp(l0 - top), tl.exp(l1 - top), tl.exp(l2 - top)
    total = e0 + e1 + e2
    return e0 / total, e1 / total, e2 / total


@triton.jit
def inverse_norm(r2):
    """1 / r, 0 for a row without direction."""
    return tl.where(r2 > 1e-30, tl.rsqrt(tl.maximum(r2, 1e-30)), 0.0)


@triton.jit
def clipped_exp(r2, c, clip):
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
    g0, g1, g2 = softmax_of_three(logit_ptr + row * 3)
    y = tl.zeros([BLOCK_D], tl.float32)
    if EXPERT == -1 or EXPERT == 0:
        y += g0 * tl.load(here, mask=inside, other=0.0).to(tl.float32)
        here += plane
    if EXPERT == -1 or EXPERT == 1:
        u = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        y += g1 * tl.load(kappa_ptr) * inverse_norm(tl.sum(u * u, 0)) * u
        here += plane
    if EXPERT == -1 or EXPERT == 2:
        u = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(c_ptr)
        r2 = tl.sum(u * u, 0)
        t, q, sech2 = clipped_exp(r2, c, clip)
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


READ = (
    "not measured; compiled ahead of time for D = 1024: {} registers, {} with a Moebius bias, no spills up to D = 4096"
)

LAUNCH = {  # num_warps is for rows of up to 1,024 columns; wider rows take proportionally more
    INTERPRETER: Launch(num_warps=1),
    80: Launch(num_warps=1, source=READ.format(96, 96)),
    90: Launch(num_warps=1, source=READ.format(96, 128)),
    100: Launch(num_warps=1, source=READ.format(72, 123)),
}


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
            *(u, logits, kappa, c, moebius_bias, y, clip, rows),
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            EXPERT=-1 if expert is None else expert,
            MOEBIUS=moebius_bias is not None,
            num_warps=warps(settings(LAUNCH, u), dim),
        )
    return y
