"""Where the gates of geometry adapters send tokens: mean shares of the experts by task, block and kind of token, and over images.

Shape legend: A adapters, B galaxies, L tokens of a prompt, g x g tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from armillary.engine.evaluate.questions.answers import TOKEN_CLASSES, gate_shares, token_classes
from armillary.kernels.geometry.geometry_combine import EXPERTS
from armillary.models.galaxy_walker.stage2 import GalaxyWalkerMethod
from armillary.models.method import Batch

__all__ = ["GateShare", "ImageGates", "gate_table", "image_gates"]

SHOWN = 4


@dataclass(frozen=True)
class GateShare:
    """Mean shares of the experts over some of the tokens.

    Attributes:
        kind: "task", "block" or "token".
        name: Which of them.
        share: Of the Euclidean, spherical and hyperbolic expert; they sum to 1.
        error: Standard deviation over galaxies of each galaxy's mean, over the root of their number.
        galaxies: Number of them.
    """

    kind: str
    name: str
    share: tuple[float, ...]
    error: tuple[float, ...]
    galaxies: int

    experts = EXPERTS


@dataclass(frozen=True)
class ImageGates:
    """Shares over the images of a few galaxies, in the last adapted block.

    Attributes:
        block: Its number.
        crops: [n, 3, S, S] model inputs.
        shares: [n, 3, g, g].
    """

    block: int
    crops: np.ndarray
    shares: np.ndarray


def gate_table(method: GalaxyWalkerMethod, batch: Batch) -> list[GateShare]:
    """Shares by task over all blocks and tokens, by block and by kind of token over all tasks; empty without adapters.

    Args:
        method: In evaluation mode.
        batch: Model inputs of some galaxies.
    """
    if not method.config.adapter.every:
        return []
    names = [*method.inputs.targets, *method.inputs.questions]
    by_task, by_block, by_class = [], [], []
    blocks: list[int] = []
    for first in method.templates.first:
        blocks, shares = gate_shares(method, batch, first)
        values = shares.cpu().numpy()  # [A, B, L, 3]
        kinds = np.array(token_classes(method, first))
        by_task.append(values.mean((0, 2)))
        by_block.append(values.mean(2))
        means = [values[:, :, kinds == kind].mean((0, 2)) if (kinds == kind).any() else None for kind in TOKEN_CLASSES]
        by_class.append(means)
    found = [_of("task", name, x) for name, x in zip(names, by_task, strict=True)]
    found += [_of("block", str(block), np.mean([x[i] for x in by_block], 0)) for i, block in enumerate(blocks)]
    for i, kind in enumerate(TOKEN_CLASSES):
        known = [x for means in by_class if (x := means[i]) is not None]
        if known:
            found.append(_of("token", kind, np.mean(known, 0)))
    return found


def _of(kind: str, name: str, by_galaxy: np.ndarray) -> GateShare:
    """From each galaxy's mean shares [B, 3]."""
    count = len(by_galaxy)
    error = by_galaxy.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.full(3, np.nan)
    return GateShare(kind, name, tuple(by_galaxy.mean(0).tolist()), tuple(error.tolist()), count)


def image_gates(method: GalaxyWalkerMethod, batch: Batch) -> ImageGates | None:
    """Shares over images for the first question; None without images or adapters."""
    if not (method.config.adapter.every and method.inputs.channels):
        return None
    few: Batch = Batch(**{n: x[:SHOWN] for n, x in batch.items() if isinstance(x, torch.Tensor)})  # type: ignore[typeddict-item]
    template = method.templates.first[-1]
    blocks, shares = gate_shares(method, few, template)
    of_image = np.array(token_classes(method, template)) == "image"
    side = round(method.reader.image_tokens**0.5)
    last = shares[-1].cpu().numpy()[:, of_image]
    return ImageGates(blocks[-1], few["crop"].cpu().numpy(), last.transpose(0, 2, 1).reshape(len(last), 3, side, side))


def by_kind(gates: Sequence[GateShare], kind: str) -> list[GateShare]:
    """Those of one kind."""
    return [g for g in gates if g.kind == kind]
