"""Stochastic depth that leaves out the work: a residual branch runs on a random subset of the samples only.

For each branch and crop group, int(N (1 - rate)) of the N samples, at least one, run the branch; its output is scaled
by N over their number, so the expectation is that of the whole branch. Tokens are packed (`armillary.kernels.tokens.attention`).

Shape legend: N samples of one group, L tokens of a sample, n samples of a subset, P packed tokens of all groups,
D width.

Source: Huang et al. 2016 (arXiv:1603.09382), in the form of Oquab et al. 2023, DINOv2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.tokens.attention import PackedSequences
from armillary.kernels.tokens.residual_norm import Packing

__all__ = ["Runs", "Subset", "branch_scale", "draw_subsets", "fork", "join", "split_groups"]

Runs = tuple[tuple[int, int], ...]  # (N, L) of each group


@dataclass(frozen=True)
class Subset:
    """The samples that run one residual branch.

    Attributes:
        rows: For each group [n] int32: its samples, on the tokens' device.
        scales: For each group: the factor of the branch's output.
        groups: Layout of the tokens of all samples.
        layout: Layout of the subset's packed tokens.
        packing: The same by sample, for `armillary.kernels.tokens.residual_norm`.
    """

    rows: tuple[Tensor, ...]
    scales: tuple[float, ...]
    groups: PackedSequences
    layout: PackedSequences
    packing: Packing


def draw_subsets(runs: Runs, rate: float, count: int, device: torch.device) -> list[Subset]:
    """Draw the subsets of several branches.

    All are drawn at once on the CPU, from torch's global generator: their sizes are known to the host, and one copy
    moves the maps of all branches, where a permutation for each branch would be two kernels.

    Args:
        runs: (N, L) of each group.
        rate: Fraction of the samples that skip a branch, in [0, 1).
        count: Branches.
        device: The tokens' device.
    """
    # int() of a float product, as DINOv2 has it: 90 samples at 0.3 keep 62
    kept = [max(int(n * (1 - rate)), 1) for n, _ in runs]
    draws = [torch.rand(count, n).argsort(dim=1)[:, :k] for (n, _), k in zip(runs, kept, strict=True)]
    starts, first = [], 0
    for draw, k, (n, length) in zip(draws, kept, runs, strict=True):
        place = first + length * torch.arange(k, dtype=torch.int32)
        starts.append(torch.full((count, n), -1, dtype=torch.int32).scatter_(1, draw, place.expand(count, k)))
        first += k * length
    maps = torch.cat([*(draw.to(torch.int32) for draw in draws), *starts], dim=1)
    maps = (maps.pin_memory() if device.type == "cuda" else maps).to(device, non_blocking=True)
    *rows, start = maps.split([*kept, sum(n for n, _ in runs)], dim=1)
    scales = tuple(n / k for (n, _), k in zip(runs, kept, strict=True))
    groups = PackedSequences.from_runs(runs, device)
    layout = PackedSequences.from_runs([(k, length) for k, (_, length) in zip(kept, runs, strict=True)], device)
    sample, place, scale = _token_maps(runs, scales, device)
    return [
        Subset(
            tuple(group[i] for group in rows), scales, groups, layout, Packing(sample, place, start[i], scale, first)
        )
        for i in range(count)
    ]


@lru_cache(maxsize=16)
def _token_maps(runs: Runs, scales: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sample and place in it of each token, and each sample's factor: what the branches of a step share."""
    lengths = torch.tensor([length for n, length in runs for _ in range(n)])
    sample = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = torch.arange(len(sample)) - (lengths.cumsum(0) - lengths)[sample]
    scale = torch.tensor([scale for (n, _), scale in zip(runs, scales, strict=True) for _ in range(n)])
    return sample.to(device, torch.int32), place.to(device, torch.int32), scale.to(device, torch.float32)


def split_groups(x: Tensor, layout: PackedSequences) -> list[Tensor]:
    """Views [N, L*D] of packed tokens [P, D], one a group."""
    runs = layout.runs or ()
    ends = [0]
    for n, length in runs:
        ends.append(ends[-1] + n * length)
    return [x[a:b].view(n, -1) for (a, b), (n, _) in zip(pairwise(ends), runs, strict=True)]


def branch_scale(subset: Subset, like: Tensor) -> Tensor:
    """[samples of all groups, 1]: the factor of the branch for each sample, 0 where it is dropped; dtype of `like`."""
    scales = [
        like.new_zeros(n, 1).index_fill(0, rows.long(), scale)
        for (n, _), rows, scale in zip(subset.groups.runs or (), subset.rows, subset.scales, strict=True)
    ]
    return torch.cat(scales)


def fork(x: Tensor, subset: Subset, *, own: bool) -> tuple[Tensor, Tensor]:
    """Split off the input of a branch.

    Args:
        x: [P, D] tokens.
        subset: The samples that run the branch.
        own: x belongs to the caller alone, so it is handed on; else it is copied, because `join` writes into it.

    Returns:
        The tokens to `join` the branch to, and the subset's packed tokens.
    """
    if torch.compiler.is_compiling():
        parts = zip(split_groups(x, subset.groups), subset.rows, strict=True)
        return x, torch.cat([part.index_select(0, rows).view(-1, x.shape[1]) for part, rows in parts])
    return _Fork.apply(x, subset, own)


def join(x: Tensor, y: Tensor, subset: Subset) -> Tensor:
    """Add the branch's output, scaled; eager in place, so `x` must come from `fork`.

    Args:
        x: [P, D] tokens.
        y: The branch's output for the subset's packed tokens.
        subset: The samples that ran the branch.
    """
    if torch.compiler.is_compiling():
        groups = split_groups(x, subset.groups), split_groups(y, subset.layout)
        parts = zip(*groups, subset.rows, subset.scales, strict=True)
        return torch.cat([a.index_add(0, rows, b, alpha=c).view(-1, x.shape[1]) for a, b, rows, c in parts])
    return _Join.apply(x, y, subset)


class _Fork(torch.autograd.Function):
    """`fork` with fewer passes over the tokens than split, select, concatenate and index-add make.

    The gradient of the tokens that are handed on is written into: `_Join.backward` returns it, and nobody else holds
    it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, subset: Subset, own: bool) -> tuple[Tensor, Tensor]:
        ctx.subset = subset
        branch = _take(x, subset)
        if own:
            ctx.mark_dirty(x)
            return x, branch
        return x.clone(), branch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, branch: Tensor) -> tuple[Tensor, None, None]:
        _add(grad, branch, ctx.subset, (1.0,) * len(ctx.subset.rows))
        return grad, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, subset: Subset) -> Tensor:
        ctx.subset = subset
        ctx.mark_dirty(x)
        return _add(x, y, subset, subset.scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad = grad.contiguous()
        out = _take(grad, ctx.subset)
        for part, scale in zip(split_groups(out, ctx.subset.layout), ctx.subset.scales, strict=True):
            part.mul_(scale)
        return grad, out, None


def _take(x: Tensor, subset: Subset) -> Tensor:
    """Packed tokens of the subset."""
    out = x.new_empty(sum(n * length for n, length in subset.layout.runs or ()), x.shape[1])
    groups = split_groups(x, subset.groups), split_groups(out, subset.layout)
    for source, target, rows in zip(*groups, subset.rows, strict=True):
        torch.index_select(source, 0, rows, out=target)
    return out


def _add(x: Tensor, y: Tensor, subset: Subset, scales: tuple[float, ...]) -> Tensor:
    groups = split_groups(x, subset.groups), split_groups(y.contiguous(), subset.layout)
    for target, source, rows, scale in zip(*groups, subset.rows, scales, strict=True):
        target.index_add_(0, rows, source, alpha=scale)
    return x
