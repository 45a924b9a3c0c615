"""Weights into new methods: whole encoders for a run of the same kind, or the encoder of one modality for another method.

They come from runs of armillary, with a check that the encoder will be shown what it was trained on, or from published files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from armillary.engine.config.config_json import PACKAGES
from armillary.engine.data.format.survey import Survey, WaveGrid
from armillary.engine.weights.export import encoder_keys, load_encoder, trained_pixels
from armillary.engine.weights.public_checkpoints import read_state_dict
from armillary.engine.zero.partition import persistent_buffers
from armillary.models.method import Method
from armillary.models.vit.state_names import from_public

__all__ = ["fill_encoder", "init_from_file", "input_mismatch"]


@torch.no_grad()
def init_from_file(method: Method, file: Path) -> None:
    """Start a method from the encoder in a file: teachers and the students that they follow take its weights.

    Args:
        method: Freshly built.
        file: Encoder exported by armillary, all of which is taken; or published weights (see `public_checkpoints`):
            those of the whole method, or of the encoder of its one modality.

    Raises:
        ValueError: The file is not readable or does not fit the method; every name is listed.
    """
    tensors: dict[str, Tensor] = dict(method.named_parameters()) | persistent_buffers(method)
    stored, ours = _read_weights(file)
    wanted = encoder_keys(method)
    encoders = method.encoders()
    if not ours and not set(stored) & set(wanted):
        if len(encoders) != 1:
            have = ", ".join(encoders) or "no"
            raise ValueError(f"{file}: {type(method).__name__} has {have} encoders and none of the file's names")
        ((modality, prefix),) = encoders.items()
        wanted = [key for key in tensors if key.startswith(prefix)]
        stored = _published(stored, modality, prefix, tensors, file)
    elif not ours:
        image = encoders.get("image", "")
        part = {k: v for k, v in stored.items() if image and k.startswith(image)}
        rest = {k: v for k, v in stored.items() if k not in part}
        bare = {k.removeprefix(image): v for k, v in part.items()}
        stored = rest | (_published(bare, "image", image, tensors, file) if part else {})
    _copy(tensors, stored, wanted, file)
    for student, teacher in method.teacher_pairs():
        student.copy_(teacher)


@torch.no_grad()
def fill_encoder(
    method: Method, modality: str, source: Path, views: Any, survey: Survey, packages: Sequence[str] = PACKAGES
) -> None:
    """Give one modality's encoder of a new method the weights of an earlier run, or published ones.

    Args:
        method: Freshly built.
        modality: One of `method.encoders()`.
        source: A run's folder, an encoder exported by armillary, or a published file of the encoder or of the whole method.
        views: The new run's views: an encoder must be shown what it was trained on.
        survey: The new run's survey.
        packages: As for `load_encoder`.

    Raises:
        FileNotFoundError: There is no such run or file.
        ValueError: It holds no encoder of this modality, or one of another shape, or one that was trained on other inputs.
    """
    tensors: dict[str, Tensor] = dict(method.named_parameters()) | persistent_buffers(method)
    prefix = method.encoders()[modality]
    wanted = [key for key in tensors if key.startswith(prefix)]
    if not source.exists():
        raise FileNotFoundError(f"{modality} encoder: {source}: no such run or file; train it first")
    if source.is_dir() or _is_ours(source):
        earlier, run = load_encoder(source, packages)
        theirs = earlier.encoders().get(modality)
        if theirs is None:
            raise ValueError(f"{modality} encoder: {source} is a run of {type(earlier).__name__}, which has none")
        state = earlier.state_dict()
        stored = {prefix + k.removeprefix(theirs): v for k, v in state.items() if k.startswith(theirs)}
        pixels = trained_pixels(source)
        problem = input_mismatch(pixels, survey, (modality,))
        if not problem and modality == "image":
            problem = _stretch_mismatch(run.views, pixels, views, survey)
        if problem:
            raise ValueError(f"{modality} encoder: {source}: {problem}")
    else:
        published, _ = _read_weights(source)
        whole = {k.removeprefix(prefix): v for k, v in published.items() if k.startswith(prefix)}
        stored = _published(whole or published, modality, prefix, tensors, source)
    _copy(tensors, stored, wanted, source)


def input_mismatch(trained: Survey, survey: Survey, modalities: Sequence[str]) -> str:
    """Why an encoder trained on one survey cannot read another; empty if it can.

    Args:
        trained: What it was trained on; see `trained_pixels`.
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


def _published(
    stored: dict[str, Tensor], modality: str, prefix: str, tensors: dict[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """Published weights of an encoder under the method's names."""
    if modality != "image":
        return {prefix + k: v for k, v in stored.items()}
    shapes = {k.removeprefix(prefix): tuple(v.shape) for k, v in tensors.items() if k.startswith(prefix)}
    try:
        return {prefix + k: v for k, v in from_public(stored, shapes).items()}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _copy(tensors: dict[str, Tensor], stored: dict[str, Tensor], wanted: list[str], file: Path) -> None:
    """Copy by name, all or nothing."""
    keys = set(wanted)
    problems = [f"{key}: not in the method" for key in stored if key not in keys]
    problems += [f"{key}: not in the file" for key in wanted if key not in stored]
    problems += [
        f"{key}: {tuple(value.shape)} in the file, {tuple(tensors[key].shape)} in the method"
        for key, value in stored.items()
        if key in keys and value.shape != tensors[key].shape
    ]
    if problems:
        raise ValueError(f"{file}: does not fit the method: " + "; ".join(problems))
    for key, value in stored.items():
        tensors[key].copy_(value)


def _is_ours(file: Path) -> bool:
    """Whether armillary exported this file."""
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == "armillary-encoder"
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error


def _read_weights(file: Path) -> tuple[dict[str, Tensor], bool]:
    """Tensors of a file by name, and whether armillary exported it."""
    if _is_ours(file):
        return load_file(file), True
    return read_state_dict(file), False
