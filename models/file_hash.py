"""SHA-256 of files that are written once and read by many: checkpoints, catalogues, published weights."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

__all__ = ["sha256_of"]


def sha256_of(path: Path) -> str:
    """Hex digits of a file's hash; of a file that stays as it is only once a process."""
    stamp = path.stat()
    return _hashed(path, stamp.st_size, stamp.st_mtime_ns, stamp.st_ino)


@lru_cache(maxsize=1024)
def _hashed(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
