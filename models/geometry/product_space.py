"""A product of spaces of constant curvature, read by its geodesics.

A point has a part in each factor: R^D, the sphere of curvature c in R^(D+1) (`sphere`), the Poincare ball of curvature -c
(`manifolds`). With the distances d_s in the factors,

    d(x, y)^2 = sum over s of d_s(x_s, y_s)^2

The ball's distance tends to 2 |u - v| of tangent vectors for c -> 0 (`manifolds`) and is halved here, so that all three factors
agree in the flat limit.

Shape legend: points have their coordinates in the last dimension; leading shapes are broadcast.

Source: Gu et al. 2019 (Learning mixed-curvature representations in product spaces, ICLR), equation 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from armillary.kernels.launch import Impl
from armillary.models.constants import constant
from armillary.models.geometry.manifolds import distance as ball_distance

__all__ = ["factor_distance", "product_distance"]

LEAST = 1e-12  # squared length below which the gradient of a length is that of 0


def factor_distance(x: Tensor, y: Tensor, space: str, c: Tensor | float = 1.0, *, impl: Impl = "auto") -> Tensor:
    """[...] geodesic distances in one factor; their gradient at 0 is 0.

    Args:
        x: [..., D] points; [..., D + 1] on the sphere.
        y: Likewise.
        space: "euclidean", "spherical" or "hyperbolic".
        c: Curvature of the sphere; minus that of the ball.
        impl: Implementation of the ball's distance, see `armillary.kernels.launch`.

    Raises:
        ValueError: There is no such space.
    """
    if space == "hyperbolic":
        return ball_distance(x, y, c, impl=impl) / 2
    if space not in ("euclidean", "spherical"):
        raise ValueError(f"space: must be euclidean, spherical or hyperbolic, got {space!r}")
    if space == "euclidean":
        return _length(x - y)
    # An angle from both chords keeps its digits at 0 and at pi, where the arc cosine loses them.
    root = constant(c, x).sqrt()
    return 2 * torch.atan2(_length(x - y), _length(x + y)) / root


def product_distance(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    spaces: Sequence[str],
    c: Sequence[Tensor | float],
    *,
    impl: Impl = "auto",
) -> Tensor:
    """[...] geodesic distances in a product; arguments as for `factor_distance`, one a factor."""
    parts = [
        factor_distance(a, b, space, k, impl=impl).square() for a, b, space, k in zip(x, y, spaces, c, strict=True)
    ]
    return _root(torch.stack(parts).sum(0))


def _length(v: Tensor) -> Tensor:
    return _root(v.square().sum(-1))


def _root(square: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 and not infinite."""
    small = square < LEAST
    return torch.where(small, 0.0, torch.where(small, 1.0, square).sqrt())
