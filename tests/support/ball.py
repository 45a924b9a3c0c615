"""Rows and scalars for the tests of maps of the Poincare ball."""

import torch
from torch import Tensor


def unit(rows: int, width: int) -> Tensor:
    """Random directions in float64."""
    x = torch.randn(rows, width, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def scalar(value: float, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)
