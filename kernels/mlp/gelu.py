r"""GELU and SiLU with their derivatives, for use inside Triton kernels.

    erf form     gelu(z) = z Phi(z),  Phi(z) = (1 + erf(z / sqrt 2)) / 2        gelu'(z) = Phi(z) + z phi(z)
    tanh form    gelu(z) = z sigmoid(t),  t = sqrt(8 / pi) (z + 0.044715 z^3)   (Hendrycks & Gimpel 2016, arXiv:1606.08415)
    silu(z) = z sigmoid(z)

Arithmetic is float32. The tanh form costs one exp2 and one division an element where the erf form costs two polynomials
and a division; it differs from the erf form by at most 4.8e-4 (at |z| = 2.7), its derivative by at most 8.7e-4.

Largest error against float64 for |z| <= 40, tested: values 1.5e-7 of max(1, |z|), derivatives 2.5e-7, with a correctly
rounded exp2 (a GPU's is good to 2 units in the last place). All stay finite for every finite z.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(t):
    """sigmoid(t) and sigmoid(t) sigmoid(-t), both without cancellation."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(t))
    r = 1.0 / (1.0 + e)
    return tl.where(t >= 0.0, r, e * r), e * r * r


@triton.jit
def gelu_and_gradient(z, TANH: tl.constexpr):
    """gelu(z) and gelu'(z), sharing what they have in common."""
    if TANH:
        square = tl.minimum(z * z, 1e4)  # far in the tails; keeps the products below finite
        s, ds = _sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * square))
        return z * s, s + z * ds * 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        cdf = 0.5 + 0.5 * tl.erf(0.7071067811865476 * z)
        return z * cdf, cdf + z * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)


@triton.jit
def gelu(z, TANH: tl.constexpr):
    """gelu(z), of the tanh or the erf form."""
    if TANH:
        return z / (1.0 + tl.exp2(tl.minimum(z * (-2.302208198 - 0.1029432397 * z * z), 126.0)))
    else:
        return z * (0.5 + 0.5 * tl.erf(0.7071067811865476 * z))


@triton.jit
def gelu_gradient(z, TANH: tl.constexpr):
    """gelu'(z), of the tanh or the erf form."""
    _, gradient = gelu_and_gradient(z, TANH)
    return gradient


@triton.jit
def silu_and_gradient(z):
    """silu(z) and silu'(z)."""
    s, ds = _sigmoid(z)
    return z * s, s + z * ds


@triton.jit
def silu(z):
    """silu(z)."""
    return z / (1.0 + tl.exp2(tl.minimum(-1.4426950408889634 * z, 126.0)))


@triton.jit
def silu_gradient(z):
    """silu'(z)."""
    _, gradient = silu_and_gradient(z)
    return gradient
