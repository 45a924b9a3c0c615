"""Measures that show the collapse of self-distillation, which losses and nearest-neighbour scores do not.

Shape legend: B rows of a step, D width, V prototypes, n rows that a measure has seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from armillary.kernels.launch import untraced

__all__ = ["MIN_EFFECTIVE_RANK", "CollapseMonitor", "effective_rank", "least_prototypes", "perplexity"]

MIN_EFFECTIVE_RANK = 5.0


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the centred features' covariance spectrum (Roy & Vetterli 2007 use singular values).

    Args:
        features: [n, D].

    Returns:
        Between 1 and min(n - 1, D); 1 for constant features, NaN where a feature is not finite.
    """
    x = features.double()
    if not bool(torch.isfinite(x).all()):
        return math.nan
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    spectrum = torch.linalg.eigvalsh(gram).clamp(min=0)
    # Rounding of constant features must not look like a spectrum.
    floor = spectrum.numel() * torch.finfo(torch.float32).eps ** 2 * float(features.double().square().sum())
    spectrum = torch.where(spectrum > floor, spectrum, 0.0)
    return 1.0 if not spectrum.any() else perplexity(spectrum / spectrum.sum())


def perplexity(p: Tensor) -> float:
    """exp of the entropy of a distribution [V], zeros allowed."""
    return float(torch.special.entr(p).sum().exp())


def least_prototypes(prototypes: float, rows: float) -> float:
    """How many prototypes must be in use: min(V, n) / 2.

    n rows with decided assignments show at most n prototypes, so a window of 1,024 rows cannot show half of 65,536.
    """
    return min(prototypes, rows) / 2


class CollapseMonitor:
    """Effective rank of recent features, and how many prototypes the teacher uses for them.

    Between calls of `measure` a step costs one copy and the softmax of at most `ROWS` rows; nothing waits for the
    device. Measures are of this rank's samples, which are a random part of all, so no rank waits for another.

    Attributes:
        WINDOW: Rows that the measures look back on: a ring of features, and an exponential window of assignments.
        ROWS: Rows a step that enter the assignments.
        GRACE: Steps before a measure that was never good is warned of. A new encoder with a small LayerScale gives all
            images nearly the same class token, and takes a while to tell them apart.
    """

    WINDOW = 1024
    ROWS = 64
    GRACE = 200

    def __init__(self) -> None:
        self._ring: Tensor | None = None
        self._assignment: Tensor | None = None
        self._written = 0  # rows that ever entered the ring
        self._assigned = 0  # rows that ever entered the assignment
        self._steps = 0
        self._was_good: set[str] = set()

    @untraced
    @torch.no_grad()
    def update(self, features: Tensor, projected: Tensor, prototypes: Tensor, temperature: float) -> None:
        """Take in a step.

        Args:
            features: [B, D] teacher features of one crop a sample.
            projected: [B, b] their normalised projections.
            prototypes: [V, b] of the teacher.
            temperature: The teacher's. Assignments are its plain softmax: centring and Sinkhorn would spread a
                collapsed teacher's targets over all prototypes.
        """
        self._steps += 1
        features = features[-self.WINDOW :].float()
        if self._ring is None or self._ring.device != features.device:
            self._ring = features.new_zeros(self.WINDOW, features.shape[1])
            self._assignment = features.new_zeros(len(prototypes))
            self._written = self._assigned = 0
        start = self._written % self.WINDOW
        head = features[: self.WINDOW - start]
        self._ring[start : start + len(head)] = head
        self._ring[: len(features) - len(head)] = features[len(head) :]
        self._written += len(features)

        rows = projected[: self.ROWS]
        if len(rows):
            self._assigned += len(rows)
            mean = (rows @ prototypes.T).float().div_(temperature).softmax(-1).mean(0)
            assert self._assignment is not None
            self._assignment.lerp_(mean, min(1.0, len(rows) / min(self._assigned, self.WINDOW)))

    def measure(self) -> dict[str, float]:
        """`effective_rank`, `prototypes_in_use` and `window_rows`; empty before two rows were seen."""
        if self._ring is None or self._assignment is None or self._written < 2:
            return {}
        return {
            "effective_rank": effective_rank(self._ring[: self._written]),
            "prototypes_in_use": perplexity(self._assignment),
            "window_rows": float(min(self._assigned, self.WINDOW)),
        }

    def warnings(self, measures: Mapping[str, float], prototypes: int) -> list[str]:
        """Warnings that follow from a result of `measure`; none before the window is full, or within the grace.

        Args:
            measures: Result of `measure`.
            prototypes: V.
        """
        if not {"effective_rank", "prototypes_in_use", "window_rows"} <= measures.keys():
            return []
        rank, in_use, rows = (measures[k] for k in ("effective_rank", "prototypes_in_use", "window_rows"))
        bound = least_prototypes(prototypes, rows)
        found = []
        if rows >= self.WINDOW and self._bad("effective rank", rank <= MIN_EFFECTIVE_RANK):
            found.append(
                f"teacher features are collapsing: effective rank {rank:.1f} <= {MIN_EFFECTIVE_RANK:g}; "
                "nearest-neighbour scores do not show this. Raise koleo_weight or ibot_weight, use Sinkhorn centering, "
                "or lower the teacher temperature. (A new encoder with a small LayerScale starts so.)"
            )
        if rows >= self.WINDOW and self._bad("prototypes", in_use < bound):
            found.append(
                f"the teacher uses few prototypes: {in_use:.0f} in effect, fewer than {bound:.0f}, half of what "
                f"{rows:.0f} samples can show of {prototypes}. Use Sinkhorn centering, or lower the teacher temperature"
            )
        return found

    def _bad(self, name: str, bad: bool) -> bool:
        """Whether to warn: the measure was good before, or has had its time."""
        if not bad:
            self._was_good.add(name)
        return bad and (name in self._was_good or self._steps >= self.GRACE)
