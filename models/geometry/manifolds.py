"""The Poincare ball and the sphere: maps of rows as plain functions, and a curvature that can be learnt.

Ball of curvature -c and radius 1 / sqrt(c); its tangent space at 0 is R^D with twice the Euclidean metric (conformal
factor 2), so that d(0, exp0(u)) = 2 |u|, and for c -> 0 every function tends to its Euclidean namesake:

    exp0(u) -> u     log0(x) -> x     project(x) = x     mobius_add(x, y) -> x + y     distance(x, y) -> 2 |x - y|

The mathematics, the arithmetic and what happens at 0 and at the boundary stand in the kernels' files: radial_map.py,
mobius_add.py, poincare_distance.py.

Example:
    curvature = Curvature(1.0)
    c = curvature()
    z = mobius_add(exp0(u, c), exp0(v, c), c)
    loss = distance(z, exp0(target, c), c).mean()

Every function takes rows in the last dimension (D <= 8,192) under any leading shape, in float32, bfloat16, float16 or
float64, and returns rows unless it says otherwise; tensors that are not contiguous are copied. c > 0 and kappa are
numbers or 0-d float32 or float64 tensors (differentiable). `impl` is "auto", "reference" or "triton". Bad input raises ValueError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from armillary.kernels.geometry.mobius_add import mobius_add as _mobius_add
from armillary.kernels.geometry.poincare_distance import poincare_distance
from armillary.kernels.geometry.radial_map import radial_map
from armillary.kernels.launch import Impl

__all__ = ["Curvature", "distance", "exp0", "log0", "mobius_add", "project", "sphere_normalise"]


def exp0(u: Tensor, c: Tensor | float, *, impl: Impl = "auto") -> Tensor:
    """Exponential map at 0, the point reached by the tangent vector u: tanh(sqrt(c) |u|) / (sqrt(c) |u|) u."""
    return radial_map(u.contiguous(), c, "exp0", impl=impl)


def log0(x: Tensor, c: Tensor | float, *, impl: Impl = "auto") -> Tensor:
    """Logarithm at 0, the inverse of `exp0`: the tangent vector that leads to x; points outside the ball as if projected."""
    return radial_map(x.contiguous(), c, "log0", impl=impl)


def project(x: Tensor, c: Tensor | float, *, impl: Impl = "auto") -> Tensor:
    """Pull rows outside the ball onto its rim, as near to the boundary as x's dtype can tell; leave the others alone.

    Before rounding, sqrt(c) |x| <= 1 - 2^-16 (float32), 1 - 2^-10 (float16), 1 - 2^-7 (bfloat16).
    """
    return radial_map(x.contiguous(), c, "project", impl=impl)


def sphere_normalise(x: Tensor, kappa: Tensor | float, *, impl: Impl = "auto") -> Tensor:
    """Normalise rows to the sphere of radius kappa: kappa x / |x|; 0 with gradient 0 for |x| < 1e-15."""
    return radial_map(x.contiguous(), kappa, "sphere", impl=impl)


def mobius_add(x: Tensor, y: Tensor, c: Tensor | float, *, impl: Impl = "auto") -> Tensor:
    """Moebius addition x (+) y: y translated by x; leading shapes are broadcast."""
    x, y = torch.broadcast_tensors(x, y)
    return _mobius_add(x.contiguous(), y.contiguous(), c, impl=impl)


def distance(x: Tensor, y: Tensor, c: Tensor | float, *, impl: Impl = "auto") -> Tensor:
    """Geodesic distance [...], (2 / sqrt(c)) artanh(sqrt(c) |(-x) (+) y|); gradient 0 where x = y; shapes are broadcast."""
    x, y = torch.broadcast_tensors(x, y)
    return poincare_distance(x.contiguous(), y.contiguous(), c, impl=impl)


class Curvature(nn.Module):
    """A learnable c, bounded: c = c_min (c_max / c_min)^sigmoid(initial + offset).

    Steps are relative (c is a scale), the bounds cannot be left whatever the optimiser does, and the parameter is the
    offset from the initial value: 0 at the start, exact in every dtype, so that the initial c survives a cast to bfloat16
    and weight decay pulls towards it. The initial value and the bounds are configuration, not state.

    Args:
        initial: c at the start, strictly between the bounds.
        c_min: Least c, > 0.
        c_max: Greatest c.

    Attributes:
        offset: [1], the only parameter.

    Raises:
        ValueError: Not 0 < c_min < initial < c_max < infinity.
    """

    def __init__(self, initial: float = 1.0, c_min: float = 1e-2, c_max: float = 1e2) -> None:
        super().__init__()
        if not 0 < c_min < initial < c_max < math.inf:
            raise ValueError(
                f"Curvature: initial must lie strictly between 0 < c_min and c_max < infinity, got {initial} "
                f"between {c_min} and {c_max}"
            )
        self.initial, self.c_min, self.c_max = initial, c_min, c_max
        self._log_ratio = math.log(c_max / c_min)
        self._start = math.log(math.log(initial / c_min) / math.log(c_max / initial))  # the logit of its place
        self.offset = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """Back to the initial value."""
        nn.init.zeros_(self.offset)

    def forward(self) -> Tensor:
        """The curvature c: 0-d, float32 (float64 for a float64 parameter)."""
        place = torch.sigmoid(self.offset.double() + self._start)
        c = self.c_min * torch.exp(self._log_ratio * place)
        return c.to(torch.promote_types(self.offset.dtype, torch.float32)).reshape(())

    def extra_repr(self) -> str:
        """Initial value and bounds."""
        return f"initial={self.initial}, c_min={self.c_min}, c_max={self.c_max}"
