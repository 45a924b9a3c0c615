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
from torch import Tensor, nn

from armillary.engine.atomic_file import atomic_open, atomic_path
from armillary.engine.weights.tensors import Entry, check_suffix, write_tensors
from armillary.engine.weights.trained_encoder import EXPORT_FORMAT, RECORDED, TrainedEncoder
from armillary.models.specformer.specformer import SpectrumTransformer
from armillary.models.supervised.timm_encoder import is_of_timm
from armillary.models.vit.state_names import to_public
from armillary.models.vit.vit import VisionTransformer

__all__ = ["export_dinov2", "export_encoder", "export_specformer"]


def export_encoder(source: TrainedEncoder, file: Path) -> None:
    """Write an encoder with its record as safetensors.

    Raises:
        ValueError: It is a published file, without a record; or the file's name ends otherwise.
        OSError: The file cannot be written.
    """
    check_suffix(file, ".safetensors")
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
        ValueError: The method has no image encoder, or one that the published program has no name for; or the chunks do
            not divide its depth.
        OSError: The file cannot be written.
    """
    check_suffix(file, ".safetensors", ".pth")
    encoder = _module(source, "image")
    if is_of_timm(encoder):
        raise ValueError(
            f"{source.path}: the image encoder must be a vision transformer of armillary to have DINOv2's names, got timm's "
            f"{type(encoder).__name__}; --format safetensors exports it, with timm's names behind 'encoder.'"
        )
    if isinstance(encoder, VisionTransformer) and encoder.config.gelu != "erf":
        raise ValueError(
            f'{source.path}: gelu must be "erf" in a file of DINOv2, whose program has no other, got {encoder.config.gelu!r}'
        )
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
        for name in [n for n in heads if n.endswith("last_layer.weight_v")]:  # norms kept at 1 are in no state dict
            heads.setdefault(name[:-1] + "g", torch.ones(len(heads[name]), 1))
        content = {"teacher": {f"backbone.{k}": v for k, v in backbone.items()} | heads}
    _write_pickle(content, file)


def export_specformer(source: TrainedEncoder, file: Path) -> None:
    """Write a spectrum encoder under the names of AstroCLIP's SpecFormer.

    Args:
        source: The encoder: of SpecFormer, or of a method that holds one.
        file: File to write: .safetensors, or .ckpt with the weights under "state_dict", where Lightning has them, and the
            numbers that AstroCLIP's loader builds the network from under "hyper_parameters".

    Raises:
        ValueError: The method has no spectrum encoder, or one that the published program cannot build.
        OSError: The file cannot be written.
    """
    check_suffix(file, ".safetensors", ".ckpt")
    encoder, state = _module(source, "spectrum"), source.part("spectrum")
    if not isinstance(encoder, SpectrumTransformer):
        raise ValueError(f"{source.path}: the spectrum encoder must be a SpecFormer, got {type(encoder).__name__}")
    shape = encoder.shape
    if shape.mlp_ratio != 4:
        raise ValueError(
            f"{source.path}: mlp_ratio must be 4 in a file of SpecFormer, whose program has no other, got {shape.mlp_ratio}"
        )
    if file.suffix == ".safetensors":
        _write_safetensors(state, file, {"format": "pt"})
    else:
        numbers = {
            "input_dim": shape.features,
            "embed_dim": shape.dim,
            "num_layers": shape.depth,
            "num_heads": shape.heads,
            "max_len": shape.positions,
            "slice_section_length": shape.window,
            "slice_overlap": shape.window - shape.step,
            "dropout": 0.0,
        }
        _write_pickle({"state_dict": state, "hyper_parameters": numbers}, file)


def _module(source: TrainedEncoder, modality: str) -> nn.Module:
    """The encoder of a modality; `TrainedEncoder.part` refuses where there is none."""
    prefix = source.method.encoders().get(modality)
    if prefix is None:
        raise ValueError(f"{source.path}: {type(source.method).__name__} has no {modality} encoder")
    return source.method.get_submodule(prefix.rstrip("."))


def _write_safetensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        write_tensors(temporary, [Entry.of(name, x) for name, x in tensors.items()], metadata, seal=True)


def _write_pickle(content: Mapping[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(file) as opened:  # torch would write a temporary file's name into it
        torch.save(content, opened)
