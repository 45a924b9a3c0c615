r"""Radial row maps of the Poincare ball and of the sphere: y = t(|x|^2, p) x.

Four maps of geometric deep learning stretch each row x along itself, by a factor that depends on its length r = |x| and
on one learnable parameter p. With a = sqrt(c) r in the ball of curvature -c, whose points have a < 1:

    kind          parameter   t
    exp0          c > 0       tanh(a) / a                  tangent space at 0 -> ball
    log0          c > 0       artanh(min(a, A_MAX)) / a    ball -> tangent space at 0
    project       c > 0       min(1, limit / a)            all of R^D -> ball
    sphere        kappa       kappa / r, 0 where r < 1e-15 all of R^D -> sphere of radius |kappa|

All gradients are one formula. A row's tangential part is stretched by t, its radial part by d(t r)/dr = t + q with
q = r dt/dr, and for the ball t depends on a alone, so that c dt/dc = q / 2. With G = dL/dy and x^ = x / r:

    dL/dx = t G + q (G . x^) x^        dL/dc = sum over rows of (G . x) q / (2 c)        dL/dkappa = sum of G . x^

    exp0      q = sech^2(a) - t
    log0      q = 1 / (1 - a^2) - t   inside, -t outside
    project   q = 0                   inside, -t outside
    sphere    q = -t                  (no radial part: the length of x is forgotten)

At x = 0 the first three are smooth (t = 1, q = 0: kernels/geometry/curvature.py has the series) and the sphere has no limit: such
rows give 0 with gradient 0. At the boundary: exp0 saturates, its rows round to the boundary and beyond for a > 9 in
float32 (4 in bfloat16); log0 takes points outside as if projected; `project` leaves a margin that the rounding of its
result's dtype cannot jump, so what it returns lies inside, and projecting again changes it by rounding at most.

x, y: [..., D], D <= 8,192; p: 0-d float32. Arithmetic float32 (float64 for float64, reference only); |x|^2 must be finite
in it. Saved for backward: x and p.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.geometry.curvature import (
    A_MAX,
    exp_coefficients,
    exp_scale_reference,
    log_coefficients,
    log_scale_reference,
)
from armillary.kernels.geometry.maps import RowMap, apply_map, check_map
from armillary.kernels.launch import INTERPRETER, Impl, Launch, refuse, use_triton
from armillary.kernels.rows import load_rows, row_tile, wide

__all__ = ["KINDS", "NO_DIRECTION", "Kind", "ball_limit", "radial_map", "radial_map_reference"]

Kind = Literal["exp0", "log0", "project", "sphere"]
KINDS: tuple[str, ...] = ("exp0", "log0", "project", "sphere")

NO_DIRECTION = 1e-30
"""|x|^2 up to which a row counts as 0 where its direction matters: 1 / |x|^2 still is a float32."""


def ball_limit(dtype: torch.dtype) -> float:
    """Greatest sqrt(c) |x| that `project` leaves: 1 - 2^-16, or a unit of the dtype below 1 where that is coarser."""
    return min(A_MAX, 1.0 - torch.finfo(dtype).eps)


def radial_map_reference(x: Tensor, parameter: Tensor, kind: Kind) -> Tensor:
    """The same in PyTorch: any float dtype, differentiable twice; arguments as `radial_map`."""
    rows = x.to(wide(x))
    r2 = rows.square().sum(-1, keepdim=True)
    if kind == "sphere":
        long = r2 > NO_DIRECTION
        direction = rows / torch.where(long, r2, 1.0).sqrt()
        return (parameter * torch.where(long, direction, 0.0)).to(x.dtype)
    a2 = parameter * r2
    if kind == "exp0":
        t = exp_scale_reference(a2)
    elif kind == "log0":
        t = log_scale_reference(a2)
    else:
        limit = ball_limit(x.dtype)
        outside = a2 > limit * limit
        t = torch.where(outside, limit * torch.where(outside, a2, 1.0).rsqrt(), 1.0)
    return (t * rows).to(x.dtype)


@triton.jit
def _stretch(r2, p, LIMIT: tl.constexpr, KIND: tl.constexpr):
    """t, q and 1 / r (0 for a row without direction) of the docstring."""
    directed = r2 > 1e-30
    inverse = tl.where(directed, 1.0 / tl.sqrt(tl.where(directed, r2, 1.0)), 0.0)
    if KIND == "exp0":
        t, q = exp_coefficients(r2, p)
    elif KIND == "log0":
        t, q = log_coefficients(r2, p)
    elif KIND == "project":
        a2 = p * r2
        outside = a2 > LIMIT * LIMIT
        t = tl.where(outside, LIMIT / tl.sqrt(tl.where(outside, a2, 1.0)), 1.0)
        q = tl.where(outside, -t, 0.0)
    else:
        t = p * inverse
        q = -t
    return t, q, inverse


@triton.jit
def _radial_map_fwd_kernel(
    x_ptr,
    parameter_ptr,
    y_ptr,
    rows,
    width,
    LIMIT: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # one program: ROWS rows
    _, at, inside = row_tile(rows, width, ROWS, BLOCK)
    x = load_rows(x_ptr, at, inside)
    t, _, _ = _stretch(tl.sum(x * x, 1, keep_dims=True), tl.load(parameter_ptr), LIMIT, KIND)
    tl.store(y_ptr + at, (t * x).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _radial_map_bwd_kernel(
    x_ptr,
    parameter_ptr,
    dy_ptr,
    dx_ptr,
    dp_ptr,
    rows,
    width,
    LIMIT: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # one program: ROWS rows and their sum of the parameter's gradient
    _, at, inside = row_tile(rows, width, ROWS, BLOCK)
    x = load_rows(x_ptr, at, inside)
    g = load_rows(dy_ptr, at, inside)
    p = tl.load(parameter_ptr)
    gx = tl.sum(g * x, 1, keep_dims=True)
    t, q, inverse = _stretch(tl.sum(x * x, 1, keep_dims=True), p, LIMIT, KIND)
    radial = gx * inverse  # G . x^
    if dx_ptr is not None:
        tl.store(dx_ptr + at, (t * g + q * radial * inverse * x).to(dx_ptr.dtype.element_ty), mask=inside)
    if dp_ptr is not None:
        dp = radial if KIND == "sphere" else gx * (q / (2.0 * p))
        tl.store(dp_ptr + tl.program_id(0), tl.sum(dp))


READ = "not measured; compiled ahead of time at D = 1,024: at most 40 registers forward, 64 backward, no spills"

LAUNCH = {INTERPRETER: Launch({"TILE": 128}), **dict.fromkeys((80, 90, 100), Launch({"TILE": 2048}, source=READ))}
KERNELS = RowMap(_radial_map_fwd_kernel, _radial_map_bwd_kernel, LAUNCH)


def radial_map(x: Tensor, parameter: Tensor | float, kind: Kind, *, impl: Impl = "auto") -> Tensor:
    """Stretch each row by a function of its length: exp_0, log_0, projection into the ball, normalisation to a sphere.

    Args:
        x: [..., D] contiguous, D <= 8,192; float32, bfloat16, float16, or float64 (reference only).
        parameter: c > 0 of the ball of curvature -c and radius 1 / sqrt(c), or kappa, the sphere's radius (a negative one
            mirrors): a number or a 0-d float32 or float64 tensor.
        kind: "exp0", "log0", "project" or "sphere".
        impl: "auto", "reference" or "triton".

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: A wrong type, shape, dtype, device or layout, c <= 0, an unknown kind or impl.

    Source: Ganea et al. 2018 (arXiv:1805.09112), lemma 2 (exp_0, log_0); Nickel and Kiela 2017 (arXiv:1705.08039), section
    3.1 (projection).
    """
    if kind not in KINDS:
        refuse("radial_map", "kind", f"must be one of {', '.join(KINDS)}", repr(kind))
    p = check_map("radial_map", "kappa" if kind == "sphere" else "c", parameter, x)
    if not use_triton("radial_map", impl, x):
        return radial_map_reference(x, p, kind)
    return apply_map(KERNELS, p, x, KIND=kind, LIMIT=ball_limit(x.dtype))
