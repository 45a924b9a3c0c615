"""Encoders out of runs, and into them.

The exported encoder is what `Method.encode` needs, in float32 under the method's own parameter names: teachers (the
averages of their students), trained parameters without a teacher, frozen ones, buffers. The run's record travels in the
file's metadata, so that one file is enough to embed with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.engine.atomic_file import atomic_path
from armillary.engine.config.config_json import PACKAGES, from_json, to_json
from armillary.engine.config.run import Run
from armillary.engine.data.format.survey import Survey
from armillary.engine.weights.checkpoint import CheckpointError, latest, open_archive
from armillary.engine.weights.tensors import Archive, Entry, write_tensors
from armillary.engine.zero.partition import persistent_buffers
from armillary.models.method import InputSpec, Method
from armillary.models.vit.state_names import to_public

__all__ = [
    "encoder_keys",
    "export_dinov2",
    "export_encoder",
    "export_specformer",
    "load_encoder",
    "trained_inputs",
    "trained_pixels",
]


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
    missing = [key for key in encoder_keys(method) if key not in archive.pieces]
    if missing:
        raise ValueError(f"{source}: lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    _fill(method, archive.whole)
    return method, run


def trained_inputs(source: Path | str) -> InputSpec:
    """The inputs that a run's method was built for.

    Args:
        source: As for `load_encoder`.

    Raises:
        FileNotFoundError: There is neither a checkpoint nor an exported encoder.
        ValueError: The file says nothing of it.
    """
    return InputSpec.from_json(_said(source, "inputs"))


def trained_pixels(source: Path | str) -> Survey:
    """What the stretch of a run was fitted to: the pixels of the survey that it was trained on, without the samples.

    An encoder's input must be stretched with these statistics, also where another survey is embedded.

    Args:
        source: As for `load_encoder`.

    Raises:
        FileNotFoundError: There is neither a checkpoint nor an exported encoder.
        ValueError: The file says nothing of it.
    """
    try:
        return Survey.from_json(_said(source, "pixels"))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: does not say what survey it was trained on: {error!r}") from error


def _said(source: Path | str, what: str) -> dict[str, Any]:
    """What a run's newest checkpoint, else its exported encoder, says of the training."""
    source = Path(source)
    newest = latest(source / "checkpoints") if source.is_dir() else None
    if newest is not None:
        state: dict[str, Any] = open_archive(newest)[1]
        return state.get(what, {})
    file = source / "export" / "teacher.safetensors" if source.is_dir() else source
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no checkpoint and no exported encoder here")
    try:
        described: dict[str, Any] = json.loads(Archive([file]).metadata[0][what])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: does not say what {what} it was trained on: {error!r}") from error
    return described


def _build(run: Run, inputs: dict[str, Any]) -> Method:
    with torch.random.fork_rng(devices=[]):
        return run.method.build(InputSpec.from_json(inputs))


def encoder_keys(method: Method) -> list[str]:
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
    for key in encoder_keys(method):
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
    _write([Entry.of(key, tensors[key]) for key in encoder_keys(method)], file, metadata)


def _write(entries: list[Entry], file: Path, metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        write_tensors(temporary, entries, metadata)


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
    prefix = method.encoders().get("image")
    if prefix is None:
        raise ValueError(f"{source}: {type(method).__name__} has no image encoder, so no DINOv2 names")
    state = {k: v for k, v in method.state_dict().items() if k.startswith("teacher.")}
    backbone = {k.removeprefix(prefix): v for k, v in method.state_dict().items() if k.startswith(prefix)}
    backbone = to_public(backbone, block_chunks)
    if file.suffix == ".safetensors":
        _write([Entry.of(k, v) for k, v in backbone.items()], file, {"format": "pt"})
        return
    content: dict[str, Any] = backbone
    if block_chunks:
        heads = {k.removeprefix("teacher."): v for k, v in state.items() if not k.startswith(prefix)}
        content = {"teacher": {f"backbone.{k}": v for k, v in backbone.items()} | heads}
    _save(content, file)


def export_specformer(source: Path, file: Path, packages: Sequence[str] = PACKAGES) -> None:
    """Write a spectrum encoder under the names of AstroCLIP's SpecFormer.

    Args:
        source: A run's folder or an exported encoder, of SpecFormer or of a method that holds one.
        file: File to write: .safetensors, or .ckpt with the weights under "state_dict", where Lightning has them; it
            appears when it is complete.
        packages: As for `load_encoder`.

    Raises:
        ValueError: The method has no spectrum encoder.
        OSError: The file cannot be written.
    """
    if file.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"{file}: a file name ending in .safetensors or .ckpt")
    method, _ = load_encoder(source, packages)
    prefix = method.encoders().get("spectrum")
    if prefix is None:
        raise ValueError(f"{source}: {type(method).__name__} has no spectrum encoder")
    state = {k.removeprefix(prefix): v for k, v in method.state_dict().items() if k.startswith(prefix)}
    if file.suffix == ".safetensors":
        _write([Entry.of(k, v) for k, v in state.items()], file, {"format": "pt"})
    else:
        _save({"state_dict": state}, file)


def _save(content: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        torch.save(content, temporary)
