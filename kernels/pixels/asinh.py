"""Inverse hyperbolic sine in place, the nonlinear step of astronomical stretches.

    asinh x = sign(x) log(1 + t),   t = |x| + x^2 / (1 + sqrt(1 + x^2))

float32. On a CPU csrc/stretch.cpp computes it in vectorised polynomials (torch's took several times as long where it was
measured); elsewhere torch does. Accurate to 2 units in the last place for |x| < 1e19; a pixel that is not finite gives
NaN. Not differentiated.
"""

import torch
from torch import Tensor

from armillary import _C

__all__ = ["asinh_"]


def asinh_(x: Tensor, threads: int | None = None) -> Tensor:
    """Replace every element by its inverse hyperbolic sine.

    Args:
        x: Any shape, float32, contiguous.
        threads: CPU threads; torch's number where not given.

    Returns:
        `x`.

    Raises:
        ValueError: Wrong dtype or layout.
    """
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"asinh_: needs a contiguous float32 tensor, got {x.dtype} with strides {x.stride()}")
    if x.is_cuda:
        return x.asinh_()
    _C.asinh(x.numpy(), threads or torch.get_num_threads())
    return x
