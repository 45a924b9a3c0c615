"""Options of readers from the command line: written as NAME=VALUE, and fitted to what the reader takes."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["fit_options", "parse_options"]


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options written as NAME=VALUE: numbers, tuples, True and None as in Python, everything else text.

    Raises:
        ValueError: One has another form, or is given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"option {text!r}: must be NAME=VALUE, such as radius=2.5")
        if name in options:
            raise ValueError(f"option {name!r}: given twice")
        options[name] = _literal(value)
    return options


def fit_options(reader: Callable[..., Any], options: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Options as a reader's keyword arguments, each of the type that it declares.

    One value serves where several are taken; text with commas is taken apart (`grid=linear,3600,0.8,7781`).

    Args:
        reader: A class or function; its first argument is the path.
        options: By name.
        what: What the reader is, for errors.

    Raises:
        ValueError: It has no such option, or the value is of another type.
    """
    takes = list(inspect.signature(reader).parameters)[1:]
    try:
        hints = typing.get_type_hints(reader.__init__ if isinstance(reader, type) else reader)  # type: ignore[misc]
    except NameError:
        hints = {}
    fitted = {}
    for name, value in options.items():
        if name not in takes:
            known = ", ".join(takes) or "none"
            raise ValueError(f"{name}: {what} have no such option (they have: {known}); leave it out")
        fitted[name] = _fitted(name, value, hints.get(name, Any))
    return fitted


def _fitted(name: str, value: Any, hint: Any) -> Any:
    """A value, or what was meant by it, that fits a type."""
    meanings = [value, (value,)]
    if isinstance(value, str):
        texts = [part.strip() for part in value.split(",")]
        meanings += [tuple(map(_literal, texts)), tuple(texts)]
    for meant in (*meanings, str(value)):
        if _fits(meant, hint):
            return meant
    raise ValueError(f"option {name}: must be {_words(hint)}, got {str(value) if isinstance(value, Path) else value!r}")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; types that are not known here fit."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str | Path)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if isinstance(origin, type) and issubclass(origin, Sequence):
        if not isinstance(value, tuple | list):
            return False
        if origin is tuple and inner[-1:] != (Ellipsis,):
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return all(_fits(one, inner[0]) for one in value)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _words(hint: Any) -> str:
    """A type, for who writes options."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in inner if one is not type(None)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping such as {'NAME': VALUE}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        if origin is tuple and inner[-1:] != (Ellipsis,):
            return f"({', '.join(_words(one) for one in inner)})"
        return f"one or more of {_words(inner[0])}, such as (A, B)"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a path"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
