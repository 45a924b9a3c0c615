r"""Radial coefficients of the exponential and logarithmic map of the Poincare ball, for use inside Triton kernels.

With a = sqrt(c) r, r = |row|, curvature -c, c > 0 (Ganea et al. 2018, arXiv:1805.09112, section 2.4):

    exp_0(u) = t u,   t = tanh(a) / a        q = r dt/dr = sech^2(a) - t
    log_0(x) = s x,   s = artanh(a) / a      p = r ds/dr = 1 / (1 - a^2) - s

The gradients follow from t, q (or s, p) alone: d exp_0(u)/du . G = t G + q (G . u) u / r^2 and, as t depends on c and r
through a only, c dt/dc = q / 2. Near 0 both differences cancel, so power series in a^2 take over:

    t = 1 - a^2/3 + 2 a^4/15 - ...    q = sum_k 2 k t_k a^{2k}      for a^2 < 0.25, to a^16
    s = sum_k a^{2k} / (2k + 1)       p = sum_k 2 k / (2k + 1) a^{2k}   for a^2 < 0.2, to a^20

Arithmetic is float32. Outside the ball (a >= A_MAX) the row counts as lying at A_MAX: s = artanh(A_MAX) / a keeps the
logarithm's length, and p = -s, its derivative.
"""

import triton
import triton.language as tl

__all__ = ["A_MAX"]

A_MAX = 1.0 - 2.0**-16  # exact in float32
"""Greatest sqrt(c) |x| of a point of the ball in float32; the logarithm is at most 5.9 / sqrt(c) long."""


@triton.jit
def exp_coefficients(r2, c):
    """t and q of exp_0 from r^2 and c, float32."""
    a2 = c * r2
    a = tl.sqrt(a2)
    e = tl.exp(-2.0 * a)
    tanh = (1.0 - e) / (1.0 + e)
    t = tanh / tl.maximum(a, 0.1)  # the floor is out of reach: the series takes over before
    q = 4.0 * e / ((1.0 + e) * (1.0 + e)) - t
    t_series = 0.0035921280 + a2 * (-0.0014558344 + a2 * 0.00059002744)
    t_series = -0.053968254 + a2 * (0.021869489 + a2 * (-0.0088632355 + a2 * t_series))
    t_series = 1.0 + a2 * (-0.33333333 + a2 * (0.13333333 + a2 * t_series))
    q_series = 0.043105536 + a2 * (-0.020381682 + a2 * 0.0094404391)
    q_series = -0.32380952 + a2 * (0.17495591 + a2 * (-0.088632355 + a2 * q_series))
    q_series = a2 * (-0.66666667 + a2 * (0.53333333 + a2 * q_series))
    small = a2 < 0.25
    return tl.where(small, t_series, t), tl.where(small, q_series, q)


@triton.jit
def sech_squared(r2, c):
    """sech^2(sqrt(c) r) = 1 - c |exp_0(u)|^2 without the cancellation, float32."""
    e = tl.exp(-2.0 * tl.sqrt(c * r2))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def log_coefficients(r2, c, A_MAX: tl.constexpr):
    """s and p of log_0 from r^2 and c, float32."""
    a2 = c * r2
    a = tl.sqrt(a2)
    inside = tl.minimum(a, A_MAX)
    s = 0.5 * tl.log((1.0 + inside) / (1.0 - inside)) / tl.maximum(a, 0.1)  # the floor is out of reach, as above
    p = tl.where(a < A_MAX, 1.0 / ((1.0 - inside) * (1.0 + inside)), 0.0) - s
    s_series = 0.0
    p_series = 0.0
    for k in tl.static_range(10, 0, -1):
        s_series = a2 * (1.0 / (2 * k + 1) + s_series)
        p_series = a2 * (2 * k / (2 * k + 1) + p_series)
    small = a2 < 0.2
    return tl.where(small, 1.0 + s_series, s), tl.where(small, p_series, p)
