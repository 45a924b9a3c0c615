"""How many files a process may have open at a time: shards, libraries and connections need more than some machines allow at first."""

from __future__ import annotations

import resource

__all__ = ["open_file_problems"]

LEAST = 512
"""DALI opens up to 128 shards for each of two stretches of an epoch, other readers keep 64; the rest is a process's own."""

USUAL = 1024


def open_file_problems() -> list[str]:
    """Raise this process's limit as far as it may, where it is low; what is wrong where that is not far enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = [USUAL if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard)]
    if limits[0] < USUAL and limits[0] < limits[1]:
        limits[0] = min(USUAL, limits[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[0], hard))
    if limits[0] >= LEAST:
        return []
    return [
        f"open files: a process must be allowed at least {LEAST} at a time, got {limits[0]}; raise the limit in the shell that starts "
        f"it (`ulimit -n {USUAL}`), or ask who runs this machine"
    ]
