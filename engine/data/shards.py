"""Shards: USTAR archives of `<key>.img` blobs, the same bytes for the same content, with DALI's index beside each.

USTAR, because DALI reads no PAX headers. An archive appears under its name only when it is complete and on disk.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from armillary.engine.data.survey import ShardRecord
from armillary.engine.data.surveys.sample import key_problem

__all__ = ["EXTENSION", "Member", "ShardWriter", "fsync_folder", "read_index", "read_members", "write_index"]

EXTENSION = "img"
INDEX_VERSION = "v1.2"
BLOCK = 512  # bytes of a tar header, and the unit that contents are padded to


@dataclass(frozen=True)
class Member:
    """A blob of a shard.

    Attributes:
        key: The sample's key.
        offset: First byte of the blob in the tar.
        size: Bytes of the blob.
    """

    key: str
    offset: int
    size: int


class ShardWriter:
    """Writes one shard; use it as a context manager. On an error nothing is left under the shard's name.

    Args:
        path: The shard, `<split>-<number>.tar`.
        split: Split of all its samples.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path, self.split = path, split
        self.members: list[Member] = []
        self._keys: set[str] = set()
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._sha256, self._bytes = hashlib.sha256(), 0
        self._record: ShardRecord | None = None

    def __enter__(self) -> ShardWriter:
        """Open the temporary file."""
        self._file = open(self._temporary, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the tar, flush it to disk and give it its name; on an error remove it."""
        try:
            if kind is None:
                self._write(bytes(2 * BLOCK))
                self._write(bytes(-self._bytes % tarfile.RECORDSIZE))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
                self._record = ShardRecord(
                    self.path.name, self.split, len(self.members), self._bytes, self._sha256.hexdigest()
                )
        finally:
            if self._record is None:
                try:
                    self._file.close()  # flushes, so a full disk fails here once more
                except OSError:
                    pass
                self._temporary.unlink(missing_ok=True)

    @property
    def record(self) -> ShardRecord:
        """The finished shard's entry for survey.json."""
        if self._record is None:
            raise RuntimeError(f"{self.path}: the shard is not finished; leave the writer's `with` block first")
        return self._record

    def add(self, key: str, blob: bytes) -> Member:
        """Append a sample.

        Raises:
            ValueError: The key cannot name a member, or is in the shard already.
        """
        if problem := key_problem(key):
            raise ValueError(problem)
        if key in self._keys:
            raise ValueError(f"key {key!r}: already in {self.path.name}; keys must be unique in a survey")
        self._keys.add(key)
        header = tarfile.TarInfo(f"{key}.{EXTENSION}")  # its defaults: mtime, uid and gid 0, mode 644, no names
        header.size = len(blob)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        member = Member(key, self._bytes, len(blob))
        self._write(blob)
        self._write(bytes(-len(blob) % BLOCK))
        self.members.append(member)
        return member

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)


def read_members(path: Path) -> Iterator[Member]:
    """Members of a shard, in stored order, from its tar headers.

    Raises:
        ValueError: The tar is damaged or truncated, or a member is not a sample.
    """
    length = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, mode="r:") as tar:
            for header in tar:
                stem, _, extension = header.name.partition(".")
                if not header.isreg() or extension != EXTENSION:
                    raise ValueError(f"member {header.name!r} is not a <key>.{EXTENSION} file")
                end = header.offset_data + -(-header.size // BLOCK) * BLOCK
                if end > length:
                    raise ValueError(f"truncated: member {header.name!r} ends at byte {end} of {length}")
                yield Member(stem, header.offset_data, header.size)
        with open(path, "rb") as f:
            f.seek(end)
            if f.read(2 * BLOCK) != bytes(2 * BLOCK):
                raise ValueError("truncated: the two empty blocks that end a tar are missing")
    except tarfile.TarError as error:
        raise ValueError(f"not a readable tar: {error}") from error


def write_index(tar: Path, members: Sequence[Member] | None = None) -> Path:
    """Write DALI's index of a shard beside it, atomically.

    Args:
        tar: The shard.
        members: Its members; read from the shard by default.

    Returns:
        The index, `<shard>.idx`.
    """
    found = list(read_members(tar)) if members is None else members
    lines = [f"{INDEX_VERSION} {len(found)}"]
    lines += [f"{EXTENSION} {m.offset} {m.size} {m.key}.{EXTENSION}" for m in found]
    index = tar.with_suffix(".idx")
    temporary = index.with_name(f".{index.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="ascii") as f:
            f.write("\n".join(lines) + "\n")
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, index)
    finally:
        temporary.unlink(missing_ok=True)
    return index


def read_index(index: Path) -> list[Member]:
    """Members according to a DALI index.

    Raises:
        ValueError: The file is not such an index.
    """
    try:
        header, *lines = index.read_text(encoding="ascii").splitlines()
        version, count = header.split()
        if version != INDEX_VERSION or int(count) != len(lines):
            raise ValueError(f"header {header!r} for {len(lines)} lines")
        members = []
        for line in lines:
            extension, offset, size, name = line.split(" ")
            if extension != EXTENSION:
                raise ValueError(f"line {line!r}")
            members.append(Member(name.removesuffix(f".{EXTENSION}"), int(offset), int(size)))
        return members
    except ValueError as error:
        raise ValueError(f"not a DALI index of version {INDEX_VERSION}: {error}") from error


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
