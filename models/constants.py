"""Numbers of the host as tensors of a device, made once: a copy to a GPU waits until it is done with all that it was given before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["constant"]


def constant(values: Tensor | float | Sequence[float], like: Tensor) -> Tensor:
    """Numbers with the dtype and device of another tensor; a tensor as it is. Not to be written into.

    Args:
        values: The numbers.
        like: The other tensor.
    """
    if isinstance(values, Tensor):
        return values.to(like)
    return _made(tuple(values) if isinstance(values, Sequence) else values, like.dtype, like.device)


@lru_cache(maxsize=256)
def _made(values: float | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
