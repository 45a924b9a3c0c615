"""Encoders into files: our own format, and the names that other programs read.

Our own holds what `Method.encode` needs, in float32 under the method's parameter names: teachers (the averages of their
students), trained parameters without a teacher, frozen ones, buffers. The run's record travels in the file's metadata, so
that one file is enough to embed with; but frozen weights that have files of their own are named there by hash, not held. Every file appears when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.engine.atomic_file import atomic_open, atomic_path
from armillary.engine.weights.tensors import Entry, write_tensors
from armillary.engine.weights.trained_encoder import EXPORT_FORMAT, RECORDED, TrainedEncoder
from armillary.models.vit.state_names import to_public

__all__ = ["export_dinov2", "export_encoder", "export_specformer"]


def export_encoder(source: TrainedEncoder, file: Path) -> None:
    """Write an encoder with its record as safetensors.

    Raises:
        ValueError: It is a published file, without a record.
        OSError: The file cannot be written.
    """
    if source.is_published:
        raise ValueError(f"{source.path}: a published file, which has no record to export with its weights")
    metadata = {
        "format": EXPORT_FORMAT,
        **{name: json.dumps(source.record[name]) for name in RECORDED},
        **({"base": json.dumps(source.record["base"])} if "base" in source.record else {}),
        "commit": str(source.record["commit"]),
    }
    _write_safetensors(source.weights(), file, metadata)


def export_dinov2(source: TrainedEncoder, file: Path, block_chunks: int = 0) -> None:
    """Write an image encoder under the names of published DINOv2 files.

    Args:
        source: The encoder.
        file: File to write. A .safetensors file, or without chunks any file, holds the bare backbone, as the public ones
            do. A .pth file with chunks is laid out like the teacher of a training run:
            {"teacher": {"backbone.*", "dino_head.*", ...}}.
        block_chunks: The other program's block_chunks.

    Raises:
        ValueError: The method has no image encoder, or the chunks do not divide its depth.
        OSError: The file cannot be written.
    """
    _check_suffix(file, ".safetensors", ".pth")
    backbone = to_public(source.part("image"), block_chunks)
    if file.suffix == ".safetensors":
        _write_safetensors(backbone, file, {"format": "pt"})
        return
    content: dict[str, Any] = backbone
    if block_chunks:
        method = source.method
        prefix = method.encoders()["image"]
        heads = {
            k.removeprefix("teacher."): v
            for k, v in method.state_dict().items()
            if k.startswith("teacher.") and not k.startswith(prefix)
        }
        content = {"teacher": {f"backbone.{k}": v for k, v in backbone.items()} | heads}
    _write_pickle(content, file)


def export_specformer(source: TrainedEncoder, file: Path) -> None:
    """Write a spectrum encoder under the names of AstroCLIP's SpecFormer.

    Args:
        source: The encoder: of SpecFormer, or of a method that holds one.
        file: File to write: .safetensors, or .ckpt with the weights under "state_dict", where Lightning has them.

    Raises:
        ValueError: The method has no spectrum encoder.
        OSError: The file cannot be written.
    """
    _check_suffix(file, ".safetensors", ".ckpt")
    state = source.part("spectrum")
    if file.suffix == ".safetensors":
        _write_safetensors(state, file, {"format": "pt"})
    else:
        _write_pickle({"state_dict": state}, file)


def _check_suffix(file: Path, *suffixes: str) -> None:
    if file.suffix not in suffixes:
        raise ValueError(f"{file}: the file's name must end in {' or '.join(suffixes)}")


def _write_safetensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        write_tensors(temporary, [Entry.of(name, x) for name, x in tensors.items()], metadata)


def _write_pickle(content: Mapping[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(file) as opened:  # torch would write a temporary file's name into it
        torch.save(content, opened)
