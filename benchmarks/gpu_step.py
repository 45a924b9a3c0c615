"""The whole DINOv2 step of a ViT-L/12 in bf16, by phase: PyTorch, PyTorch compiled, and the Triton kernels.

torch.compile runs on each block, as torchtitan does it: the blocks are alike, so that one compilation serves all of the
student's and one all of the teacher's. The last block and the heads, which compute a few tokens in a number that changes
from step to step, stay as they are. All variants run the same batches from the same seed. Masks are not timed: the
loader makes them ahead, in a thread of its own.
"""

from __future__ import annotations

import gc
import importlib.util
import math
from dataclasses import replace
from typing import Any

import torch
from step_methods import CROPS, MODELS, DINOv2Subject
from step_training import Training, phase_columns

from armillary.models.dinov2.dino_head import Head
from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.method import InputSpec
from armillary.models.vit.vit import ViT

__all__ = ["VARIANTS", "step_rows"]

VARIANTS = ("eager", "triton", "compiled")
PREDICTED_MS = {"eager": 253.0, "compiled": 227.0}  # of 96 images
BATCHES = (96, 72, 48)
STEPS = 10
WARMUP = 4

TINY = DINOv2(
    vit=ViT(image_size=8, patch_size=4, dim=32, depth=2, heads=2, layer_scale=0.1),
    head=Head(64, 32, 16),
    koleo_weight=0.0,
)
TINY_INPUTS = InputSpec(channels=3, global_size=8, n_global=2, local_size=4, n_local=1)


def configuration(variant: str, smoke: bool) -> DINOv2:
    """The method: impl "reference" for eager and compiled, "triton" for ours."""
    config = TINY if smoke else DINOv2(vit=MODELS["vitl"])
    # Without flash-attn "auto" means "torch"; said outright, torch.compile need not trace the search for the package.
    attention = "auto" if importlib.util.find_spec("flash_attn") else "torch"
    return replace(config, attention=attention, impl="triton" if variant == "triton" else "reference")


def step_rows(variant: str, device: torch.device, smoke: bool) -> list[dict[str, Any]]:
    """One row: the largest micro-batch that fits, milliseconds an image of each phase, memory; first loss and gradient.

    Args:
        variant: One of `VARIANTS`.
        device: Where.
        smoke: A tiny model, one step, nothing timed.

    Raises:
        torch.OutOfMemoryError: Not even the smallest micro-batch fits.
    """
    for batch in (1,) if smoke else BATCHES:
        try:
            return [_row(variant, device, batch, smoke)]
        except torch.OutOfMemoryError:
            if batch == BATCHES[-1]:
                raise
        gc.collect()
        torch.cuda.empty_cache()
    raise AssertionError("unreachable")


def _row(variant: str, device: torch.device, batch: int, smoke: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    subject = DINOv2Subject(configuration(variant, smoke), TINY_INPUTS if smoke else CROPS)
    training = Training(subject, "fp32" if smoke else "bf16", device, batch)
    if variant == "compiled":
        _compile(training, device)
    batches = [training.prepared(i) for i in range(2)]
    training.step(batches[0])  # its loss and gradient norm are those of the same weights for every variant
    first = {"loss": training.loss, "grad_norm": math.hypot(*training.optimizer.norms.values())}
    for i in range(1, 1 if smoke else WARMUP):
        training.step(batches[i % 2])
    row: dict[str, Any] = {
        "operation": "step",
        "variant": variant,
        "shape": "tiny" if smoke else "ViT-L/12 2x144 + 8x60 V=65536",
        "dtype": "float32" if smoke else "bfloat16",
        "status": "ok",
        "batch": batch,
        "gflop_per_image": training.method.flops_per_sample() / 1e9,
        **first,
    }
    if not smoke:
        torch.cuda.reset_peak_memory_stats(device)
        steps = [training.step(batches[i % 2]) for i in range(STEPS)]
        row |= phase_columns(steps, batch, subject) | {"peak_mib": torch.cuda.max_memory_allocated(device) / 2**20}
        if variant in PREDICTED_MS:
            row["predicted_ms"] = PREDICTED_MS[variant] * batch / 96
    if variant == "compiled":
        torch.compiler.reset()
    return row


def _compile(training: Training, device: torch.device) -> None:
    backend = "inductor" if device.type == "cuda" else "eager"
    for network in (training.method.student, training.method.teacher):
        for block in network.backbone.blocks[:-1]:
            block.compile(backend=backend, dynamic=False)
