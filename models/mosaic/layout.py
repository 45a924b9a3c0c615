"""Where the entries, components and tokens of quantities lie: each run of a quantity's components is a token.

Shape legend: B samples, e entries and c components of all quantities, T tokens; w entries of a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.models.quantities import Quantity

__all__ = ["Layout", "Span"]


@dataclass(frozen=True)
class Span:
    """One quantity.

    Attributes:
        quantity: The quantity.
        entries: Its place among all entries.
        components: Its place among all components.
        tokens: Its place among all tokens.
    """

    quantity: Quantity
    entries: slice
    components: slice
    tokens: slice

    @property
    def width(self) -> int:
        """Entries w of a token."""
        return self.quantity.scaling.entries // self.quantity.runs

    @property
    def levels(self) -> int:
        """1 where the first entry of a token is a level, else 0."""
        return (self.quantity.scaling.entries - self.quantity.size) // self.quantity.runs

    def of(self, entries: Tensor) -> Tensor:
        """[B, runs, w] of all entries [B, e]."""
        return entries[:, self.entries].unflatten(1, (self.quantity.runs, self.width))


class Layout:
    """All quantities of a method's inputs, one behind the other.

    Attributes:
        spans: The quantities.
        entries: e.
        components: c.
        tokens: T.
    """

    def __init__(self, quantities: tuple[Quantity, ...]) -> None:
        self.spans: list[Span] = []
        self.entries = self.components = self.tokens = 0
        for quantity in quantities:
            ends = self.entries + quantity.scaling.entries, self.components + quantity.size, self.tokens + quantity.runs
            begins = self.entries, self.components, self.tokens
            self.spans.append(Span(quantity, *(slice(a, b) for a, b in zip(begins, ends, strict=True))))
            self.entries, self.components, self.tokens = ends

    def span(self, name: str) -> Span:
        """The quantity of this name."""
        return next(s for s in self.spans if s.quantity.name == name)

    def known(self, entries: Tensor) -> Tensor:
        """[B, c] bool: components that are known, of entries [B, e]."""
        parts = [~s.of(entries)[..., s.levels :].flatten(1).isnan() for s in self.spans]
        return torch.cat(parts, dim=1)

    def shown(self, entries: Tensor, hidden: Tensor) -> Tensor:
        """Entries [B, e] without hidden components [B, c]: NaN, and levels are those of the others."""
        parts = []
        for span in self.spans:
            own, lost = entries[:, span.entries], hidden[:, span.components]
            if span.levels:
                scaling = span.quantity.scaling
                parts.append(scaling(scaling.inverse(own).masked_fill(lost, torch.nan)))
            else:
                parts.append(own.masked_fill(lost, torch.nan))
        return torch.cat(parts, dim=1)

    def scored(self, entries: Tensor, shown: Tensor) -> Tensor:
        """Entries [B, e] that are to be predicted, NaN elsewhere: known components that are not shown, and their levels."""
        parts = []
        for span in self.spans:
            true, seen = span.of(entries), span.of(shown)
            hidden = seen.isnan() & ~true.isnan()
            if span.levels:
                hidden[..., 0] = hidden[..., 1:].any(-1)
            parts.append(true.masked_fill(~hidden, torch.nan).flatten(1))
        return torch.cat(parts, dim=1)

    def any_of_token(self, chosen: Tensor) -> Tensor:
        """[B, T] bool: tokens of which any entry is chosen, of [B, e] bool."""
        return torch.cat([s.of(chosen).any(-1) for s in self.spans], dim=1)

    def chosen(self, names: Iterable[str]) -> Tensor:
        """[c] bool: components of quantities, each as `name` or, from its a-th to before its b-th, `name[a:b]`.

        Raises:
            ValueError: There is no such quantity, or no such components.
        """
        found = torch.zeros(self.components, dtype=torch.bool)
        have = [s.quantity.name for s in self.spans]
        for text in names:
            match = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", text)
            if match is None or match[1] not in have:
                raise ValueError(f"{text!r}: must be one of {', '.join(have)}, or components of it as name[first:end]")
            span = self.span(match[1])
            begin, end = int(match[2] or 0), int(match[3] or span.quantity.size)
            if not begin < end <= span.quantity.size:
                raise ValueError(f"{text!r}: must be components of {span.quantity.size}, first to before end")
            found[span.components.start + begin : span.components.start + end] = True
        return found
