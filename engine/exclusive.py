"""One owner at a time for a folder that a run, a build, a cache or an evaluation writes.

The owner holds a lock of the operating system (flock) on the file `.lock` in the folder, which says who it is: host, process,
command. Such a lock ends with its process, so a crash frees it. Network file systems carry flock between hosts where they
are mounted so (NFS since Linux 2.6.12, Lustre with `flock`, GPFS); one that has none falls back to the file itself: then a
file left by a process of this host that has ended is taken over, and one of another host is refused by name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["LOCK", "InUse", "exclusive", "is_owned"]

LOCK = ".lock"
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""How a file system says that it has no locks."""


class InUse(RuntimeError):
    """Another process owns the folder; the message names it."""


@contextmanager
def exclusive(folder: Path | str) -> Iterator[None]:
    """Own a folder for the length of a block. The folder must exist; in a job of several ranks one of them calls this.

    Raises:
        InUse: Another process owns it.
        OSError: The folder cannot be written.
    """
    path = Path(folder) / LOCK
    descriptor = _take(path)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that is gone has no lock to free
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                path.unlink()
        os.close(descriptor)


def is_owned(folder: Path | str) -> bool:
    """Whether a process owns the folder now; nothing is written, and a lock left by a crash does not count."""
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        owner = _read(descriptor)
        return bool(owner) and not _ended(owner)
    finally:
        os.close(descriptor)


def _take(path: Path) -> int:
    """An open, locked descriptor of the file, which names this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _in_use(path, _read(descriptor)) from error
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                owner = _read(descriptor)
                if owner and not _ended(owner):
                    raise _in_use(path, owner, f"; if that process is gone, delete {path}") from error
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # else its last owner has just removed it
                _write(descriptor)
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _write(descriptor: int) -> None:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    owner = {"host": socket.gethostname(), "process": os.getpid(), "command": command}
    owner["since"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    os.fsync(descriptor)


def _read(descriptor: int) -> dict[str, Any]:
    """Who the file names; nothing where it is still empty."""
    try:
        owner = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _ended(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this host that no longer runs."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner.get("process", 0)), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _in_use(path: Path, owner: dict[str, Any], advice: str = "") -> InUse:
    who = "another process"
    if owner:
        who = f"{owner.get('command')!r} (process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')})"
    return InUse(f"{path.parent}: in use by {who}; wait for it or choose another folder{advice}")
