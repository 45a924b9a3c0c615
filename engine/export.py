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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from armillary.engine.checkpoint import CheckpointError, latest, open_archive
from armillary.engine.layout import persistent_buffers
from armillary.engine.record import PACKAGES, from_json, to_json
from armillary.engine.run import Run
from armillary.engine.tensors import Archive, Entry, write_tensors
from armillary.models.method import InputSpec, Method

__all__ = ["export_encoder", "init_from_file", "load_encoder"]


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
        stored = next((f"{kind}/{key}" for kind in ("weight", "frozen", "buffer") if f"{kind}/{key}" in archive.pieces), "")
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


def export_encoder(run_folder: Path, file: Path, packages: Sequence[str] | None = None) -> None:
    """Write the encoder of a run's newest checkpoint as safetensors.

    Args:
        run_folder: The run's folder.
        file: File to write; it appears when it is complete.
        packages: As for `load_encoder`; None trusts the record, for it is this process's own run.

    Raises:
        CheckpointError: The run has no checkpoint.
        OSError: The file cannot be written.
    """
    newest = latest(run_folder / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{run_folder}: no checkpoint to export")
    archive, state = open_archive(newest)
    if packages is None:
        packages = tuple({t.split(":")[0].split(".")[0] for t in _types(state["run"])})
    run = from_json(state["run"], packages)
    method = _build(run, state["inputs"])
    _fill(method, lambda key: _from_checkpoint(archive, method, key))
    tensors: dict[str, Tensor] = dict(method.named_parameters()) | persistent_buffers(method)
    metadata = {
        "format": "armillary-encoder",
        "run": json.dumps(to_json(run)),
        "inputs": json.dumps(state["inputs"]),
        "step": str(state["progress"]["step"]),
        "commit": str(state["commit"]),
    }
    _write([Entry.of(key, tensors[key]) for key in _encoder_keys(method)], file, metadata)


def _types(described: Any) -> list[str]:
    """Every class that a record names."""
    if isinstance(described, dict):
        own = [described["$type"]] if "$type" in described else []
        return own + [t for v in described.values() for t in _types(v)]
    return [t for v in described for t in _types(v)] if isinstance(described, list) else []


def _write(entries: list[Entry], file: Path, metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    try:
        write_tensors(temporary, entries, metadata)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def init_from_file(method: Method, file: Path) -> None:
    """Start a method from the encoder in a file: teachers and the students they follow take its weights.

    Args:
        method: Freshly built.
        file: Encoder exported by armillary, or a public DINOv2 backbone (safetensors, or a pickle of tensors only).

    Raises:
        ValueError: A tensor has another shape than the method's, or the file holds none that the method has, or some
            that it does not.
    """
    stored = _read_tensors(file)
    tensors: dict[str, Tensor] = dict(method.named_parameters()) | persistent_buffers(method)
    wanted = _encoder_keys(method)
    problems = [f"  {key}: not in the method" for key in stored if key not in wanted]
    problems += [f"  {key}: not in the file" for key in wanted if key not in stored]
    problems += [
        f"  {key}: {tuple(value.shape)} in the file, {tuple(tensors[key].shape)} in the method"
        for key, value in stored.items()
        if key in wanted and value.shape != tensors[key].shape
    ]
    if problems:
        raise ValueError(f"{file}: does not fit the method:\n" + "\n".join(problems))
    for key, value in stored.items():
        tensors[key].copy_(value)
    for student, teacher in method.teacher_pairs():
        student.copy_(teacher)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error
