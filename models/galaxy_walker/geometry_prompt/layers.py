"""The two kinds of graph layers of the geometry prompt, and the maps of one space that they use.

Shape legend: D width of what comes in, f neighbours of a node.

Source: Galaxy-Walker (arXiv:2503.18578), equation 3, and its released code; GraphSAGE: arXiv:1706.02216.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armillary.kernels.geometry.geometry_combine import CLIP
from armillary.kernels.launch import Impl
from armillary.models.constants import constant
from armillary.models.geometry.manifolds import exp0, log0, mobius_add
from armillary.models.geometry.sphere import exp_pole, log_pole

__all__ = ["Chart", "ReleasedSAGE", "RiemannianSAGE"]


@dataclass(frozen=True)
class Chart:
    """The maps of a space at its origin.

    Attributes:
        space: "euclidean", "spherical" or "hyperbolic".
        c: Curvature of the sphere; minus that of the ball.
        impl: Implementation of the maps of the ball, see `armillary.kernels.launch`.
    """

    space: str
    c: Tensor | float
    impl: Impl

    def exp(self, u: Tensor) -> Tensor:
        """Points of tangent vectors, which are cut where the map saturates or meets the antipode."""
        if self.space == "euclidean":
            return u
        length2 = constant(self.c, u) * u.square().sum(-1, keepdim=True)
        cut = length2 > CLIP**2
        u = torch.where(cut, CLIP * torch.where(cut, length2, 1.0).rsqrt(), 1.0) * u
        return exp0(u, self.c, impl=self.impl) if self.space == "hyperbolic" else exp_pole(u, self.c)

    def log(self, x: Tensor) -> Tensor:
        """Tangent vectors at the origin that lead to points."""
        if self.space == "euclidean":
            return x
        return log0(x, self.c, impl=self.impl) if self.space == "hyperbolic" else log_pole(x, self.c)

    def shift(self, x: Tensor, u: Tensor) -> Tensor:
        """Points moved along a tangent vector of the origin that was transported to them in parallel."""
        if self.space == "euclidean":
            return x + u
        if self.space == "hyperbolic":
            return mobius_add(x, exp0(u, self.c, impl=self.impl), self.c, impl=self.impl)
        root = constant(self.c, x).sqrt()
        y, at_pole = x * root, torch.zeros_like(x[..., :1])
        along = (y[..., 1:] * u).sum(-1, keepdim=True) / (1 + y[..., :1])
        # Of v = (0, u), whose geodesic runs over the pole e: v - <y, v> / (1 + <e, y>) (e + y).
        v = torch.cat([at_pole - along * (1 + y[..., :1]), u - along * y[..., 1:]], -1)
        t = root * u.norm()
        return torch.cos(t) * x + torch.sinc(t / math.pi) * v


class RiemannianSAGE(nn.Module):
    """A layer between tangent spaces, equation 3: GraphSAGE, LayerNorm, ReLU, over sqrt(width).

    Args:
        width: Width of what comes in.
        out: Width of what goes out.
        space: Its space; all are treated alike.
        dropout: Of the result.
    """

    def __init__(self, width: int, out: int, space: str, dropout: float) -> None:
        super().__init__()
        self.itself = nn.Linear(width, out, bias=False)
        self.neighbours = nn.Linear(width, out)
        self.norm = nn.LayerNorm(out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, around: Tensor, known: Tensor, chart: Chart) -> Tensor:
        """Tangent vectors of the nodes behind this layer.

        Args:
            h: [..., D] tangent vectors of the nodes.
            around: [..., f, D] those of their neighbours.
            known: [..., f] bool, False where there is no such neighbour. A node without any has a mean of 0.
            chart: Not read: the maps stand between the layers.

        Returns:
            [..., out] of the inputs' dtype.
        """
        dtype = self.itself.weight.dtype
        mean = _mean(around, known)
        u = self.dropout(self.norm(self.itself(h.to(dtype)) + self.neighbours(mean.to(dtype))).relu())
        return u.to(h.dtype) / math.sqrt(u.shape[-1])


class ReleasedSAGE(nn.Module):
    """A layer as the released code has it, also where that is not defined geometrically.

    A linear map of the space (log0, matrix, dropout, exp0, bias transported to the point), LayerNorm and ReLU in the tangent
    space; then GraphSAGE on the coordinates of the points, as if they were vectors, LayerNorm and ReLU again. There the sphere's
    exponential map is given vectors that do not lie in its tangent space; here they do.

    Args:
        width: Width of what comes in.
        out: Width of what goes out.
        space: Its space; points of the sphere have one coordinate more.
        dropout: Of the linear map.
    """

    def __init__(self, width: int, out: int, space: str, dropout: float) -> None:
        super().__init__()
        coordinates = out + (space == "spherical")
        self.linear = nn.Linear(width, out, bias=False)
        self.bias = nn.Parameter(torch.zeros(out))
        self.dropout = nn.Dropout(dropout)
        self.linear_norm = nn.LayerNorm(out)
        self.itself = nn.Linear(coordinates, out, bias=False)
        self.neighbours = nn.Linear(coordinates, out)
        self.norm = nn.LayerNorm(out)

    def forward(self, h: Tensor, around: Tensor, known: Tensor, chart: Chart) -> Tensor:
        """As for `RiemannianSAGE`, in the space of `chart`."""
        dtype = self.itself.weight.dtype
        centre, mean = self._points(h, chart), _mean(self._points(around, chart), known)
        return self.norm(self.itself(centre.to(dtype)) + self.neighbours(mean.to(dtype))).relu().to(h.dtype)

    def _points(self, h: Tensor, chart: Chart) -> Tensor:
        dtype = self.linear.weight.dtype
        u = self.dropout(self.linear(h.to(dtype)).to(h.dtype))
        x = chart.shift(chart.exp(u), self.bias.to(h.dtype))
        return chart.exp(self.linear_norm(chart.log(x).to(dtype)).relu().to(h.dtype))


def _mean(around: Tensor, known: Tensor) -> Tensor:
    """[..., D] mean over the known of [..., f, D]."""
    weight = known.unsqueeze(-1).to(around.dtype)
    return (around * weight).sum(-2) / weight.sum(-2).clamp(min=1)
