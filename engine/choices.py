"""Checking values against the choices that their type names."""

from __future__ import annotations

from typing import Any, get_args

__all__ = ["check_choice", "choice_problem"]


def choice_problem(field: str, value: object, choices: Any) -> str | None:
    """`field: must be a, b or c, got value` for a value that is none of a `Literal`'s; None for one that is."""
    words = get_args(choices)
    if value in words:
        return None
    return f"{field}: must be {', '.join(words[:-1])} or {words[-1]}, got {value!r}"


def check_choice(field: str, value: object, choices: Any) -> None:
    """Refuse a value that is none of a `Literal`'s.

    Raises:
        ValueError: It is not; the message lists the choices.
    """
    if problem := choice_problem(field, value, choices):
        raise ValueError(problem)
