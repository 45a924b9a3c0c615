"""The geometry prompt: a galaxy and its neighbours on the sky as one token for each of three geometries.

In every space two GraphSAGE layers work in the tangent space of the origin, where vectors can be added (equation 3):

    X' = exp0( SAGE( log0(X), A ) )        SAGE(h)_i = W_self h_i + W_neighbours mean over j in A_i of h_j + b

The first takes features from flat space to the manifold, the second stays on it. LayerNorm and ReLU follow SAGE in the tangent
space, as in the released code; that code applies SAGE to coordinates on the manifold, which is not defined there, and which
`layers="released"` keeps for comparison (`layers.ReleasedSAGE`). Tangent vectors are divided by sqrt(width), so that they start
well inside of the ball, and cut at sqrt(c) |u| = 2.3. The points of the last layer are read in the tangent space by one projection for all spaces.

Everything is float32, whatever autocast says, but products with weights of another dtype, which are in theirs. The sphere has one
coordinate more than its tangent space (models/geometry/sphere.py), the ball as many. For a curvature c -> 0 both spaces give what the Euclidean one gives.

Shape legend: N galaxies with features, F features, B samples of a batch, f1 and f2 neighbours, S spaces, D width of a layer.

Source: Galaxy-Walker (arXiv:2503.18578), equations 1 and 3; GraphSAGE: arXiv:1706.02216.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from armillary.kernels.launch import Impl
from armillary.models.galaxy_walker.geometry_prompt.layers import Chart, ReleasedSAGE, RiemannianSAGE
from armillary.models.geometry.manifolds import Curvature
from armillary.models.method import Batch, InputSpec
from armillary.models.rules import at_least, fractions, one_of, positive, refuse

__all__ = ["Geometry", "GeometryPrompt", "GeometryPromptConfig", "Hops", "Prompt", "graph_problems", "hops_of"]

Geometry = Literal["euclidean", "spherical", "hyperbolic"]

CURVATURE_BOUNDS = (0.01, 2.0)
LAYERS = ("equation", "released")

Hops = Mapping[str, tuple[Tensor, Tensor]]
"""For each space the places of neighbours [B, f1] and of theirs [B, f1, f2], -1 where there are fewer."""


@dataclass(frozen=True)
class GeometryPromptConfig:
    """Shape of the prompt. The defaults are Galaxy-Walker's.

    Attributes:
        features: Features F of a galaxy: the width of AstroCLIP's embeddings.
        hidden: Width of the first layer.
        out: Width of the second one.
        tokens: Width of a token; that of the language model which reads it.
        spaces: Geometries, a token each.
        dropout: Of the tangent vectors behind each layer.
        curvature: c of the sphere (curvature c) and the ball (-c), at the start.
        learn_curvature: Whether each space's c is trained, between .01 and 2.
        layers: "equation": aggregation in tangent spaces; "released": on coordinates, as the released code has it.
    """

    features: int = 1024
    hidden: int = 512
    out: int = 256
    tokens: int = 1536
    spaces: tuple[Geometry, ...] = ("euclidean", "hyperbolic", "spherical")
    dropout: float = 0.1
    curvature: float = 1.0
    learn_curvature: bool = False
    layers: Literal["equation", "released"] = "equation"

    def problems(self) -> list[str]:
        """Every rule that the configuration breaks, as `field: rule, got value`."""
        found = at_least(1, self, "features", "hidden", "out", "tokens")
        found += fractions(self, "dropout") + positive(self, "curvature") + one_of("layers", self.layers, LAYERS)
        if not self.spaces or len(set(self.spaces)) < len(self.spaces) or set(self.spaces) - set(get_args(Geometry)):
            found.append(f"spaces: must be some of {', '.join(get_args(Geometry))}, each once, got {self.spaces}")
        low, high = CURVATURE_BOUNDS
        if self.learn_curvature and not low < self.curvature < high:
            found.append(f"curvature: must lie between {low} and {high} to be learnt, got {self.curvature}")
        return found

    def flops(self, fan_out: int) -> float:
        """Matrix-product FLOPs of one sample, forward: 2 a multiply-add.

        Args:
            fan_out: Neighbours f1 of the sample; how many each of them has does not matter.
        """
        first = (1 + fan_out) * 2 * self.features * self.hidden
        return 2.0 * len(self.spaces) * (first + 2 * self.hidden * self.out + self.out * self.tokens)


class Prompt(NamedTuple):
    """What the module returns. A tuple, so that DeepSpeed finds the tensors in it.

    Attributes:
        tokens: [B, S, tokens] float32, in the order of the configuration's spaces.
        points: For each space [B, out] float32 on the manifold, [B, out + 1] on the sphere: for losses of distance.
    """

    tokens: Tensor
    points: tuple[Tensor, ...]


def graph_problems(inputs: InputSpec, spaces: Sequence[str]) -> list[str]:
    """Why views do not give the neighbours that a prompt of these spaces reads, as `field: rule, got value`; empty if they do."""
    if not inputs.graphs:
        return ["views.neighbours: must be given, because the geometry prompt reads neighbours, got None"]
    if inputs.graphs not in (1, len(spaces)):
        return [f"views.neighbours.graphs: must be one, or one for each of {len(spaces)} spaces, got {inputs.graphs}"]
    return []


def hops_of(batch: Batch, graphs: int, spaces: Sequence[str]) -> Hops:
    """For each space the neighbours of a batch and theirs, as the prompt takes them; one graph serves all spaces.

    Args:
        batch: With `neighbours` of the views.
        graphs: How many graphs the views read.
        spaces: Of the prompt.

    Raises:
        ValueError: The batch has none, or those of another number of graphs.
    """
    near = batch.get("neighbours")
    if near is None or near.ndim != 4 or near.shape[1] != graphs:
        got = "none" if near is None else list(near.shape)
        raise ValueError(f"neighbours: must be [B, {graphs}, f1, 1 + f2], got {got}")
    parts = [near[:, 0 if near.shape[1] == 1 else i] for i in range(len(spaces))]
    return {space: (part[..., 0], part[..., 1:]) for space, part in zip(spaces, parts, strict=True)}


class GeometryPrompt(nn.Module):
    """The module.

    Args:
        config: Shape.
        impl: Implementation of the maps of the ball, see `armillary.kernels.launch`.

    Raises:
        ValueError: The configuration breaks a rule.
    """

    def __init__(self, config: GeometryPromptConfig, impl: Impl = "auto") -> None:
        super().__init__()
        refuse("GeometryPromptConfig", config.problems())
        self.config = config
        self.impl = impl
        c = config
        widths = ((c.features, c.hidden), (c.hidden, c.out))
        layer = RiemannianSAGE if c.layers == "equation" else ReleasedSAGE
        self.layers = nn.ModuleDict(
            {space: nn.ModuleList(layer(*pair, space, c.dropout) for pair in widths) for space in c.spaces}
        )
        curved = [space for space in c.spaces if space != "euclidean"] if c.learn_curvature else []
        self.curvature = nn.ModuleDict({space: Curvature(c.curvature, *CURVATURE_BOUNDS) for space in curved})
        self.projection = nn.Linear(c.out, c.tokens)
        self.norm = nn.LayerNorm(c.tokens)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise from torch's global generator: an orthogonal projection times .1, as published; torch's own otherwise."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm | Curvature):
                module.reset_parameters()
            elif isinstance(module, ReleasedSAGE):
                nn.init.zeros_(module.bias)
        nn.init.orthogonal_(self.projection.weight, gain=0.1)
        nn.init.zeros_(self.projection.bias)

    def forward(self, features: Tensor, rows: Tensor, hops: Hops) -> Prompt:
        """Tokens of a batch.

        Args:
            features: [N, F], of every row of the catalogue; not trained.
            rows: [B] int64 rows of the batch.
            hops: For each space the rows of sampled neighbours [B, f1] and of theirs [B, f1, f2], -1 where there are
                fewer (`engine.data.sky_graph.sampling.sample_neighbours`).

        Raises:
            ValueError: The shapes do not fit, or a space has no neighbours.
        """
        self._check(features, rows, hops)
        tokens: list[Tensor] = []
        points: list[Tensor] = []
        with torch.autocast(features.device.type, enabled=False):
            for space in self.config.spaces:
                first, second = hops[space]
                chart = Chart(space, self.curvature_of(space), self.impl)
                one, two = cast(nn.ModuleList, self.layers[space])
                x, around, beyond = (_features(features, at) for at in (rows, first, second))
                # Features are flat, and their logarithm is they themselves.
                near = chart.exp(one(around, beyond, second >= 0, chart))
                centre = chart.exp(one(x, around, first >= 0, chart))
                u = two(chart.log(centre), chart.log(near), first >= 0, chart)
                points.append(chart.exp(u))
                read = chart.log(points[-1]).to(self.projection.weight.dtype)
                tokens.append(self.norm(self.projection(read)).to(u.dtype))
        return Prompt(torch.stack(tokens, 1), tuple(points))

    def curvature_of(self, space: str) -> Tensor | float:
        """c of a space's manifold; of no meaning for the Euclidean one."""
        return self.curvature[space]() if space in self.curvature else self.config.curvature

    def _check(self, features: Tensor, rows: Tensor, hops: Hops) -> None:
        if features.ndim != 2 or features.shape[1] != self.config.features or rows.ndim != 1:
            got = f"{list(features.shape)} and {list(rows.shape)}"
            raise ValueError(f"features and rows: must be [N, {self.config.features}] and [B], got {got}")
        for space in self.config.spaces:
            if space not in hops:
                raise ValueError(f"hops: must have the space {space!r}, got {', '.join(hops) or 'none'}")
            first, second = hops[space]
            if first.ndim != 2 or first.shape[0] != len(rows) or second.ndim != 3 or second.shape[:2] != first.shape:
                got = f"{list(first.shape)} and {list(second.shape)}"
                raise ValueError(f"hops[{space!r}]: must be [B, f1] and [B, f1, f2] with B = {len(rows)}, got {got}")


def _features(features: Tensor, rows: Tensor) -> Tensor:
    """[..., F] float32 features of rows; of any row where there is none (-1), which its layer leaves out."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return features[rows.clamp(min=0)].to(wide)
