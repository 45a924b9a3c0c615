"""Joint draws of what is asked, given what is shown.

Asked tokens are drawn one after the other, in the order in which quantities are named and from the first run of each to the
last; each one that is drawn is shown when the next is asked for, so that draws of all of them belong together. Entries of one
token are drawn together, as its copula says. Medians are those of a token's own distribution given what was shown, without the
other answers; of quantities with levels they are the medians of the draws.

Where held-out samples showed how often truths fell where, each entry's own distribution is corrected by that: a draw x becomes
Q(F(x)), with Q the corrected quantile function, which keeps the order of draws and so what belongs together. Of quantities with
levels these are entries, levels and what is left of components, so that single components may stay somewhat off.

Parts of a wanted quantity that are given are handed back as they were given.

Shape legend: B samples, S draws, e entries of all quantities, w of a token, n components of a quantity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import ndtr

from armillary.kernels.pixels.philox import Purpose, normals, streams
from armillary.models.masked.copula import correlated
from armillary.models.masked.density import Density, whole_precision
from armillary.models.masked.recalibration import RecalibratedDensity
from armillary.models.method import Batch
from armillary.models.mosaic.layout import Layout, Span
from armillary.models.mosaic.network import Network, computed_rows
from armillary.models.quantities import Answer

__all__ = ["ask", "draw_answer", "given_entries"]

SEQUENCES = 8192
"""Sequences of one pass, at most: bounds the memory."""


def given_entries(layout: Layout, batch: Batch, given: Sequence[str]) -> Tensor:
    """Entries [B, e] of what is given, NaN elsewhere.

    Raises:
        ValueError: Nothing is given, or nothing of it is known of a sample, whose row is named.
    """
    if not given:
        raise ValueError("given: must name a quantity, got none")
    chosen = layout.chosen(given).to(batch["quantities"].device)
    shown = layout.shown(batch["quantities"], ~chosen.expand(len(batch["quantities"]), -1))
    unknown = shown.isnan().all(1)
    if bool(unknown.any()):
        raise ValueError(
            f"given: nothing of {', '.join(given)} is known of row {int(batch['row'][unknown][0])} "
            f"({int(unknown.sum())} of {len(unknown)} samples); leave them out"
        )
    return shown


class Said(NamedTuple):
    """What is said of one token.

    Attributes:
        density: [B, w] distributions of its entries.
        loadings: [B, w, rank] of their copula.
    """

    density: Density
    loadings: Tensor


@torch.no_grad()
def ask(network: Network, shown: Tensor, errors: Tensor, tokens: Sequence[int]) -> dict[int, Said]:
    """What is said of some tokens, given entries [B, e] with their errors."""
    layout = network.layout
    asked = torch.zeros(len(shown), layout.tokens, dtype=torch.bool, device=shown.device)
    asked[:, list(tokens)] = True
    parts = []
    for begin in range(0, len(shown), SEQUENCES):
        rows = slice(begin, begin + SEQUENCES)
        computed = computed_rows(layout.any_of_token(~shown[rows].isnan()), asked[rows])
        parts.append(network(shown[rows], errors[rows], asked[rows], *computed)[1:])
    said = [torch.cat(x) for x in zip(*parts, strict=True)]
    found: dict[int, Said] = {}
    for number, span in enumerate(layout.spans):
        numbers, loadings = said[number], whole_precision(said[len(layout.spans) + number])
        for token in set(tokens) & set(range(span.tokens.start, span.tokens.stop)):
            run = token - span.tokens.start
            found[token] = Said(network.head(number).density(numbers[:, run]), loadings[:, run])
    return found


@torch.no_grad()
def draw_answer(
    network: Network,
    batch: Batch,
    given: tuple[str, ...],
    want: tuple[str, ...],
    draws: int,
    seed: int,
    corrections: Mapping[str, Tensor],
) -> Answer:
    """See `Method.answer`, and `Method.correct_answers` on corrections.

    Raises:
        ValueError: A name is not known, fewer than one draw is asked for, or nothing given is known of a sample.
    """
    layout = network.layout
    names = [s.quantity.name for s in layout.spans]
    for name in want:
        if name not in names:
            raise ValueError(f"want: must be some of {', '.join(names)}, got {name!r}")
    if not want or draws < 1:
        raise ValueError(f"want, draws: must be a quantity and a draw at least, got {want} and {draws}")
    shown = given_entries(layout, batch, given)
    # Errors of what is not given are not looked at either.
    errors, size = batch["quantity_errors"].masked_fill(shown.isnan(), torch.nan), len(shown)
    wanted = [t for name in dict.fromkeys(want) for t in _tokens(layout, name)]
    first = ask(network, shown, errors, wanted)

    # B S sequences: all draws of the first sample, then of the second. The last token is shown to none.
    drawn: dict[int, Tensor] = {}
    if len(wanted) > 1:
        sequences, stated = (x.repeat_interleave(draws, 0) for x in (shown, errors))
    for number, token in enumerate(wanted):
        place = _place(layout, token)
        said = first[token] if number == 0 else ask(network, sequences, stated, [token])[token]
        new = _draw(said, _normals(batch["row"], token, seed, said.loadings, draws))
        drawn[token] = new.unflatten(0, (size, draws))
        if number + 1 < len(wanted):
            sequences[:, place] = _with_given(layout, token, new, shown[:, place].repeat_interleave(draws, 0))
    own = {token: said.density for token, said in first.items()}
    for token, density in own.items():
        span = _span(layout, token)
        if (steps := corrections.get(span.quantity.name)) is not None:
            run = token - span.tokens.start
            own[token] = corrected = RecalibratedDensity(density, steps.unflatten(0, (-1, span.width))[run])
            entries = drawn[token].transpose(1, 2).contiguous()
            drawn[token] = corrected.quantile(density.cdf(entries)).transpose(1, 2)
    return _answer(layout, want, drawn, shown, own)


def _answer(
    layout: Layout, want: tuple[str, ...], entries: Mapping[int, Tensor], shown: Tensor, own: Mapping[int, Density]
) -> Answer:
    """Values in the quantities' units, of drawn entries [B, S, w] by token."""
    values, medians = {}, {}
    for name in dict.fromkeys(want):
        span = layout.span(name)
        scaling = span.quantity.scaling
        given = scaling.inverse(shown[:, span.entries])
        drawn = scaling.inverse(torch.cat([entries[t] for t in _tokens(layout, name)], dim=-1))
        drawn = torch.where(given.isnan()[:, None], drawn, given[:, None])
        if span.levels:
            median = drawn.median(1).values
        else:
            medians_of = torch.cat([own[t].median() for t in range(span.tokens.start, span.tokens.stop)], dim=1)
            median = torch.where(given.isnan(), scaling.inverse(medians_of.to(shown)), given)
        values[name], medians[name] = drawn.float(), median.float()
    scalars = [layout.span(name) for name in dict.fromkeys(want) if layout.span(name).quantity.size == 1]
    return Answer(values, medians, {s.quantity.name: own[s.tokens.start] for s in scalars})


def _with_given(layout: Layout, token: int, new: Tensor, given: Tensor) -> Tensor:
    """Entries of a token as the next one is shown them: given components stay, and levels are those of all components."""
    span = _span(layout, token)
    if not span.levels:
        return torch.where(given.isnan(), new, given)
    run, scaling = token - span.tokens.start, span.quantity.scaling

    def values(entries: Tensor) -> Tensor:
        runs = [entries if r == run else torch.zeros_like(entries) for r in range(span.quantity.runs)]
        return scaling.inverse(torch.cat(runs, dim=1))

    drawn, there = values(new), values(given)
    merged = scaling(torch.where(there.isnan(), drawn, there))
    return merged.unflatten(1, (span.quantity.runs, -1))[:, run]


def _span(layout: Layout, token: int) -> Span:
    return next(s for s in layout.spans if s.tokens.start <= token < s.tokens.stop)


def _tokens(layout: Layout, name: str) -> range:
    span = layout.span(name)
    return range(span.tokens.start, span.tokens.stop)


def _place(layout: Layout, token: int) -> slice:
    """Entries of a token among all."""
    span = _span(layout, token)
    begin = span.entries.start + (token - span.tokens.start) * span.width
    return slice(begin, begin + span.width)


def _normals(row: Tensor, token: int, seed: int, loadings: Tensor, draws: int) -> Tensor:
    """[B S, rank + w] standard normal numbers in float64, keyed by row and token."""
    width, rank = loadings.shape[1:]
    stream = streams(Purpose.ANSWER, token, row.cpu().numpy(), 0)
    z = normals(stream, seed, draws * (rank + width)).reshape(-1, rank + width)
    return torch.from_numpy(z).to(row.device)


def _draw(said: Said, z: Tensor) -> Tensor:
    """Entries [B S, w] of normal numbers [B S, rank + w], of distributions of B samples or of B S."""
    loadings, repeats = said.loadings, len(z) // len(said.loadings)
    rank = loadings.shape[-1]
    together = correlated(loadings.repeat_interleave(repeats, 0), z[:, :rank], z[:, rank:])
    # Within what float32 tells apart from 0 and 1, where quantiles are infinite.
    probability = ndtr(together).clamp(1e-7, 1 - 1e-7).to(loadings)
    probability = probability.unflatten(0, (-1, repeats)).transpose(1, 2)  # [B, w, S], or [B S, w, 1]
    return said.density.quantile(probability).transpose(1, 2).flatten(0, 1)
