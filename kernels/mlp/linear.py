r"""A linear layer whose bias takes its gradient from sums that came with the gradient of the output.

    y = x W^T + b        dx = dy W,  dW = dy^T x,  db = sum_m dy

Shapes: x [M, K], W [N, K], b [N], y [M, N]. PyTorch's own layer reads dy for db once more; this one asks
`armillary.kernels.column_sums`, into which `residual_norm` and `packed_attention` write. Saved are x and W. The products are the
library's, and there is no kernel of this file's own: `impl` "triton" says that the neighbours' run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.column_sums import column_sums
from armillary.kernels.launch import Impl, use_triton

__all__ = ["linear"]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            dy @ weight if for_x else None,
            dy.t() @ x if for_weight else None,
            column_sums(dy).to(dy.dtype) if for_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, impl: Impl = "auto") -> Tensor:
    """x W^T + b.

    Under autocast and torch.compile it is plain `F.linear`, as by `impl` "reference"; bad input is refused as by that.

    Args:
        x: [M, K], any float.
        weight: [N, K].
        bias: [N].
        impl: See `armillary.kernels.launch`.

    Returns:
        [M, N].
    """
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
    if plain or not use_triton("linear", impl, x):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)
