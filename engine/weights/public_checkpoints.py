"""State dicts out of published checkpoints, without running anything that the file brings along.

A pickle is a program. Checkpoints of training frameworks hold not only tensors but pickled settings and whole modules, and
reading them the usual way imports and calls what they name. Here the tensors are read and everything else is inert:

- Of the globals that a file may name, only those that rebuild tensors and ordered dictionaries mean anything, and what they
  give are this module's own records. Every other name becomes an empty class, made on the spot: nothing is ever imported,
  looked up or called by a name from the file. Creating, calling, filling or restoring one leaves nothing behind.
- Tensors are described while the pickle is read, and made afterwards, those of the state dict only, from bytes whose number
  is checked. They are never made by functions of torch that the file chose.
- A name that has no business in a checkpoint (`os.system`, `builtins.eval`, ...) is refused, wherever it stands. Nothing
  would have come of it; but the file is not what it says it is.

Formats: the zip files that torch.save writes (since 1.6), Lightning checkpoints among them. Older torch files are left to
torch's own reader of tensors only. Safetensors files hold no code; `TrainedEncoder` opens those itself.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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

_HOSTILE_MODULES = frozenset(
    "os posix nt sys subprocess importlib runpy pty shutil socket ctypes code codeop pickle _pickle marshal webbrowser "
    "multiprocessing asyncio threading signal atexit commands platform pip pdb bdb timeit".split()
)
_HOSTILE_BUILTINS = frozenset(
    "eval exec execfile compile open file input __import__ breakpoint exit quit globals locals vars setattr delattr "
    "memoryview apply".split()
)
_HOSTILE = frozenset(
    "io.open _io.open io.FileIO _io.FileIO codecs.open torch.load torch.hub.load numpy.load types.CodeType "
    "types.FunctionType".split()
)
"""Names with no business in a checkpoint. Whether a name is here decides what the user is told, and nothing else: those that
are not here are not run either."""


def _is_hostile(module: str, name: str) -> bool:
    if module in ("builtins", "__builtin__"):
        return name.partition(".")[0] in _HOSTILE_BUILTINS
    return module.partition(".")[0] in _HOSTILE_MODULES or f"{module}.{name}" in _HOSTILE


class _Inert:
    """Stands for any class, function or object that the file names; every use of it is allowed and does nothing.

    `__setstate__` keeps the unpickler from setting attributes by itself, on instances and on classes.
    """

    __slots__ = ()
    origin = ""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __call__(self, *_args: Any, **_kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _item: Any) -> None: ...

    def extend(self, _items: Any) -> None: ...

    def add(self, _item: Any) -> None: ...


class _Ordered(dict[Any, Any]):
    """Stands for an ordered dictionary; attributes (`_metadata` of a state dict) are not kept."""

    __slots__ = ()

    def __setstate__(self, _state: Any) -> None: ...


class _Storage:
    """A storage that the pickle refers to, not read yet."""

    __slots__ = ("elements", "key", "kind")

    def __init__(self, kind: str, key: str, elements: int) -> None:
        self.kind, self.key, self.elements = kind, key, elements

    def __setstate__(self, _state: Any) -> None: ...


class _Tensor:
    """Stands for `torch._utils._rebuild_tensor*`: keeps the arguments."""

    __slots__ = ("arguments",)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, _state: Any) -> None: ...


class _Parameter:
    """Stands for `torch._utils._rebuild_parameter`: the tensor in it."""

    __slots__ = ()

    def __new__(cls, data: Any = None, *_rest: Any) -> Any:
        return data

    def __setstate__(self, _state: Any) -> None: ...


class _FromType:
    """Stands for `torch._tensor._rebuild_from_type_v2`, of tensors that carry attributes: the tensor."""

    __slots__ = ()

    def __new__(cls, rebuild: Any, _kind: Any, arguments: Any, *_rest: Any) -> Any:
        return rebuild(*arguments) if rebuild is _Tensor or rebuild is _Parameter else _Inert()

    def __setstate__(self, _state: Any) -> None: ...


_KNOWN: dict[str, type] = {
    "collections.OrderedDict": _Ordered,
    "torch._utils._rebuild_tensor": _Tensor,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_parameter_with_state": _Parameter,
    "torch._tensor._rebuild_from_type_v2": _FromType,
}


class _Unpickler(pickle.Unpickler):
    """Reads a checkpoint's pickle into dictionaries, lists, plain values, `_Tensor` and `_Inert`."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str, /) -> type:
        origin = f"{module}.{name}"
        if _is_hostile(module, name):
            raise ValueError(f"it names {origin}, which a checkpoint has no use for (refused; nothing of it was run)")
        if origin in _KNOWN:
            return _KNOWN[origin]
        if origin not in self._classes:
            self._classes[origin] = type("Inert", (_Inert,), {"__slots__": (), "origin": origin})
        return self._classes[origin]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", type() as kind, str(key), str(), int(elements)) if issubclass(kind, _Inert):
                return _Storage(kind.origin, key, elements)
        raise ValueError(f"it refers to something other than a storage: {pid!r:.80}")


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

    def storage(self, storage: _Storage) -> Tensor:
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

    def tensor(self, described: _Tensor) -> Tensor:
        """The tensor that a record describes, inside its storage."""
        match described.arguments:
            case (_Storage() as storage, int(offset), tuple(size), tuple(stride), *_) if (
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
            content = _Unpickler(io.BytesIO(archive.bytes(archive.pickle))).load()
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
        if isinstance(value, _Inert) or (isinstance(value, type) and issubclass(value, _Inert)):
            raise ValueError(f"it is a checkpoint with pickled code (refused): {name!r:.80} is of {value.origin}")
        if not isinstance(name, str) or not isinstance(value, (_Tensor, Tensor)):
            raise ValueError(f"{name!r:.80}: must be a tensor with a name, got {_name(value)}")
    return dict(content)


def _name(value: Any) -> str:
    return value.origin if isinstance(value, _Inert) else f"a {type(value).__name__}"
