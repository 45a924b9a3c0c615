"""Checking an argument against the choices that its type names."""

from __future__ import annotations

from typing import Any, get_args

from armillary.models.rules import one_of

__all__ = ["check_choice"]


def check_choice(field: str, value: object, choices: Any) -> None:
    """Refuse a value that is none of a `Literal`'s.

    Raises:
        ValueError: It is not; the message lists the choices.
    """
    if problem := one_of(field, value, get_args(choices)):
        raise ValueError(problem[0])
