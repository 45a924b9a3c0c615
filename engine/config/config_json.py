"""Frozen dataclasses as JSON and back, their type check, and the difference of two of them.

A run's description has to outlive its process: `to_json` keeps, beside the fields of every dataclass, the import path of
its class under "$type", so that `from_json` rebuilds the very same objects. Only classes of trusted packages are imported.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from armillary.engine.user_code import import_path, load_class

__all__ = ["differences", "from_json", "packages_of", "to_json", "type_problems"]


def to_json(value: Any) -> Any:
    """Describe a value with JSON types only.

    Args:
        value: Dataclass instance, path, mapping with string keys, sequence, or JSON scalar; nested at will.

    Raises:
        TypeError: A value of another type is in it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"$type": f"{import_path(cls.__module__)}:{cls.__qualname__}", **fields}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__}: a run's fields hold dataclasses, paths, tuples, numbers and text only")


def from_json(value: Any, where: str = "run") -> Any:
    """Rebuild what `to_json` described; lists come back as tuples.

    Args:
        value: Parsed JSON.
        where: Name of the value in messages.

    Raises:
        ValueError: A class is not of a trusted package (see `user_code.trust`), cannot be imported, is no dataclass, or its
            fields do not match.
    """
    if isinstance(value, list):
        return tuple(from_json(v, f"{where}[{i}]") for i, v in enumerate(value))
    if not isinstance(value, dict):
        return value
    if "$path" in value:
        return Path(value["$path"])
    fields = {k: from_json(v, f"{where}.{k}") for k, v in value.items() if k != "$type"}
    if "$type" not in value:
        return fields
    try:
        cls = load_class(value["$type"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{where}: {value['$type']} must be a dataclass")
    known = {f.name for f in dataclasses.fields(cls)}
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"{where}: {cls.__name__} has no field {', '.join(unknown)}; it was written by another version"
        )
    if missing := sorted(required - set(fields)):
        raise ValueError(f"{where}: {cls.__name__} needs {', '.join(missing)}, which the record lacks")
    return cls(**fields)


def packages_of(described: Any) -> tuple[str, ...]:
    """Top-level packages of all classes that a record (a result of `to_json`) names."""
    if isinstance(described, dict):
        own = (described["$type"].partition(":")[0].partition(".")[0],) if "$type" in described else ()
        nested = [packages_of(v) for v in described.values()]
    else:
        own, nested = (), [packages_of(v) for v in described] if isinstance(described, list) else []
    return tuple(dict.fromkeys([*own, *(name for names in nested for name in names)]))


def differences(old: Any, new: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields in which two records (results of `to_json`) differ, by dotted name: (old value, new value).

    A field that the old one lacks, because it was written before there was such a field, is taken to have had the class's default.
    """
    both = isinstance(old, dict) and isinstance(new, dict) and "$path" not in old
    if both and old.get("$type") == new.get("$type"):
        found: dict[str, tuple[Any, Any]] = {}
        if "$type" in old and not new.keys() <= old.keys():
            old = _defaults(old["$type"]) | old
        for key in dict.fromkeys([*old, *new]):
            name = f"{where}.{key}" if where else key
            found |= differences(old.get(key), new.get(key), name)
        return found
    return {} if old == new else {where: (_plain(old), _plain(new))}


def _defaults(kind: str) -> dict[str, Any]:
    """Default values of a class's fields as `to_json` describes them; none where the class cannot be had."""
    try:
        fields = dataclasses.fields(load_class(kind))
    except (ValueError, TypeError):
        return {}
    plain = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    return {name: to_json(value) for name, value in (plain | made).items()}


def _plain(value: Any) -> Any:
    return value["$path"] if isinstance(value, dict) and set(value) == {"$path"} else value


def type_problems(value: Any, where: str = "") -> list[str]:
    """Fields of a dataclass, nested ones included, whose value does not have the annotated type.

    Returns:
        `section.field: rule, got value`, one a broken field. Annotations that are classes (or protocols) of other
        parts are not looked into.
    """
    hints = get_type_hints(type(value))
    problems: list[str] = []
    for field in dataclasses.fields(value):
        name = f"{where}.{field.name}" if where else field.name
        item = getattr(value, field.name)
        if not _fits(item, hints[field.name]):
            problems.append(f"{name}: must be {_describe(hints[field.name])}, got {item!r}")
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            problems += type_problems(item, name)
    return problems


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_fits(v, args[0]) for v in value)
        return len(value) == len(args) and all(_fits(v, a) for v, a in zip(value, args, strict=True))
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None:
        return value is None
    if isinstance(hint, type) and Protocol not in hint.__mro__:
        return isinstance(value, hint)
    return True


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin is tuple:
        return "a tuple of " + ", ".join("..." if a is Ellipsis else _describe(a) for a in args)
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
