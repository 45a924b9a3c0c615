"""Gaussian blur of images, in place."""

from __future__ import annotations

import torch
from cases.case import Case, Problem
from torch import Tensor

from armillary.kernels.pixels.blur import blur_, blur_reference


def cases(tiny: bool) -> list[Case]:
    """Images N, their shape; half of the planes are blurred."""
    n, side = (2, 8) if tiny else (128, 144)

    def build(device: torch.device) -> Problem:
        sigma = (torch.rand(n, 3) + 0.5) * (torch.arange(n)[:, None] % 2)

        def ours(image: Tensor) -> Tensor:
            return blur_(image, sigma, "triton")

        def reference(image: Tensor) -> Tensor:
            return blur_reference(image.cpu(), sigma).to(image.device)

        image = torch.randn(n, 3, side, side, device=device)
        return Problem({"image": image}, ours, reference, in_place=True, time_reference=False)

    return [Case("blur", f"N={n} 3x{side}x{side}", build, (2 * 4.0 * n * 3 * side**2 / 2, 0.0))]
