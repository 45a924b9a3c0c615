"""The residual stream of a pre-norm transformer, with a branch's output kept apart until the next norm reads both.

Joining a branch and normalising for the next one read the same tokens. Carrying the pair (tokens, output of the last
branch) from one norm to the next lets one kernel do both (`armillary.kernels.tokens.residual_norm`), across the borders of
blocks too; without it, `ResidualNorm` takes the steps of `armillary.models.vit.stochastic_depth` one after the other.

Shape legend: P packed tokens of all crops, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from armillary.kernels.launch import Impl, use_triton
from armillary.kernels.tokens.residual_norm import residual_add, residual_norm
from armillary.models.vit.stochastic_depth import Subset, fork, join

__all__ = ["ResidualNorm", "Stream", "materialise"]


class Stream(NamedTuple):
    """Tokens between two residual branches. A tuple, so that DeepSpeed finds the tensors in it.

    Attributes:
        x: [P, D] tokens.
        y: Output of the last branch, which is still to be added to x: for all tokens [P, D] or the subset's. None
            where there is nothing to add.
        ran: The samples that ran that branch; None if all did.
    """

    x: Tensor
    y: Tensor | None = None
    ran: Subset | None = None


class ResidualNorm(nn.LayerNorm):
    """LayerNorm at the beginning of a residual branch; it adds the last branch's output on the way.

    Args:
        dim: Width D.
        impl: See `armillary.kernels.launch`.
        eps: Added to the variance; DINOv2's if absent.
    """

    def __init__(self, dim: int, impl: Impl, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)
        self.impl = impl

    def forward(  # type: ignore[override]
        self, stream: Stream, runs: Subset | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens [P, D] with the last branch's output, and the norm of those that run the next branch.

        Without the kernel the output is added in place where a subset ran the branch, so x must come from this method.

        Args:
            stream: Tokens and last branch.
            runs: The samples that run the next branch; all if absent.
        """
        x, y, ran = stream
        if _fused(self.impl, x):
            maps = [None if subset is None else subset.packing for subset in (ran, runs)]
            return residual_norm(x, y, self.weight, self.bias, *maps, eps=self.eps, impl="triton")
        if y is not None:
            x = x + y if ran is None else join(x, y, ran)
        if runs is None:
            return x, super().forward(x)
        x, branch = fork(x, runs, own=y is not None)
        return x, super().forward(branch)


def materialise(stream: Stream, impl: Impl) -> Stream:
    """The stream with nothing left to add."""
    x, y, ran = stream
    if y is None:
        return stream
    if ran is None:
        return Stream(x + y)
    return Stream(residual_add(x, y, ran.packing, impl="triton") if _fused(impl, x) else join(x, y, ran))


def _fused(impl: Impl, x: Tensor) -> bool:
    """Whether the kernel runs; torch.compile fuses these steps itself, unless the kernel is asked for."""
    return use_triton("residual_norm", impl, x) and not (impl == "auto" and torch.compiler.is_compiling())
