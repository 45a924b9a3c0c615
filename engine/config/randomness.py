"""Seeds and states of every random generator that a process has: torch's, CUDA's, numpy's and Python's global ones.

The project's own draws are keyed and need none of this; dropout, and whatever a method calls, does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_states", "seed_everything", "set_random_states"]


def seed_everything(*keys: int) -> None:
    """Seed all generators from whole numbers: the run's seed alone, or with step and rank for streams of their own."""
    mixed = int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])
    torch.manual_seed(mixed & (2**63 - 1))
    np.random.seed(mixed & (2**32 - 1))  # noqa: NPY002  (the global generator is what other code may draw from)
    random.seed(mixed)


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of all generators: the large ones as tensors under "rng/...", the rest as JSON types."""
    version, keys, gauss = random.getstate()
    name, words, *place = np.random.get_state(legacy=True)  # noqa: NPY002
    tensors = {"rng/torch": torch.get_rng_state(), "rng/numpy": torch.from_numpy(np.asarray(words).astype(np.int64))}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, list(keys), gauss], "numpy": [name, *place]}


def set_random_states(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Undo what happened since `random_states`.

    Args:
        tensors: Its first result.
        rest: Its second result; may have been through JSON.
    """
    version, keys, gauss = rest["python"]
    random.setstate((version, tuple(keys), gauss))
    name, *place = rest["numpy"]
    np.random.set_state((name, tensors["rng/numpy"].numpy().astype(np.uint32), *place))  # noqa: NPY002
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
