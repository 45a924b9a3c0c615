"""Filling a folder of tokens: in chunks, by any number of processes, continued where it was killed. See `cache`.

FOLDER/.fill/
  plan.json              what will be in the folder
  chunk-000000 ...       CRC-32s of a finished chunk's rows

The run that fills owns the folder (see `engine.exclusive`).
A chunk's numbers reach the disk before its file of CRCs gets its name, so a fill that is killed at any moment goes on with
the chunks that have none.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from armillary.engine.atomic_file import atomic_open, write_bytes, write_json
from armillary.engine.exclusive import LOCK, InUse, exclusive
from armillary.engine.token_cache.cache import DTYPES, FORMAT, TokenCacheError, TokenLayout, refuse_difference

__all__ = ["CHUNK_BYTES", "TokenCacheFill"]

CHUNK_BYTES = 256 * 2**20
"""What is written between two marks: as much is lost when a fill is killed."""


class TokenCacheFill:
    """A folder of tokens that is being filled. One process prepares and finishes it; any number of them write.

    Args:
        folder: The folder of the cache.
        layout: What will be in it.
        made_of: What the tokens are made of, as JSON types.
    """

    def __init__(self, folder: Path, layout: TokenLayout, made_of: Mapping[str, Any]) -> None:
        self.folder, self.layout, self.made_of = folder, layout, dict(made_of)
        self.work = folder / ".fill"
        self.chunk = max(1, CHUNK_BYTES // sum(map(layout.row_bytes, layout.names)))
        self.chunks = [range(i, min(i + self.chunk, layout.samples)) for i in range(0, layout.samples, self.chunk)]

    @contextmanager
    def prepared(self, usage: Callable[[Path], Any] = shutil.disk_usage) -> Iterator[None]:
        """Make the folder or continue it, and own it.

        Args:
            usage: `shutil.disk_usage`.

        Raises:
            TokenCacheError: The folder holds something else, another run fills it (and is named), or the disk is too full.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TokenCacheError(
                f"data.token_cache: must be a folder that can be written to, got {self.folder} ({error})"
            ) from error
        with ExitStack() as owned:
            try:
                owned.enter_context(exclusive(self.folder))
            except InUse as error:
                raise TokenCacheError(f"data.token_cache: {error}") from error
            try:
                self._continue_or_begin(usage)
                yield
            finally:
                if not (self.work / "plan.json").exists():  # nothing was begun, or all is finished
                    shutil.rmtree(self.work, ignore_errors=True)

    def _continue_or_begin(self, usage: Callable[[Path], Any]) -> None:
        plan = self.work / "plan.json"
        mine = {"format": FORMAT, **self.layout.to_json(), "chunk": self.chunk, **self.made_of}
        mine = json.loads(json.dumps(mine))
        if plan.exists():
            try:
                theirs = json.loads(plan.read_text())
            except ValueError as error:
                raise TokenCacheError(
                    f"data.token_cache: {plan} is damaged ({error}); delete {self.folder} to fill it anew"
                ) from error
            refuse_difference(self.folder, theirs, mine)
        elif strangers := [p.name for p in self.folder.iterdir() if p != self.work and p.name != LOCK]:
            raise TokenCacheError(
                f"data.token_cache: must be an empty folder or a token cache, got {self.folder} with {strangers[0]}"
            )
        needed = sum(self.layout.files().values())
        there = sum(p.stat().st_blocks * 512 for p in self.folder.glob("*.bin"))
        free = int(usage(self.folder).free)
        if free < needed - there:
            gib = 2**30
            raise TokenCacheError(
                f"data.token_cache: {needed - there} bytes free ({(needed - there) / gib:.1f} GiB) for the tokens of "
                f"{self.layout.samples} samples, {needed // max(1, self.layout.samples)} bytes each as "
                f"{self.layout.dtype}, got {free / gib:.1f} GiB at {self.folder}"
            )
        if not plan.exists():
            write_json(plan, mine)
        for name, size in self.layout.files().items():
            path = self.folder / name
            if not path.exists() and len(self.pending()) == len(self.chunks):
                with atomic_open(path) as f:
                    f.truncate(size)
            if not path.is_file() or path.stat().st_size != size:
                raise TokenCacheError(
                    f"data.token_cache: {path} must have {size} bytes; delete {self.folder} to fill it anew"
                )

    def pending(self) -> list[int]:
        """Numbers of the chunks that are not finished."""
        return [n for n, chunk in enumerate(self.chunks) if not self._is_done(self._mark(n), chunk)]

    def _mark(self, number: int) -> Path:
        return self.work / f"chunk-{number:06d}"

    def _is_done(self, mark: Path, chunk: range) -> bool:
        return mark.is_file() and mark.stat().st_size == 4 * len(chunk) * len(self.layout.names)

    def write(self, number: int, parts: Iterable[tuple[int, Mapping[str, np.ndarray]]]) -> None:
        """Write one chunk and mark it finished when it is on the disk.

        Args:
            number: Which one.
            parts: (first place in the split, arrays [b, T, D] by name), together the whole chunk in order.

        Raises:
            TokenCacheError: A token is not finite or beyond the dtype, or has another shape.
        """
        chunk, names = self.chunks[number], self.layout.names
        crc = np.zeros((len(chunk), len(names)), "<u4")
        done = chunk.start
        files = {name: os.open(self.folder / f"{name}.bin", os.O_WRONLY | os.O_CLOEXEC) for name in names}
        try:
            for first, arrays in parts:
                if first != done:
                    raise TokenCacheError(f"data.token_cache: chunk {number} goes on at sample {done}, got {first}")
                for k, name in enumerate(names):
                    rows = self._stored(name, arrays, first)
                    for i, row in enumerate(rows):
                        crc[first - chunk.start + i, k] = zlib.crc32(row)
                    _write_at(files[name], rows.tobytes(), first * self.layout.row_bytes(name))
                done += len(arrays[names[0]])
            if done != chunk.stop:
                raise TokenCacheError(f"data.token_cache: chunk {number} ends at sample {chunk.stop}, got {done}")
            for file in files.values():
                os.fsync(file)
        finally:
            for file in files.values():
                os.close(file)
        write_bytes(self._mark(number), crc.tobytes())

    def _stored(self, name: str, arrays: Mapping[str, np.ndarray], first: int) -> np.ndarray:
        array, shape = arrays[name], self.layout.shapes[name]
        if array.shape[1:] != shape:
            raise TokenCacheError(f"data.token_cache: {name} must have shape {shape} a sample, got {array.shape[1:]}")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array).astype(DTYPES[self.layout.dtype])
        bad = ~np.isfinite(stored).reshape(len(stored), -1).all(1)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            largest = float(np.abs(array[i]).max())
            hint = " (choose data.token_cache_dtype float32)" if np.isfinite(largest) else ""
            raise TokenCacheError(
                f"data.token_cache: {name} must be finite and within {self.layout.dtype}, got {largest:g} in sample {first + i} of the "
                f"split{hint}"
            )
        return stored

    def finish(self) -> None:
        """Write tokens.json, once every chunk is finished."""
        if left := self.pending():
            raise TokenCacheError(
                f"data.token_cache: all chunks must be filled, got {len(left)} unfinished, first {left[0]}"
            )
        crc = b"".join(self._mark(number).read_bytes() for number in range(len(self.chunks)))
        write_bytes(self.folder / "rows.crc", crc)
        record = {"format": FORMAT, **self.layout.to_json(), "made_of": self.made_of, "crc": zlib.crc32(crc)}
        write_bytes(self.folder / "tokens.json", json.dumps(record | {"complete": True}, indent=1).encode())
        (self.work / "plan.json").unlink()


def _write_at(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
