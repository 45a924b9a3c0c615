"""A folder that `transformers.AutoModel.from_pretrained` opens where Armillary is not installed.

    config.json, model.safetensors    an image encoder as Dinov2Model; a SpecFormer or an AstroCLIP by remote code
    modeling_armillary.py             that code, where it is needed
    preprocessor_config.json          an encoder of images: crop and stretch as numbers of the survey trained on
    image_processing_armillary.py     and the code that applies them
    README.md                         the model card

The position embedding is that of the crops that are embedded, so that it is never interpolated there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from armillary.engine.atomic_file import atomic_path
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.exclusive import exclusive
from armillary.engine.hub.card import model_card
from armillary.engine.weights.tensors import Entry, write_tensors
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.kernels.pixels.stretch import Affine, AsinhMatrix, Lupton, StretchNumbers
from armillary.models.astroclip.astroclip import AstroCLIPMethod
from armillary.models.specformer.specformer import SpectrumTransformer
from armillary.models.vit.low_rank import is_adapter
from armillary.models.vit.transformers_names import to_transformers
from armillary.models.vit.vit import VisionTransformer

__all__ = ["export_folder"]

REMOTE = Path(__file__).with_name("remote")
MODEL_CODE, IMAGE_CODE = "modeling_armillary", "image_processing_armillary"


@dataclass(frozen=True)
class _Model:
    """What is written: the configuration, tensors by Hugging Face's names, and the class that opens them."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    name: str


def export_folder(source: TrainedEncoder, folder: Path, *, licence: str = "", figures: Path | None = None) -> None:
    """Write a trained encoder for Hugging Face.

    Args:
        source: The encoder, with its record.
        folder: Folder to write; what is in it already is kept, but for files of these names.
        licence: Licence of the weights for the card, as the hub calls it ("cc-by-4.0"); it is the publisher's to choose.
        figures: metrics.parquet of an evaluation, whose figures the card lists; none where absent.

    Raises:
        ValueError: The method has no form there, or the encoder has no record.
        InUse: Another process writes it.
        OSError: The folder cannot be written.
    """
    if not re.fullmatch(r"[\w.+-]*", licence):  # a line of the card's YAML
        raise ValueError(f"licence: must be a licence as the hub calls it, such as cc-by-4.0, got {licence!r}")
    method = source.method
    if isinstance(method, AstroCLIPMethod):
        model = _astroclip(source, method)
    elif "image" in method.encoders():
        model = _dinov2(source, method.get_submodule(method.encoders()["image"].rstrip(".")))
    elif "spectrum" in method.encoders():
        model = _specformer(source, method.get_submodule(method.encoders()["spectrum"].rstrip(".")))
    else:
        raise ValueError(
            f"{source.path}: {type(method).__name__} has no image or spectrum encoder of its own that Hugging Face could "
            "open; --format safetensors exports it for armillary"
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = {"config.json": _json(model.config)}
    if source.inputs.channels:
        written["preprocessor_config.json"] = _json(_preprocessing(source))
        written[f"{IMAGE_CODE}.py"] = (REMOTE / f"{IMAGE_CODE}.py").read_text()
    if "auto_map" in model.config:
        written[f"{MODEL_CODE}.py"] = (REMOTE / f"{MODEL_CODE}.py").read_text()
    written["README.md"] = model_card(
        source, model.name, remote="auto_map" in model.config, licence=licence, figures=figures
    )
    with exclusive(folder):
        for name, text in written.items():
            with atomic_path(folder / name) as temporary:
                temporary.write_text(text)
        with atomic_path(folder / "model.safetensors") as temporary:
            entries = [Entry.of(name, tensor.contiguous()) for name, tensor in model.tensors.items()]
            write_tensors(temporary, entries, {"format": "pt"})


def _dinov2(source: TrainedEncoder, encoder: Any) -> _Model:
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(
            f"{source.path}: the image encoder must be a vision transformer to be written for Hugging Face or as ONNX, got "
            f"{type(encoder).__name__}; --format safetensors exports it for armillary"
        )
    vit, ratio = encoder.config, encoder.config.mlp_ratio
    if ratio != int(ratio):
        raise ValueError(f"{source.path}: mlp_ratio must be a whole number in a Dinov2Model, got {ratio}")
    name = "Dinov2WithRegistersModel" if vit.registers else "Dinov2Model"
    config = {
        "architectures": [name],
        "model_type": "dinov2_with_registers" if vit.registers else "dinov2",
        "hidden_size": vit.dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "mlp_ratio": int(ratio),
        "hidden_act": "gelu" if vit.gelu == "erf" else "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "image_size": source.inputs.global_size,
        "patch_size": vit.patch_size,
        "num_channels": vit.channels,
        "qkv_bias": True,
        "layerscale_value": vit.layer_scale,
        "use_swiglu_ffn": False,
        **({"num_register_tokens": vit.registers} if vit.registers else {}),
        "dtype": "float32",
    }
    return _Model(config, to_transformers(_image_state(source, encoder)), name)


def _specformer(source: TrainedEncoder, encoder: Any) -> _Model:
    if not isinstance(encoder, SpectrumTransformer):
        raise ValueError(
            f"{source.path}: the spectrum encoder must be a SpecFormer to be written for Hugging Face, got "
            f"{type(encoder).__name__}; --format safetensors exports it for armillary"
        )
    config = _remote("SpecFormer", "specformer") | _spectrum(source.pixels, encoder)
    return _Model(config, _prefixed("encoder.", encoder.state_dict()), "SpecFormerModel")


def _astroclip(source: TrainedEncoder, method: AstroCLIPMethod) -> _Model:
    image, spectrum = method.image_encoder.backbone, method.spectrum_encoder.backbone
    assert isinstance(image, VisionTransformer) and isinstance(spectrum, SpectrumTransformer)
    vit, chosen = image.config, method.config
    config = _remote("AstroCLIP", "astroclip") | {
        "image": {
            "side": source.inputs.global_size,
            "patch_size": vit.patch_size,
            "channels": vit.channels,
            "dim": vit.dim,
            "depth": vit.depth,
            "heads": vit.heads,
            "hidden": vit.hidden,
            "registers": vit.registers,
            "gelu": vit.gelu,
        },
        "spectrum": _spectrum(source.pixels, spectrum),
        "embedding": chosen.embedding,
        "heads": chosen.heads,
        "image_residual": chosen.image_residual,
        "spectrum_residual": chosen.spectrum_residual,
        "image_tokens": chosen.image_tokens,
    }
    tensors = dict(method.state_dict()) | _prefixed("image_encoder.backbone.", _image_state(source, image))
    return _Model(config, tensors, "AstroCLIPModel")


def _image_state(source: TrainedEncoder, encoder: VisionTransformer) -> dict[str, Tensor]:
    """An image encoder's tensors, with the position embedding of the crops that are embedded."""
    state = {name: tensor for name, tensor in encoder.state_dict().items() if not is_adapter(name)}
    return state | {"pos_embed": encoder.position(source.inputs.global_size)}


def _spectrum(survey: Survey, encoder: SpectrumTransformer) -> dict[str, Any]:
    shape = asdict(encoder.shape)
    del shape["mlp_ratio"]
    recorded = survey.spectrum
    if recorded is None:
        return shape | {"hidden": encoder.shape.hidden}
    return shape | {
        "hidden": encoder.shape.hidden,
        "wave_angstrom": recorded.grid.angstrom().tolist(),
        "unit": recorded.unit,
    }


def _remote(name: str, model_type: str) -> dict[str, Any]:
    return {
        "architectures": [f"{name}Model"],
        "auto_map": {"AutoConfig": f"{MODEL_CODE}.{name}Config", "AutoModel": f"{MODEL_CODE}.{name}Model"},
        "model_type": model_type,
        "dtype": "float32",
    }


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _preprocessing(source: TrainedEncoder) -> dict[str, Any]:
    views, survey = source.run.views, source.pixels
    crops = views.image if isinstance(views, ObjectViews) else views
    if not isinstance(crops, MultiCrop):
        raise ValueError(
            f"{source.path}: its views ({type(views).__name__}) have no crop that could be written as numbers"
        )
    form, numbers = _numbers(crops.stretch.numbers(survey))
    return {
        "image_processor_type": "GalaxyImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{IMAGE_CODE}.GalaxyImageProcessor"},
        "bands": list(survey.bands),
        "unit": survey.unit,
        "side": source.inputs.global_size,
        "form": form,
        "numbers": numbers,
    }


def _numbers(stretch: StretchNumbers) -> tuple[str, dict[str, Any]]:
    if isinstance(stretch, Affine):
        return "affine", {"shift": stretch.shift, "divisor": stretch.divisor}
    if isinstance(stretch, AsinhMatrix):
        return "asinh", {"softening": stretch.softening, "matrix": stretch.matrix, "offset": stretch.offset}
    assert isinstance(stretch, Lupton)
    return "lupton", {"bands": stretch.order, "scales": stretch.scales, "m": stretch.m, "q": stretch.q}


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
