"""Published weights, ready to embed a survey: what a file of weights does not say is taken from its names and shapes.

    DINOv2's backbones      a vision transformer with patches of 14 pixels: shown RGB pictures, normalised as ImageNet's
    AstroDINO and the like  another vision transformer with three channels: shown RGB pictures as AstroCLIP makes them
    SpecFormer              spectra, zeros where a pixel carries no data
    AstroCLIP               images and spectra, each as above, into one space

Neither weights nor names tell the number of heads: they are 64 wide in a vision transformer and 128 wide in a SpecFormer,
as in everything published so far.

Source: the released code of DINOv2 (arXiv:2304.07193) and AstroCLIP (arXiv:2310.03024).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from armillary.engine.config.run import Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Schedules
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.stretch import Identity, Stretch, ToRGB
from armillary.engine.weights.init_weights import init_method
from armillary.engine.weights.trained_encoder import TrainedEncoder, encoder_tensors
from armillary.models.astroclip.astroclip import AstroCLIP
from armillary.models.dinov2.dino_head import Head
from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.method import Method, MethodConfig
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.specformer.specformer_pretraining import SpecFormerPretraining
from armillary.models.vit.state_names import bare_name
from armillary.models.vit.vit import ViT

__all__ = ["PublishedEncoder"]

IMAGENET_PATCH = 14
IMAGENET_MEAN = 0.485, 0.456, 0.406
IMAGENET_STD = 0.229, 0.224, 0.225
HEAD_WIDTH = {"image": 64, "spectrum": 128}
ALIGNED = "image_encoder.", "spectrum_encoder."


class PublishedEncoder(TrainedEncoder):
    """A published file with the record that a run of it would have.

    Args:
        source: The file, opened.
        survey: What it shall read.

    Raises:
        ValueError: It is no encoder that is known here, or the survey has not what it reads.
    """

    def __init__(self, source: TrainedEncoder, survey: Survey):
        super().__init__(source.path, source._archive, {})
        state = source.weights()
        aligned = [p for p in ALIGNED if any(name.startswith(p) for name in state)]
        bare = {_bare(name): value for name, value in state.items() if not name.startswith("student.")}
        method: MethodConfig
        views: ObjectViews | MultiCrop
        if len(aligned) == len(ALIGNED):
            method, views = _astroclip(state, survey, source.path)
        elif "data_embed.weight" in bare:
            method, views = SpecFormerPretraining(_specformer(bare), 1, 1), ObjectViews(spectrum=True)
        elif "patch_embed.proj.weight" in bare:
            vit = _vit(bare, source.path)
            small = Head(prototypes=8, hidden=8, bottleneck=8)  # not published with backbones, and not looked at
            method, views = DINOv2(vit=vit, head=small), _crops(vit, survey, source.path, 2)
        else:
            raise ValueError(
                f"{source.path}: its names are none of DINOv2, SpecFormer or AstroCLIP ({', '.join(list(state)[:3])} ...); "
                "start a run of the recipe that it is for with --init-from"
            )
        run = Run(
            name=source.path.stem,
            method=method,
            views=views,
            data=Data(path=survey.folder or Path()),
            optim=Optim(lr=1e-4),
            schedule=Schedules(learning_rate=Constant(), weight_decay=Constant(0.0)),
            train=Training(steps=1, global_batch=1, micro_batch=1),
        )
        problems = views.problems(survey)
        inputs = None if problems else views.input_spec(survey)
        problems += [] if inputs is None else method.problems(inputs)
        if problems or inputs is None:
            raise ValueError(f"{source.path}: {survey.name!r} is not what it reads: " + "; ".join(problems))
        self.run, self.inputs, self.pixels = run, inputs, survey.pixels()
        self._source = source

    @property
    def is_published(self) -> bool:
        """Not any more: it has a record."""
        return False

    @cached_property
    def _loaded(self) -> tuple[Method, dict[str, Tensor]]:
        """As of a run: the method with these weights, and what the encoder is of it."""
        method = self.untrained()
        init_method(method, self._source)
        for name, weight in method.named_parameters():
            if name.endswith("patch_embed.proj.weight") and weight.shape[2] == IMAGENET_PATCH:
                _fold_normalisation(weight, method.get_parameter(name[: -len("weight")] + "bias"))
        tensors = encoder_tensors(method)
        return method.eval().requires_grad_(False), tensors


@torch.no_grad()
def _fold_normalisation(weight: Tensor, bias: Tensor) -> None:
    """Let a patch projection normalise its pictures itself: w (x - mean) / std + b = (w / std) x + b - sum w mean / std."""
    mean, std = (torch.tensor(x, dtype=weight.dtype)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    weight.div_(std)
    bias.sub_((weight * mean).sum((1, 2, 3)))


def _bare(name: str) -> str:
    """A name as in the encoder alone; SpecFormer's pre-training calls it `encoder`."""
    return bare_name(bare_name(name).removeprefix("encoder."))


def _depth(state: Mapping[str, Tensor]) -> int:
    found = (re.match(r"blocks\.(\d+)\.", name) for name in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _vit(state: Mapping[str, Tensor], path: Path) -> ViT:
    """The shape of a vision transformer with these tensors."""
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    if "blocks.0.mlp.fc1.weight" not in state or "pos_embed" not in state:
        raise ValueError(f"{path}: must have position embeddings and MLPs with GELU (not SwiGLU, as ViT-g has)")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    return ViT(
        channels=channels,
        image_size=side * patch,
        patch_size=patch,
        dim=dim,
        depth=_depth(state),
        heads=max(1, dim // HEAD_WIDTH["image"]),
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        registers=registers,
        drop_path=0.0,
        position_offset=0.0 if registers else 0.1,
        antialias=registers > 0,
    )


def _specformer(state: Mapping[str, Tensor]) -> SpecFormer:
    dim, features = state["data_embed.weight"].shape
    window = features - 2
    return SpecFormer(
        dim=dim,
        depth=_depth(state),
        heads=max(1, dim // HEAD_WIDTH["spectrum"]),
        window=window,
        step=window // 2,
        positions=state["position_embed.weight"].shape[0],
        missing="zero",
    )


def _astroclip(state: Mapping[str, Tensor], survey: Survey, path: Path) -> tuple[AstroCLIP, ObjectViews]:
    image, spectrum = ({_bare(k.removeprefix(p)): v for k, v in state.items() if k.startswith(p)} for p in ALIGNED)
    vit = _vit(image, path)
    method = AstroCLIP(
        image=vit,
        spectrum=_specformer(spectrum),
        freeze=False,  # which would ask for the encoders' own files
        embedding=state["image_encoder.cross_attention.query"].shape[-1],
    )
    crops = _crops(vit, survey, path, 1) if survey.bands else None
    if crops is None or survey.spectrum is None:
        raise ValueError(f"{path}: reads images and spectra, but {survey.name!r} has {', '.join(survey.modalities)}")
    return method, ObjectViews(image=crops, spectrum=True)


def _crops(vit: ViT, survey: Survey, path: Path, n_global: int) -> MultiCrop:
    """The central crop, as large as the position embedding or the cutouts allow, as the picture that it was trained on."""
    if not survey.bands:
        raise ValueError(f"{path}: reads images, but {survey.name!r} has {', '.join(survey.modalities)}")
    side = min(vit.image_size, survey.height, survey.width) // vit.patch_size * vit.patch_size
    stretch: Stretch = ToRGB()
    if survey.unit == "count" and len(survey.bands) == 3:
        stretch = Identity(divide_by=255.0)
    return MultiCrop(
        global_size=max(side, vit.patch_size),
        n_global=n_global,
        placement="centre",
        hflip=0.0,
        vflip=0.0,
        stretch=stretch,
    )
