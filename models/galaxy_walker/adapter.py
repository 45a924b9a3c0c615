"""The geometry adapter: a mixture of geometry experts in place of the feed-forward layer of every k-th block of a VLM.

The Euclidean expert takes the pretrained layer's weights, and a gate that gives it everything leaves the model as it was, to
the last bit; training starts from a gate of .9.

    config = GeometryAdapter(every=4)
    adapt(vlm, config)                      # a model of transformers, changed in place
    attach(vlm, "adapter.safetensors")      # the same with the weights of an exported run

Shape legend: D width of the language model, L tokens of a sequence.

Source: Galaxy-Walker (arXiv:2503.18578), section 3.3 and its ablation of k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from armillary.kernels.geometry.geometry_combine import EXPERTS
from armillary.kernels.launch import Impl
from armillary.models.galaxy_walker.published_experts import PublishedExperts
from armillary.models.geometry.geometry_experts import GeometryExperts, GeometryFFN
from armillary.models.rules import at_least, choices, positive, refuse

__all__ = [
    "MLP_NAMES",
    "AdaptedFFN",
    "GeometryAdapter",
    "adapt",
    "adapted",
    "attach",
    "ffn_problems",
    "language_layers",
]

MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a feed-forward layer that an adapter can take the place of."""


@dataclass(frozen=True)
class GeometryAdapter:
    """What is adapted and how. Every field is a flag of an ablation.

    Attributes:
        every: Period k: blocks 0, k, 2k, ... are adapted; 0 adapts none.
        experts: "equations": as the paper defines them (`GeometryExperts`); "published": as its code does
            (`PublishedExperts`).
        use: Experts that take part.
        gate: "learned"; or "even": all that take part have the same share, always.
        start: Share of the Euclidean expert at the start, with a learned gate; 1 holds it there. None: the router starts
            as it was initialised, as in the released code.
        temperature: Of the gate, at the start.
        learn_temperature: Whether it is trained; the published experts always do.
        curvature: c of the Poincare ball at the start, trained; of the experts "equations".
        impl: Implementation of the experts "equations", see `armillary.kernels.launch`.
    """

    every: int = 4
    experts: Literal["equations", "published"] = "equations"
    use: tuple[Literal["euclidean", "spherical", "hyperbolic"], ...] = ("euclidean", "spherical", "hyperbolic")
    gate: Literal["learned", "even"] = "learned"
    start: float | None = 0.9
    temperature: float = 0.1
    learn_temperature: bool = True
    curvature: float = 1.0
    impl: Impl = "auto"

    def problems(self) -> list[str]:
        """Every rule that the configuration breaks, as `adapter.field: rule, got value`."""
        found = at_least(0, self, "every") + choices(self) + positive(self, "temperature")
        if self.start is not None and not 0 < self.start <= 1:
            found.append(f"start: must be in (0, 1], or None, got {self.start}")
        if not self.use or len(set(self.use)) < len(self.use) or set(self.use) - set(EXPERTS):
            found.append(f"use: must be some of {', '.join(EXPERTS)}, each once, got {self.use}")
        elif self.start is not None and self.gate == "learned" and "euclidean" not in self.use:
            found.append(
                f"start: must be None without the Euclidean expert, which it is the share of, got {self.start}"
            )
        if not found:
            found += self._ffn(1, 1).problems()
        return [f"adapter.{p}" for p in found]

    def _ffn(self, dim: int, hidden: int) -> GeometryFFN:
        return GeometryFFN(
            dim=dim,
            hidden=hidden,
            body="swiglu",
            bias=False,
            experts=self.taking_part,
            temperature=self.temperature,
            learn_temperature=self.learn_temperature,
            curvature=self.curvature,
        )

    def layer(self, dim: int, hidden: int) -> AdaptedFFN:
        """One layer, freshly initialised. What nothing can train is frozen."""
        experts: GeometryExperts | PublishedExperts
        router: list[Tensor]
        if self.experts == "published":
            experts = PublishedExperts(dim, hidden, self.taking_part, self.temperature)
            router = [experts.router.weight, experts.router.bias]
        else:
            experts = GeometryExperts(self._ffn(dim, hidden), self.impl)
            router = [experts.router_weight, experts.router_bias]
        if self.taking_part == ("euclidean",):
            for name, p in experts.named_parameters():
                p.requires_grad_(name.startswith(("up_weight", "down_weight", "euclidean")))
        elif self.gate == "even":
            for weight in router:
                nn.init.zeros_(weight)
                weight.requires_grad_(False)
        elif self.start is not None:
            experts.prefer("euclidean", self.start)
        return AdaptedFFN(experts)

    @property
    def taking_part(self) -> tuple[str, ...]:
        """Experts that take part in fact. A share of 1 at the start is for good: no gradient reaches the gate or the others."""
        return ("euclidean",) if self.gate == "learned" and self.start == 1 else self.use


class AdaptedFFN(nn.Module):
    """The adapted layer.

    Args:
        experts: The mixture.

    Attributes:
        record: Whether to keep the gate's logits of the last call.
        logits: [..., L, 3] float32, of that call.
    """

    def __init__(self, experts: GeometryExperts | PublishedExperts) -> None:
        super().__init__()
        self.experts = experts
        self.record = False
        self.logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., L, D] to [..., L, D]."""
        y, logits = self.experts(x)
        if self.record:
            self.logits = logits.detach()
        return cast(Tensor, y)


def language_layers(vlm: nn.Module) -> nn.ModuleList:
    """Blocks of the language model inside of a vision-language model of transformers.

    Raises:
        ValueError: There are none where Qwen2-VL, Qwen2.5-VL and Qwen3-VL have them.
    """
    language = getattr(getattr(vlm, "model", vlm), "language_model", None)
    layers = getattr(language, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(vlm).__name__}: must have its blocks in model.language_model.layers, as Qwen2-VL has")
    return layers


def ffn_problems(vlm: nn.Module, every: int) -> list[str]:
    """Which of the blocks to adapt have no feed-forward layer of the expected names; empty if none."""
    found = []
    for i, layer in _chosen(language_layers(vlm), every):
        mlp = getattr(layer, "mlp", None)
        have = [n for n, _ in mlp.named_parameters()] if isinstance(mlp, nn.Module) else []
        if sorted(have) != sorted(f"{n}.weight" for n in MLP_NAMES):
            found.append(
                f"adapter.every: block {i} of {type(vlm).__name__} must have mlp.{', mlp.'.join(MLP_NAMES)} without biases, "
                f"got {', '.join(have[:6]) or 'no mlp'}"
            )
    return found


def _chosen(layers: nn.ModuleList, every: int) -> Iterator[tuple[int, Any]]:
    for i, layer in enumerate(layers):
        if every and i % every == 0:
            yield i, layer


def adapt(vlm: nn.Module, config: GeometryAdapter) -> dict[int, AdaptedFFN]:
    """Put adapters into a model, with the weights of the layers that they take the place of, where these have any.

    Args:
        vlm: Changed in place. On the meta device its layers have no weights to take.
        config: Which and how.

    Returns:
        The new layers by number of their block.

    Raises:
        ValueError: The configuration breaks a rule, or a feed-forward layer has not the expected names.
    """
    refuse("GeometryAdapter", config.problems() or ffn_problems(vlm, config.every))
    made = {}
    for i, layer in _chosen(language_layers(vlm), config.every):
        old = layer.mlp.gate_proj.weight
        made[i] = config.layer(old.shape[1], old.shape[0])
        if not old.is_meta:
            made[i].experts.load_mlp(layer.mlp.state_dict())
            made[i].to(old.device, old.dtype)
        layer.mlp = made[i]
    return made


def adapted(vlm: nn.Module) -> dict[int, AdaptedFFN]:
    """Adapted layers of a model by number of their block."""
    layers = language_layers(vlm)
    return {i: layer.mlp for i, layer in enumerate(layers) if isinstance(layer.mlp, AdaptedFFN)}


def attach(vlm: nn.Module, file: Path | str) -> None:
    """Give a model of transformers the adapters of an exported run; what else the run trained is left out.

    Args:
        vlm: The run's base, as transformers opens it; changed in place.
        file: What `armillary export` wrote, or the export in the run's folder.

    Raises:
        ValueError: The file holds no adapters, or they do not fit.
    """
    from safetensors import safe_open

    with safe_open(Path(file), framework="pt") as opened:
        written: Mapping[str, str] = opened.metadata() or {}
        try:
            fields = json.loads(written["run"])["method"]["adapter"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: not an export of a run with geometry adapters: {error!r}") from error
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "$type"
        }
        stored = {k: opened.get_tensor(k) for k in opened.keys() if ".mlp.experts." in k}
    layers = adapt(vlm, GeometryAdapter(**settings))
    for i, layer in layers.items():
        mark = f".layers.{i}.mlp."
        layer.load_state_dict({k.partition(mark)[2]: v for k, v in stored.items() if mark in k})
