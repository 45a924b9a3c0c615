"""Spectra as MMAE's published model is shown them: normalised by their own mean and scatter, then averaged in bins.

    x = (flux - m) / s,   m, s: mean and root mean square about it of the pixels with data, weighted with ivar

A pixel without data has x = 0, and the mean of a bin counts it. The first and the last pixel of a spectrum get the median
of the pixels with data where |x| > 100. As published, a pixel of flux 0 carries no data, whatever its ivar; packed spectra
are rounded to an eighth of their noise, so that 1 % of the pixels of simulated galaxies become 0. That changes their bins of
30 pixels by .03 of s, the noise by .25. Surveys built with `--codec float16` keep such pixels.

Shape legend: B spectra, L pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normalised_bins", "scatter_of"]

SPIKE = 100.0
FLAT = 1e-6  # scatter over mean of a constant spectrum, which is all rounding


def normalised_bins(flux: Tensor, ivar: Tensor | None, pixels: int) -> Tensor:
    """Normalise spectra and average them in bins.

    Args:
        flux: [B, L] float32, in any unit; anything, NaN too, where `ivar` is 0.
        ivar: [B, L] inverse variance, 0 where a pixel carries no data; every pixel does if absent.
        pixels: Pixels of a bin; those left over at the red end are dropped.

    Returns:
        [B, L // pixels] float32; 0 throughout for a spectrum without data, or of one value.
    """
    mean, scatter, seen = _moments(flux, ivar)
    varies = scatter > FLAT * mean.abs()
    x = torch.where(seen & varies, (flux - mean) / torch.where(varies, scatter, 1.0), 0.0)
    ends = x[:, :: max(x.shape[1] - 1, 1)]
    spikes = ends.abs() > SPIKE
    if x.device.type != "cpu" or bool(spikes.any()):  # a GPU sorts sooner than its host has waited for the answer
        ends.copy_(torch.where(spikes, _median(x, seen), ends))
    return x.unfold(1, pixels, pixels).mean(2)


def scatter_of(flux: Tensor, ivar: Tensor | None) -> Tensor:
    """s of spectra, [B], in their unit: what a normalised flux is to be multiplied by. Arguments as of `normalised_bins`."""
    return _moments(flux, ivar)[1][:, 0]


def _moments(flux: Tensor, ivar: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """m and s, [B, 1], and which pixels carry data [B, L]."""
    weight = torch.ones_like(flux) if ivar is None else ivar
    seen = (weight > 0) & (flux != 0)
    weight = torch.where(seen, weight, 0.0)
    flux = torch.where(seen, flux, 0.0)
    total = weight.sum(1, keepdim=True)
    total = torch.where(total > 0, total, 1.0)
    mean = (weight * flux).sum(1, keepdim=True) / total
    return mean, ((weight * (flux - mean).square()).sum(1, keepdim=True) / total).sqrt(), seen


def _median(x: Tensor, seen: Tensor) -> Tensor:
    """[B, 1] medians of the chosen elements, the mean of the middle two where their number is even."""
    ordered = x.masked_fill(~seen, torch.inf).sort(1).values
    last = (seen.sum(1, keepdim=True) - 1).clamp(min=0)
    return (ordered.gather(1, last // 2) + ordered.gather(1, (last + 1) // 2)) / 2
