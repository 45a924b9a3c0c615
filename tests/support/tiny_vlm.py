"""Tiny checkpoints of vision-language models as transformers writes them, and batches of galaxies for stage 2."""

import torch
from transformers import AutoModelForImageTextToText

from armillary.models.galaxy_walker import vlm
from armillary.models.galaxy_walker.prompt import byte_tokenizer
from armillary.models.method import BatchKey, InputSpec

INPUTS = InputSpec(
    channels=3,
    global_size=48,
    n_global=1,
    targets=("redshift", "log_mstar"),
    target_mean=(0.1, 10.0),
    target_std=(0.05, 0.5),
    spectrum_features=16,
    geometry_features=8,
    spaces=3,
    questions=("bar", "merging"),
    options=("strong|weak|no", "none|minor|major|merger"),
)
SIDES = {"qwen2_vl": 56, "qwen2_5_vl": 56, "qwen3_vl": 64}
"""Side of an image of four tokens, by family."""


def write_checkpoint(folder, family="qwen2_vl", seed=0, shard="200KB"):
    """A checkpoint with random weights, in several files, with its tokenizer; returns the folder."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(vlm.tiny_config(family), dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


def galaxies(count=6, seed=0):
    """A batch before `prepare`; what is asked can be told from what is shown."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(count, 2, generator=generator)
    bar = (targets[:, 0] > 0).long() * 2
    return {
        "row": torch.arange(count),
        "position": torch.arange(count),
        "crop": torch.rand(count, 3, 48, 48, generator=generator),
        "spectrum_vector": targets.repeat(1, 8) + 0.1 * torch.randn(count, 16, generator=generator),
        "geometry_vectors": torch.randn(count, 3, 8, generator=generator),
        "targets": targets,
        "answers": torch.stack([bar, torch.full((count,), -1)], 1),
    }


def key(count=6, epoch=0):
    return BatchKey(seed=0, epoch=epoch, first_position=0, global_batch=count)
