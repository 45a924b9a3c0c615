"""The sphere of curvature c: exponential and logarithmic map at its pole, as plain functions of rows.

Points have D + 1 coordinates, the first along the pole (1 / sqrt(c), 0, ..., 0); the tangent space there is R^D, exactly, so
that no vector has to be projected on it. With t = sqrt(c) |u|:

    exp_pole(u) = (cos t / sqrt(c), sin t / t u)        log_pole(x, y) = t / (sqrt(c) |y|) y,  t = atan2(|y|, x)

For c -> 0 the last D coordinates tend to u. They are inverse to each other for t < pi; the antipode of the pole, which has no
logarithm, gives 0. atan2 keeps the digits that arccos loses at the pole.

Arithmetic is that of the tensors' dtype, float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.models.constants import constant

__all__ = ["exp_pole", "log_pole"]

SMALL = 1e-3
"""Squared angle below which sin t / t is its series to t^4, whose first dropped term is t^6 / 5,040 = 2e-13."""


def exp_pole(u: Tensor, c: Tensor | float) -> Tensor:
    """[..., D + 1] points that the tangent vectors u [..., D] at the pole lead to."""
    c = constant(c, u)
    t2 = c * u.square().sum(-1, keepdim=True)
    small = t2 < SMALL
    t = torch.where(small, 1.0, t2).sqrt()
    series = 1 - t2 / 6 * (1 - t2 / 20)
    cosine = torch.where(small, 1 - t2 / 2 * (1 - t2 / 12 * (1 - t2 / 30)), t.cos())
    return torch.cat([cosine / c.sqrt(), torch.where(small, series, t.sin() / t) * u], -1)


def log_pole(x: Tensor, c: Tensor | float) -> Tensor:
    """[..., D] tangent vectors at the pole that lead to the points x [..., D + 1]."""
    c = constant(c, x)
    along, across = x[..., :1] * c.sqrt(), x[..., 1:] * c.sqrt()
    s2 = across.square().sum(-1, keepdim=True)
    small = (s2 < SMALL) & (along > 0)
    lost = s2 == 0  # the pole, which the series has, or its antipode
    s = torch.where(small | lost, 1.0, s2).sqrt()
    series = 1 + s2 / 6 * (1 + s2 * 9 / 20 * (1 + s2 * 25 / 42))
    scale = torch.where(small, series, torch.atan2(s, along) / s)
    return torch.where(lost & ~small, 0.0, scale) * x[..., 1:]
