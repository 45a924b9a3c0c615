"""Files that appear under their name only when they are whole and on the disk.

Everything is written under a temporary name in the same folder, flushed and synced, renamed, and the folder is synced. An
error leaves the old file as it was and nothing else; a killed process leaves its temporary file, which a later writer in
that folder removes. Readers that list a folder are safe from half-written files: their names are `.NAME.HOST-PID.tmp`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["atomic_open", "atomic_path", "require_writable", "sync_folder", "write_bytes", "write_json", "write_text"]

HOST = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())
LEFTOVER = re.compile(rf"\..*\.{HOST}-(\d+)\.tmp")
IDLE = 3600.0
"""Seconds without a write after which a file of a dead process goes; a container's processes look dead to another one."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path for a library that writes by itself, a file or a folder; it gets its name when the block ends well.

    Args:
        path: Final name. Its folder must exist; a file of that name is replaced, a folder must not exist.

    Raises:
        OSError: It cannot be written, synced or renamed.
    """
    _clear_leftovers(path.parent)
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")
    try:
        yield temporary
        _sync_tree(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        _remove(temporary)


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes to; it gets its name when the block ends well. See `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def require_writable(path: Path) -> None:
    """Make sure, before hours of work, that a file of this name can be written; its folder is made if need be.

    Raises:
        OSError: It cannot; the message names the file and what is in the way.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: must be a file, got a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise type(error)(f"{path}: cannot be written: {error}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file of bytes. See `atomic_path`."""
    with atomic_open(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole file of UTF-8 text. See `atomic_path`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a whole file of JSON, indented by one. See `atomic_path`."""
    write_text(path, json.dumps(value, indent=1))


def sync_folder(folder: Path) -> None:
    """Make what was renamed or made in a folder survive a power cut; the same for the content of one file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _sync_tree(inner)
    sync_folder(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@cache  # once a folder and process: a listing for each of thousands of shards would be slow
def _clear_leftovers(folder: Path) -> None:
    """Remove temporary files of processes of this machine that no longer run."""
    for entry in os.scandir(folder):
        found = LEFTOVER.fullmatch(entry.name)
        if found and not _alive(int(found[1])):
            try:
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > IDLE:
                    _remove(Path(entry.path))
            except FileNotFoundError:
                pass  # another writer removed it


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
