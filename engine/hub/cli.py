"""Command `armillary export`: the encoder, or everything, out of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from armillary.engine.exclusive import exclusive_file
from armillary.engine.user_code import Packages, trust

__all__ = ["export"]


def export(
    run: tyro.conf.Positional[Path],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    *,
    format: Literal["safetensors", "dinov2", "specformer", "portable", "hf", "onnx"] = "safetensors",
    block_chunks: int = 0,
    push: str | None = None,
    licence: str = "",
    package: Packages = (),
) -> int:
    """Take the encoder, or everything, out of a run's newest checkpoint.

    Args:
        run: Folder of the run; for the encoder also a file exported before.
        out: File to write; with hf, a folder.
        format: safetensors is the encoder with the run's record. dinov2 is its backbone under the names of published
            DINOv2 files, .safetensors or .pth. specformer is a spectrum encoder under the names of AstroCLIP's,
            .safetensors or .ckpt. portable is weights, optimizer, average, loader and counters, from which --restore of a
            recipe continues with another number of ranks or another ZeRO stage. hf is a folder for Hugging Face, which
            `transformers.AutoModel.from_pretrained` opens without armillary, with a model card. onnx is the encoder for
            programs without PyTorch.
        block_chunks: With dinov2, the other program's block_chunks.
        push: With hf, a repository OWNER/NAME of the hub that the folder is uploaded to (private, where it is made).
        licence: With hf, licence of the weights for the model card, as the hub calls it, such as cc-by-4.0.
        package: Name of a package, or path of its folder or of a recipe, with methods of your own; repeatable.
    """
    from armillary.engine.weights.export import export_dinov2, export_encoder, export_specformer
    from armillary.engine.weights.portable import export_portable, find_checkpoint
    from armillary.engine.weights.trained_encoder import TrainedEncoder

    trust(*package)
    if block_chunks and format != "dinov2":
        raise ValueError(f"block_chunks: must be 0 without --format dinov2, got {block_chunks}")
    if (push or licence) and format != "hf":
        raise ValueError("push, licence: must be left out without --format hf")
    if format == "hf":
        return _export_hub(run, out, push, licence)
    with exclusive_file(out):
        if format == "portable":
            export_portable(find_checkpoint(run), out)
        else:
            encoder = TrainedEncoder.open(run)
            if format == "dinov2":
                export_dinov2(encoder, out, block_chunks)
            elif format == "specformer":
                export_specformer(encoder, out)
            elif format == "onnx":
                from armillary.engine.hub.onnx_file import export_onnx

                export_onnx(encoder, out)
            else:
                export_encoder(encoder, out)
    print(f"{out}: {out.stat().st_size / 2**20:,.1f} MiB")
    return 0


def _export_hub(run: Path, out: Path, push: str | None, licence: str) -> int:
    from armillary.engine.hub.folder import export_folder
    from armillary.engine.hub_files import check_repo, upload
    from armillary.engine.weights.trained_encoder import TrainedEncoder

    if push:
        check_repo(push)
    figures = run / "evaluation" / "metrics.parquet"
    export_folder(TrainedEncoder.open(run), out, licence=licence, figures=figures if figures.is_file() else None)
    print(f"{out}: {sum(p.stat().st_size for p in out.iterdir() if p.is_file()) / 2**20:,.1f} MiB")
    if push:
        print(upload(out, push))
    return 0
