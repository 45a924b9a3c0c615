"""Spectra decoded in the rest frame of the galaxy and redshifted by a given z.

A decoder of observed spectra that does not know the redshift can only draw the mean over its own uncertainty of it, in which
lines are as wide as that: 15 times too wide in MMAE as published. Here lines lie still. What is uncertain about their place
is left to z: given one, the spectrum is sharp; draws of z give draws of the spectrum.

Shape legend: B samples, S redshifts of each, D width, R points in the rest frame, L bins of an observed spectrum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["RestFrameDecoder"]

WAVES = 7  # Fourier features of ln(1 + z), of 1/2, 1, 2 ... periods over its range


class RestFrameDecoder(nn.Module):
    """An MLP from a sample's vector and its redshift to a rest-frame spectrum, read where the observed bins came from.

    Points of the rest frame are equally spaced in ln(wavelength), so that a redshift is a shift; between them it is linear.

    Args:
        wave: Observed wavelengths of the L bins in angstrom, increasing.
        highest: Highest redshift; the rest frame reaches from the first bin there to the last bin at a redshift of 0, and goes
            on as its end beyond.
        points: Points R.
        dim: Width D.
        hidden: Width of the two hidden layers.
    """

    def __init__(self, wave: Tensor, highest: float, points: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.log_wave = wave.double().log()  # not a buffer: exact in any precision of the weights
        self.range = math.log1p(highest)
        self.first = float(self.log_wave[0]) - self.range
        self.step = (float(self.log_wave[-1]) - self.first) / (points - 1)
        self.mlp = nn.Sequential(
            nn.Linear(dim + 1 + 2 * WAVES, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, points),
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Observed spectra [B, S, L] of vectors [B, D] at redshifts [B, S] above -1; float32 at least."""
        shift = z.double().log1p()
        phase = shift[..., None] / self.range * math.pi * 2.0 ** torch.arange(WAVES, device=z.device)
        features = torch.cat([shift[..., None] / self.range, phase.sin(), phase.cos()], dim=2).to(x.dtype)
        rest = self.mlp(torch.cat([x[:, None].expand(-1, z.shape[1], -1), features], dim=2))
        rest = rest.to(torch.promote_types(rest.dtype, torch.float32))
        place = (self.log_wave.to(z.device) - shift[..., None] - self.first) / self.step
        place = place.clamp(0, rest.shape[2] - 1)
        below = place.long().clamp(max=rest.shape[2] - 2)
        part = (place - below).to(rest.dtype)
        return torch.lerp(rest.gather(2, below), rest.gather(2, below + 1), part)
