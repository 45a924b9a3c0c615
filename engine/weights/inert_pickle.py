"""An unpickler that imports and calls nothing.

A pickle is a program. Checkpoints of training frameworks hold not only tensors but pickled settings and whole modules, and
reading them the usual way imports and calls what they name. Here the tensors are described and everything else is inert:

- Of the globals that a file may name, only those that rebuild tensors and ordered dictionaries mean anything, and what they
  give are this module's own records. Every other name becomes an empty class, made on the spot: nothing is ever imported,
  looked up or called by a name from the file. Creating, calling, filling or restoring one leaves nothing behind.
- A name that has no business in a checkpoint (`os.system`, `builtins.eval`, ...) is refused, wherever it stands. Nothing
  would have come of it; but the file is not what it says it is.
"""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO

__all__ = ["Storage", "TensorRecord", "load", "origin"]

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


class _Stateless:
    """Keeps the unpickler from setting attributes, on instances and on classes."""

    __slots__ = ()

    def __setstate__(self, _state: Any) -> None: ...


class _Inert(_Stateless):
    """Stands for any class, function or object that the file names; every use of it is allowed and does nothing."""

    __slots__ = ()
    origin = "something unknown"

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __call__(self, *_args: Any, **_kwargs: Any) -> _Inert:
        return self

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _item: Any) -> None: ...

    def extend(self, _items: Any) -> None: ...

    def add(self, _item: Any) -> None: ...


class _Ordered(_Stateless, dict[Any, Any]):
    """Stands for an ordered dictionary; attributes (`_metadata` of a state dict) are not kept."""

    __slots__ = ()


class Storage(_Stateless):
    """A storage that the pickle refers to, not read yet."""

    __slots__ = ("elements", "key", "kind")

    def __init__(self, kind: str, key: str, elements: int) -> None:
        self.kind, self.key, self.elements = kind, key, elements


class TensorRecord(_Stateless):
    """Stands for `torch._utils._rebuild_tensor*`: keeps the arguments."""

    __slots__ = ("arguments",)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class _Parameter(_Stateless):
    """Stands for `torch._utils._rebuild_parameter`: the tensor in it."""

    __slots__ = ()

    def __new__(cls, data: Any = None, *_rest: Any) -> Any:
        return data


class _FromType(_Stateless):
    """Stands for `torch._tensor._rebuild_from_type_v2`, of tensors that carry attributes: the tensor."""

    __slots__ = ()

    def __new__(cls, rebuild: Any, _kind: Any, arguments: Any, *_rest: Any) -> Any:
        return rebuild(*arguments) if rebuild is TensorRecord or rebuild is _Parameter else _Inert()


_KNOWN: dict[str, type] = {
    "collections.OrderedDict": _Ordered,
    "torch._utils._rebuild_tensor": TensorRecord,
    "torch._utils._rebuild_tensor_v2": TensorRecord,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_parameter_with_state": _Parameter,
    "torch._tensor._rebuild_from_type_v2": _FromType,
}


class _Unpickler(pickle.Unpickler):
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

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", type() as kind, str(key), str(), int(elements)) if issubclass(kind, _Inert):
                return Storage(kind.origin, key, elements)
        raise ValueError(f"it refers to something other than a storage: {pid!r:.80}")


def load(file: BinaryIO) -> Any:
    """Read a pickle into dictionaries, lists, plain values, `TensorRecord`s and inert objects.

    Raises:
        ValueError: It names something that checkpoints have no use for. Any other error where it is damaged.
    """
    return _Unpickler(file).load()


def origin(value: Any) -> str | None:
    """What an inert object or class stands for, as `module.name`; None for everything else."""
    return (
        value.origin if isinstance(value, _Inert) or (isinstance(value, type) and issubclass(value, _Inert)) else None
    )
