"""Safetensors files: written in one pass that also hashes and syncs, read piecewise across several files.

A checkpoint's files hold fragments: flat pieces of named tensors, each file with a table of where its pieces belong. A
portable export is one such file in which every piece is whole. `Archive` reads both alike, which is all that moving to
another number of ranks takes. Format: https://huggingface.co/docs/safetensors (header length, JSON header, bytes).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from armillary.engine.weights.verify import SEAL, UNSEALED

__all__ = ["Archive", "Entry", "Piece", "check_suffix", "state_digest", "write_tensors"]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def check_suffix(file: Path, *suffixes: str) -> None:
    """Refuse a file of weights whose name other programs would take for one of another format.

    Raises:
        ValueError: It ends in none of the suffixes.
    """
    if file.suffix not in suffixes:
        raise ValueError(f"{file}: the file's name must end in {' or '.join(suffixes)}")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: Its key in the file.
        shape: Its shape.
        dtype: Its type.
        load: Gives the tensor; called when its turn comes, so that one tensor is in memory at a time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """An entry for a tensor at hand."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_tensors(
    path: Path, entries: Iterable[Entry], metadata: Mapping[str, str], *, seal: bool = False
) -> tuple[int, str]:
    """Write a safetensors file and sync it to disk.

    Args:
        path: File to write.
        entries: Tensors, in the order of the file.
        metadata: Text by key.
        seal: Add this hash to the metadata, so that the file can be checked by itself (see `verify`).

    Returns:
        (bytes of the file, SHA-256 as hex digits, without the seal).

    Raises:
        OSError: It could not be written; the disk is full, say.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": dict(metadata) | ({SEAL: UNSEALED} if seal else {})}
    end = 0
    for entry in entries:
        begin, end = end, end + math.prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as f:
        for block in (len(text).to_bytes(8, "little"), text):
            f.write(block)
            digest.update(block)
        for entry in entries:
            tensor = entry.load().detach()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(f"{path}: {entry.name}: announced {entry.shape}, got {tuple(tensor.shape)}")
            data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            f.write(data)
            digest.update(data)
        size = f.tell()
        if seal:
            key = f'"{SEAL}": "'.encode()
            f.seek(8 + text.index(key) + len(key))
            f.write(digest.hexdigest().encode())
        f.flush()
        os.fsync(f.fileno())
    return size, digest.hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 of tensors, by name, type, shape and value."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Piece:
    """Where a stored flat tensor belongs: elements [start, start + length) of a tensor of this shape.

    Attributes:
        file: Index of the file.
        start: First element in the flattened whole.
        length: Elements.
        shape: Shape of the whole.
    """

    file: int
    start: int
    length: int
    shape: tuple[int, ...]


class Archive:
    """Named tensors that lie in pieces in one or several files.

    Args:
        files: Safetensors files whose metadata has "pieces": JSON {key: [start, shape]}; tensors outside that table
            are whole.

    Raises:
        ValueError: A file is not readable.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self._open = []
        self.metadata: list[dict[str, str]] = []
        self.pieces: dict[str, list[Piece]] = {}
        for i, path in enumerate(self.files):
            try:
                handle = safe_open(path, framework="pt")
                metadata = handle.metadata() or {}
                table = json.loads(metadata.get("pieces", "{}"))
            except (SafetensorError, OSError, ValueError) as error:
                raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
            self._open.append(handle)
            self.metadata.append(metadata)
            for key in handle.keys():
                shape = handle.get_slice(key).get_shape()
                start, whole = table.get(key, (0, shape))
                length = math.prod(shape)
                self.pieces.setdefault(key, []).append(Piece(i, start, length, tuple(whole)))

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self.pieces[key][0].shape

    def read(self, key: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a flattened tensor, gathered from the pieces that hold them.

        Raises:
            KeyError: There is no such tensor.
            ValueError: The pieces do not cover these elements.
        """
        found = []
        for piece in sorted(self.pieces[key], key=lambda p: p.start):
            low, high = max(start, piece.start), min(start + length, piece.start + piece.length)
            if low < high:
                found.append((low, high, piece))
        position, parts = start, []
        for low, high, piece in found:
            if high <= position:
                continue  # a piece that two files hold
            if low > position:
                break
            stored = self._open[piece.file].get_slice(key)
            if len(stored.get_shape()) == 1:  # of long pieces only what is asked for leaves the disk
                parts.append(stored[position - piece.start : high - piece.start])
            else:
                flat = self._open[piece.file].get_tensor(key).reshape(-1)
                parts.append(flat[position - piece.start : high - piece.start])
            position = high
        if position != start + length:
            raise ValueError(f"{self.files[0].parent}: {key}: elements from {position} on are in none of the files")
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, key: str) -> Tensor:
        """A whole tensor, in its shape."""
        shape = self.shape(key)
        return self.read(key, 0, math.prod(shape)).reshape(shape)
