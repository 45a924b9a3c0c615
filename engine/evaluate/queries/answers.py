"""What a frozen method answers of a split, beside the truth.

Shape legend: M galaxies, S draws, n components of a quantity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from armillary.engine.evaluate.embedding.embed import first_samples, open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.queries.question import PIXELS, Query, parts_of
from armillary.engine.evaluate.study.study import Study
from armillary.models.method import Batch, BatchKey
from armillary.models.quantities import Quantity

__all__ = ["Answered", "Sizes", "Values", "answer_all", "joint_draws", "judged_names", "read_values"]

BATCH = 512
JOINT_DRAWS = 200


@dataclass(frozen=True)
class Sizes:
    """How much is asked.

    Attributes:
        samples: Galaxies asked for numbers, at most.
        draws: Draws of a number.
        vector_samples: Galaxies asked for vectors, at most: each token of those is a pass over all draws.
        vector_draws: Draws of a vector.
    """

    samples: int = 4000
    draws: int = 200
    vector_samples: int = 200
    vector_draws: int = 30


@dataclass(frozen=True, eq=False)
class Values:
    """Quantities of galaxies as the method is shown them: in their units, with the noise of the views.

    Attributes:
        row: [M] rows of the catalogue.
        of: [M, n] float64 by name, NaN where unknown.
    """

    row: np.ndarray
    of: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Answered:
    """Answers to one query, of galaxies of which something given and something wanted is known.

    Attributes:
        query: The query.
        quantity: What is wanted.
        row: [M] rows of the catalogue.
        truth: [M, n] float64, NaN where a component is unknown.
        median: [M, n] float64.
        draws: [M, S, n] float64.
    """

    query: Query
    quantity: Quantity
    row: np.ndarray
    truth: np.ndarray
    median: np.ndarray
    draws: np.ndarray


def judged_names(encoder: Encoder, study: Study) -> set[str]:
    """What answers can be held against: quantities of the run's views, and labels of the survey that are numbers."""
    asked = encoder.method.questions()
    assert asked is not None, "a method that answers questions"
    viewed = {q.name for q in _viewed(encoder)}
    return viewed | {q.name for q in asked.want if q.size == 1 and q.name in study.survey.labels}


def read_values(encoder: Encoder, study: Study, split: str, samples: int, repeats: int = 1) -> Values:
    """The quantities of the first galaxies of a split; the stored order is random.

    Args:
        encoder: With the views of the run.
        study: The survey.
        split: Of it.
        samples: Galaxies, at most.
        repeats: Where views draw noise anew in each epoch, the galaxies so many times over, each time with other noise: a model
            that is to stand beside the run must have seen as much of it.
    """
    quantities, reader = _viewed(encoder), encoder.view.quantities
    rows: list[np.ndarray] = []
    found: dict[str, list[np.ndarray]] = {q.name: [] for q in quantities}
    noisy = reader is not None and any(view.noise == "redrawn" for view in reader.views)
    for epoch in range(repeats if noisy else 1):
        for batch in _batches(encoder, study.folder, split, samples):
            if reader is not None and epoch:
                batch["position"] = batch["row"]
                reader.add(batch, BatchKey(study.seed, epoch, 0, len(batch["row"])))
            rows.append(batch["row"].cpu().numpy())
            for quantity, values in zip(quantities, _values(batch, quantities), strict=True):
                found[quantity.name].append(values.double().cpu().numpy())
    return Values(np.concatenate(rows), {name: np.concatenate(parts) for name, parts in found.items()})


def answer_all(
    encoder: Encoder, study: Study, queries: Sequence[Query], sizes: Sizes, seed: int
) -> tuple[list[Answered], dict[Query, str]]:
    """Answer queries of the first galaxies of the test split.

    Returns:
        The answers in the order of the queries, and why a query has none.
    """
    asked = encoder.method.questions()
    assert asked is not None, "a method that answers questions"
    viewed = _viewed(encoder)
    wanted = {q.name: q for q in asked.want}
    labels = {name: study.label(name) for name in judged_names(encoder, study) - {q.name for q in viewed}}
    parts: dict[Query, list[tuple[np.ndarray, ...]]] = {query: [] for query in queries}
    refused: dict[Query, str] = {}
    left = {query: sizes.samples if wanted[query.want].size == 1 else sizes.vector_samples for query in queries}
    for batch in _batches(encoder, study.folder, study.test_split, max(left.values(), default=0)):
        values = dict(zip((q.name for q in viewed), _values(batch, viewed), strict=True))
        for name, label in labels.items():
            values[name] = torch.from_numpy(label[batch["row"].cpu().numpy()])[:, None].to(batch["row"].device)
        for query in queries:
            if query in refused or left[query] <= 0:
                continue
            chosen = _answerable(query, batch, values, viewed)[: left[query]]
            left[query] -= len(chosen)
            if not len(chosen):
                continue
            draws = sizes.draws if wanted[query.want].size == 1 else sizes.vector_draws
            try:
                answer = encoder.method.answer(_take(batch, chosen), query.given, (query.want,), draws, seed)
            except ValueError as error:
                refused[query] = str(error)
                continue
            truth = values[query.want][chosen]
            pieces = (batch["row"][chosen], truth, answer.median[query.want], answer.draws[query.want])
            parts[query].append(tuple(p.double().cpu().numpy() for p in pieces))
    found = []
    for query, pieces_of in parts.items():
        if query in refused:
            continue
        if not pieces_of:
            refused[query] = "no galaxy has something of what is given and of what is wanted"
            continue
        whole = [np.concatenate(p) for p in zip(*pieces_of, strict=True)]
        found.append(Answered(query, wanted[query.want], whole[0].astype(np.int64), *whole[1:]))
    return found, refused


def joint_draws(
    encoder: Encoder,
    study: Study,
    rows: Sequence[int],
    given: tuple[str, ...],
    want: tuple[str, ...],
    seed: int,
) -> dict[str, np.ndarray]:
    """[M, S] joint draws of numbers for some rows of the test split, by name."""
    kept = []
    for batch in _batches(encoder, study.folder, study.test_split, 1 << 60):
        chosen = torch.isin(batch["row"], torch.tensor(list(rows), device=batch["row"].device)).nonzero()[:, 0]
        if len(chosen):
            kept.append(
                (batch["row"][chosen], encoder.method.answer(_take(batch, chosen), given, want, JOINT_DRAWS, seed))
            )
        if sum(len(row) for row, _ in kept) == len(rows):
            break
    order = np.concatenate([row.cpu().numpy() for row, _ in kept])
    place = [int(np.flatnonzero(order == row)[0]) for row in rows]
    return {name: np.concatenate([a.draws[name][..., 0].cpu().numpy() for _, a in kept])[place] for name in want}


def _viewed(encoder: Encoder) -> tuple[Quantity, ...]:
    """Quantities of the run's views."""
    return encoder.view.quantities.quantities if encoder.view.quantities is not None else ()


def _batches(encoder: Encoder, folder: Path, split: str, samples: int) -> Iterator[Batch]:
    device = next(encoder.method.parameters()).device
    batches: Iterable[Batch] = open_batches(folder, split, encoder.view, BATCH, device)
    for batch in first_samples(batches, samples):
        yield encoder.view(batch)


def _values(batch: Batch, quantities: Sequence[Quantity]) -> list[Tensor]:
    """Values [B, n] of each quantity in its unit."""
    found, begin = [], 0
    for quantity in quantities:
        end = begin + quantity.scaling.entries
        found.append(quantity.scaling.inverse(batch["quantities"][:, begin:end].double()))
        begin = end
    return found


def _answerable(query: Query, batch: Batch, values: Mapping[str, Tensor], quantities: Sequence[Quantity]) -> Tensor:
    """Places of samples of which something of each side is known."""
    known = torch.zeros_like(batch["row"], dtype=torch.bool)
    for given in query.given:
        if given in PIXELS:
            there = batch.get(f"has_{given}")
            known |= there if isinstance(there, Tensor) else torch.ones_like(known)
            continue
        quantity, part = parts_of(given, quantities)
        known |= ~values[quantity.name][:, part].isnan().all(1)
    return (known & ~values[query.want].isnan().all(1)).nonzero()[:, 0]


def _take(batch: Batch, chosen: Tensor) -> Batch:
    return Batch(**{k: v[chosen] for k, v in batch.items() if isinstance(v, Tensor)})  # type: ignore[typeddict-item]
