"""Rules that configurations of models share. A broken rule is said as `field: rule, got value`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = ["at_least", "choices", "fields_named", "fractions", "one_of", "positive", "refuse"]


def at_least(least: int, config: Any, *names: str) -> list[str]:
    """Fields that are smaller than `least`."""
    return [f"{n}: must be at least {least}, got {v}" for n in names if not (v := getattr(config, n)) >= least]


def positive(config: Any, *names: str) -> list[str]:
    """Fields that are not above 0."""
    return [f"{n}: must be positive, got {v}" for n in names if not (v := getattr(config, n)) > 0]


def fractions(config: Any, *names: str) -> list[str]:
    """Fields outside of [0, 1)."""
    return [f"{n}: must be in [0, 1), got {v}" for n in names if not 0 <= (v := getattr(config, n)) < 1]


def one_of(name: str, value: object, known: Sequence[str]) -> list[str]:
    """The broken rule of a word that is not known; empty if it is."""
    return [] if value in known else [f"{name}: must be one of {', '.join(known)}, got {value!r}"]


def choices(config: Any) -> list[str]:
    """Fields of a dataclass that are annotated as a `Literal` and hold none of its words."""
    found: list[str] = []
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            found += one_of(name, getattr(config, name), get_args(hint))
    return found


def fields_named(config: Any, wanted: str) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of all fields of a name, in a dataclass and in those that it holds."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == wanted:
            yield wanted, value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from ((f"{field.name}.{name}", found) for name, found in fields_named(value, wanted))


def refuse(kind: str, problems: Sequence[str]) -> None:
    """Raise ValueError with all broken rules, where there are any."""
    if problems:
        raise ValueError(f"{kind}: " + "; ".join(problems))
