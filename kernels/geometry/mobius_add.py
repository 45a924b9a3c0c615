r"""Moebius addition in the Poincare ball of curvature -c, row by row: f = x (+) y, in a form without cancellation.

Moebius addition is the translation of the ball: y -> x (+) y is the isometry that takes 0 to x without a turn. It is not
commutative, but x (+) 0 = 0 (+) x = x, (-x) (+) (x (+) y) = y, and for c -> 0 it becomes x + y. The textbook form

    f = [(1 + 2c <x,y> + c |y|^2) x + (1 - c |x|^2) y] / (1 + 2c <x,y> + c^2 |x|^2 |y|^2)

subtracts numbers near 1 when y is near -x close to the boundary: the denominator there is (1 - c |x|^2)^2, below float32's
resolution of 1. With w = x + y and the (inverse) conformal factors B = 1 - c |x|^2, E = 1 - c |y|^2 the same is

    f = (B w + W x) / N,    W = c |w|^2,   N = B E + W,    and   1 - c |f|^2 = B E / N

where every term is positive: nothing is lost that x and y themselves hold. Points at or beyond the boundary (B or E below
EDGE = 1 - A_MAX^2) get B = EDGE, E = EDGE, constants to the gradient, so N > 0 and all is finite. f of points inside lies
inside but for rounding; `project` it where additions are chained.

Gradient, G = dL/df. All of it goes through w, B, E and W; with K = (G.y + (1 - E) G.x) / N^2 and phi = G.f

    dL/dB = W K     dL/dW = -B K     dL/dE = -B phi / N
    dL/dx = (B + W)/N G + 2c dL/dW w - 2c dL/dB x      dL/dy = B/N G + 2c dL/dW w - 2c dL/dE y
    dL/dc = sum over rows of |w|^2 dL/dW - |x|^2 dL/dB - |y|^2 dL/dE

x, y, f: [..., D], D <= 8,192; c: 0-d float32. Arithmetic float32 (float64 for float64, reference only). Saved for backward:
x, y and c; everything is formed again from five row sums.

Source: Ungar 2008; Ganea et al. 2018 (arXiv:1805.09112), equation 4 and section 2.3.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.geometry.curvature import EDGE, RIM_GAP, conformal
from armillary.kernels.geometry.maps import RowMap, apply_map, check_map
from armillary.kernels.launch import INTERPRETER, Impl, Launch, use_triton
from armillary.kernels.rows import load_rows, row_tile, wide

__all__ = ["mobius_add", "mobius_add_reference"]


def mobius_add_reference(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """The same in PyTorch: any float dtype, differentiable twice; arguments as `mobius_add`."""
    u, v = x.to(wide(x)), y.to(wide(y))
    w = u + v
    b = (1.0 - c * u.square().sum(-1, keepdim=True)).clamp_min(EDGE)
    e = (1.0 - c * v.square().sum(-1, keepdim=True)).clamp_min(EDGE)
    cw2 = c * w.square().sum(-1, keepdim=True)
    return ((b * w + cw2 * u) / (b * e + cw2)).to(x.dtype)


@triton.jit
def _mobius_add_fwd_kernel(
    x_ptr, y_ptr, c_ptr, f_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # one program: ROWS rows
    _, at, inside = row_tile(rows, width, ROWS, BLOCK)
    x = load_rows(x_ptr, at, inside)
    y = load_rows(y_ptr, at, inside)
    c = tl.load(c_ptr)
    w = x + y
    b, _ = conformal(tl.sum(x * x, 1, keep_dims=True), c)
    e, _ = conformal(tl.sum(y * y, 1, keep_dims=True), c)
    cw2 = c * tl.sum(w * w, 1, keep_dims=True)
    n = b * e + cw2
    tl.store(f_ptr + at, ((b / n) * w + (cw2 / n) * x).to(f_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mobius_add_bwd_kernel(
    x_ptr, y_ptr, c_ptr, df_ptr, dx_ptr, dy_ptr, dc_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # one program: ROWS rows and their sum of dL/dc
    _, at, inside = row_tile(rows, width, ROWS, BLOCK)
    x = load_rows(x_ptr, at, inside)
    y = load_rows(y_ptr, at, inside)
    g = load_rows(df_ptr, at, inside)
    c = tl.load(c_ptr)
    w = x + y
    x2 = tl.sum(x * x, 1, keep_dims=True)
    y2 = tl.sum(y * y, 1, keep_dims=True)
    w2 = tl.sum(w * w, 1, keep_dims=True)
    gx = tl.sum(g * x, 1, keep_dims=True)
    gy = tl.sum(g * y, 1, keep_dims=True)
    b, b_free = conformal(x2, c)
    e, e_free = conformal(y2, c)
    cw2 = c * w2
    n = b * e + cw2
    k = (gy + tl.minimum(c * y2, 1.0 - RIM_GAP) * gx) / n / n
    phi = (b * (gx + gy) + cw2 * gx) / n
    d_b = b_free * cw2 * k
    d_e = -e_free * b * phi / n
    d_w = -b * k
    if dx_ptr is not None:
        dx = ((b + cw2) / n) * g + (2.0 * c * d_w) * w - (2.0 * c * d_b) * x
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dy_ptr is not None:
        dy = (b / n) * g + (2.0 * c * d_w) * w - (2.0 * c * d_e) * y
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=inside)
    if dc_ptr is not None:
        tl.store(dc_ptr + tl.program_id(0), tl.sum(w2 * d_w - x2 * d_b - y2 * d_e))


READ = "not measured; compiled ahead of time at D = 1,024: at most 56 registers forward, 95 backward, no spills"

LAUNCH = {INTERPRETER: Launch({"TILE": 128}), **dict.fromkeys((80, 90, 100), Launch({"TILE": 2048}, source=READ))}
KERNELS = RowMap(_mobius_add_fwd_kernel, _mobius_add_bwd_kernel, LAUNCH)


def mobius_add(x: Tensor, y: Tensor, c: Tensor | float, *, impl: Impl = "auto") -> Tensor:
    """x (+) y in the Poincare ball of curvature -c and radius 1 / sqrt(c), row by row.

    Args:
        x: [..., D] contiguous, D <= 8,192; float32, bfloat16, float16, or float64 (reference only).
        y: As x, in shape, dtype and device.
        c: Positive number or 0-d float32 or float64 tensor.
        impl: "auto", "reference" or "triton".

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: A wrong type, shape, dtype, device or layout, c <= 0, or an unknown impl.
    """
    c = check_map("mobius_add", "c", c, x, y)
    if not use_triton("mobius_add", impl, x):
        return mobius_add_reference(x, y, c)
    return apply_map(KERNELS, c, x, y)
