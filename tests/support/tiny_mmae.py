"""MMAE as published, small enough to be followed by hand."""

import torch
from pair_batches import INPUTS

from armillary.models.mmae.mmae import MMAE

TINY = MMAE(
    patch_size=4, bin_pixels=5, token_bins=3, dim=8, depth=2, fusion_depth=2, heads=2, dropout=0.0, image_mask=0.5
)


def build(config=TINY, inputs=INPUTS, seed=0):
    """A method with weights of a seed."""
    torch.manual_seed(seed)
    return config.build(inputs)
