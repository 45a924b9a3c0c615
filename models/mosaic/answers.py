"""Joint draws of what is asked, given what is shown.

Asked tokens are drawn one after the other, in the order in which quantities are named and from the first run of each to the
last; each one that is drawn is shown when the next is asked for, so that draws of all of them belong together. Entries of one
token are drawn together, as its copula says. Medians are those of a token's own distribution given what was shown, without the
other answers; of quantities with levels they are the medians of the draws.

Where held-out samples showed how often truths fell where, the distribution of each component, given what was shown, is corrected
by that: a draw x becomes Q(F(x)), with Q the corrected quantile function, which keeps the order of draws and so what belongs
together. A component of a quantity with levels is a sum of two entries, whose distribution has no closed form. It is taken from
draws of its own token alone, and the joint draws, of which there are then 32 at least, give the order (`coupled`).

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
from armillary.models.masked.recalibration import RecalibratedDensity, coupled
from armillary.models.method import Batch
from armillary.models.mosaic.layout import Layout, Span
from armillary.models.mosaic.network import Network, computed_rows
from armillary.models.quantities import Answer, Distribution

__all__ = ["ask", "component_pit", "draw_answer", "given_entries"]

SEQUENCES = 8192
"""Sequences of one pass, at most: bounds the memory."""

OWN_DRAWS = 128
"""That stand for the distribution of a component; corrections are fitted by their finest step, 1/20."""

PIT_DRAWS = 64
"""That the truth of a component is ranked among."""

LEAST_TO_ORDER = 32
"""Joint draws, where their order is all that is kept of them."""


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
    errors = batch["quantity_errors"].masked_fill(shown.isnan(), torch.nan)
    wanted = [t for name in dict.fromkeys(want) for t in _tokens(layout, name)]
    first = ask(network, shown, errors, wanted)
    ordered = any(layout.span(name).levels and name in corrections for name in want)
    made = max(draws, LEAST_TO_ORDER) if ordered else draws
    drawn = _together(network, shown, errors, batch["row"], wanted, first, made, seed)

    values, medians = {}, {}
    densities: dict[str, Distribution] = {}
    for name in dict.fromkeys(want):
        span, steps = layout.span(name), corrections.get(name)
        said = [first[t] for t in _tokens(layout, name)]
        entries = torch.cat([drawn[t] for t in _tokens(layout, name)], dim=-1)
        if span.levels:
            of_name, median = _of_levels(span, said, entries, batch["row"], seed, steps)
        else:
            own = [x.density for x in said]
            if steps is not None:
                each = steps.unflatten(0, (-1, span.width))
                own = [RecalibratedDensity(d, of_token) for d, of_token in zip(own, each, strict=True)]
                entries = _moved(entries, said, own)
            of_name = span.quantity.scaling.inverse(entries)
            median = span.quantity.scaling.inverse(torch.cat([d.median() for d in own], dim=1).to(shown))
            if span.quantity.size == 1:
                densities[name] = own[0]
        there = span.quantity.scaling.inverse(shown[:, span.entries])
        values[name] = torch.where(there.isnan()[:, None], of_name[:, :draws], there[:, None]).float()
        medians[name] = torch.where(there.isnan(), median, there).float()
    return Answer(values, medians, densities)


def _together(
    network: Network,
    shown: Tensor,
    errors: Tensor,
    row: Tensor,
    wanted: Sequence[int],
    first: Mapping[int, Said],
    draws: int,
    seed: int,
) -> dict[int, Tensor]:
    """Draws [B, S, w] of the entries of wanted tokens, each given those before it."""
    layout, drawn = network.layout, {}
    # B S sequences: all draws of the first sample, then of the second. The last token is shown to none.
    if len(wanted) > 1:
        sequences, stated = (x.repeat_interleave(draws, 0) for x in (shown, errors))
    for number, token in enumerate(wanted):
        place = _place(layout, token)
        said = first[token] if number == 0 else ask(network, sequences, stated, [token])[token]
        new = _draw(said, _normals(row, token, seed, said.loadings, draws))
        drawn[token] = new.unflatten(0, (len(shown), draws))
        if number + 1 < len(wanted):
            sequences[:, place] = _with_given(layout, token, new, shown[:, place].repeat_interleave(draws, 0))
    return drawn


def _moved(entries: Tensor, said: Sequence[Said], corrected: Sequence[Density]) -> Tensor:
    """Entries [B, S, e], where the corrected distributions have the probabilities that they had before."""
    width = entries.shape[-1] // len(said)
    parts = []
    for part, before, after in zip(entries.split(width, dim=-1), said, corrected, strict=True):
        of_entry = part.transpose(1, 2).contiguous()
        parts.append(after.quantile(before.density.cdf(of_entry)).transpose(1, 2))
    return torch.cat(parts, dim=-1)


def _of_levels(
    span: Span, said: Sequence[Said], entries: Tensor, row: Tensor, seed: int, steps: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Values [B, S, n] of joint draws of entries [B, S, e], and medians [B, n], corrected where steps [n, K + 1] say by what."""
    values = span.quantity.scaling.inverse(entries)
    if steps is None:
        return values, values.median(1).values
    joint, own = values.transpose(1, 2), _own_values(span, said, row, seed, OWN_DRAWS).transpose(1, 2)
    return coupled(joint, own, steps).transpose(1, 2), coupled(joint[..., :1], own, steps)[..., 0]


@torch.no_grad()
def component_pit(network: Network, batch: Batch, given: tuple[str, ...], want: str) -> Tensor:
    """See `Method.answer_pit`."""
    layout, span = network.layout, network.layout.span(want)
    shown = given_entries(layout, batch, given)
    errors = batch["quantity_errors"].masked_fill(shown.isnan(), torch.nan)
    of_token = ask(network, shown, errors, _tokens(layout, want))
    said = [of_token[t] for t in _tokens(layout, want)]
    true = layout.scored(batch["quantities"], shown)
    if not span.levels:
        return torch.cat([x.density.pit(span.of(true)[:, run]) for run, x in enumerate(said)], dim=1)
    values = span.quantity.scaling.inverse(true[:, span.entries])
    below = (_own_values(span, said, batch["row"], 0, PIT_DRAWS) < values[:, None]).sum(1)
    return ((below + 0.5) / (PIT_DRAWS + 1)).to(values).masked_fill(values.isnan(), torch.nan)


def _own_values(span: Span, said: Sequence[Said], row: Tensor, seed: int, draws: int) -> Tensor:
    """Values [B, draws, n] of a quantity, each token drawn by itself: other draws than those of the answer."""
    entries = []
    for run, of_token in enumerate(said):
        normal = _normals(row, span.tokens.start + run, seed, of_token.loadings, draws, stream=1)
        entries.append(_draw(of_token, normal).unflatten(0, (len(row), draws)))
    return span.quantity.scaling.inverse(torch.cat(entries, dim=-1))


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


def _normals(row: Tensor, token: int, seed: int, loadings: Tensor, draws: int, stream: int = 0) -> Tensor:
    """[B S, rank + w] standard normal numbers in float64, keyed by row, token and stream."""
    width, rank = loadings.shape[1:]
    z = normals(streams(Purpose.ANSWER, token, row.cpu().numpy(), stream), seed, draws * (rank + width)).reshape(
        -1, rank + width
    )
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
