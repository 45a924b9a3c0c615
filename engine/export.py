"""Encoders out of runs, and into them.

The exported encoder is what `Method.encode` needs, in float32 under the method's own parameter names: teachers (the
averages of their students), trained parameters without a teacher, frozen ones, buffers. The run's record travels in the
file's metadata, so that one file is enough to embed with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from armillary.engine.checkpoint import CheckpointError, latest, open_archive
from armillary.engine.data.survey import Survey
from armillary.engine.layout import persistent_buffers
from armillary.engine.record import PACKAGES, from_json, to_json
from armillary.engine.run import Run
from armillary.engine.tensors import Archive, Entry, write_tensors
from armillary.models.method import InputSpec, Method
from armillary.models.state_names import from_public, to_public

__all__ = ["export_dinov2", "export_encoder", "init_from_file", "load_encoder", "trained_pixels"]


def load_encoder(source: Path | str, packages: Sequence[str] = PACKAGES) -> tuple[Method, Run]:
    """Build a run's method with its newest weights, ready to `encode`.

    Args:
        source: A run's folder (its newest checkpoint, else its export) or an exported file.
        packages: Packages whose classes the record may name; see `Run.load`.

    Returns:
        (the method, float32, on the CPU, in evaluation mode with no gradients; the run)

    Raises:
        FileNotFoundError: There is neither.
        ValueError: The record or the weights do not fit this version.
    """
    source = Path(source)
    if source.is_dir():
        newest = latest(source / "checkpoints")
        if newest is not None:
            archive, state = open_archive(newest)
            run = Run.load(source, packages)
            method = _build(run, state["inputs"])
            _fill(method, lambda key: _from_checkpoint(archive, method, key))
            return method, run
        source = source / "export" / "teacher.safetensors"
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no checkpoint and no exported encoder here")
    try:
        archive = Archive([source])
        described = json.loads(archive.metadata[0]["run"])
        inputs = json.loads(archive.metadata[0]["inputs"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source}: not an encoder exported by armillary: {error!r}") from error
    run = from_json(described, packages)
    method = _build(run, inputs)
    missing = [key for key in _encoder_keys(method) if key not in archive.pieces]
    if missing:
        raise ValueError(f"{source}: lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    _fill(method, archive.whole)
    return method, run


def trained_pixels(source: Path | str) -> Survey:
    """What the stretch of a run was fitted to: the pixels of the survey that it was trained on, without the samples.

    An encoder's input must be stretched with these statistics, also where another survey is embedded.

    Args:
        source: As for `load_encoder`.

    Raises:
        FileNotFoundError: There is neither a checkpoint nor an exported encoder.
        ValueError: The file says nothing of it.
    """
    source = Path(source)
    newest = latest(source / "checkpoints") if source.is_dir() else None
    try:
        if newest is not None:
            return Survey.from_json(open_archive(newest)[1]["pixels"])
        file = source / "export" / "teacher.safetensors" if source.is_dir() else source
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no checkpoint and no exported encoder here")
        return Survey.from_json(json.loads(Archive([file]).metadata[0]["pixels"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: does not say what survey it was trained on: {error!r}") from error


def _build(run: Run, inputs: dict[str, Any]) -> Method:
    with torch.random.fork_rng(devices=[]):
        return run.method.build(InputSpec(**inputs))


def _encoder_keys(method: Method) -> list[str]:
    """Names of what is exported: all parameters but students that have a teacher, and buffers."""
    students = {id(s) for s, _ in method.teacher_pairs()}
    return [n for n, p in method.named_parameters() if id(p) not in students] + list(persistent_buffers(method))


def _from_checkpoint(archive: Archive, method: Method, key: str) -> Tensor:
    """A tensor of the encoder, where a checkpoint keeps it."""
    names = {id(p): n for n, p in method.named_parameters()}
    student_of = {names[id(t)]: names[id(s)] for s, t in method.teacher_pairs()}
    if key in student_of:
        stored = f"ema/{student_of[key]}"
    else:
        stored = next(
            (f"{kind}/{key}" for kind in ("weight", "frozen", "buffer") if f"{kind}/{key}" in archive.pieces), ""
        )
    if stored not in archive.pieces:
        raise ValueError(f"{archive.files[0].parent}: {key} is not in the checkpoint; it is of another version")
    return archive.whole(stored)


@torch.no_grad()
def _fill(method: Method, get: Callable[[str], Tensor]) -> None:
    """Set the encoder's tensors; a student takes its teacher's."""
    tensors: dict[str, Tensor] = dict(method.named_parameters()) | persistent_buffers(method)
    for key in _encoder_keys(method):
        value = get(key)
        if value.shape != tensors[key].shape:
            raise ValueError(f"{key}: {tuple(value.shape)} in the file, {tuple(tensors[key].shape)} in the method")
        tensors[key].copy_(value)
    for student, teacher in method.teacher_pairs():
        student.copy_(teacher)
    method.eval().requires_grad_(False)


def export_encoder(source: Path, file: Path, packages: Sequence[str] = PACKAGES) -> None:
    """Write the encoder of a run's newest checkpoint as safetensors.

    Args:
        source: The run's folder.
        file: File to write; it appears when it is complete.
        packages: As for `load_encoder`.

    Raises:
        CheckpointError: The run has no checkpoint.
        OSError: The file cannot be written.
    """
    newest = latest(source / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{source}: no checkpoint to export")
    state = open_archive(newest)[1]
    method, run = load_encoder(source, packages)
    tensors: dict[str, Tensor] = dict(method.named_parameters()) | persistent_buffers(method)
    metadata = {
        "format": "armillary-encoder",
        "run": json.dumps(to_json(run)),
        "inputs": json.dumps(state["inputs"]),
        "pixels": json.dumps(state["pixels"]),
        "step": str(state["progress"]["step"]),
        "commit": str(state["commit"]),
    }
    _write([Entry.of(key, tensors[key]) for key in _encoder_keys(method)], file, metadata)


def _write(entries: list[Entry], file: Path, metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    try:
        write_tensors(temporary, entries, metadata)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


BACKBONE = "teacher.backbone."
"""Prefix of the parameters that a public DINOv2 file holds."""


def export_dinov2(source: Path, file: Path, block_chunks: int = 0, packages: Sequence[str] = PACKAGES) -> None:
    """Write an encoder under the names of published DINOv2 files.

    A .safetensors file, or without chunks any file, holds the bare backbone, as the public ones do. A .pth file with
    chunks is laid out like the teacher of a training run: {"teacher": {"backbone.*", "dino_head.*", ...}}.

    Args:
        source: A run's folder or an exported encoder.
        file: File to write, .safetensors or .pth; it appears when it is complete.
        block_chunks: The other program's block_chunks.
        packages: As for `load_encoder`.

    Raises:
        ValueError: The method has no DINOv2 backbone, or the chunks do not divide its depth.
        OSError: The file cannot be written.
    """
    if file.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"{file}: a file name ending in .safetensors or .pth")
    method, _ = load_encoder(source, packages)
    state = {k: v for k, v in method.state_dict().items() if k.startswith("teacher.")}
    backbone = {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)}
    if not backbone:
        raise ValueError(f"{source}: {type(method).__name__} has no {BACKBONE.rstrip('.')}, so no DINOv2 names")
    backbone = to_public(backbone, block_chunks)
    if file.suffix == ".safetensors":
        _write([Entry.of(k, v) for k, v in backbone.items()], file, {"format": "pt"})
        return
    content: dict[str, Any] = backbone
    if block_chunks:
        heads = {k.removeprefix("teacher."): v for k, v in state.items() if not k.startswith(BACKBONE)}
        content = {"teacher": {f"backbone.{k}": v for k, v in backbone.items()} | heads}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def init_from_file(method: Method, file: Path) -> None:
    """Start a method from the encoder in a file: teachers and the students that they follow take its weights.

    Args:
        method: Freshly built.
        file: Encoder exported by armillary, all of which is taken; or a published DINOv2 backbone or teacher
            (.safetensors, or a pickle that holds tensors only), of which the backbone is.

    Raises:
        ValueError: The file is not readable or does not fit the method; every name is listed.
    """
    tensors: dict[str, Tensor] = dict(method.named_parameters()) | persistent_buffers(method)
    stored, ours = _read_encoder(file)
    if ours:
        wanted = _encoder_keys(method)
    else:
        wanted = [key for key in tensors if key.startswith(BACKBONE)]
        if not wanted:
            raise ValueError(f"{file}: {type(method).__name__} has no {BACKBONE.rstrip('.')} to take it")
        shapes = {key.removeprefix(BACKBONE): tuple(tensors[key].shape) for key in wanted}
        try:
            stored = {BACKBONE + key: value for key, value in from_public(stored, shapes).items()}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    problems = [f"{key}: not in the method" for key in stored if key not in wanted]
    problems += [f"{key}: not in the file" for key in wanted if key not in stored]
    problems += [
        f"{key}: {tuple(value.shape)} in the file, {tuple(tensors[key].shape)} in the method"
        for key, value in stored.items()
        if key in wanted and value.shape != tensors[key].shape
    ]
    if problems:
        raise ValueError(f"{file}: does not fit the method: " + "; ".join(problems))
    for key, value in stored.items():
        tensors[key].copy_(value)
    for student, teacher in method.teacher_pairs():
        student.copy_(teacher)


def _read_encoder(file: Path) -> tuple[dict[str, Any], bool]:
    """Contents of a file, and whether armillary exported it."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                ours = (opened.metadata() or {}).get("format") == "armillary-encoder"
            return load_file(file), ours
        except SafetensorError as error:
            raise ValueError(f"{file}: not a safetensors file: {error}") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle at all fails in any way
        raise ValueError(f"{file}: neither .safetensors nor a pickle that holds tensors only: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a dictionary of tensors, got a {type(content).__name__}")
    return content, False
