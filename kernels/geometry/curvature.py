r"""Radial coefficients of the exponential and logarithmic map of the Poincare ball, in Triton kernels and in PyTorch.

With a = sqrt(c) r, r = |row|, curvature -c, c > 0 (Ganea et al. 2018, arXiv:1805.09112, section 2.4):

    exp_0(u) = t u,   t = tanh(a) / a        q = r dt/dr = sech^2(a) - t
    log_0(x) = s x,   s = artanh(a) / a      p = r ds/dr = 1 / (1 - a^2) - s

The gradients follow from t, q (or s, p) alone: d exp_0(u)/du . G = t G + q (G . u) u / r^2 and, as t depends on c and r
through a only, c dt/dc = q / 2. Near 0 both differences cancel: q = -2 a^2 / 3 + ... is left of two terms near 1. So
power series in a^2 take over there, and as t is even and smooth in a, nothing needs the root of r^2 at 0:

    t = 1 - a^2/3 + 2 a^4/15 - ...    q = sum_k 2 k t_k a^{2k}
    s = sum_k a^{2k} / (2k + 1)       p = sum_k 2 k / (2k + 1) a^{2k}

Device functions (float32): t, q by series for a^2 < 0.25, to a^14 and a^16; s, p for a^2 < 0.2, to a^20. Largest relative error of
t, s, sech^2 4e-7 away from the boundary and of q, p 1.5e-6. PyTorch (`exp_scale_reference`, `log_scale_reference`, any
float dtype): t and s as functions of a^2 whose automatic derivatives are as good, to 1e-14 in float64, because both sides
of the switch at a^2 = 0.1 are.

Outside the ball (a >= A_MAX) the row counts as lying at A_MAX: s = artanh(A_MAX) / a keeps the logarithm's length, and
p = -s, its derivative. So log_0 of a point outside is log_0 of its projection.
"""

from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["A_MAX", "EDGE", "even_series", "exp_scale_reference", "log_scale_reference"]

A_MAX = 1.0 - 2.0**-16  # exact in float32
"""Greatest sqrt(c) |x| of a point of the ball in float32; the logarithm is at most 5.9 / sqrt(c) long."""

EDGE = 1.0 - A_MAX * A_MAX  # exact in float32, too
"""Least 1 - c |x|^2 of a point of the ball."""

RIM, RIM_GAP = tl.constexpr(A_MAX), tl.constexpr(EDGE)  # the same for kernels

SERIES_BELOW = 0.1  # a^2 where PyTorch's series end; the quotients lose less than a factor 20 beyond it
TERMS = 18  # 0.1^18 < 2^-53


def _tanh_series() -> list[float]:
    """t_k of tanh(a) = sum_k t_k a^{2k+1}, from tanh' = 1 - tanh^2."""
    t = [Fraction(1)]
    for k in range(1, TERMS):
        t.append(-sum((t[i] * t[k - 1 - i] for i in range(k)), Fraction(0)) / (2 * k + 1))
    return [float(x) for x in t]


TANH = _tanh_series()
ARTANH = [1 / (2 * k + 1) for k in range(TERMS)]


def even_series(coefficients: list[float], a2: Tensor) -> Tensor:
    """sum_k coefficients[k] a2^k by elements, in few operations for autograd, and exact to the second derivative at 0."""
    k = torch.arange(2, len(coefficients), dtype=a2.dtype, device=a2.device)
    weight = torch.tensor(coefficients[2:], dtype=a2.dtype, device=a2.device)
    # PyTorch's second derivative of x^0 and x^1 is NaN at 0, so those two stand apart.
    return coefficients[0] + coefficients[1] * a2 + (weight * a2.unsqueeze(-1) ** k).sum(-1)


def exp_scale_reference(a2: Tensor) -> Tensor:
    """tanh(a) / a from a^2 >= 0, differentiable everywhere."""
    small = a2 < SERIES_BELOW
    a = torch.where(small, 1.0, a2).sqrt()
    return torch.where(small, even_series(TANH, torch.where(small, a2, 0.0)), a.tanh() / a)


def log_scale_reference(a2: Tensor) -> Tensor:
    """artanh(min(a, A_MAX)) / a from a^2 >= 0, differentiable everywhere but at A_MAX, where it counts as outside."""
    small = a2 < SERIES_BELOW
    a = torch.where(small, 0.5, a2).sqrt()
    inside = torch.where(a < A_MAX, a, A_MAX)
    return torch.where(small, even_series(ARTANH, torch.where(small, a2, 0.0)), inside.atanh() / a)


@triton.jit
def exp_coefficients(r2, c):
    """t and q of exp_0 from r^2 and c, float32."""
    a2 = c * r2
    a = tl.sqrt(a2)
    e = tl.exp(-2.0 * a)
    tanh = (1.0 - e) / (1.0 + e)
    t = tanh / tl.maximum(a, 0.1)  # the floor is out of reach: the series takes over before
    q = 4.0 * e / ((1.0 + e) * (1.0 + e)) - t
    u = tl.minimum(a2, 0.25)  # powers of a large a^2 would overflow unused
    t_series = 0.0035921280 + u * -0.0014558344
    t_series = -0.053968254 + u * (0.021869489 + u * (-0.0088632355 + u * t_series))
    t_series = 1.0 + u * (-0.33333333 + u * (0.13333333 + u * t_series))
    q_series = 0.043105536 + u * (-0.020381682 + u * 0.0094404391)
    q_series = -0.32380952 + u * (0.17495591 + u * (-0.088632355 + u * q_series))
    q_series = u * (-0.66666667 + u * (0.53333333 + u * q_series))
    small = a2 < 0.25
    return tl.where(small, t_series, t), tl.where(small, q_series, q)


@triton.jit
def sech_squared(r2, c):
    """sech^2(sqrt(c) r) = 1 - c |exp_0(u)|^2 without the cancellation, float32."""
    e = tl.exp(-2.0 * tl.sqrt(c * r2))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def log_coefficients(r2, c):
    """s and p of log_0 from r^2 and c, float32."""
    a2 = c * r2
    a = tl.sqrt(a2)
    inside = tl.minimum(a, RIM)
    s = 0.5 * tl.log((1.0 + inside) / (1.0 - inside)) / tl.maximum(a, 0.1)  # the floor is out of reach, as above
    p = tl.where(a < RIM, 1.0 / ((1.0 - inside) * (1.0 + inside)), 0.0) - s
    u = tl.minimum(a2, 0.2)
    s_series = 0.0
    p_series = 0.0
    for k in tl.static_range(10, 0, -1):
        s_series = u * (1.0 / (2 * k + 1) + s_series)
        p_series = u * (2 * k / (2 * k + 1) + p_series)
    small = a2 < 0.2
    return tl.where(small, 1.0 + s_series, s), tl.where(small, p_series, p)


@triton.jit
def conformal(r2, c):
    """1 - c r^2, EDGE at and beyond the boundary, and whether a gradient passes (1.0 inside, 0.0 else); float32."""
    gap = 1.0 - c * r2
    return tl.where(gap < RIM_GAP, RIM_GAP, gap), tl.where(gap < RIM_GAP, 0.0, 1.0)
