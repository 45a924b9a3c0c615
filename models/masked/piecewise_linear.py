r"""Cumulative distributions that are linear between knots, and their continuous ranked probability score.

    CRPS(F, y) = \int_{-\infty}^{y} F(x)^2 dx + \int_{y}^{\infty} (1 - F(x))^2 dx

Between knots this is a sum of integrals of squared lines, w (a^2 + a b + b^2) / 3 of a segment of width w with a and b at its
ends; the segment that holds y is two of them. It is exact and has gradients.

Shape legend: [...] distributions, K segments, m numbers asked of each distribution. `knots` [..., K + 1] ascend; `below`
[..., K + 1] are the cumulative probabilities at them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["crps_between", "cumulative", "inverse", "slope", "widths"]

NARROW = 1e-18
"""Width of a segment whose ends were rounded to one number."""


def widths(knots: Tensor) -> Tensor:
    """[..., K] of the segments, positive."""
    return knots.diff(dim=-1).clamp(min=NARROW)


def cumulative(knots: Tensor, below: Tensor, x: Tensor) -> Tensor:
    """Cumulative probabilities [..., m] at x [..., m]; beyond the knots that of the last one."""
    place = _segment(knots, x)
    left = knots.gather(-1, place)
    part = ((x - left) / widths(knots).gather(-1, place)).clamp(0, 1)
    at = below.gather(-1, place)
    return at + part * (below.gather(-1, place + 1) - at)


def slope(knots: Tensor, below: Tensor, x: Tensor) -> Tensor:
    """Densities [..., m] at x [..., m]; 0 beyond the knots."""
    within = (x >= knots[..., :1]) & (x <= knots[..., -1:])
    return (below.diff(dim=-1) / widths(knots)).gather(-1, _segment(knots, x)) * within


def inverse(knots: Tensor, below: Tensor, probability: Tensor) -> Tensor:
    """Numbers [..., m] at which the cumulative probabilities are [..., m]; the last knot for those beyond."""
    place = torch.searchsorted(below[..., 1:].contiguous(), probability.to(below.dtype).contiguous())
    place = place.clamp(max=below.shape[-1] - 2)
    at, left = below.gather(-1, place), knots.gather(-1, place)
    inside = (below.gather(-1, place + 1) - at).clamp(min=torch.finfo(below.dtype).tiny)
    part = ((probability - at) / inside).clamp(0, 1)
    return left + part * (knots.gather(-1, place + 1) - left)


def crps_between(knots: Tensor, below: Tensor, true: Tensor) -> Tensor:
    """The part of the scores [...] of true numbers [...] that comes from between the knots."""
    y = true.to(below.dtype)[..., None]
    left, right, a, b = knots[..., :-1], knots[..., 1:], below[..., :-1], below[..., 1:]
    cut = torch.minimum(torch.maximum(y, left), right)  # the end of what lies below y in each segment
    at = a + (cut - left) / widths(knots) * (b - a)
    first = (cut - left) * (a * a + a * at + at * at)
    at, b = 1 - at, 1 - b
    second = (right - cut) * (at * at + at * b + b * b)
    return (first + second).sum(-1) / 3


def _segment(knots: Tensor, x: Tensor) -> Tensor:
    """[..., m] segment that holds x, the nearest one where none does."""
    place = torch.searchsorted(knots.contiguous(), x.to(knots.dtype).contiguous(), right=True) - 1
    return place.clamp(0, knots.shape[-1] - 2)
