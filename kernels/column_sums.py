"""Sums over the rows of a gradient that travel with it.

The gradient of a linear layer's bias is the sum over the rows of the gradient of its output. Whoever writes that gradient has the
rows at hand and sums them on the way, so that the layer does not read them once more.

Sums count only if the gradient arrives as it left, or reshaped: where autograd adds several gradients, where a hook makes another one
or writes into it, they are made anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attach_column_sums", "column_sums"]


def attach_column_sums(grad: Tensor, sums: Tensor) -> None:
    """Let sums travel with a gradient.

    Args:
        grad: [M, ...] contiguous, about to be returned to autograd.
        sums: [...] float32, over its rows.
    """
    grad.__dict__["column_sums"] = (grad._version, sums)


def column_sums(grad: Tensor) -> Tensor:
    """[N] float32 sums over the rows of a gradient [M, N]: those that came with it, or made now."""
    for written in (grad, grad._base):
        if written is None:
            continue
        version, sums = written.__dict__.get("column_sums", (None, None))
        whole = grad.storage_offset() == written.storage_offset() and grad.numel() == written.numel()
        if sums is not None and version == grad._version and sums.numel() == grad.shape[1]:
            if whole and grad.is_contiguous():
                found: Tensor = sums.flatten()
                return found
    return grad.sum(0, dtype=torch.float32)
