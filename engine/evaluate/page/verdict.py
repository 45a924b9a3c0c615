"""Lines of the verdict at the head of a page, and numbers with their errors."""

from __future__ import annotations

import html

import numpy as np

__all__ = ["item", "number", "with_error"]


def item(kind: str, title: str, text: str) -> str:
    """A line of the verdict.

    Args:
        kind: "yes", "no" or "note", which sets its mark.
        title: In bold before it.
        text: The sentence.
    """
    return f'<li class="{kind}"><b>{html.escape(title)}</b><span>{html.escape(text)}</span></li>'


def number(value: float, form: str) -> str:
    """A number with a minus sign of its own width, or "undefined"."""
    return f"{value:{form}}".replace("-", "\u2212") if np.isfinite(value) else "undefined"


def with_error(value: float, error: float, form: str) -> str:
    """A number and its standard error as HTML."""
    if not np.isfinite(value):
        return '<span class="se">undefined</span>'
    spread = f' <span class="se">± {error:{form.lstrip("+")}}</span>' if np.isfinite(error) else ""
    return number(value, form) + spread
