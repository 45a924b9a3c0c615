"""Bit-plane blobs of the shard codec to images."""

from __future__ import annotations

import numpy as np
import torch
from cases.case import Case, Problem
from cutouts import BANDS, SKY_SIGMA, cutout
from torch import Tensor

from armillary.engine.data.format import codec
from armillary.kernels.pixels.decode import decode_bitplane, decode_bitplane_reference

DISTINCT = 64  # cutouts that are made; more rows repeat them


def padded_blobs(count: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blobs of realistic cutouts, [count, P] uint8, and their sizes [count] int64."""
    steps = np.array(SKY_SIGMA, np.float32) / 8
    blobs = [codec.encode(cutout(i, side), steps) for i in range(min(count, DISTINCT))]
    rows = np.zeros((len(blobs), -(-max(map(len, blobs)) // 16) * 16), np.uint8)
    for row, blob in zip(rows, blobs, strict=True):
        row[: len(blob)] = np.frombuffer(blob, np.uint8)
    of_row = torch.arange(count) % len(blobs)
    sizes = torch.tensor([len(blob) for blob in blobs])
    return torch.from_numpy(rows)[of_row].to(device), sizes[of_row].to(device)


def cases(tiny: bool) -> list[Case]:
    """Images B, their shape."""
    return [_case(*size) for size in ([(2, 16)] if tiny else [(1024, 152), (1024, 160)])]


def _case(b: int, side: int) -> Case:
    shape = (len(BANDS), side, side)
    output = 4.0 * b * len(BANDS) * side**2

    def build(device: torch.device) -> Problem:
        blobs, sizes = padded_blobs(b, side, device)

        def ours(blobs: Tensor, sizes: Tensor) -> Tensor:
            return decode_bitplane(blobs, sizes, *shape, masks=False)[0]

        def reference(blobs: Tensor, sizes: Tensor) -> Tensor:
            return decode_bitplane_reference(blobs, sizes, *shape)[0]

        return Problem({"blobs": blobs, "sizes": sizes}, ours, reference, time_reference=False)

    compressed = b * 5.7 * side**2 / 2.7  # bytes: 48 KiB of a cutout of 3 x 152 x 152
    return Case("decode", f"B={b} 3x{side}x{side}", build, (output + compressed, 0.0), output_bytes=output)
