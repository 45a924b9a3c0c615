r"""A residual branch's output joined and the next branch's input normalised in one pass over the tokens.

    x' = x + s y            for the tokens of samples that ran the last branch, x' = x for the others
    n  = (x' - mean) rstd w + b     for the tokens of samples that run the next branch, packed in its order

A block's LayerScale gains are folded into the branch's last weights, so the factor s of a sample is stochastic depth's
alone. Which samples run a branch, and where their tokens lie in its packed rows, a `Packing` tells by sample; without
one every token has its own row, and s = 1.

Shapes: P tokens, D width, N samples. x, x' [P, D]; y [rows of the last branch, D]; n [rows of the next branch, D]; w, b
[D]. Arithmetic is float32; x' is rounded to x's dtype before its statistics are taken, so that the backward pass sees
the same. The mean is corrected by the mean of the differences from it, so that a constant row is exactly its own mean.

Saved for the backward pass: x' (x where there is no y), w, and mean and rstd [rows of the next branch] in float32. It
is one pass as well: with g = w dn and x̂ = (x' - mean) rstd

    dx = dx' + (g - mean(g) - x̂ mean(g x̂)) rstd,   dy = s dx,   dw = Σ dn x̂,   db = Σ dn

where each program sums its share of dw and db in float32 and one sum over the programs follows. So it does for Σ dy, the gradient of
the bias of the layer that made y, which travels with dy (`armillary.kernels.column_sums`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.column_sums import attach_column_sums
from armillary.kernels.launch import Impl, check_tensor, refuse, settings, untraced, use_triton
from armillary.kernels.tokens.residual_norm_kernels import (
    LAUNCH,
    residual_norm_bwd_kernel,
    residual_norm_fwd_kernel,
    row_shape,
)

__all__ = ["Packing", "residual_add", "residual_add_reference", "residual_norm", "residual_norm_reference"]

MAX_WIDTH = 8192  # a row lies in the registers of one program


@dataclass(frozen=True)
class Packing:
    """Where the tokens of the samples that run a branch lie in the branch's packed rows.

    Attributes:
        sample: [P] int32: sample of each token; the same for all branches of a step.
        place: [P] int32: place of each token in its sample, from 0; likewise.
        start: [N] int32: row of each sample's first token, -1 where the sample skips the branch.
        scale: [N] float32: factor of the branch's output.
        rows: Number of packed rows.
    """

    sample: Tensor
    place: Tensor
    start: Tensor
    scale: Tensor
    rows: int

    def tokens(self) -> Tensor:
        """[rows] int64: token of each packed row, found without waiting for the device."""
        start = self.start.long().index_select(0, self.sample)
        row = torch.where(start >= 0, start + self.place, self.rows)  # behind the last one: cut off below
        token = torch.arange(len(row), device=row.device)
        return torch.empty(self.rows + 1, dtype=torch.int64, device=row.device).scatter_(0, row, token)[: self.rows]


def residual_add_reference(x: Tensor, y: Tensor, ran: Packing | None = None) -> Tensor:
    """`residual_add` in plain PyTorch, in any float dtype."""
    if ran is None:
        return x + y
    tokens = ran.tokens()
    scale = ran.scale.index_select(0, ran.sample.index_select(0, tokens))
    return x.index_add(0, tokens, (scale[:, None] * y).to(x.dtype))


def residual_norm_reference(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    ran: Packing | None = None,
    runs: Packing | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`residual_norm` in plain PyTorch, in any float dtype: the oracle of the tests and the CPU path."""
    if y is not None:
        x = residual_add_reference(x, y, ran)
    branch = x if runs is None else x.index_select(0, runs.tokens())
    return x, F.layer_norm(branch, weight.shape, weight, bias, eps)


def _maps(ran: Packing | None, runs: Packing | None) -> tuple[Tensor | None, ...]:
    """Arguments `sample_ptr` to `runs_ptr` of the kernels."""
    any_packing = ran or runs
    if any_packing is None:
        return (None,) * 5
    last = (None, None) if ran is None else (ran.start, ran.scale)
    return any_packing.sample, any_packing.place, *last, None if runs is None else runs.start


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        ran: Packing | None,
        runs: Packing | None,
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        tokens, width = x.shape
        out = x if y is None else torch.empty_like(x)
        n = mean = rstd = None
        if weight is not None:
            rows = tokens if runs is None else runs.rows
            n = x.new_empty(rows, width)
            if any(ctx.needs_input_grad):
                mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        if tokens:
            residual_norm_fwd_kernel[(tokens,)](
                x,
                y,
                weight,
                bias,
                out,
                n,
                mean,
                rstd,
                *_maps(ran, runs),
                width,
                eps,
                **row_shape(settings(LAUNCH, x), width),
            )
        if weight is not None:
            ctx.save_for_backward(out, weight, mean, rstd)
        ctx.ran, ctx.runs, ctx.has_y, ctx.shape = ran, runs, y is not None, x.shape
        ctx.set_materialize_grads(False)
        return out, n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_n: Tensor | None) -> tuple[Tensor | None, ...]:
        like = d_n if d_out is None else d_out
        if like is None:
            return (None,) * 7
        needs_x, needs_y, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        tokens, width = ctx.shape
        launch = settings(LAUNCH, like)
        shape = row_shape(launch, width)
        programs = min(launch.blocks["WARPS"] // shape["num_warps"], tokens)
        out, weight, mean, rstd = (None,) * 4 if d_n is None else ctx.saved_tensors
        d_x = d_y = None
        of_norm = 2 if d_n is not None and (needs_weight or needs_bias) else 0
        sums = torch.empty(of_norm + needs_y, programs, width, dtype=torch.float32, device=like.device)
        if needs_x or (needs_y and ctx.ran is None):
            d_x = like.new_empty(tokens, width)
        if needs_y and ctx.ran is not None:
            d_y = like.new_empty(ctx.ran.rows, width)
        if tokens:
            residual_norm_bwd_kernel[(programs,)](
                None if d_out is None else d_out.contiguous(),
                None if d_n is None else d_n.contiguous(),
                out,
                weight,
                mean,
                rstd,
                d_x,
                d_y,
                sums if of_norm else None,
                sums[-1] if needs_y else None,
                *_maps(ctx.ran, ctx.runs),
                tokens,
                width,
                **shape,
            )
        if needs_y and ctx.ran is None:
            d_y = d_x
        totals = sums.sum(1)
        d_weight, d_bias = totals[:2].to(like.dtype) if of_norm else (None, None)
        if d_y is not None:
            attach_column_sums(d_y, totals[-1])
        return d_x, d_y, d_weight, d_bias, None, None, None


@untraced
def residual_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    ran: Packing | None = None,
    runs: Packing | None = None,
    *,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the last branch's output to the tokens and normalise them for the next branch (Ba et al. 2016).

    Args:
        x: [P, D], float32, bfloat16 or float16 (the reference: any float).
        y: [P, D], or [ran.rows, D]: the last branch's output; None where there is none yet.
        weight: [D] of the norm. All four share one dtype.
        bias: [D] of the norm.
        ran: Which samples ran the last branch; all, with factor 1, if absent.
        runs: Which samples run the next branch; all if absent. Its `scale` is not used.
        eps: Added to the variance.
        impl: See `armillary.kernels.launch`.

    Returns:
        x' [P, D], which is x itself without y, and n [P, D] or [runs.rows, D], both in x's dtype.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or layout; the message names it.
    """
    fused = use_triton("residual_norm", impl, x)
    _check("residual_norm", x, y, ran, runs, fused)
    for name, p in (("weight", weight), ("bias", bias)):
        check_tensor("residual_norm", name, p, [x.shape[1]], like=x, dtypes=[x.dtype])
    if not eps > 0:
        refuse("residual_norm", "eps", "must be positive", eps)
    if fused:
        return _ResidualNorm.apply(x, y, weight, bias, ran, runs, eps)
    return residual_norm_reference(x, y, weight, bias, ran, runs, eps=eps)


@untraced
def residual_add(x: Tensor, y: Tensor, ran: Packing | None = None, *, impl: Impl = "auto") -> Tensor:
    """Add a branch's output to the tokens where no norm follows; arguments, result and errors as `residual_norm`."""
    fused = use_triton("residual_add", impl, x)
    _check("residual_add", x, y, ran, None, fused)
    if fused and ran is not None:
        return _ResidualNorm.apply(x, y, None, None, ran, None, 0.0)[0]
    return residual_add_reference(x, y, ran)


def _check(name: str, x: Tensor, y: Tensor | None, ran: Packing | None, runs: Packing | None, fused: bool) -> None:
    check_tensor(name, "x", x, ["P", "D"])
    tokens, width = x.shape
    if not x.is_floating_point():
        refuse(name, "x", "must be floating point", x.dtype)
    if fused and not 1 <= width <= MAX_WIDTH:
        refuse(name, "x", f"must have a width D of 1 to {MAX_WIDTH}", width)
    if y is not None:
        check_tensor(name, "y", y, [tokens if ran is None else ran.rows, width], like=x, dtypes=[x.dtype])
    elif ran is not None:
        refuse(name, "ran", "must be absent without y", "a Packing")
    for argument, packing in (("ran", ran), ("runs", runs)):
        if packing is not None:
            for field, dtype, size in (
                ("sample", torch.int32, tokens),
                ("place", torch.int32, tokens),
                ("start", torch.int32, "N"),
                ("scale", torch.float32, len(packing.start)),
            ):
                check_tensor(name, f"{argument}.{field}", getattr(packing, field), [size], like=x, dtypes=[dtype])
