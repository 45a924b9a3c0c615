"""Masks of spectra: chunks of successive tokens that the encoder has to fill in.

A spectrum of N tokens is cut into `chunks` parts of floor(N / chunks) tokens, and in each a run of `width` of them is
hidden. The run of part i begins at floor(i N / chunks) + r, with r uniform on 0 .. floor(N / chunks) - width - 1 (the
released code's half-open draw). So the runs never touch, exactly chunks * width tokens are hidden, the first one (mean and
deviation of the spectrum) among them once in a while, and a few tokens at the end of each part never.

Source: AstroCLIP (Parker et al. 2024, arXiv:2310.03024), section 3.2, and its released code.

Shape legend: B spectra, N tokens of a spectrum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from armillary.kernels.pixels.philox import Purpose, streams, uniforms
from armillary.models.method import BatchKey

__all__ = ["chunk_masks", "chunk_problems"]


def chunk_problems(tokens: int, chunks: int, width: int) -> list[str]:
    """Every rule that chunks break for spectra of so many tokens, as `field: rule, got value`; empty if none.

    Args:
        tokens: Tokens N of a spectrum, that of mean and deviation included.
        chunks: Hidden runs a spectrum.
        width: Tokens of each.
    """
    if chunks < 1:
        return [f"chunks: must be at least 1, got {chunks}"]
    part = tokens // chunks
    if part < 2:
        return [f"chunks: must leave parts of at least 2 tokens, of a spectrum's {tokens}, got {chunks}"]
    if not 1 <= width < part:
        return [
            f"chunk_tokens: must be in 1 .. {part - 1}, to fit into each of {chunks} parts of {part} tokens, got {width}"
        ]
    return []


def chunk_masks(position: Tensor, key: BatchKey, tokens: int, *, chunks: int, width: int) -> Tensor:
    """Draw the masks of one micro-batch; a spectrum's own is a function of seed, epoch and position only.

    Args:
        position: [B] int64, places in the epoch's global order.
        key: Seed and epoch.
        tokens: Tokens N of a spectrum.
        chunks: Hidden runs a spectrum.
        width: Tokens of each.

    Returns:
        [B, N] bool on the device of `position`: True where a token is hidden.

    Raises:
        ValueError: The chunks do not fit.
    """
    if found := chunk_problems(tokens, chunks, width):
        raise ValueError("chunk_masks: " + "; ".join(found))
    stream = streams(Purpose.SPECTRUM_MASK, 0, position.cpu().numpy(), key.epoch)
    offset = (uniforms(stream, key.seed, chunks) * (tokens // chunks - width)).astype(np.int64)
    start = np.arange(chunks) * tokens // chunks + offset  # [B, chunks]
    place = np.arange(tokens)
    hidden = ((place >= start[..., None]) & (place < start[..., None] + width)).any(1)
    return torch.from_numpy(hidden).to(position.device)
