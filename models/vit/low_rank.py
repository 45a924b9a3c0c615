"""Low-rank adaptation of linear layers (LoRA): the weight stays as it is, a product of two thin matrices is added and trained.

    W' = W + (alpha / r) up down        up [out, r], 0 at first; down [r, in]

The sum is formed before the layer uses it, so that layers which take their weight into a fused kernel (GELU, the gain of a residual
branch) are adapted like any other, and a merged layer is the same function. Outputs could be added instead, as the peft library
does; that would save the whole weight's gradient, a third of the layer's products, and a copy of W' until it is made, but cannot
pass through such a kernel. What is saved here is optimizer state and communication. In bf16 W' is rounded like the copy of a
master weight.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; `down` as in its released code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["AdaptableLinear", "LowRank", "adapt", "is_adapter", "merge"]


class LowRank(nn.Module):
    """What is added to one weight.

    Args:
        out_features: Rows of the weight.
        in_features: Its columns.
        rank: Rank r of what is added.
        alpha: Its scale is alpha / r.
    """

    def __init__(self, out_features: int, in_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight [out, in]."""
        return torch.addmm(weight, self.up, self.down, alpha=self.scale)


class AdaptableLinear(nn.Linear):
    """A linear layer that reads its weight through `adapted`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.adapter: LowRank | None = None

    def adapted(self) -> Tensor:
        """The weight, with what is added to it."""
        return self.weight if self.adapter is None else self.adapter(self.weight)


def adapt(network: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a network, and give each of its adaptable layers an adapter, which is trained."""
    network.requires_grad_(False)
    for layer in [m for m in network.modules() if isinstance(m, AdaptableLinear)]:
        layer.adapter = LowRank(layer.out_features, layer.in_features, rank, alpha)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".adapter." in name


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Add what adapters add to the weights themselves; the adapters stay, and add nothing."""
    for layer in network.modules():
        if isinstance(layer, AdaptableLinear) and layer.adapter is not None:
            layer.weight.copy_(layer.adapted())
            layer.adapter.up.zero_()
