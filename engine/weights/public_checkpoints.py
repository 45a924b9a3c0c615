"""State dicts out of published checkpoints, without running anything that the file brings along.

The pickle is read by `inert_pickle`. Tensors are described while it is read, and made here afterwards, those of the state
dict only, from bytes whose number is checked. They are never made by functions of torch that the file chose.

Formats: the zip files that torch.save writes (since 1.6), Lightning checkpoints among them. Older torch files are left to
torch's own reader of tensors only. Safetensors files hold no code; `TrainedEncoder` opens those itself.
"""

from __future__ import annotations

import io
import math
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.engine.weights import inert_pickle
from armillary.engine.weights.inert_pickle import Storage, TensorRecord

__all__ = ["read_state_dict"]

WRAPPERS = ("state_dict", "teacher", "model")
"""Under what names training files keep the state dict; the first that is there counts."""

_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class _Archive:
    """The storages of a zip file."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        pickles = [name for name in file.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it must be a zip file with one data.pkl, as torch.save writes it, got {len(pickles)}")
        self._file, self.pickle = file, pickles[0]
        self._folder = self.pickle.removesuffix("data.pkl")
        self._read: dict[str, Tensor] = {}
        order = f"{self._folder}byteorder"
        stored = self.bytes(order) if order in file.namelist() else b"little"
        if stored != sys.byteorder.encode():
            raise ValueError(f"its bytes must be in {sys.byteorder}-endian order, got {bytes(stored)!r:.20}")

    def bytes(self, name: str) -> bytearray:
        """Contents of an entry. Compressed ones, which torch does not write, are refused: they may grow without end."""
        entry = self._file.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"{name}: must be an entry without compression")
        content = bytearray(entry.file_size)
        with self._file.open(entry) as opened:
            at, view = 0, memoryview(content)
            while count := opened.readinto(view[at:]):  # type: ignore[attr-defined]
                at += count
        if at != len(content):
            raise ValueError(f"{name}: must have {len(content)} bytes, got {at}")
        return content

    def storage(self, storage: Storage) -> Tensor:
        """A storage as a flat tensor; tensors that share one share it here, too."""
        if storage.kind not in _DTYPES:
            raise ValueError(f"a storage must be one of {', '.join(sorted(_DTYPES))}, got {storage.kind}")
        dtype = _DTYPES[storage.kind]
        if storage.key not in self._read:
            name = f"{self._folder}data/{storage.key}"
            if name not in self._file.NameToInfo:
                raise ValueError(f"{name}: the file refers to a storage that it does not hold")
            content = self.bytes(name)
            if len(content) != storage.elements * dtype.itemsize:
                raise ValueError(f"{name}: must have {storage.elements} numbers of {dtype}, got {len(content)} bytes")
            self._read[storage.key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        found = self._read[storage.key]
        if found.dtype != dtype or len(found) != storage.elements:
            raise ValueError(f"storage {storage.key}: is referred to as {dtype} and as {found.dtype}")
        return found

    def tensor(self, described: TensorRecord) -> Tensor:
        """The tensor that a record describes, inside its storage."""
        match described.arguments:
            case (Storage() as storage, int(offset), tuple(size), tuple(stride), *_) if (
                offset >= 0 and len(size) == len(stride) and all(type(n) is int and n >= 0 for n in (*size, *stride))
            ):
                flat = self.storage(storage)
                elements = math.prod(size)
                last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if elements else -1
                if last >= len(flat) or elements > len(flat):
                    raise ValueError(
                        f"a tensor {size} with strides {stride} at {offset} does not lie within its {len(flat)} numbers"
                    )
                return flat.as_strided(size, stride, offset)
        raise ValueError("a tensor must come with a storage, an offset, a size and strides")


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of a published checkpoint.

    Of a training file the entry "state_dict" (Lightning), "teacher" (DINOv2) or "model" is returned, the first that is
    there; everything beside it (optimizer, settings, pickled modules) is left in the file.

    Args:
        path: File written by torch.save.

    Returns:
        Names to tensors on the CPU, as the file has them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another format, names something that checkpoints do not need, or the state dict
            holds something other than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        return _read_legacy(path)
    try:
        with zipfile.ZipFile(path) as file:
            archive = _Archive(file)
            content = inert_pickle.load(io.BytesIO(archive.bytes(archive.pickle)))
            return {name: archive.tensor(value) for name, value in _tensors_only(content).items()}
    except Exception as error:  # whatever a damaged or hostile file may cause
        detail = str(error) if type(error) is ValueError else repr(error)
        raise ValueError(f"{path}: not a checkpoint that can be read: {detail}") from error


def _read_legacy(path: Path) -> dict[str, Tensor]:
    """Files older than torch 1.6, if they hold nothing but tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return _tensors_only(content)
    except Exception as error:  # a file that is no pickle at all fails in any way
        raise ValueError(
            f"{path}: neither .safetensors nor a file of torch.save (since 1.6), nor an older one that holds tensors only: "
            f"{error}"
        ) from error


def _tensors_only(content: Any) -> dict[str, Any]:
    """The state dict in a file's content; its tensors are read or described."""
    if isinstance(content, Mapping):
        content = next((content[k] for k in WRAPPERS if isinstance(content.get(k), Mapping)), content)
    if not isinstance(content, Mapping):
        raise ValueError(f"it must hold a dictionary of tensors, got {_name(content)}")
    for name, value in content.items():
        if origin := inert_pickle.origin(value):
            raise ValueError(f"it is a checkpoint with pickled code (refused): {name!r:.80} is of {origin}")
        if not isinstance(name, str) or not isinstance(value, (TensorRecord, Tensor)):
            raise ValueError(f"{name!r:.80}: must be a tensor with a name, got {_name(value)}")
    return dict(content)


def _name(value: Any) -> str:
    return inert_pickle.origin(value) or f"a {type(value).__name__}"
