"""Projection head of DINO and iBOT: an MLP, a normalised bottleneck, and prototypes.

The head stops before the logits: it returns normalised features and the prototype matrix, and the loss multiplies them
chunk by chunk (`armillary.kernels.objective.prototype_loss`).

Source: Caron et al. 2021, DINO (arXiv:2104.14294); names and initialisation as DINOv2 has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.models.rules import at_least, choices, refuse

__all__ = ["DINOHead", "Head"]


@dataclass(frozen=True)
class Head:
    """Shape of a projection head. The defaults are those of DINOv2's short schedule and of AstroCLIP.

    Attributes:
        prototypes: Prototypes V, the size of the targets.
        hidden: Width of the MLP's two hidden layers.
        bottleneck: Width D of the normalised features.
        weight_norm: What the prototypes' norms are: "trainable" (1 at the start; the released code trains them, with
            weight decay) or "unit" (kept at 1).
    """

    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    weight_norm: Literal["trainable", "unit"] = "trainable"

    def problems(self) -> list[str]:
        """Every rule that the configuration breaks, as `field: rule, got value`."""
        return at_least(1, self, "hidden", "bottleneck") + at_least(2, self, "prototypes") + choices(self)

    def flops(self, dim: int) -> float:
        """Matrix-product FLOPs of one row, forward.

        Args:
            dim: Width of the encoder.
        """
        mlp = dim * self.hidden + self.hidden**2 + self.hidden * self.bottleneck
        return 2.0 * (mlp + self.bottleneck * self.prototypes)


class DINOHead(nn.Module):
    """MLP, L2 normalisation and weight-normalised prototypes; state dict as in DINOv2 (`mlp.*`, `last_layer.*`).

    Args:
        config: Shape.
        dim: Width of the encoder.
    """

    def __init__(self, config: Head, dim: int) -> None:
        super().__init__()
        refuse("Head", config.problems())
        self.config = config
        h, b = config.hidden, config.bottleneck
        self.mlp = nn.Sequential(nn.Linear(dim, h), nn.GELU(), nn.Linear(h, h), nn.GELU(), nn.Linear(h, b))
        self.last_layer = _Prototypes(config.prototypes, b, trainable_norm=config.weight_norm == "trainable")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise from torch's global generator; the prototypes keep the default of a linear layer."""
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens.

        Args:
            x: [n, dim] tokens.

        Returns:
            features: [n, bottleneck], of norm 1.
            prototypes: [V, bottleneck].
        """
        x = self.mlp(x)
        # float32 keeps the norm of a bf16 model from being rounded before it divides
        features = F.normalize(x.float(), dim=-1, eps=1e-12).to(x.dtype) if x.dtype != torch.float64 else F.normalize(x)
        return features, self.last_layer()


class _Prototypes(nn.Module):
    """Rows `weight_g * weight_v / |weight_v|`."""

    def __init__(self, prototypes: int, dim: int, trainable_norm: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(prototypes, dim))
        norm = torch.ones(prototypes, 1)
        if trainable_norm:
            self.weight_g = nn.Parameter(norm)
        else:
            self.register_buffer("weight_g", norm, persistent=False)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))
        with torch.no_grad():
            self.weight_g.fill_(1.0)

    def forward(self) -> Tensor:
        """[V, dim], by PyTorch's fused weight normalisation."""
        # A norm that is not trained is a buffer, which stays float32 where the parameters are bfloat16.
        return torch._weight_norm(self.weight_v, self.weight_g.to(self.weight_v.dtype), 0)
