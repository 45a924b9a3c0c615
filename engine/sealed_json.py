"""JSON records with a seal: the SHA-256 of their other entries, by which a bit that has changed is noticed when they are read.

A record without a seal is taken as it is: one of an earlier version, or one that somebody has changed on purpose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["sealed", "unsealed"]

SEAL = "sha256"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of JSON types with its seal, the last entry."""
    return {**record, SEAL: _digest(record)}


def unsealed(record: Any) -> dict[str, Any]:
    """A record as JSON gave it back, without its seal.

    Raises:
        ValueError: It is no record, or not what was written.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it must be an object of named entries, got a {type(record).__name__}")
    rest = {name: value for name, value in record.items() if name != SEAL}
    if record.get(SEAL) not in (None, _digest(rest)):
        raise ValueError(
            f'its SHA-256 differs: it was damaged, or changed by hand; copy it again, or delete its entry "{SEAL}" if the change '
            "is meant"
        )
    return rest


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
