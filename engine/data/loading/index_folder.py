"""A folder in memory for DALI's index files: gone once a pipeline has read it, and, after a kill, at the next start."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["index_folder", "remove_leftovers"]

log = logging.getLogger(__name__)

MEMORY = Path("/dev/shm")
PREFIX = "armillary-index-"
SPARE_BYTES = 16 * 2**20  # many times the index files of a pipeline
LEFT_S = 60.0  # between a folder's making and its locking lies no minute


@contextmanager
def index_folder() -> Iterator[Path]:
    """A folder in memory, or on disk where memory is short, that is locked and removed at the end."""
    in_memory = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= SPARE_BYTES
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=MEMORY if in_memory else None) as folder:
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(lock)


def remove_leftovers() -> int:
    """Remove this user's folders whose process was killed.

    A folder is in use as long as it is locked, which also holds for jobs in other containers, whose process ids mean
    nothing here.

    Returns:
        Bytes of memory that are free again.
    """
    freed = 0
    for folder in MEMORY.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another user's, or just removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = os.fstat(lock)
            if state.st_uid == os.getuid() and time.time() - state.st_mtime > LEFT_S:
                held = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
                shutil.rmtree(folder, ignore_errors=True)
                freed += held
                log.warning("%s: removed, left by a killed process: %d bytes of memory", folder, held)
        except OSError:  # in use, or removed by another job at the same time
            continue
        finally:
            os.close(lock)
    return freed
