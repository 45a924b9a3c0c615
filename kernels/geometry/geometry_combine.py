r"""The output side of a mixture of geometry experts: three tangent vectors and a gate become one row, in one pass.

    y = g_E u_E + g_S kappa u_S / |u_S| + g_H f_H,   g = softmax(logits)
    f_H = exp_0(u_H), or exp_0(u_H) (+)_c b with a Moebius bias b

exp_0 is the exponential map of the Poincare ball of curvature -c. It saturates: tanh(5) is 1 in bfloat16, and a row out
there gets no radial gradient at all. So u_H is first cut to sqrt(c) |u_H| <= clip, and f_H stays at tanh(clip) of the way
to the boundary. A spherical row shorter than 1e-15 has no direction: it gives 0 and no gradient.

Shapes: u [3, M, D] (E, S, H), logits [M, 3] float32, kappa and c [] float32, b [D], y [M, D]. With `expert` set, u is
[1, M, D], that expert's alone, and y = g_k F_k: what a router that sends a token to one expert needs.

combine_backward.py has the gradients. Only per-row scalars couple the columns, so both passes read and write every element
once: 4 rows forward, 7 backward. Arithmetic is float32. Saved for backward: the inputs. Column sums are partial sums of
each program, added in order.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.geometry.combine_backward import combine_backward
from armillary.kernels.geometry.combine_forward import combine_forward
from armillary.kernels.geometry.curvature import exp_scale_reference
from armillary.kernels.geometry.radial_map import NO_DIRECTION
from armillary.kernels.launch import FLOATS, Impl, check_tensor, refuse, use_triton
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
    """kappa and c as 0-d tensors; ValueError unless they and the others are what the maps take; `like` is [..., D]."""
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
