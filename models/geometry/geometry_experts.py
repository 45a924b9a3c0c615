"""Mixture of geometry experts: a feed-forward layer whose experts live in flat, spherical and hyperbolic space.

It takes the place of a transformer's MLP. A gate mixes three experts of the same size, and the Euclidean one can be
loaded from the MLP that it replaces, so that a pretrained model starts where it was:

    layer = GeometryExperts(GeometryFFN(dim=1536, hidden=8960, body="swiglu", bias=False))
    layer.load_mlp(block.mlp.state_dict())
    layer.prefer("euclidean", probability=0.9)
    y, logits = layer(x)

Parameters, all read in this module's own forward (E, S, H is the experts' order; 2 stands for gate and up of SwiGLU):

    router_weight [3, D]                          router_bias [3]
    up_weight     [3, H, D] or [3, 2, H, D]       up_bias     [3, H] or [3, 2, H]
    down_weight   [3, D, H]                       down_bias   [3, D]
    log_temperature [1], kappa [1], moebius_bias [D] (a tangent vector at 0), curvature.offset [1]

Shape legend: M tokens, D width, H hidden width.

Source: Galaxy-Walker (arXiv:2503.18578), equations 4 to 7; hard routing: Switch Transformer (arXiv:2101.03961).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.kernels.geometry.geometry_combine import CLIP, EXPERTS
from armillary.kernels.geometry.geometry_ffn import Routing, geometry_ffn
from armillary.kernels.launch import Impl
from armillary.kernels.mlp.up_projection import Activation
from armillary.models.geometry.manifolds import Curvature, exp0
from armillary.models.rules import at_least, choices, positive, refuse

__all__ = ["GateStatistics", "GeometryExperts", "GeometryFFN", "Mixture", "gate_statistics"]

# The hyperbolic map saturates, and a saturated row has no radial gradient: this expert's output starts that much smaller
# than the others'.
HYPERBOLIC_GAIN = 0.1

CLOSED = -1e4
"""What is added to the gate's logits of experts that take no part: their share underflows to 0."""


@dataclass(frozen=True)
class GeometryFFN:
    """Shape and geometry of a mixture of geometry experts. The defaults are those of Galaxy-Walker's released code.

    Attributes:
        dim: Width D.
        hidden: Hidden width H of each expert.
        body: "gelu", "gelu_tanh" or "swiglu".
        bias: Whether the experts' linear layers have biases (Qwen2's have none).
        experts: Experts that take part; the gate of the others is 0, and they learn nothing. They are computed all the same,
            but where the Euclidean one is alone: then the layer is the MLP that it was loaded from, to the last bit.
        routing: "soft" mixes all three experts; "top1" computes only that of the greatest logit for each token, at a third
            of the cost, but the host waits for the device once a layer.
        temperature: What the gate's logits are divided by, at the start.
        learn_temperature: Whether it is trained; it stays positive, being an exponential.
        kappa: Radius of the sphere at the start; trained.
        curvature: c of the Poincare ball (curvature -c) at the start; trained.
        curvature_min: Least c.
        curvature_max: Greatest c.
        moebius_bias: Whether the hyperbolic expert has a bias that is added on the ball.
        input_radius: Euclidean radius at which the rows of a LayerNorm enter the ball; below 1 / sqrt(curvature_max).
        clip: Where the tangent norm sqrt(c) |u| of the hyperbolic expert is cut: tanh(2.3) = 0.98 of the ball's radius.
    """

    dim: int = 1024
    hidden: int = 4096
    body: Activation = "gelu"
    bias: bool = True
    experts: tuple[str, ...] = EXPERTS
    routing: Routing = "soft"
    temperature: float = 0.1
    learn_temperature: bool = True
    kappa: float = 1.0
    curvature: float = 1.0
    curvature_min: float = 0.01
    curvature_max: float = 2.0
    moebius_bias: bool = False
    input_radius: float = 0.5
    clip: float = CLIP

    def problems(self) -> list[str]:
        """Every rule that the configuration breaks, as `field: rule, got value`."""
        found = at_least(1, self, "dim", "hidden") + choices(self)
        found += positive(self, "temperature", "input_radius", "clip")
        if not self.experts or len(set(self.experts)) < len(self.experts) or set(self.experts) - set(EXPERTS):
            found.append(f"experts: must be some of {', '.join(EXPERTS)}, each once, got {self.experts}")
        if not 0 < self.curvature_min < self.curvature < self.curvature_max < math.inf:
            bounds = f"{self.curvature_min} and {self.curvature_max}"
            found.append(
                f"curvature: must lie between curvature_min > 0 and curvature_max, got {self.curvature}, {bounds}"
            )
        elif not self.input_radius**2 * self.curvature_max < 1:
            limit = self.curvature_max**-0.5
            found.append(f"input_radius: must be below 1 / sqrt(curvature_max) = {limit:.3g}, got {self.input_radius}")
        return found

    def flops(self) -> float:
        """Matrix-product FLOPs of one token, forward: 2 a multiply-add."""
        matrices = 3 if self.body == "swiglu" else 2
        experts = 3 if self.routing == "soft" and self.experts != ("euclidean",) else 1
        return 2.0 * self.dim * (experts * matrices * self.hidden + 3)


class Mixture(NamedTuple):
    """What the layer returns. A tuple, so that DeepSpeed finds the tensors in it.

    Attributes:
        y: [..., D] in the input's dtype.
        logits: [..., 3] float32, of the gate, divided by its temperature; for the log or a balance loss.
    """

    y: Tensor
    logits: Tensor


class GateStatistics(NamedTuple):
    """How a gate spreads tokens over the Euclidean, spherical and hyperbolic expert. Tensors, so that nothing waits.

    Attributes:
        share: [3], mean gate of each expert; sums to 1.
        chosen: [3], fraction of the tokens whose greatest gate it is.
        entropy: [], mean entropy of a token's gate in units of log 3: 1 where all are equal, 0 where one decides.
    """

    share: Tensor
    chosen: Tensor
    entropy: Tensor


def gate_statistics(logits: Tensor) -> GateStatistics:
    """Statistics of a gate's logits.

    Args:
        logits: [..., 3], at least one token.
    """
    logits = logits.detach().flatten(0, -2)
    log_gates = logits.log_softmax(1)
    gates = log_gates.exp()
    chosen = (logits.argmax(1, keepdim=True) == torch.arange(3, device=logits.device)).float().mean(0)
    return GateStatistics(gates.mean(0), chosen, -(gates * log_gates).sum(1).mean() / math.log(3))


class GeometryExperts(nn.Module):
    """The layer.

    Args:
        config: Shape and geometry.
        impl: Implementation, see `armillary.kernels.launch`.

    Raises:
        ValueError: The configuration breaks a rule.
    """

    closed: Tensor

    def __init__(self, config: GeometryFFN, impl: Impl = "auto") -> None:
        super().__init__()
        refuse("GeometryFFN", config.problems())
        self.config = config
        self.impl = impl
        d, h = config.dim, config.hidden
        halves = (2, h) if config.body == "swiglu" else (h,)
        self.router_weight = nn.Parameter(torch.empty(3, d))
        self.router_bias = nn.Parameter(torch.empty(3))
        closed = torch.tensor([0.0 if name in config.experts else CLOSED for name in EXPERTS])
        self.register_buffer("closed", closed, persistent=False)  # settings, not state
        self.up_weight = nn.Parameter(torch.empty(3, *halves, d))
        self.up_bias = nn.Parameter(torch.empty(3, *halves)) if config.bias else None
        self.down_weight = nn.Parameter(torch.empty(3, d, h))
        self.down_bias = nn.Parameter(torch.empty(3, d)) if config.bias else None
        self.log_temperature = nn.Parameter(torch.empty(1), requires_grad=config.learn_temperature)
        self.kappa = nn.Parameter(torch.empty(1))
        self.curvature = Curvature(config.curvature, config.curvature_min, config.curvature_max)
        self.moebius_bias = nn.Parameter(torch.empty(d)) if config.moebius_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise from torch's global generator: a gate that starts even, biases of 0, a small hyperbolic expert."""
        nn.init.trunc_normal_(self.router_weight, std=0.02 * self.config.temperature)
        nn.init.trunc_normal_(self.up_weight, std=0.02)
        nn.init.trunc_normal_(self.down_weight, std=0.02)
        with torch.no_grad():
            self.down_weight[2].mul_(HYPERBOLIC_GAIN)
        for bias in (self.router_bias, self.up_bias, self.down_bias, self.moebius_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        nn.init.constant_(self.log_temperature, math.log(self.config.temperature))
        nn.init.constant_(self.kappa, self.config.kappa)
        self.curvature.reset_parameters()

    def forward(self, x: Tensor) -> Mixture:
        """Mix the experts' outputs.

        Args:
            x: [..., D], the output of a norm, in the parameters' dtype.
        """
        config = self.config
        if config.experts == ("euclidean",):
            return Mixture(self._euclidean(x), self.closed.expand(*x.shape[:-1], 3))
        wide = torch.promote_types(x.dtype, torch.float32)
        all_take_part = len(config.experts) == len(EXPERTS)
        router_bias = self.router_bias if all_take_part else self.router_bias + self.closed.to(self.router_bias.dtype)
        c = self.curvature().to(wide)
        bias = None if self.moebius_bias is None else exp0(self.moebius_bias.to(wide), c, impl=self.impl)
        y, logits = geometry_ffn(
            x.reshape(-1, config.dim).contiguous(),
            self.router_weight,
            router_bias,
            self.log_temperature.to(wide).exp().squeeze(0),
            self.up_weight,
            self.up_bias,
            self.down_weight,
            self.down_bias,
            self.kappa.to(wide).squeeze(0),
            c,
            bias,
            body=config.body,
            input_scale=config.input_radius / math.sqrt(config.dim),
            routing=config.routing,
            clip=config.clip,
            impl=self.impl,
        )
        return Mixture(y.view(x.shape), logits.view(*x.shape[:-1], 3))

    def _euclidean(self, x: Tensor) -> Tensor:
        """The Euclidean expert alone, in the order of operations of the MLP that it was loaded from."""
        bias = (None, None) if self.up_bias is None or self.down_bias is None else (self.up_bias[0], self.down_bias[0])
        if self.config.body == "swiglu":
            gate, up = (
                F.linear(x, w, b)
                for w, b in zip(self.up_weight[0], (None, None) if bias[0] is None else bias[0], strict=True)
            )
            hidden = F.silu(gate) * up
        else:
            approximate = "tanh" if self.config.body == "gelu_tanh" else "none"
            hidden = F.gelu(F.linear(x, self.up_weight[0], bias[0]), approximate=approximate)
        return F.linear(hidden, self.down_weight[0], bias[1])

    @torch.no_grad()
    def load_mlp(self, state: Mapping[str, Tensor]) -> None:
        """Copy an MLP's weights into the Euclidean expert.

        Args:
            state: The MLP's state dict: `gate_proj`, `up_proj` and `down_proj` for the body "swiglu" (Qwen2, Llama), `fc1`
                and `fc2` for the others, each with `.weight` and, where this layer has biases, `.bias`.

        Raises:
            ValueError: A tensor is missing, too many, or of the wrong shape. Nothing has been copied then.
        """
        gated = self.config.body == "swiglu"
        names = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
        tensors = {"weight": (self.up_weight, self.down_weight), "bias": (self.up_bias, self.down_bias)}
        targets = {
            f"{name}.{kind}": target
            for kind, (up, down) in tensors.items()
            if up is not None and down is not None
            for name, target in zip(names, (*(up[0] if gated else up[:1]), down[0]), strict=True)
        }
        if set(state) != set(targets):
            raise ValueError(f"load_mlp: state must have {', '.join(sorted(targets))}, got {', '.join(sorted(state))}")
        for name, target in targets.items():
            if state[name].shape != target.shape:
                got = list(state[name].shape)
                raise ValueError(f"load_mlp: {name} must have shape {list(target.shape)}, got {got}")
        for name, target in targets.items():
            target.copy_(state[name])

    @torch.no_grad()
    def prefer(self, expert: str, probability: float) -> None:
        """Set the gate so that it gives one expert the same share at every token, at the present temperature.

        The gate's weight becomes 0 and still learns. With probability 1 the other experts get exactly nothing, and no
        gradient either, so the layer equals that expert.

        Args:
            expert: "euclidean", "spherical" or "hyperbolic".
            probability: Its share, in (0, 1]; the others share the rest evenly.

        Raises:
            ValueError: No such expert or probability.
        """
        if expert not in EXPERTS:
            raise ValueError(f"prefer: expert must be one of {', '.join(EXPERTS)}, got {expert!r}")
        if expert not in self.config.experts:
            raise ValueError(f"prefer: expert must take part ({', '.join(self.config.experts)}), got {expert!r}")
        if not 0 < probability <= 1:
            raise ValueError(f"prefer: probability must be in (0, 1], got {probability}")
        others = len(self.config.experts) - 1
        logit = math.log(others * probability / (1 - probability)) if probability < 1 and others else -CLOSED
        nn.init.zeros_(self.router_weight)
        nn.init.zeros_(self.router_bias)
        self.router_bias[EXPERTS.index(expert)] = logit * self.log_temperature.exp()[0]
