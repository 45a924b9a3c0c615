"""Flags that are given twice: they add up where a command says so, and are refused elsewhere; none is dropped without a word."""

from __future__ import annotations

import inspect
import typing
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import tyro

__all__ = ["refuse_repeats", "repeatable", "repeated"]


def repeatable(command: Callable[..., Any]) -> set[str]:
    """Flags of a command that may be repeated: parameters marked with `tyro.conf.UseAppendAction`."""
    marker = typing.get_args(tyro.conf.UseAppendAction[int])[1:]
    hints = typing.get_type_hints(command, include_extras=True)
    found = set()
    for name in inspect.signature(command).parameters:
        if set(marker) & set(getattr(hints.get(name), "__metadata__", ())):
            found.add(f"--{name.replace('_', '-')}")
    return found


def refuse_repeats(words: Sequence[str], allowed: Collection[str] = ()) -> None:
    """Refuse a command line in which a flag occurs twice: only its last value would count.

    Args:
        words: The command line.
        allowed: Flags that add up.

    Raises:
        ValueError: A flag occurs twice.
    """
    if twice := [name for name in repeated(words) if name not in allowed]:
        raise ValueError(f"{twice[0]} is given twice; give it once, with all its values")


def repeated(words: Sequence[str]) -> list[str]:
    """Flags that occur more than once in a command line."""
    names = [w.split("=", 1)[0].replace("_", "-") for w in words if w.startswith("--") and len(w) > 2]
    return [name for name, count in Counter(names).items() if count > 1]
