"""Weights into new methods: whole encoders for a run of the same kind, or the encoder of one modality for another method.

They come from runs of armillary, with a check that the encoder will be shown what it was trained on, or from published files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armillary.engine.data.format.survey import Survey, WaveGrid
from armillary.engine.weights.trained_encoder import TrainedEncoder, copy_weights, encoder_tensors
from armillary.models.method import Method
from armillary.models.supervised.timm_encoder import is_of_timm, published_weights
from armillary.models.vit.low_rank import is_adapter
from armillary.models.vit.state_names import HEADS, bare_name, from_public

__all__ = ["init_encoder", "init_method", "input_mismatch"]


def init_method(method: Method, source: TrainedEncoder) -> list[str]:
    """Start a method from a trained encoder: teachers and the students that follow them take its weights.

    Heads in a published training file are taken, too, where the method has the same ones.

    Args:
        method: Freshly built.
        source: An encoder of a run, all of which is taken; or published weights, those of the whole method or of the encoder
            of its one modality.

    Returns:
        What was left out of the file, one line each.

    Raises:
        ValueError: It does not fit the method; every name is listed.
    """
    stored, encoders, prefix = source.weights(), method.encoders(), ""
    published = stored
    if source.is_published:
        training_file = all(name.startswith(("student.", "teacher.")) for name in stored)
        if set(stored) & set(encoder_tensors(method)) and not training_file:
            image = encoders.get("image")
            part = {k for k in stored if image is not None and k.startswith(image)}
            if image is not None and part:
                bare = {k.removeprefix(image): stored[k] for k in part}
                rest = {k: v for k, v in stored.items() if k not in part}
                stored = rest | _renamed(bare, "image", method, source.path)
        elif len(encoders) == 1:
            ((modality, prefix),) = encoders.items()
            stored = _renamed(stored, modality, method, source.path)
        else:
            have = " and ".join(encoders) or "no"
            raise ValueError(
                f"{source.path}: holds none of the names of {type(method).__name__}, and which of its encoders "
                f"({have}) it is for is not clear"
            )
    copy_weights(method, stored, source.path, prefix)
    return _take_heads(method, published, prefix) if source.is_published else []


def _take_heads(method: Method, stored: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Give the method the heads of a published training file; what does not fit is said."""
    heads = {bare_name(name): value for name, value in stored.items() if bare_name(name).startswith(HEADS)}
    if not heads:
        return []
    own, network = dict(method.named_parameters()), prefix.removesuffix("backbone.")
    if any(network + k not in own or own[network + k].shape != v.shape for k, v in heads.items()):
        return [
            f"the {len(heads)} tensors of heads in the file are left out, because the method's heads have other shapes"
        ]
    with torch.no_grad():
        for name, value in heads.items():
            own[network + name].copy_(value)
        for student, teacher in method.teacher_pairs():
            student.copy_(teacher)
    return []


def init_encoder(method: Method, modality: str, source: TrainedEncoder, views: Any, survey: Survey) -> None:
    """Give one modality's encoder of a new method the weights of an earlier run, or published ones.

    Args:
        method: Freshly built.
        modality: One of `method.encoders()`.
        source: Encoder of a run, or published weights of the encoder or of the whole method.
        views: The new run's views: an encoder must be shown what it was trained on.
        survey: The new run's survey.

    Raises:
        ValueError: It holds no encoder of this modality, or one of another shape, or one that was trained on other inputs.
    """
    prefix = method.encoders()[modality]
    if source.is_published:
        stored = source.weights()
        whole = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
        stored = _renamed(whole or stored, modality, method, source.path)
    else:
        stored = {prefix + k: v for k, v in source.part(modality).items()}
        problem = input_mismatch(source.pixels, survey, (modality,))
        if not problem and modality == "image":
            problem = _stretch_mismatch(source.run.views, source.pixels, views, survey)
        if modality == "prompt":
            problem = _node_mismatch(source, method, views, survey)
        if problem:
            raise ValueError(f"{source.path}: {problem}")
    own = {k: v for k, v in encoder_tensors(method).items() if k.startswith(prefix) and is_adapter(k)}
    copy_weights(method, stored | own, source.path, prefix)


def input_mismatch(trained: Survey, survey: Survey, modalities: Sequence[str]) -> str:
    """Why an encoder trained on one survey cannot read another; empty if it can.

    Args:
        trained: What it was trained on; see `TrainedEncoder.pixels`.
        survey: What it shall read.
        modalities: What it reads of it.
    """
    if "image" in modalities:
        for name in ("bands", "unit"):
            wanted, got = getattr(trained, name), getattr(survey, name)
            if wanted != got:
                return f"{name}: the encoder was trained on {wanted}, this survey has {got}"
        scales = trained.pixel_scale_arcsec, survey.pixel_scale_arcsec
        if scales[0] and scales[1] and abs(scales[1] / scales[0] - 1) > 0.02:
            return (
                f"pixel_scale_arcsec: the encoder was trained at {scales[0]}, this survey has {scales[1]}; resample it"
            )
    if "spectrum" in modalities and trained.spectrum is not None and survey.spectrum is not None:
        for name in ("unit", "grid"):
            wanted, got = getattr(trained.spectrum, name), getattr(survey.spectrum, name)
            if wanted != got:
                return f"spectrum.{name}: the encoder was trained on {_short(wanted)}, this survey has {_short(got)}"
    return ""


def _short(grid: Any) -> str:
    if not isinstance(grid, WaveGrid):
        return repr(grid)
    wave = grid.angstrom()
    return f"{grid.count} pixels from {wave[0]:.1f} to {wave[-1]:.1f} angstrom ({grid.kind})"


def _stretch_mismatch(before: Any, pixels: Survey, now: Any, survey: Survey) -> str:
    """Why the image reaches the encoder in another form than in its own training; empty if it does not."""
    old, new = (getattr(v, "image", v) for v in (before, now))
    if not hasattr(old, "stretch") or not hasattr(new, "stretch"):
        return ""
    if type(old.stretch) is not type(new.stretch):
        return f"views.image.stretch: must be that of its training, {old.stretch}, got {new.stretch}"
    if old.stretch.numbers(pixels) != new.stretch.numbers(survey):
        return (
            f"views.image.stretch: {new.stretch} gives other numbers on this survey than {old.stretch} on the one it was "
            "trained on; align on that survey, or train with a stretch that does not depend on the survey"
        )
    return ""


def _node_mismatch(source: TrainedEncoder, method: Method, views: Any, survey: Survey) -> str:
    """Why neighbours reach a geometry prompt in another form than in its own training; empty if they do not."""
    old, new = (getattr(v, "neighbours", None) for v in (source.run.views, views))
    for name in ("columns", "shown"):
        wanted, got = getattr(old, name, ()), getattr(new, name, ())
        if wanted != got:
            return f"views.neighbours.{name}: must be those of its training, {wanted}, got {got}"
    before, now = source.inputs, views.input_spec(survey)
    if not np.allclose(before.node_mean + before.node_std, now.node_mean + now.node_std, rtol=1e-4):
        return "views.neighbours.columns: have other moments than in its training; use the survey of stage 1"
    shapes = [m.get_submodule(m.encoders()["prompt"].removesuffix(".")).config for m in (source.method, method)]
    if shapes[0] != shapes[1]:
        return f"method.prompt: must be that of its training, {shapes[0]}, got {shapes[1]}"
    return ""


def _renamed(stored: dict[str, Tensor], modality: str, method: Method, path: Path) -> dict[str, Tensor]:
    """Published weights of an encoder under the method's names."""
    prefix = method.encoders()[modality]
    if modality == "image":
        network = method.get_submodule(prefix.rstrip("."))
        if is_of_timm(network):
            return {prefix + k: v for k, v in published_weights(stored, network).items()}
        shapes = {
            k.removeprefix(prefix): tuple(v.shape)
            for k, v in method.state_dict().items()
            if k.startswith(prefix) and not is_adapter(k)
        }
        try:
            stored = from_public(stored, shapes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return {prefix + k: v for k, v in stored.items()}
