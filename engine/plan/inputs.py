"""What a run's step is given: the shapes of its inputs, from its survey or, where that is not there, from the recipe; and a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from armillary.engine.config.run import Run
from armillary.engine.data.format.survey import SpectrumRecord, Statistics, Survey, VectorRecord, WaveGrid
from armillary.engine.data.views.conversations import ConversationViews
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.models.method import Batch, BatchKey, InputSpec, Method
from armillary.models.quantities import Quantity, Scaling

__all__ = ["Inputs", "example_batch", "inputs_of", "prepared_batch"]

SIDE = 152  # pixels of the published cutouts
GRID = WaveGrid("linear", 3600.0, 0.8, 7781)  # of DESI's spectra
WIDTHS = {"spectrum_features": 1024, "geometry_features": 256, "embeddings": 1024}
COMPONENTS = 100
BYTES_PER_PIXEL = 0.75  # of a packed image: float32 / 5.5, docs/codec.md
BYTES_PER_SPECTRUM_PIXEL = 3.0


@dataclass(frozen=True)
class Inputs:
    """What a method is given.

    Attributes:
        spec: The shapes.
        samples: Samples of the survey's training split; None without a survey.
        sample_bytes: Bytes of a sample on disk.
        assumed: What was assumed for want of a survey, one sentence each.
        fan_outs: Neighbours of a galaxy, and of each of these.
    """

    spec: InputSpec
    samples: int | None
    sample_bytes: float
    assumed: tuple[str, ...] = ()
    fan_outs: tuple[int, int] = (0, 0)


def inputs_of(run: Run) -> Inputs:
    """The inputs of a run.

    Raises:
        ValueError: The views do not suit the survey, or the method not the views; one broken rule a line.
    """
    near = getattr(run.views, "neighbours", None)
    fan_outs = near.fan_outs if near is not None else (0, 0)
    try:
        survey = Survey.load(run.data.path)
    except FileNotFoundError:
        inputs = replace(_without_survey(run), fan_outs=fan_outs)
    else:
        if problems := run.views.problems(survey):
            raise ValueError("\n".join(problems))
        shards = [s for s in survey.shards if s.split == run.data.split]
        samples = sum(s.count for s in shards)
        read = sum(s.bytes for s in shards) if run.views.modalities and run.data.token_cache is None else 0
        inputs = Inputs(run.views.input_spec(survey), samples, read / max(samples, 1), (), fan_outs)
    if problems := run.method.problems(inputs.spec):
        raise ValueError("\n".join(p if p.startswith(("views.", "method.")) else f"method.{p}" for p in problems))
    return inputs


def _without_survey(run: Run) -> Inputs:
    views = run.views
    image = views if isinstance(views, MultiCrop) else getattr(views, "image", None)
    assumed = [f"there is no survey at {run.data.path}: its shapes are taken from the recipe"]
    bands = _bands(run, image) if image is not None else ()
    if image is not None:
        side = max(SIDE, image.global_size)
        assumed.append(f"cutouts of {len(bands)} x {side} x {side} pixels, {BYTES_PER_PIXEL:g} bytes each on disk")
    spectrum = bool(getattr(views, "spectrum", False)) and isinstance(views, ObjectViews)
    if spectrum:
        assumed.append(f"spectra of {GRID.count} pixels, {BYTES_PER_SPECTRUM_PIXEL:g} bytes each on disk, as DESI's")
    survey = _described(bands, SIDE if image is None else side, spectrum)
    if isinstance(views, MultiCrop):
        spec = views.input_spec(survey)
    elif isinstance(views, ObjectViews):
        spec = _of_objects(views, survey, assumed)
    elif isinstance(views, ConversationViews):
        spec = _of_conversations(views, survey, assumed)
    else:
        spec = views.input_spec(survey)
    size = (
        len(bands) * survey.height * survey.width * BYTES_PER_PIXEL + spectrum * GRID.count * BYTES_PER_SPECTRUM_PIXEL
    )
    return Inputs(spec, None, 0.0 if run.data.token_cache is not None else size, tuple(assumed))


def _bands(run: Run, image: Any) -> tuple[str, ...]:
    """As many bands as the method or the stretch wants, else 3."""
    named = getattr(image.stretch, "bands", ())
    vit: Any = next((v for v in (getattr(run.method, "vit", None), getattr(run.method, "image", None)) if v), None)
    return named or ("g", "r", "z", "i", "y", "u", "n", "w")[: getattr(vit, "channels", 3)]


def _described(bands: tuple[str, ...], side: int, spectrum: bool) -> Survey:
    """A survey without samples."""
    ones, none = (1.0,) * len(bands), (0.0,) * len(bands)
    covariance = tuple(tuple(float(i == j) for j in range(len(bands))) for i in range(len(bands)))
    record = SpectrumRecord(GRID, "") if spectrum else None
    side = side if bands else 0
    moments = Statistics(none, ones, none, covariance, 0)
    return Survey("assumed", bands, side, side, None, "", "bitplane", ones, ones, (), moments, spectrum=record)


def _of_objects(views: ObjectViews, survey: Survey, assumed: list[str]) -> InputSpec:
    plain = replace(views, columns=(), targets=(), neighbours=None, quantities=()).input_spec(survey)
    near, features = views.neighbours, 0
    if near is not None:
        features = len(near.columns) + 2 * len(near.shown)
        if near.embeddings is not None:
            features += WIDTHS["embeddings"]
            assumed.append(f"embeddings of width {WIDTHS['embeddings']} in {near.embeddings}")
    node = near.standardised if near is not None else ()
    return replace(
        plain,
        columns=views.columns, column_mean=_halves(views.columns), column_std=_halves(views.columns),
        targets=views.targets, target_mean=_halves(views.targets), target_std=_halves(views.targets),
        graphs=len(near.graphs) if near else 0, node_features=features,
        node_mean=_halves(node), node_std=_halves(node),
        quantities=tuple(_quantity(view, assumed) for view in views.quantities),
    )  # fmt: skip


def _of_conversations(views: ConversationViews, survey: Survey, assumed: list[str]) -> InputSpec:
    spec = (
        views.input_spec(survey) if not (views.targets or views.questions or views.spectrum or views.geometry) else None
    )
    if spec is None:
        spec = replace(views, targets=(), questions=(), spectrum=None, geometry=None).input_spec(survey)
    seen = {name: WIDTHS[f"{name}_features"] for name in ("spectrum", "geometry") if getattr(views, name) is not None}
    assumed += [f"embeddings of width {width} in {getattr(views, name)}" for name, width in seen.items()]
    if views.questions:
        assumed.append("three options a question")
    return replace(
        spec,
        targets=views.targets, target_mean=_halves(views.targets), target_std=_halves(views.targets),
        spectrum_features=seen.get("spectrum", 0), geometry_features=seen.get("geometry", 0),
        spaces=views.spaces if "geometry" in seen else 0,
        questions=views.questions, options=("first|second|third",) * len(views.questions),
    )  # fmt: skip


def _halves(names: tuple[str, ...]) -> tuple[float, ...]:
    return (0.5,) * len(names)


def _quantity(view: Any, assumed: list[str]) -> Quantity:
    components = view.components
    if view.vector and not components:
        count = COMPONENTS + -COMPONENTS % view.runs
        components = tuple(map(str, range(count)))
        assumed.append(f"{count} components of the vector {view.vector!r}")
    record = (VectorRecord(view.vector, components, ""),) if view.vector else ()
    quantity: Quantity = view.described(replace(_described((), 0, False), vectors=record))
    levels = view.runs if view.levels else 0
    ones = (1.0,) * (quantity.size + levels + (view.scaling == "shape"))
    softening = (1.0,) * quantity.size if view.scaling == "asinh" else ()
    scaling = Scaling(view.scaling, tuple(0.0 for _ in ones), ones, softening, levels)
    return replace(quantity, scaling=scaling)


def example_batch(inputs: Inputs, count: int) -> Batch:
    """Random inputs of a method as its views make them, on the CPU; the same each time.

    Args:
        inputs: Their shapes.
        count: Samples B.
    """
    spec, g = inputs.spec, torch.Generator().manual_seed(0)

    def draw(*shape: int, of: Callable[..., Tensor] = torch.rand) -> Tensor:
        return of(count * shape[0], *shape[1:], generator=g)

    batch = Batch(position=torch.arange(count), row=torch.arange(count))
    if spec.channels and (spec.n_global > 1 or spec.n_local):
        batch["global_crops"] = draw(spec.n_global, spec.channels, spec.global_size, spec.global_size)
        if spec.n_local:
            batch["local_crops"] = draw(spec.n_local, spec.channels, spec.local_size, spec.local_size)
    elif spec.channels:
        batch["crop"] = draw(1, spec.channels, spec.global_size, spec.global_size)
    if spec.pixels:
        batch["spectrum"], batch["spectrum_ivar"] = draw(1, spec.pixels), torch.ones(count, spec.pixels)
    if spec.columns:
        batch["columns"] = draw(1, len(spec.columns))
    if spec.targets:
        batch["targets"] = draw(1, len(spec.targets))
    if spec.spectrum_features:
        batch["spectrum_vector"] = draw(1, spec.spectrum_features)
    if spec.spaces:
        batch["geometry_vectors"] = draw(1, spec.spaces, spec.geometry_features)
    if spec.questions:
        batch["answers"] = torch.zeros(count, len(spec.questions), dtype=torch.int64)
    if spec.quantities:
        entries = sum(q.scaling.entries for q in spec.quantities)
        batch["quantities"], batch["quantity_errors"] = draw(1, entries), draw(1, entries)
    if spec.graphs:
        _add_neighbours(batch, inputs, count, draw)
    return batch


def _add_neighbours(batch: Batch, inputs: Inputs, count: int, draw: Callable[..., Tensor]) -> None:
    """Neighbours that no two galaxies share: as many nodes as there can be."""
    spec, (near, far) = inputs.spec, inputs.fan_outs
    seen = spec.graphs * near * (1 + far)
    batch["node_features"] = draw(1 + seen, spec.node_features)
    batch["node_row"] = torch.arange(count * (1 + seen))
    batch["neighbours"] = count + torch.arange(count * seen).view(count, spec.graphs, near, 1 + far)
    batch["left_out"] = torch.zeros(count, dtype=torch.bool)


def prepared_batch(method: Method, batch: Batch) -> Batch:
    """The batch with what the method adds before a step."""
    return method.prepare(batch, BatchKey(0, 0, 0, len(batch["position"])))
