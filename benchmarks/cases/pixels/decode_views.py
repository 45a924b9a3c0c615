"""Blobs of the shard codec straight to model input: decoding, crop, stretch and cast, as an embedding run does it."""

from __future__ import annotations

import numpy as np
import torch
from cases.case import Case, Problem, word
from cases.pixels.decode import padded_blobs
from cutouts import BANDS, SKY_SIGMA
from torch import Tensor

from armillary.kernels.pixels.decode_views import decode_views, decode_views_reference
from armillary.kernels.pixels.stretch import AsinhMatrix, Lupton, StretchNumbers

STRETCHES: dict[str, StretchNumbers] = {
    "Lupton": Lupton(order=(2, 1, 0), scales=(2.2, 3.4, 6.0), m=0.03, q=20.0),
    "asinh": AsinhMatrix(
        softening=tuple(1 / (3 * sigma) for sigma in SKY_SIGMA),
        matrix=((1.9, -0.6, -0.2), (-0.6, 2.4, -0.9), (-0.2, -0.9, 1.8)),
        offset=(-0.3, -0.4, -0.5),
    ),
}


def cases(tiny: bool) -> list[Case]:
    """Images B, their side, side S of the crop, stretch, dtype."""
    if tiny:
        return [_case(1, 12, 8, "Lupton", torch.float32)]
    return [
        _case(1024, 152, 144, "Lupton", torch.bfloat16),
        _case(1024, 152, 144, "Lupton", torch.float32),
        _case(1024, 152, 144, "asinh", torch.bfloat16),
    ]


def _case(b: int, side: int, crop: int, stretch: str, dtype: torch.dtype) -> Case:
    def build(device: torch.device) -> Problem:
        blobs, sizes = padded_blobs(b, side, device)
        rng = np.random.default_rng(0)
        where = (
            (len(BANDS), side, side),
            rng.integers(0, side - crop + 1, (b, 2)),
            rng.integers(0, 16, b),
            crop,
            STRETCHES[stretch],
        )

        def ours(blobs: Tensor, sizes: Tensor) -> Tensor:
            return decode_views(blobs, sizes, *where, dtype, impl="triton")

        def reference(blobs: Tensor, sizes: Tensor) -> Tensor:
            return decode_views_reference(blobs, sizes, *where, dtype)

        def oracle(blobs: Tensor, sizes: Tensor) -> Tensor:
            return decode_views_reference(blobs, sizes, *where, torch.float64)

        return Problem({"blobs": blobs, "sizes": sizes}, ours, reference, oracle=oracle, time_reference=False)

    output = float(dtype.itemsize) * b * len(BANDS) * crop**2
    compressed = b * 2.11 * side**2  # bytes: 47.6 KiB of a cutout of 3 x 152 x 152
    name = f"B={b} 3x{side}x{side} to {crop} {stretch} {word(dtype)}"
    return Case("decode_views", name, build, (output + compressed, 0.0), output_bytes=output)
