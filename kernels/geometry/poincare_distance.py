r"""Geodesic distance in the Poincare ball of curvature -c, row by row, good for near points and near the boundary.

    d(x, y) = (2 / sqrt(c)) artanh(sqrt(c) |(-x) (+) y|)

Both steps of this definition lose figures: the Moebius sum for near points, artanh near 1. But 1 - c |(-x) (+) y|^2 =
B E / (B E + c |w|^2) with w = x - y, B = 1 - c |x|^2, E = 1 - c |y|^2 (see kernels/geometry/mobius_add.py), and artanh(a) =
arsinh(a / sqrt(1 - a^2)), hence

    d = (2 / sqrt(c)) arsinh(z) = 2 S k(z),   z = sqrt(c) S,   S = |w| / sqrt(B E),   k(z) = arsinh(z) / z

without a difference other than w. The last form has no root of c: for c -> 0 it is 2 |x - y|, twice the Euclidean distance
(the conformal factor at 0 is 2), and d(0, x) = 2 |log_0(x)|. k is even in z, so a power series serves near 0.

Gradient, with h = z dk/dz = 1 / sqrt(1 + z^2) - k (by series near 0) and N = B E + c |w|^2 = B E (1 + z^2), for one row:

    dd/dx = (2 / sqrt(N)) (w / |w| + c |w| x / B)         dd/dy = (2 / sqrt(N)) (-w / |w| + c |w| y / E)
    dd/dc = S [(|x|^2 / B + |y|^2 / E) / sqrt(1 + z^2) + h / c]

At x = y the distance has a kink; the gradient there (|x - y| < 1e-15) is chosen 0, the mean of all directions, as
PyTorch does for a norm at 0, and d is 0. Points at or beyond the boundary get B = EDGE, E = EDGE, constants to the
gradient: distances stay finite, and the gradient keeps the direction w.

x, y: [..., D], D <= 8,192; c: 0-d float32; d: [...] in x's dtype. Arithmetic float32 (float64 for float64, reference
only). Saved for backward: x, y and c.

Source: Ganea et al. 2018 (arXiv:1805.09112), section 2.3.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.geometry.curvature import EDGE, SERIES_BELOW, TERMS, conformal, even_series
from armillary.kernels.geometry.maps import RowMap, apply_map, check_map
from armillary.kernels.geometry.radial_map import NO_DIRECTION
from armillary.kernels.launch import INTERPRETER, Impl, Launch, use_triton
from armillary.kernels.rows import load_rows, row_tile, wide

__all__ = ["poincare_distance", "poincare_distance_reference"]

ARSINH = [(-1) ** k * math.comb(2 * k, k) / (4**k * (2 * k + 1)) for k in range(TERMS)]


def _arsinh_ratio(z2: Tensor) -> Tensor:
    """arsinh(z) / z from z^2 >= 0, differentiable everywhere."""
    small = z2 < SERIES_BELOW
    z = torch.where(small, 1.0, z2).sqrt()
    return torch.where(small, even_series(ARSINH, torch.where(small, z2, 0.0)), z.asinh() / z)


def poincare_distance_reference(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """The same in PyTorch: any float dtype, differentiable twice; arguments as `poincare_distance`."""
    u, v = x.to(wide(x)), y.to(wide(y))
    w2 = (u - v).square().sum(-1)
    apart = w2 > NO_DIRECTION
    length = torch.where(apart, torch.where(apart, w2, 1.0).sqrt(), 0.0)
    b = (1.0 - c * u.square().sum(-1)).clamp_min(EDGE)
    e = (1.0 - c * v.square().sum(-1)).clamp_min(EDGE)
    return (2.0 * length * (b * e).rsqrt() * _arsinh_ratio(c * w2 / (b * e))).to(x.dtype)


@triton.jit
def _arsinh_coefficients(z2):
    """k and h of the docstring from z^2, float32."""
    z = tl.sqrt(z2)
    root = tl.sqrt(1.0 + z2)
    k = tl.log(z + root) / tl.maximum(z, 0.1)  # the floor is out of reach: the series takes over before
    h = 1.0 / root - k
    u = tl.minimum(z2, 0.3)  # powers of a large z^2 would overflow unused
    k_series = 0.0
    h_series = 0.0
    for i in tl.static_range(14, 0, -1):
        # Ratio of neighbouring coefficients of arsinh(z) / z: -(2i - 1)^2 / (2i (2i + 1)).
        step = -((2 * i - 1) * (2 * i - 1)) / (2 * i * (2 * i + 1))
        k_series = step * u * (1.0 + k_series)
        h_series = step * u * (2 * i + h_series)
    small = z2 < 0.3
    return tl.where(small, 1.0 + k_series, k), tl.where(small, h_series, h)


@triton.jit
def _poincare_distance_fwd_kernel(
    x_ptr, y_ptr, c_ptr, d_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # one program: ROWS rows
    row, at, inside = row_tile(rows, width, ROWS, BLOCK)
    x = load_rows(x_ptr, at, inside)
    y = load_rows(y_ptr, at, inside)
    c = tl.load(c_ptr)
    w = x - y
    w2 = tl.sum(w * w, 1, keep_dims=True)
    b, _ = conformal(tl.sum(x * x, 1, keep_dims=True), c)
    e, _ = conformal(tl.sum(y * y, 1, keep_dims=True), c)
    k, _ = _arsinh_coefficients(c * w2 / (b * e))
    d = tl.where(w2 > 1e-30, 2.0 * tl.sqrt(w2) / tl.sqrt(b * e) * k, 0.0 * w2)  # a NaN goes through
    tl.store(d_ptr + row, d.to(d_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _poincare_distance_bwd_kernel(
    x_ptr, y_ptr, c_ptr, dd_ptr, dx_ptr, dy_ptr, dc_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # one program: ROWS rows and their sum of dL/dc
    row, at, inside = row_tile(rows, width, ROWS, BLOCK)
    x = load_rows(x_ptr, at, inside)
    y = load_rows(y_ptr, at, inside)
    g = tl.load(dd_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    c = tl.load(c_ptr)
    w = x - y
    x2 = tl.sum(x * x, 1, keep_dims=True)
    y2 = tl.sum(y * y, 1, keep_dims=True)
    w2 = tl.sum(w * w, 1, keep_dims=True)
    b, b_free = conformal(x2, c)
    e, e_free = conformal(y2, c)
    apart = w2 > 1e-30
    length = tl.where(apart, tl.sqrt(w2), 0.0)
    inverse = tl.where(apart, 1.0 / tl.sqrt(tl.where(apart, w2, 1.0)), 0.0)
    slope = 2.0 * g / tl.sqrt(b * e + c * w2)
    if dx_ptr is not None:
        dx = (slope * inverse) * w + (slope * c * length * b_free / b) * x
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dy_ptr is not None:
        dy = (slope * c * length * e_free / e) * y - (slope * inverse) * w
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=inside)
    if dc_ptr is not None:
        z2 = c * w2 / (b * e)
        _, h = _arsinh_coefficients(z2)
        inner = (x2 * b_free / b + y2 * e_free / e) / tl.sqrt(1.0 + z2) + h / c
        tl.store(dc_ptr + tl.program_id(0), tl.sum(g * length / tl.sqrt(b * e) * inner))


READ = "not measured; compiled ahead of time at D = 1,024: at most 40 registers forward, 96 backward, no spills"

LAUNCH = {INTERPRETER: Launch({"TILE": 128}), **dict.fromkeys((80, 90, 100), Launch({"TILE": 2048}, source=READ))}
KERNELS = RowMap(_poincare_distance_fwd_kernel, _poincare_distance_bwd_kernel, LAUNCH, reduces=True)


def poincare_distance(x: Tensor, y: Tensor, c: Tensor | float, *, impl: Impl = "auto") -> Tensor:
    """Geodesic distance of each row of x to the same row of y in the Poincare ball of curvature -c.

    Args:
        x: [..., D] contiguous, D <= 8,192; float32, bfloat16, float16, or float64 (reference only).
        y: As x, in shape, dtype and device.
        c: Positive number or 0-d float32 or float64 tensor.
        impl: "auto", "reference" or "triton".

    Returns:
        [...] >= 0 in x's dtype; 0 for points closer than 1e-15.

    Raises:
        ValueError: A wrong type, shape, dtype, device or layout, c <= 0, or an unknown impl.
    """
    c = check_map("poincare_distance", "c", c, x, y)
    if not use_triton("poincare_distance", impl, x):
        return poincare_distance_reference(x, y, c)
    return apply_map(KERNELS, c, x, y)
