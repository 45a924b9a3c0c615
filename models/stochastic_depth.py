"""Stochastic depth that leaves out the work: a residual branch runs on a random subset of the samples only.

For each branch and crop group, int(N (1 - rate)) of the N samples, at least one, run the branch; its output is scaled
by N over their number, so the expectation is that of the whole branch. Tokens are packed (`armillary.kernels.attention`).

Shape legend: N samples of one group, L tokens of a sample, n samples of a subset, P packed tokens of all groups,
D width.

Source: Huang et al. 2016 (arXiv:1603.09382), in the form of Oquab et al. 2023, DINOv2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.attention import Layout

__all__ = ["Runs", "Subset", "branch_scale", "draw_subsets", "fork", "join", "split_groups"]

Runs = tuple[tuple[int, int], ...]  # (N, L) of each group


@dataclass(frozen=True)
class Subset:
    """The samples that run one residual branch.

    Attributes:
        rows: For each group [n] int64: its samples, on the tokens' device.
        scales: For each group: the factor of the branch's output.
        layout: Of the subset's packed tokens.
    """

    rows: tuple[Tensor, ...]
    scales: tuple[float, ...]
    layout: Layout


def draw_subsets(runs: Runs, rate: float, count: int, device: torch.device) -> list[Subset]:
    """Draw the subsets of several branches.

    All are drawn at once on the CPU, from torch's global generator: their sizes are known to the host, and one copy a
    group moves them, where a permutation for each branch would be two kernels.

    Args:
        runs: (N, L) of each group.
        rate: Fraction of the samples that skip a branch, in [0, 1).
        count: Branches.
        device: The tokens' device.
    """
    # int() of a float product, as DINOv2 has it: 90 samples at 0.3 keep 62
    kept = [max(int(n * (1 - rate)), 1) for n, _ in runs]
    draws = [torch.rand(count, n).argsort(dim=1)[:, :k] for (n, _), k in zip(runs, kept, strict=True)]
    rows = [draw.to(device, non_blocking=True).unbind(0) for draw in draws]
    layout = Layout.from_runs([(k, length) for k, (_, length) in zip(kept, runs, strict=True)], device)
    scales = tuple(n / k for (n, _), k in zip(runs, kept, strict=True))
    return [Subset(tuple(group[i] for group in rows), scales, layout) for i in range(count)]


def split_groups(x: Tensor, layout: Layout) -> list[Tensor]:
    """Views [N, L*D] of packed tokens [P, D], one a group."""
    runs = layout.runs or ()
    ends = [0]
    for n, length in runs:
        ends.append(ends[-1] + n * length)
    return [x[a:b].view(n, -1) for (a, b), (n, _) in zip(pairwise(ends), runs, strict=True)]


def branch_scale(subset: Subset, layout: Layout, like: Tensor) -> Tensor:
    """[samples of all groups, 1]: the factor of the branch for each sample, 0 where it is dropped; dtype of `like`."""
    scales = [
        like.new_zeros(n, 1).index_fill(0, rows, scale)
        for (n, _), rows, scale in zip(layout.runs or (), subset.rows, subset.scales, strict=True)
    ]
    return torch.cat(scales)


def fork(x: Tensor, layout: Layout, subset: Subset, *, own: bool) -> tuple[Tensor, Tensor]:
    """Split off the input of a branch.

    Args:
        x: [P, D] tokens.
        layout: Their groups.
        subset: The samples that run the branch.
        own: x belongs to the caller alone, so it is handed on; else it is copied, because `join` writes into it.

    Returns:
        The tokens to `join` the branch to, and the subset's packed tokens.
    """
    if torch.compiler.is_compiling():
        parts = zip(split_groups(x, layout), subset.rows, strict=True)
        return x, torch.cat([part.index_select(0, rows).view(-1, x.shape[1]) for part, rows in parts])
    return _Fork.apply(x, layout, subset, own)


def join(x: Tensor, y: Tensor, layout: Layout, subset: Subset) -> Tensor:
    """Add the branch's output, scaled; eager in place, so `x` must come from `fork`.

    Args:
        x: [P, D] tokens.
        y: The branch's output for the subset's packed tokens.
        layout: Groups of x.
        subset: The samples that ran the branch.
    """
    if torch.compiler.is_compiling():
        parts = zip(split_groups(x, layout), split_groups(y, subset.layout), subset.rows, subset.scales, strict=True)
        return torch.cat([a.index_add(0, rows, b, alpha=c).view(-1, x.shape[1]) for a, b, rows, c in parts])
    return _Join.apply(x, y, layout, subset)


class _Fork(torch.autograd.Function):
    """`fork` with fewer passes over the tokens than split, select, concatenate and index-add make.

    The gradient of the tokens that are handed on is written into: `_Join.backward` returns it, and nobody else holds
    it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, subset: Subset, own: bool) -> tuple[Tensor, Tensor]:
        ctx.layout, ctx.subset = layout, subset
        branch = _take(x, layout, subset)
        if own:
            ctx.mark_dirty(x)
            return x, branch
        return x.clone(), branch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, branch: Tensor) -> tuple[Tensor, None, None, None]:
        _add(grad, branch, ctx.layout, ctx.subset, (1.0,) * len(ctx.subset.rows))
        return grad, None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, layout: Layout, subset: Subset) -> Tensor:
        ctx.layout, ctx.subset = layout, subset
        ctx.mark_dirty(x)
        return _add(x, y, layout, subset, subset.scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad = grad.contiguous()
        out = _take(grad, ctx.layout, ctx.subset)
        for part, scale in zip(split_groups(out, ctx.subset.layout), ctx.subset.scales, strict=True):
            part.mul_(scale)
        return grad, out, None, None


def _take(x: Tensor, layout: Layout, subset: Subset) -> Tensor:
    """Packed tokens of the subset."""
    out = x.new_empty(sum(n * length for n, length in subset.layout.runs or ()), x.shape[1])
    for source, target, rows in zip(
        split_groups(x, layout), split_groups(out, subset.layout), subset.rows, strict=True
    ):
        torch.index_select(source, 0, rows, out=target)
    return out


def _add(x: Tensor, y: Tensor, layout: Layout, subset: Subset, scales: tuple[float, ...]) -> Tensor:
    parts = zip(split_groups(x, layout), split_groups(y.contiguous(), subset.layout), subset.rows, scales, strict=True)
    for target, source, rows, scale in parts:
        target.index_add_(0, rows, source, alpha=scale)
    return x
