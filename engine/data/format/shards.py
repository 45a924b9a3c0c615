"""Shards: USTAR archives of blobs, the same bytes for the same content, with DALI's index beside each.

A sample is one member a modality, `<key>.img`, `<key>.spc`, `<key>.vec`, one after the other; it may lack some. The
archives are USTAR because DALI reads no PAX headers. One appears under its name only when it is complete and on disk.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from armillary.engine.atomic_file import atomic_open, write_text
from armillary.engine.data.format.survey import MODALITIES, ShardRecord

__all__ = [
    "Member",
    "Part",
    "ShardWriter",
    "key_problem",
    "parse_line",
    "read_index",
    "read_members",
    "write_index",
]

EXTENSIONS = tuple(MODALITIES.values())
INDEX_VERSION = "v1.2"
MAX_KEY = 96  # a USTAR name field holds 100 bytes, of which ".img" takes four
KEY = re.compile(rf"[A-Za-z0-9_+=-]{{1,{MAX_KEY}}}")
BLOCK = 512  # bytes of a tar header, and the unit that contents are padded to


@dataclass(frozen=True)
class Part:
    """One blob of a sample.

    Attributes:
        extension: Its modality, see `MODALITIES`.
        offset: First byte of the blob in the tar.
        size: Bytes of the blob.
    """

    extension: str
    offset: int
    size: int


@dataclass(frozen=True)
class Member:
    """A sample of a shard.

    Attributes:
        key: The sample's key.
        parts: Its blobs, at least one, in stored order.
    """

    key: str
    parts: tuple[Part, ...]

    @property
    def offset(self) -> int:
        """First byte of the first blob."""
        return self.parts[0].offset

    @property
    def size(self) -> int:
        """Bytes from there to the end of the last blob."""
        return self.parts[-1].offset + self.parts[-1].size - self.offset

    def part(self, extension: str) -> Part | None:
        """The blob of a modality; None where the sample lacks it."""
        return next((part for part in self.parts if part.extension == extension), None)


def key_problem(key: str) -> str | None:
    """Why a key cannot name a member of a shard; None if it can."""
    if KEY.fullmatch(key):
        return None
    return f"key {key!r}: must be 1 to {MAX_KEY} letters, digits or any of _ + = -"


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
        self._opened = atomic_open(path)
        self._sha256, self._bytes = hashlib.sha256(), 0
        self._record: ShardRecord | None = None

    def __enter__(self) -> ShardWriter:
        """Open the temporary file."""
        self._file = self._opened.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the tar, flush it to disk and give it its name; on an error remove it."""
        if kind is not None:
            self._opened.__exit__(kind, error, trace)
            return
        with ExitStack() as stack:
            stack.push(self._opened)
            self._write(bytes(2 * BLOCK))
            self._write(bytes(-self._bytes % tarfile.RECORDSIZE))
        self._record = ShardRecord(self.path.name, self.split, len(self.members), self._bytes, self._sha256.hexdigest())

    @property
    def record(self) -> ShardRecord:
        """The finished shard's entry for survey.json."""
        if self._record is None:
            raise RuntimeError(f"{self.path}: the shard is not finished; leave the writer's `with` block first")
        return self._record

    def add(self, key: str, blobs: Mapping[str, bytes]) -> Member:
        """Append a sample.

        Args:
            key: Its key.
            blobs: By extension; at least one.

        Raises:
            ValueError: The key cannot name a member, or is in the shard already; an extension is unknown.
        """
        if problem := key_problem(key):
            raise ValueError(problem)
        if key in self._keys:
            raise ValueError(f"key {key!r}: already in {self.path.name}; keys must be unique in a survey")
        if not blobs or set(blobs) - set(EXTENSIONS):
            raise ValueError(f"key {key!r}: blobs must be some of {', '.join(EXTENSIONS)}, got {sorted(blobs)}")
        self._keys.add(key)
        parts = []
        for extension in EXTENSIONS:
            if extension not in blobs:
                continue
            blob = blobs[extension]
            header = tarfile.TarInfo(f"{key}.{extension}")  # its defaults: mtime, uid and gid 0, mode 644, no names
            header.size = len(blob)
            self._write(header.tobuf(tarfile.USTAR_FORMAT))
            parts.append(Part(extension, self._bytes, len(blob)))
            self._write(blob)
            self._write(bytes(-len(blob) % BLOCK))
        member = Member(key, tuple(parts))
        self.members.append(member)
        return member

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)


def read_members(path: Path) -> Iterator[Member]:
    """Samples of a shard, in stored order, from its tar headers.

    Raises:
        ValueError: The tar is damaged or truncated, or a member is not a blob of a sample.
    """
    length = path.stat().st_size
    end = 0
    key, parts = "", list[Part]()
    try:
        with tarfile.open(path, mode="r:") as tar:
            for header in tar:
                stem, _, extension = header.name.partition(".")
                if not header.isreg() or extension not in EXTENSIONS:
                    known = ", ".join(f"<key>.{e}" for e in EXTENSIONS)
                    raise ValueError(f"member {header.name!r} is none of {known}")
                end = header.offset_data + -(-header.size // BLOCK) * BLOCK
                if end > length:
                    raise ValueError(f"truncated: member {header.name!r} ends at byte {end} of {length}")
                if stem != key and parts:
                    yield Member(key, tuple(parts))
                    parts = []
                key = stem
                parts.append(Part(extension, header.offset_data, header.size))
        with open(path, "rb") as f:
            f.seek(end)
            if f.read(2 * BLOCK) != bytes(2 * BLOCK):
                raise ValueError("truncated: the two empty blocks that end a tar are missing")
    except tarfile.TarError as error:
        raise ValueError(f"not a readable tar: {error}") from error
    if parts:
        yield Member(key, tuple(parts))


def write_index(tar: Path, members: Sequence[Member] | None = None) -> Path:
    """Write DALI's index of a shard beside it, atomically.

    Args:
        tar: The shard.
        members: Its samples; read from the shard by default.

    Returns:
        The index, `<shard>.idx`.
    """
    found = list(read_members(tar)) if members is None else members
    lines = [f"{INDEX_VERSION} {len(found)}"]
    lines += [" ".join(f"{p.extension} {p.offset} {p.size} {m.key}.{p.extension}" for p in m.parts) for m in found]
    index = tar.with_suffix(".idx")
    write_text(index, "\n".join(lines) + "\n")
    return index


def parse_line(line: str) -> Member:
    """The sample of one line of a DALI index: `EXTENSION OFFSET SIZE KEY.EXTENSION`, once for each of its blobs.

    Raises:
        ValueError: It is no such line.
    """
    fields = line.split(" ")
    parts, keys = [], set()
    for extension, offset, size, name in zip(*(fields[i::4] for i in range(4)), strict=True):
        if extension not in EXTENSIONS or not name.endswith(f".{extension}"):
            raise ValueError(f"line {line!r}")
        parts.append(Part(extension, int(offset), int(size)))
        keys.add(name.removesuffix(f".{extension}"))
    if len(keys) != 1:
        raise ValueError(f"line {line!r}")
    return Member(keys.pop(), tuple(parts))


def read_index(index: Path) -> list[Member]:
    """Samples according to a DALI index.

    Raises:
        ValueError: The file is not such an index.
    """
    try:
        header, *lines = index.read_text(encoding="ascii").splitlines()
        version, count = header.split()
        if version != INDEX_VERSION or int(count) != len(lines):
            raise ValueError(f"header {header!r} for {len(lines)} lines")
        return [parse_line(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"not a DALI index of version {INDEX_VERSION}: {error}") from error
