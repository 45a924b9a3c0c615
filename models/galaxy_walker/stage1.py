"""Stage 1 of Galaxy-Walker: the geometry prompt, trained on galaxies' attributes alone.

A galaxy and its neighbours become a token for each geometry (`geometry_prompt`); a small head predicts properties and classes
from all tokens. What later stages take over is the prompt, the head stays behind.

    L = w_p (mean squared error of standardised properties + cross-entropy of classes) + w_l L_link

L_link reads geometry where a head cannot hide it, in geodesic distances d of the product of the spaces (`product_space`): of all
partners j in the batch, the one that is a neighbour of i is to be the nearest,

    L_link = - mean over i of log( exp(-d_ii / T) / sum over j of exp(-d_ij / T) )

where the partner of i is a neighbour on the sky, embedded from what was sampled around it (one hop less than i, and so are the
partners it is held against). At the published width, whose points have hundreds of coordinates, spaces hardly differ; at a width
of 2 to 5 they do.

Shape legend: B samples, S spaces, T width of a token, n targets.

Source: Galaxy-Walker (arXiv:2503.18578), section 3.2. Stage 1's head, its loss and L_link are not published; they are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from armillary.kernels.launch import Impl
from armillary.models.galaxy_walker.geometry_prompt.network import (
    Geometry,
    GeometryPrompt,
    GeometryPromptConfig,
    Hops,
    Prompt,
    graph_problems,
    hops_of,
)
from armillary.models.geometry.product_space import product_distance
from armillary.models.method import Batch, InputSpec, Losses, Method, MethodConfig, ParameterGroup, Readout
from armillary.models.rules import at_least, choices, refuse
from armillary.models.supervised.regression import known_squares

__all__ = ["GeometryPromptMethod", "Stage1"]


@dataclass(frozen=True)
class Stage1(MethodConfig):
    """Configuration; widths are Galaxy-Walker's by default.

    Attributes:
        hidden: Width of the prompt's first layer.
        out: Width of its second one: coordinates of a point.
        tokens: Width T of a token.
        spaces: Geometries, a token each.
        layers: "equation": aggregation in tangent spaces, as the paper's equation 3 has it; "released": as its code does.
        dropout: Of the layers.
        curvature: c of the sphere and the ball, at the start.
        learn_curvature: Whether it is trained.
        head: Width of the head's hidden layer; 0: linear in the tokens.
        classes: Targets that are codes of classes, 0, 1, ...; the others are properties.
        class_counts: Classes of each of them.
        property_weight: w_p.
        link_weight: w_l; 0: no links.
        temperature: T.
        impl: Implementation of the maps of the ball, see `armillary.kernels.launch`.
    """

    hidden: int = 512
    out: int = 256
    tokens: int = 1536
    spaces: tuple[Geometry, ...] = ("euclidean", "hyperbolic", "spherical")
    dropout: float = 0.1
    curvature: float = 1.0
    learn_curvature: bool = False
    layers: Literal["equation", "released"] = "equation"
    head: int = 256
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    property_weight: float = 1.0
    link_weight: float = 0.0
    temperature: float = 0.1
    impl: Impl = "auto"

    def prompt(self, features: int) -> GeometryPromptConfig:
        """Shape of the prompt over nodes of so many features."""
        return GeometryPromptConfig(
            features, self.hidden, self.out, self.tokens, self.spaces, self.dropout, self.curvature, self.learn_curvature,
            self.layers,
        )  # fmt: skip

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, see `MethodConfig`."""
        found = self.prompt(max(1, inputs.node_features)).problems() + choices(self) + at_least(0, self, "head")
        found += graph_problems(inputs, self.spaces)
        for name in ("property_weight", "link_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"{name}: must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            found.append(f"temperature: must be positive and finite, got {self.temperature}")
        if not (inputs.targets and self.property_weight) and not self.link_weight:
            found.append("link_weight: must be above 0 without views.targets to learn, got 0")
        for name in self.classes:
            if name not in inputs.targets:
                found.append(f"classes: must be among views.targets {inputs.targets}, got {name!r}")
        if len(self.class_counts) != len(self.classes) or any(count < 2 for count in self.class_counts):
            found.append(f"class_counts: must be at least 2 for each of {len(self.classes)}, got {self.class_counts}")
        return found

    def build(self, inputs: InputSpec) -> GeometryPromptMethod:
        """Build the method, see `MethodConfig`."""
        refuse("Stage1", self.problems(inputs))
        return GeometryPromptMethod(self, inputs)


class GeometryPromptMethod(Method):
    """The prompt with its head.

    Args:
        config: Configuration.
        inputs: What the views hand over, with the targets' mean and standard deviation.
    """

    def __init__(self, config: Stage1, inputs: InputSpec) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        self.prompt = GeometryPrompt(config.prompt(inputs.node_features), config.impl)
        counts = dict(zip(config.classes, config.class_counts, strict=True))
        self._widths = [counts.get(name, 1) for name in inputs.targets]
        width, n = len(config.spaces) * config.tokens, sum(self._widths)
        self.head: nn.Module = nn.Identity()
        if n:
            hidden = [nn.Linear(width, config.head), nn.GELU()] if config.head else []
            self.head = nn.Sequential(*hidden, nn.Linear(config.head or width, n))

    def _hops(self, batch: Batch) -> Hops:
        return hops_of(batch, self.inputs.graphs, self.config.spaces)

    def _run(self, batch: Batch, hops: Hops) -> Prompt:
        """The prompt of a batch, whose samples are the first nodes."""
        features = batch["node_features"]
        return self.prompt(features, torch.arange(len(batch["row"]), device=features.device), hops)

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """The losses of a micro-batch, see above.

        Args:
            batch: `row`, `node_features`, `neighbours`, `left_out`, and `targets` [B, n] float32, standardised, NaN where
                unknown.
            scalars: Not read.

        Returns:
            The loss and its terms: each target's by its name, and "link".

        Raises:
            ValueError: The batch lacks neighbours or targets, or has others than the method was built for.
        """
        c, hops = self.config, self._hops(batch)
        prompt = self._run(batch, hops)
        terms: dict[str, Tensor] = {}
        if self.inputs.targets and c.property_weight:
            terms |= {k: c.property_weight * v for k, v in self._property_terms(prompt.tokens, batch).items()}
        if c.link_weight:
            terms["link"] = c.link_weight * self._link(prompt, batch, hops)
        return Losses(torch.stack(list(terms.values())).sum(), {k: v.detach() for k, v in terms.items()})

    def _property_terms(self, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
        targets, names = batch.get("targets"), self.inputs.targets
        if targets is None or targets.ndim != 2 or targets.shape[1] != len(names):
            got = "none" if targets is None else list(targets.shape)
            raise ValueError(f"targets: must be [B, {len(names)}] for {', '.join(names)}, got {got}")
        found: dict[str, Tensor] = {}
        for place, (name, part) in enumerate(zip(names, self._outputs(tokens), strict=True)):
            target = targets[:, place]
            if name not in self.config.classes:
                found[name] = known_squares(part, target[:, None]).sum()
                continue
            known = ~target.isnan()
            code = self._natural(target.nan_to_num(), place).round().long()
            # What has no class is left out by its index, so that no NaN is multiplied by 0.
            loss = F.cross_entropy(part, torch.where(known, code, -100), ignore_index=-100, reduction="sum")
            found[name] = loss / known.sum().clamp(min=1)
        return found

    def _outputs(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Of each target [B, 1], the standardised property, or [B, classes] logits; float32."""
        dtype = next(self.head.parameters()).dtype
        return self.head(tokens.flatten(1).to(dtype)).float().split(self._widths, 1)

    def _natural(self, standardised: Tensor, place: int) -> Tensor:
        return standardised * self.inputs.target_std[place] + self.inputs.target_mean[place]

    def _link(self, prompt: Prompt, batch: Batch, hops: Hops) -> Tensor:
        """Cross-entropy of finding each sample's neighbour among those of all samples of the batch."""
        features, samples = batch["node_features"], len(batch["row"])
        rows = torch.arange(samples, device=features.device)
        first, second = hops[self.config.spaces[0]]
        other = (first >= 0) & (batch["node_row"][first.clamp(min=0)] != batch["row"][:, None])
        chosen = other.long().argmax(1)  # the first neighbour that is not the galaxy itself
        linked = other.any(1)
        partner = first[rows, chosen].clamp(min=0)
        around = second[rows, chosen]
        beyond = torch.full((*around.shape, 1), -1, device=around.device)
        there = self.prompt(features, partner, dict.fromkeys(self.config.spaces, (around, beyond)))
        curvature = [self.prompt.curvature_of(space) for space in self.config.spaces]
        here = [x[:, None] for x in prompt.points]
        distance = product_distance(
            here, [x[None] for x in there.points], self.config.spaces, curvature, impl=self.config.impl
        )
        node = batch["node_row"][partner]
        same = (node[:, None] == node) & ~torch.eye(samples, dtype=torch.bool, device=node.device)
        logits = (-distance / self.config.temperature).masked_fill(same | ~linked, -math.inf)
        logits = torch.where(linked[:, None], logits, 0.0)
        return F.cross_entropy(logits, torch.where(linked, rows, -100), ignore_index=-100, reduction="sum") / max(
            1, samples
        )

    def parameter_groups(self) -> list[ParameterGroup]:
        """Weights, and without weight decay biases, gains and curvatures."""
        named = dict(self.named_parameters())
        return [
            ParameterGroup({k: p for k, p in named.items() if p.ndim > 1}),
            ParameterGroup({k: p for k, p in named.items() if p.ndim <= 1}, weight_decay_scale=0.0),
        ]

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one training sample with five neighbours: the backward pass costs two forward ones."""
        c = self.config
        width, n = len(c.spaces) * c.tokens, sum(self._widths)
        head = 2.0 * (width * c.head + c.head * n if c.head else width * n)
        return 3.0 * (self.prompt.config.flops(5) * (2 if c.link_weight else 1) + head)

    def encoders(self) -> dict[str, str]:
        """The prompt, from which the second stage may start."""
        return {"prompt": "prompt."}

    def readouts(self) -> dict[str, Readout]:
        """All tokens as one embedding, those of each space, and the predictions."""
        found = {"geometry": Readout("geometry prompt", "columns")}
        found |= {space: Readout(f"{space} token", "columns") for space in self.config.spaces}
        if self.inputs.targets and self.config.property_weight:
            found["prediction"] = Readout("stage 1", "columns", targets=self.inputs.targets)
        return found

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens and predictions.

        Args:
            batch: `row`, `node_features` and `neighbours` of the views' evaluation view.

        Returns:
            "geometry" [B, S T], the tokens side by side; each space's [B, T] by the space's name; "prediction" [B, n] in the
            units of the targets, codes for classes. float32.

        Raises:
            ValueError: The batch lacks neighbours.
        """
        tokens = self._run(batch, self._hops(batch)).tokens
        found = {"geometry": tokens.flatten(1)}
        found |= {space: tokens[:, i] for i, space in enumerate(self.config.spaces)}
        if self.inputs.targets and self.config.property_weight:
            parts = [
                part.argmax(1).float() if name in self.config.classes else self._natural(part[:, 0], place)
                for place, (name, part) in enumerate(zip(self.inputs.targets, self._outputs(tokens), strict=True))
            ]
            found["prediction"] = torch.stack(parts, 1)
        return found
