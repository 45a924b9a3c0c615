"""The mixture of experts as Galaxy-Walker's released code has it, in plain PyTorch: the preset of comparisons with it.

    y = g_E f_E(x) + g_S kappa f_S(x / |x|) / |f_S(x / |x|)| + g_H s f_H(x) * x / (|x| + 1e-8),   g = softmax((W x + b) / T)

Each f is a SwiGLU network without biases. So the spherical expert gives rows of norm kappa (1 at the start), whatever the
norm of the others is, and the hyperbolic one is a Euclidean network whose output is multiplied, element by element, with the
direction of the input: about 1 / sqrt(D) of a SwiGLU network's at the start. Neither lives in a curved space; the equations
of the paper are in `armillary.models.geometry.geometry_experts`.

T is a plain number and may change its sign while it is trained. Which initialisation the spherical and the hyperbolic
network had is not known; here it is that of `torch.nn.Linear`.

Shape legend: D width, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.kernels.geometry.geometry_combine import EXPERTS
from armillary.models.geometry.geometry_experts import CLOSED, Mixture

__all__ = ["PublishedExperts", "SwiGLU"]


class SwiGLU(nn.Module):
    """A feed-forward layer, named and computed as Qwen's.

    Args:
        dim: Width D.
        hidden: Hidden width H.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class PublishedExperts(nn.Module):
    """The layer; takes the place of an MLP as `GeometryExperts` does.

    Args:
        dim: Width D.
        hidden: Hidden width H of each expert.
        experts: Experts that take part; the gate of the others is 0.
        temperature: T at the start.
    """

    closed: Tensor

    def __init__(self, dim: int, hidden: int, experts: tuple[str, ...] = EXPERTS, temperature: float = 0.1) -> None:
        super().__init__()
        self.names = experts
        self.euclidean, self.spherical, self.hyperbolic = (SwiGLU(dim, hidden) for _ in EXPERTS)
        self.router = nn.Linear(dim, 3)
        self.temperature = nn.Parameter(torch.tensor([temperature]))
        self.kappa = nn.Parameter(torch.ones(1))
        self.radial = nn.Parameter(torch.ones(1))
        closed = torch.tensor([0.0 if name in experts else CLOSED for name in EXPERTS])
        self.register_buffer("closed", closed, persistent=False)

    def forward(self, x: Tensor) -> Mixture:
        """Mix the experts' outputs, see `GeometryExperts.forward`."""
        if self.names == ("euclidean",):
            return Mixture(self.euclidean(x), self.closed.expand(*x.shape[:-1], 3))
        logits = self.router(x).float() / self.temperature.float() + self.closed
        gates = logits.softmax(-1).to(x.dtype).unsqueeze(-1)
        direction = x / (x.norm(dim=-1, keepdim=True) + 1e-8)
        sphere = self.kappa * F.normalize(self.spherical(F.normalize(x, dim=-1, eps=1e-8)), dim=-1, eps=1e-8)
        ball = self.radial * self.hyperbolic(x) * direction
        y = gates[..., 0, :] * self.euclidean(x) + gates[..., 1, :] * sphere + gates[..., 2, :] * ball
        return Mixture(y, logits)

    def load_mlp(self, state: Mapping[str, Tensor]) -> None:
        """Copy an MLP's weights into the Euclidean expert, see `GeometryExperts.load_mlp`.

        Raises:
            ValueError: They do not fit.
        """
        try:
            self.euclidean.load_state_dict(dict(state))
        except RuntimeError as error:
            raise ValueError(f"load_mlp: {error}") from error

    @torch.no_grad()
    def prefer(self, expert: str, probability: float) -> None:
        """Give one expert the same share at every token, see `GeometryExperts.prefer`."""
        others = len(self.names) - 1
        logit = math.log(others * probability / (1 - probability)) if probability < 1 and others else -CLOSED
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)
        self.router.bias[EXPERTS.index(expert)] = logit * self.temperature[0]
