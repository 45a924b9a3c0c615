"""A trained encoder as an ONNX file, for programs without PyTorch.

It is made from the folder of `armillary.engine.hub.folder`: opened by transformers, exported by torch. Inputs are those of
the folder's model after its image processor, any number at a time:

    Dinov2Model       pixel_values [B, K, S, S]                                    embedding [B, D] (class token)
    SpecFormerModel   spectrum [B, L], ivar [B, L]                                 embedding [B, D] (mean token)
    AstroCLIPModel    pixel_values, spectrum, ivar                                 image_embedding, spectrum_embedding [B, E]
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armillary.engine.atomic_file import atomic_path
from armillary.engine.hub.folder import export_folder
from armillary.engine.weights.tensors import check_suffix
from armillary.engine.weights.trained_encoder import TrainedEncoder

__all__ = ["export_onnx"]


class _Named(nn.Module):
    """A model of transformers with its outputs as tensors."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        found = self.model(*given)
        return tuple(getattr(found, name) for name in self.names)


def export_onnx(source: TrainedEncoder, file: Path) -> None:
    """Write a trained encoder as ONNX.

    Args:
        source: The encoder, with its record.
        file: File to write, *.onnx; the weights are inside.

    Raises:
        ValueError: The method has no such form, or packages are missing.
        OSError: The file cannot be written.
    """
    check_suffix(file, ".onnx")
    try:
        import onnxscript  # noqa: F401
        from transformers import AutoModel
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ValueError(f"--format onnx needs the package {error.name}; pip install 'armillary[hub]'") from error
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export_folder(source, Path(folder))
        model: Any = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    given: dict[str, Tensor] = {}
    if source.inputs.channels:
        channels = model.config.num_channels if "num_channels" in model.config else model.config.image["channels"]
        given["pixel_values"] = torch.zeros(2, channels, source.inputs.global_size, source.inputs.global_size)
    if source.inputs.pixels:
        given["spectrum"], given["ivar"] = torch.ones(2, 2, source.inputs.pixels)
    both = len(given) == 3
    outputs = (
        {"image_embeds": "image_embedding", "spectrum_embeds": "spectrum_embedding"}
        if both
        else {"pooler_output": "embedding"}
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary, warnings.catch_warnings():
        # Torch's exporter warns of its own parts, and of torchvision, which is not needed.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            _Named(model, tuple(outputs)),
            tuple(given.values()),
            temporary,
            input_names=list(given),
            output_names=list(outputs.values()),
            dynamic_shapes={"given": tuple({0: torch.export.Dim.DYNAMIC} for _ in given)},
            external_data=False,
            dynamo=True,
            verbose=False,
        )
