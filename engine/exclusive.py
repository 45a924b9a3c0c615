"""One owner at a time for a folder or file that a run, a build, a cache, a command or an evaluation writes.

The owner holds a lock of the operating system (flock) on the file `.lock` in the folder, or `.NAME.lock` beside a file, which says
who it is: host, process, command. Such a lock ends with its process, so a crash frees it. Network file systems carry flock between hosts where they
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

from armillary.engine.atomic_file import require_writable

__all__ = ["LOCK", "InUse", "exclusive", "exclusive_file", "is_owned"]

LOCK = ".lock"
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""How a file system says that it has no locks."""


class InUse(RuntimeError):
    """Another process owns the folder or file; the message names it."""


@contextmanager
def exclusive(folder: Path | str) -> Iterator[None]:
    """Own a folder for the length of a block. The folder must exist; in a job of several ranks one of them calls this.

    Raises:
        InUse: Another process owns it.
        OSError: The folder cannot be written.
    """
    with _owned(Path(folder) / LOCK, Path(folder)):
        yield


@contextmanager
def exclusive_file(file: Path | str) -> Iterator[None]:
    """Own the name of a file, or of a folder that appears as a whole, for the length of a block.

    Raises:
        InUse: Another process is writing it.
        OSError: It cannot be written; see `require_writable`.
    """
    file = Path(file)
    require_writable(file)
    with _owned(file.with_name(f".{file.name}{LOCK}"), file):
        yield


@contextmanager
def _owned(path: Path, what: Path) -> Iterator[None]:
    descriptor = _take(path, what)
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


def _take(path: Path, what: Path) -> int:
    """An open, locked descriptor of the file, which names this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _in_use(what, _read(descriptor)) from error
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                owner = _read(descriptor)
                if owner and not _ended(owner):
                    raise _in_use(what, owner, f"; if that process is gone, delete {path}") from error
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


def _in_use(what: Path, owner: dict[str, Any], advice: str = "") -> InUse:
    who = "another process"
    if owner:
        who = f"{owner.get('command')!r} (process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')})"
    return InUse(f"{what}: in use by {who}; wait for it or choose another name{advice}")
