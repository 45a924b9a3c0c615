"""iBOT masks: which crops of a global batch are masked, how much, and which of their patches.

Which crops are masked, and their share of patches, is decided over the *global* batch, so that masks do not depend on
the number of ranks: of its G * GB crops a fixed fraction is masked, and their ratios are stratified, the i-th one drawn
uniformly from the i-th of equal parts of `ratio_range`. Each crop's patches come from its own stream of keyed draws.

"block" is the block-wise masking of BEiT as DINOv2 runs it: rectangles of 4 to T / 2 patches and log-uniform aspect 0.3
to 1 / 0.3 are placed until the wanted number is reached; a rectangle that would exceed it is redrawn, and after ten
failures in a row the crop is left short (about 6 % of crops, by one or two patches). "random" hides exactly the wanted
number, anywhere.

Shape legend: B samples, G global crops, GB samples of the global batch, h x w = T patches, M masked crops.
"""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary import _C
from armillary.kernels.pixels.philox import Purpose, streams, uniforms
from armillary.models.method import BatchKey

__all__ = ["block_mask_reference", "masks"]


def block_mask_reference(
    wanted: int, stream: NDArray[np.uint32], seed: int, grid: tuple[int, int]
) -> NDArray[np.bool_]:
    """One block mask in Python: the specification of csrc/masks.cpp.

    Args:
        wanted: Patches to mask.
        stream: [3] uint32 of `philox.streams`; draw 0 is left to the caller, each try takes one more counter.
        seed: The run's seed.
        grid: Patches (h, w).

    Returns:
        [h, w], True where masked.
    """
    height, width = grid
    mask = np.zeros(grid, bool)
    draws = 64
    u = uniforms(stream[None], seed, 4 * draws)[0].reshape(draws, 4)
    attempt, failures = 1, 0
    while mask.sum() < wanted and failures < 10:
        if attempt == len(u):
            u = uniforms(stream[None], seed, 8 * len(u))[0].reshape(-1, 4)
        cap = min(wanted - int(mask.sum()), height * width // 2)
        area = 4.0 + (cap - 4.0) * u[attempt, 0]
        aspect = math.exp(math.log(0.3) * (1.0 - 2.0 * u[attempt, 1]))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if h < height and w < width:
            top, left = int(u[attempt, 2] * (height - h + 1)), int(u[attempt, 3] * (width - w + 1))
            block = mask[top : top + h, left : left + w]
            if 0 < h * w - int(block.sum()) <= cap:
                block[:] = True
                failures = 0
        attempt += 1
    return mask


def masks(
    position: Tensor,
    key: BatchKey,
    n_global: int,
    grid: tuple[int, int],
    *,
    crop_fraction: float,
    ratio_range: tuple[float, float],
    kind: Literal["block", "random"] = "block",
) -> Tensor:
    """Draw the iBOT masks of one micro-batch.

    Args:
        position: [B] int64, places in the epoch's global order, all within the global batch.
        key: Seed, epoch and extent of the global batch.
        n_global: Global crops G of a sample.
        grid: Patches (h, w) of a global crop.
        crop_fraction: Share of the global batch's crops that are masked, in [0, 1].
        ratio_range: Least and greatest share of a masked crop's patches, 0 <= low <= high <= 1.
        kind: "block" or "random".

    Returns:
        [G * B, T] bool on the device of `position`, crop-major; all False where a crop is not masked.

    Raises:
        ValueError: A fraction or ratio out of range, or a position outside the global batch.
    """
    low, high = ratio_range
    if not 0.0 <= crop_fraction <= 1.0:
        raise ValueError(f"masks: crop_fraction must be in [0, 1], got {crop_fraction}")
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"masks: ratio_range must be 0 <= low <= high <= 1, got {ratio_range}")
    if kind not in ("block", "random"):
        raise ValueError(f'masks: kind must be "block" or "random", got {kind!r}')
    if n_global < 1 or min(grid) < 1:
        raise ValueError(f"masks: needs at least one global crop and one patch, got {n_global} crops of {grid}")
    place = position.cpu().numpy()
    offset = place - key.first_position
    if len(offset) and (offset.min() < 0 or offset.max() >= key.global_batch):
        raise ValueError(
            f"masks: positions {place.min()} .. {place.max()} are outside the global batch of {key.global_batch} "
            f"samples from {key.first_position}"
        )
    tokens = grid[0] * grid[1]
    stratum, n_masked = _strata(key, n_global, crop_fraction)
    own = stratum[(np.arange(n_global)[:, None] * key.global_batch + offset).reshape(-1)]  # [G*B], -1: not masked
    rows = np.flatnonzero(own >= 0)
    crop, sample = np.divmod(rows, max(len(place), 1))
    stream = streams(Purpose.MASK, crop, place[sample], key.epoch)
    edges = np.linspace(low, high, n_masked + 1)
    below, above = edges[own[rows]], edges[own[rows] + 1]
    ratio = below + (above - below) * uniforms(stream, key.seed, 1)[:, 0]
    wanted = (tokens * ratio).astype(np.int64)
    out = np.zeros((len(own), tokens), bool)
    if kind == "block":
        out[rows] = _C.block_masks(wanted, stream, key.seed, *grid)
    else:
        order = np.argsort(uniforms(stream, key.seed, 4 + tokens)[:, 4:], axis=1, kind="stable")
        chosen = np.zeros((len(rows), tokens), bool)
        np.put_along_axis(chosen, order, np.arange(tokens) < wanted[:, None], axis=1)
        out[rows] = chosen
    return torch.from_numpy(out).to(position.device)


def _strata(key: BatchKey, n_global: int, crop_fraction: float) -> tuple[NDArray[np.int64], int]:
    """Stratum of every crop of the global batch [G*GB], crop-major, -1 where it is not masked; and their number."""
    crops = n_global * key.global_batch
    n_masked = int(crops * crop_fraction)
    plan = streams(Purpose.MASK_PLAN, 0, key.first_position, key.epoch)
    order = np.argsort(uniforms(plan, key.seed, crops)[0], kind="stable")
    stratum = np.full(crops, -1, np.int64)
    stratum[order[:n_masked]] = np.arange(n_masked)
    return stratum, n_masked
