"""Has the encoder collapsed? Effective rank of its embeddings, identical embeddings, prototypes in use.

A nearest-neighbour score does not tell: collapsed runs keep a few directions that still order galaxies by colour.

Shape legend: N samples, D embedding dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from armillary.models.dinov2.collapse import MIN_EFFECTIVE_RANK, effective_rank, least_prototypes

__all__ = ["Collapse", "assess", "duplicates"]


@dataclass(frozen=True)
class Collapse:
    """Collapse measures and what follows from them.

    Attributes:
        samples: Embeddings measured.
        dimensions: Embedding dimensions D.
        effective_rank: See `models.dinov2.collapse.effective_rank`.
        duplicates: Embeddings equal to an earlier one.
        prototypes_in_use: Last logged value; None where the method logs none.
        prototypes: Prototypes there are; None where the method logs none.
        reasons: Rules that are broken, in plain words; empty where the encoder is sound.
    """

    samples: int
    dimensions: int
    effective_rank: float
    duplicates: int
    prototypes_in_use: float | None
    prototypes: float | None
    reasons: tuple[str, ...]

    @property
    def collapsed(self) -> bool:
        """True where any rule is broken."""
        return bool(self.reasons)


def duplicates(vectors: np.ndarray) -> int:
    """Embeddings that equal an earlier one, bit for bit."""
    x = np.ascontiguousarray(_checked(vectors).astype(np.float32))
    return len(x) - len(np.unique(x, axis=0))


def assess(
    vectors: np.ndarray,
    *,
    prototypes_in_use: float | None = None,
    prototypes: float | None = None,
    window_rows: float | None = None,
) -> Collapse:
    """Judge embeddings: sound if their effective rank exceeds 5 and half of the prototypes that can show are in use.

    Args:
        vectors: [N, D] finite embeddings, at least a few tens for the rank to mean anything.
        prototypes_in_use: From the end of training, where the method has prototypes.
        prototypes: How many there are.
        window_rows: Samples over which their use was measured, so that no more can show; by default enough for all.

    Raises:
        ValueError: The array is empty, not a matrix, or holds non-finite numbers.
    """
    rank, twins = effective_rank(torch.from_numpy(_checked(vectors))), duplicates(vectors)
    reasons = []
    if rank <= MIN_EFFECTIVE_RANK:
        reasons.append(f"effective rank {rank:.1f} of {vectors.shape[1]}: must exceed {MIN_EFFECTIVE_RANK:g}")
    if twins > len(vectors) / 2:
        reasons.append(f"{twins} of {len(vectors)} embeddings repeat an earlier one: at most half may")
    if prototypes_in_use is not None and prototypes:
        least = least_prototypes(prototypes, prototypes if window_rows is None else window_rows)
        if prototypes_in_use < least:
            reasons.append(
                f"{prototypes_in_use:.4g} of {prototypes:.0f} prototypes in use: must be {least:.4g} or more"
            )
    return Collapse(len(vectors), vectors.shape[1], rank, twins, prototypes_in_use, prototypes, tuple(reasons))


def _checked(vectors: np.ndarray) -> np.ndarray:
    x = np.asarray(vectors, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"embeddings: need a non-empty [N, D] array, got {x.shape}")
    if bad := int((~np.isfinite(x)).any(1).sum()):
        raise ValueError(f"embeddings: {bad} of {len(x)} hold non-finite numbers; the encoder or its input is broken")
    return x
