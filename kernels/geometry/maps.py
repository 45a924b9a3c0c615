"""What the row maps of the ball and the sphere share: checks, launch and autograd.

A row map takes one tensor of rows x [..., D], or two, and one scalar p, and gives [..., D] or, if it `reduces`, [...].
Its kernels hold whole rows in registers (kernels/rows.py), so forward reads each input once. Backward forms everything
again from the inputs, which are all that is saved, and leaves one partial sum of dL/dp a program, added in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.launch import Launch
from armillary.kernels.rows import check_rows, scalar, tiles

__all__ = ["RowMap", "apply_map", "check_map"]


@dataclass(frozen=True)
class RowMap:
    """The kernels of one map.

    Attributes:
        forward: Triton kernel, called as (*rows, p, y, count, width).
        backward: Triton kernel, called as (*rows, p, dy, *drows, dp, count, width); None for what is not wanted.
        launch: Launch table with the key TILE (elements a program).
        reduces: Whether a row gives one number.
    """

    forward: Any
    backward: Any
    launch: Mapping[int, Launch]
    reduces: bool = False


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: RowMap, constants: dict[str, Any], p: Tensor, *rows: Tensor) -> Tensor:
        ctx.save_for_backward(p, *rows)
        ctx.kernels, ctx.constants = kernels, constants
        x = rows[0]
        y = torch.empty(x.shape[:-1] if kernels.reduces else x.shape, dtype=x.dtype, device=x.device)
        cut = tiles(kernels.launch, x)
        if cut.rows:
            kernels.forward[(cut.programs,)](*rows, p, y, cut.rows, cut.width, **constants, **cut.options)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        p, *rows = ctx.saved_tensors
        _, _, want_p, *want_rows = ctx.needs_input_grad
        cut = tiles(ctx.kernels.launch, rows[0])
        drows = [torch.empty_like(x) if want else None for x, want in zip(rows, want_rows, strict=True)]
        dp = torch.empty(cut.programs, dtype=torch.float32, device=dy.device) if want_p else None
        if cut.rows:
            ctx.kernels.backward[(cut.programs,)](
                *rows, p, dy.contiguous(), *drows, dp, cut.rows, cut.width, **ctx.constants, **cut.options
            )
        return None, None, None if dp is None else dp.sum(), *drows


def check_map(operation: str, name: str, parameter: Tensor | float, *rows: Tensor) -> Tensor:
    """The parameter as a 0-d tensor; ValueError unless all arguments are what a row map can take.

    Args:
        operation: Name for the error.
        name: Of the parameter: "c", which must be positive, or "kappa".
        parameter: A finite number, or a 0-d float32 or float64 tensor.
        rows: x [..., D], or x and y, which must agree in shape, dtype and device.
    """
    for argument, x, like in zip("xy", rows, (None, *rows), strict=False):
        check_rows(operation, argument, x, like)
    return scalar(operation, name, parameter, rows[0], positive=name == "c")


def apply_map(kernels: RowMap, p: Tensor, *rows: Tensor, **constants: Any) -> Tensor:
    """The map by its Triton kernels, differentiable once; `constants` are compile-time arguments of both kernels."""
    return _Apply.apply(kernels, constants, p, *rows)
