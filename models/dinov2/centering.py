"""Centring of the teacher's targets over the batch, in the form of a bias on the teacher's logits.

Both kinds make the target `softmax(logits / T + bias)`. A softmax centre subtracts a running mean of the logits.
Sinkhorn-Knopp scales columns (prototypes) so that all are used equally, then rows to sum to 1; the row scaling is what
the softmax does, so the logarithm of the column scaling is all that has to be kept.

Sums over the batch are taken over all ranks where torch.distributed runs.

Shape legend: M rows of a rank, D width of the features, V prototypes.

Source: Caron et al. 2021, DINO (arXiv:2104.14294); Caron et al. 2020, SwAV (arXiv:2006.09882); DINOv2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from armillary.kernels.launch import Impl, untraced, use_triton
from armillary.kernels.objective.logsumexp import column_logsumexp_, row_logsumexp

__all__ = ["SoftmaxCentre", "sinkhorn_bias"]

BLOCK = 8192  # prototypes at a time
CPU_BLOCK = 1024  # on a CPU: a block stays in the second-level cache, and takes no fresh pages


class SoftmaxCentre(nn.Module):
    """Running mean of the teacher's logits.

    The buffer stays float32 when the module is cast to a lower precision: with a momentum of 0.9 and updates below its
    rounding, a bfloat16 centre would stand still.

    Args:
        prototypes: Prototypes V.
        momentum: Weight of the old centre in an update.
    """

    center: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SoftmaxCentre:
        kept = self.center
        super()._apply(fn, recurse)
        if self.center.dtype != torch.float32 and not kept.is_meta:
            self.center = kept.to(self.center.device, torch.float32)
        return self

    def bias(self, temperature: float) -> Tensor:
        """[V] float32 bias of this step's targets; a copy, so that the update below does not reach into it."""
        return self.center / -temperature

    @untraced
    @torch.no_grad()
    def start_update(self, features: Tensor, prototypes: Tensor) -> Callable[[], None]:
        """Begin the update with a batch's mean logit; the all-reduce runs while the step goes on.

        The mean logit is the mean feature's logit: only a feature vector is summed over ranks, and no logits are read.
        As in DINOv2 it is the mean of the ranks' means; ranks without rows do not count, and without any the centre
        stays.

        Args:
            features: [M, D] teacher features.
            prototypes: [V, D] of the teacher.

        Returns:
            A function that finishes the update; targets formed after it see the new centre.
        """
        wide = features.float()
        total = torch.cat([wide.mean(0) if len(wide) else wide.sum(0), wide.new_full((1,), float(len(wide) > 0))])
        work = dist.all_reduce(total, async_op=True) if _distributed() else None

        def finish() -> None:
            if work is not None:
                work.wait()
            mean, ranks = total[:-1] / total[-1].clamp(min=1), total[-1]
            logits = mean.new_empty(len(prototypes))
            # in blocks, because a float32 copy of all bf16 prototypes costs more than the product
            block = CPU_BLOCK if mean.device.type == "cpu" else BLOCK
            copy = mean.new_empty(min(block, len(prototypes)), len(mean))
            for part, out in zip(prototypes.split(block), logits.split(block), strict=True):
                torch.mv(part if part.dtype == mean.dtype else copy[: len(part)].copy_(part), mean, out=out)
            self.center.lerp_(logits, (1 - self.momentum) * (ranks > 0).float())

        return finish


@untraced
@torch.no_grad()
def sinkhorn_bias(
    features: Tensor,
    prototypes: Tensor,
    temperature: float,
    iterations: int = 3,
    chunk_rows: int = 256,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Bias of Sinkhorn-Knopp targets: the logarithm of the column scaling after some iterations.

    One iteration makes the prototypes' sums over all ranks' rows equal, then each row's sum 1. Logits are recomputed in
    every iteration rather than kept. Every rank must call this, with or without rows.

    Args:
        features: [M, D] teacher features.
        prototypes: [V, D] of the teacher.
        temperature: T > 0.
        iterations: At least 1; DINOv2 takes 3.
        chunk_rows: Rows of logits in memory at a time.
        impl: Of the sums over logits, see `armillary.kernels.launch`.

    Returns:
        [V] float32 (float64 for float64 inputs), up to a constant, which the softmax of the targets removes.
    """
    wide = torch.promote_types(features.dtype, torch.float32)

    def logits() -> Iterator[Tensor]:
        for chunk in features.split(chunk_rows):
            if len(chunk):
                yield (chunk @ prototypes.T).to(wide).div_(temperature)

    fused = use_triton("sinkhorn_bias", impl, features)
    # First column sums: rows are not normalised yet, so they need a maximum of their own to stay in range.
    high = features.new_full((len(prototypes),), -torch.inf, dtype=wide)
    total = torch.zeros_like(high)
    if fused:
        high = _column_sums(features, prototypes, temperature, chunk_rows, None)
        total = torch.where(high == -torch.inf, 0.0, 1.0)
    else:
        for chunk in logits():
            new = torch.maximum(high, chunk.amax(0))
            total = total * (high - new).exp() + (chunk - new).exp_().sum(0)
            high = new
    if _distributed():
        everywhere = high.clone()
        dist.all_reduce(everywhere, dist.ReduceOp.MAX)
        total = torch.where(total > 0, total * (high - everywhere).exp(), total)
        dist.all_reduce(total)
        high = everywhere
    bias = torch.where(total > 0, -(high + total.log()), 0.0)  # without rows on any rank: 0
    for _ in range(iterations - 1):
        if fused:
            total = _column_sums(features, prototypes, temperature, chunk_rows, bias).exp()
        else:
            total = torch.zeros_like(bias)
            for chunk in logits():
                total += (chunk + bias).softmax(-1).sum(0)
        if _distributed():
            dist.all_reduce(total)
        bias = bias - total.clamp(min=torch.finfo(wide).tiny).log()
    return bias


def _column_sums(
    features: Tensor, prototypes: Tensor, temperature: float, chunk_rows: int, bias: Tensor | None
) -> Tensor:
    """[V] float32: log of the columns' sums of exp(logits); with a bias, of softmax(logits + bias).

    No float32 logits: a chunk is read as the product gave it, twice with a bias.
    """
    sums = features.new_full((len(prototypes),), -torch.inf, dtype=torch.float32)
    buffer = features.new_empty(min(chunk_rows, len(features)), len(prototypes))
    for chunk in features.split(chunk_rows) if len(features) else ():
        logits = buffer[: len(chunk)]
        torch.addmm(logits, chunk, prototypes.T, beta=0, alpha=1 / temperature, out=logits)
        rows = None if bias is None else row_logsumexp(logits, bias, impl="triton")
        column_logsumexp_(sums, logits, bias, rows, impl="triton")
    return sums


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
