"""Prepared batches of images and spectra of galaxies with one hidden number, for methods that read both."""

from dataclasses import replace

import torch

from armillary.engine.zero.optim import AdamW, build_groups
from armillary.models.method import Batch, BatchKey, InputSpec

PUBLISHED = InputSpec(
    channels=5, global_size=64, n_global=1, pixels=7783, targets=("redshift",), target_mean=(0.5,), target_std=(0.4,)
)
INPUTS = replace(PUBLISHED, channels=2, global_size=8, pixels=67)  # 4 patches; 13 bins of 5, 4 tokens of 3 and one left


def batch_for(method, size=6, seed=0, dtype=torch.float32, prepared=True):
    """Galaxies of one hidden number: it sets brightness, the place of a line, and the redshift."""
    draw = torch.Generator().manual_seed(seed)
    inputs = method.inputs
    z = torch.rand(size, 1, generator=draw, dtype=torch.float64)
    shape = size, inputs.channels, inputs.global_size, inputs.global_size
    image = z[:, :, None, None] + 0.1 * torch.randn(shape, generator=draw, dtype=torch.float64)
    at = torch.linspace(0, 1, inputs.pixels, dtype=torch.float64)
    flux = 2 + 5 * torch.exp(-(((at - z) / 0.1) ** 2)) + 0.1 * torch.randn(size, inputs.pixels, generator=draw)
    ivar = (torch.rand(size, inputs.pixels, generator=draw, dtype=torch.float64) + 0.5) * (at > 0.1)
    batch = Batch(
        position=torch.arange(size) + 1000 * seed,
        crop=image.to(dtype),
        spectrum=(flux * (ivar > 0)).to(dtype),
        spectrum_ivar=ivar.to(dtype),
        targets=((z - 0.5) / 0.4).to(dtype),
    )
    return method.prepare(batch, BatchKey(0, 0, 0, size)) if prepared else batch


def losses_on_one_batch(method, seed):
    """Losses of 40 steps on one batch of 16."""
    batch = batch_for(method, 16, seed)
    optimizer = AdamW(build_groups(method))
    losses = []
    for step in range(40):
        optimizer.set_step(step, {"learning_rate": 5e-3, "weight_decay": 0.01})
        losses.append(method(batch, {}).total)
        losses[-1].backward()
        optimizer.clip_local()
        optimizer.step()
        optimizer.zero_grad()
    return losses
