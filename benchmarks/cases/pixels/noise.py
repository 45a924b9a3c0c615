"""Keyed Gaussian noise on images, in place."""

from __future__ import annotations

import numpy as np
import torch
from cases.case import Case, Problem
from torch import Tensor

from armillary.kernels.pixels.noise import add_noise_, noise_reference
from armillary.kernels.pixels.philox import Purpose, streams

SEED = 5


def cases(tiny: bool) -> list[Case]:
    """Images N, their shape."""
    n, side = (2, 8) if tiny else (512, 144)

    def build(device: torch.device) -> Problem:
        names = streams(Purpose.PIXEL_NOISE, np.arange(n), np.arange(n), 0)
        sigma = torch.rand(n, 3) + 0.5

        def ours(image: Tensor) -> Tensor:
            return add_noise_(image, sigma, names, SEED, "triton")

        def reference(image: Tensor) -> Tensor:
            noise = noise_reference(names, SEED, 3, side, side) * sigma[:, :, None, None]
            return image + noise.to(image.device, image.dtype)

        image = torch.randn(n, 3, side, side, device=device)
        return Problem({"image": image}, ours, reference, in_place=True, time_reference=False)

    return [Case("noise", f"N={n} 3x{side}x{side}", build, (2 * 4.0 * n * 3 * side**2, 0.0))]
