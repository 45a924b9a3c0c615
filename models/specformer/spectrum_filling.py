"""Spectra with hidden parts, filled in by a masked spectrum encoder: what its training asks of it, made visible.

Shape legend: B spectra, L pixels of a spectrum, n windows of W pixels, N = 1 + n tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from armillary.kernels.tokens.window_embed_kernels import MIN_STD
from armillary.models.specformer.specformer import SpecFormer, SpectrumTransformer, fill_missing

__all__ = ["Filled", "fill_hidden"]


class Filled(NamedTuple):
    """Hidden parts of spectra as the encoder fills them in.

    Attributes:
        flux: [B, L] float32, in the unit of the input: at each pixel the mean of the predictions of the hidden windows
            that cover it; NaN where none does.
        hidden: [B, L] bool: True where a hidden window covers the pixel and no visible one does, so that the encoder has
            not seen it.
    """

    flux: Tensor
    hidden: Tensor


@torch.no_grad()
def fill_hidden(encoder: SpectrumTransformer, spectrum: Tensor, ivar: Tensor | None, mask: Tensor) -> Filled:
    """Hide tokens of spectra and fill them in.

    Mean and deviation of the whole spectrum, which scale the answer, are those that the encoder's input was scaled by, also
    where the token that tells of them is hidden.

    Args:
        encoder: Encoder with its head.
        spectrum: [B, L] float32 flux.
        ivar: [B, L] inverse variance, 0 where a pixel carries no data; None where every pixel does.
        mask: [B, N] bool: True where a token is hidden.
    """
    if ivar is not None:
        spectrum = fill_missing(spectrum, ivar, encoder.shape.missing)
    windows = encoder.head(encoder(spectrum, mask=mask)).float()[:, 1:, 2:]
    length = spectrum.shape[1]
    predicted = _fold(windows * mask[:, 1:, None], encoder.shape, length)
    hides, shows = (_fold(m[:, 1:, None].float().expand_as(windows), encoder.shape, length) for m in (mask, ~mask))
    mean, std = spectrum.mean(1, keepdim=True), spectrum.std(1, keepdim=True).clamp(min=MIN_STD)
    flux = (predicted / hides * std + mean).masked_fill(hides == 0, torch.nan)
    return Filled(flux, (hides > 0) & (shows == 0))


def _fold(windows: Tensor, shape: SpecFormer, length: int) -> Tensor:
    """Sum of windows [B, n, W] at the pixels that they cover, [B, L]."""
    n, w = windows.shape[1:]
    device = windows.device
    place = shape.step * torch.arange(n, device=device)[:, None] + torch.arange(w, device=device)
    out = windows.new_zeros(len(windows), length)
    return out.index_add_(1, place.flatten(), windows.flatten(1))
