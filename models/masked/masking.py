"""Masks of samples with several modalities: whole modalities, and tokens within one, singly or in a block.

Every draw but the coin of a batch is a function of seed, epoch and position; a modality's number keeps its draws apart from
those of the others.

Shape legend: B samples, N tokens of a modality, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from armillary.kernels.pixels.philox import Purpose, streams, uniforms
from armillary.models.method import BatchKey

__all__ = ["batch_coin", "modality_masks", "share_problems", "token_masks"]


def share_problems(field: str, share: tuple[float, float]) -> list[str]:
    """Why a range of hidden shares has no meaning, as `field: rule, got value`; empty if it has."""
    low, high = share
    if math.isfinite(low) and math.isfinite(high) and 0 <= low <= high <= 1:
        return []
    return [f"{field}: must be two shares 0 <= low <= high <= 1, got {share}"]


def token_masks(
    position: Tensor, key: BatchKey, tokens: int, share: tuple[float, float], *, modality: int = 0, block: bool = False
) -> Tensor:
    """Hide a share of each sample's tokens: floor(s N) of them, s uniform on the range of shares.

    Args:
        position: [B] int64, places in the epoch's global order.
        key: Seed and epoch.
        tokens: Tokens N of the modality.
        share: Least and greatest hidden share; equal ones hide the same number in every sample.
        modality: Number of the modality.
        block: Hide a run of neighbouring tokens, which begins anywhere that it fits; otherwise any tokens.

    Returns:
        [B, N] bool on the device of `position`: True where a token is hidden.

    Raises:
        ValueError: The range of shares has no meaning.
    """
    if found := share_problems("share", share):
        raise ValueError("token_masks: " + found[0])
    stream = streams(Purpose.TOKEN_MASK, modality, position.cpu().numpy(), key.epoch)
    u = uniforms(stream, key.seed, 2 + tokens)
    low, high = share
    hidden = ((low + (high - low) * u[:, :1]) * tokens).astype(np.int64)  # B 1
    if block:
        place = np.arange(tokens) - (u[:, 1:2] * (tokens - hidden + 1)).astype(np.int64)
    else:
        place = u[:, 2:].argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return torch.from_numpy((place >= 0) & (place < hidden)).to(position.device)


def modality_masks(position: Tensor, key: BatchKey, known: Tensor, probability: Sequence[float] | None) -> Tensor:
    """Hide whole modalities, each with its own probability, but never all that is known of a sample.

    Where the draws would hide everything, one of the known modalities is shown, each with the same chance. So with
    probabilities within (0, 1) every subset of them but the empty one is shown now and then.

    Args:
        position: [B] int64, places in the epoch's global order.
        key: Seed and epoch.
        known: [B, M] bool: True where the sample has the modality.
        probability: M probabilities; None: one for all modalities, uniform on (0, 1) and drawn for each sample.

    Returns:
        [B, M] bool on the device of `position`: True where a modality is hidden, or not known.

    Raises:
        ValueError: Nothing is known of a sample, or there are not M probabilities in [0, 1].
    """
    modalities = known.shape[1]
    if probability is not None and (len(probability) != modalities or not all(0 <= p <= 1 for p in probability)):
        raise ValueError(f"modality_masks: must be given {modalities} probabilities in [0, 1], got {probability}")
    there = known.cpu().numpy()
    if not there.any(1).all():
        at = int(position[int(np.flatnonzero(~there.any(1))[0])])
        raise ValueError(f"modality_masks: the sample at position {at} has no known modality to show")
    stream = streams(Purpose.MODALITY_MASK, 0, position.cpu().numpy(), key.epoch)
    u = uniforms(stream, key.seed, 2 * modalities + 1)
    hidden = (u[:, :modalities] < (u[:, -1:] if probability is None else np.asarray(probability))) | ~there
    kept = np.where(there, u[:, modalities : 2 * modalities], -1.0).argmax(1)
    hidden[np.arange(len(hidden)), kept] &= ~hidden.all(1)
    return torch.from_numpy(hidden).to(position.device)


def batch_coin(key: BatchKey, probability: float) -> bool:
    """One draw for a whole global batch, over all ranks and accumulation steps: True with a probability in [0, 1]."""
    # No sample's stream has crop 1 of this purpose.
    stream = streams(Purpose.MODALITY_MASK, 1, key.first_position, key.epoch)
    return bool(uniforms(stream, key.seed, 1)[0, 0] < probability)
