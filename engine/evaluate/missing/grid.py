"""Redshifts that methods say of test galaxies while more and more of the image is hidden, with the spectrum and without.

Shape legend: M galaxies, B of a batch, T patches, N tokens of a spectrum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from armillary.engine.evaluate.embedding.embed import first_samples, open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.study.study import Study
from armillary.models.masked.masking import token_masks
from armillary.models.method import Batch, BatchKey
from armillary.models.mmae.batch_checks import known_image, known_spectrum
from armillary.models.mmae.pairs import PairMethod

__all__ = ["BATCH", "SHARES", "Redshifts", "Shown", "masks", "pair_method", "pairs", "predict"]

SHARES = (0.0, 0.25, 0.5, 0.75)
"""Of the image's patches that are hidden."""

BATCH = 128


class Shown(NamedTuple):
    """What a method is shown: the share of the image that is hidden, and whether the whole spectrum is there or nothing of it."""

    hidden: float
    spectrum: bool

    def __str__(self) -> str:
        """As tables say it."""
        image = "image" if not self.hidden else f"image, {self.hidden:.0%} hidden"
        return f"{image} + spectrum" if self.spectrum else image


GRID = tuple(Shown(share, spectrum) for spectrum in (False, True) for share in SHARES)


@dataclass(frozen=True)
class Redshifts:
    """What a method says of M galaxies.

    Attributes:
        rows: [M] of the catalogue, ascending.
        median: [M] for each of the ways to show them: medians of p(z), or what a method without p(z) says.
        pit: [M] probability integral transform of the true redshift likewise; empty without p(z).
        crps: [M] continuous ranked probability score likewise.
    """

    rows: np.ndarray
    median: dict[Shown, np.ndarray]
    pit: dict[Shown, np.ndarray]
    crps: dict[Shown, np.ndarray]

    def at(self, rows: np.ndarray) -> Redshifts:
        """Of some of the rows only."""
        place = np.searchsorted(self.rows, rows)
        parts = [{k: v[place] for k, v in found.items()} for found in (self.median, self.pit, self.crps)]
        return Redshifts(rows, *parts)


def pair_method(encoder: Encoder) -> PairMethod:
    """The method of an encoder that `PairMethod`s are known of."""
    assert isinstance(encoder.method, PairMethod)
    return encoder.method


def pairs(encoder: Encoder, study: Study, split: str, samples: int) -> Iterator[Batch]:
    """Model inputs of the galaxies of a split that have both an image and a spectrum."""
    method = pair_method(encoder)
    device = next(method.parameters()).device
    for batch in first_samples(open_batches(study.folder, split, encoder.view, BATCH, device), samples):
        inputs = encoder.view(batch)
        both = known_image(inputs, method.inputs) & known_spectrum(inputs, method.inputs)
        kept = {k: v[both] for k, v in inputs.items() if isinstance(v, Tensor) and len(v) == len(both)}
        if bool(both.any()):
            yield Batch(**kept)  # type: ignore[typeddict-item]


def masks(method: PairMethod, row: Tensor, shown: Shown, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden patches [B, T], drawn for each galaxy by its row, and hidden tokens [B, N] of its spectrum."""
    key = BatchKey(seed=seed, epoch=0, first_position=0, global_batch=len(row))
    image = token_masks(row, key, method.cut.patches(method.inputs), (shown.hidden, shown.hidden))
    tokens = method.cut.tokens(method.inputs)
    return image, torch.full((len(row), tokens), not shown.spectrum, device=row.device)


@torch.no_grad()
def predict(encoder: Encoder, study: Study, samples: int) -> Redshifts:
    """What a method says of the test galaxies that have an image, a spectrum and a known redshift.

    Raises:
        ValueError: There are none.
    """
    method = pair_method(encoder)
    label = study.label("redshift")
    rows: list[np.ndarray] = []
    found: dict[str, dict[Shown, list[Tensor]]] = {name: {s: [] for s in GRID} for name in ("median", "pit", "crps")}
    for batch in pairs(encoder, study, study.test_split, samples):
        row = batch["row"]
        true = torch.from_numpy(label[row.cpu().numpy()]).to(row.device)
        known = true.isfinite()
        rows.append(row[known].cpu().numpy())
        for shown in GRID:
            seen = method.reconstruct(batch, *masks(method, row, shown, study.seed))
            found["median"][shown].append(seen.redshift[known])
            if seen.density is not None:
                found["pit"][shown].append(seen.density.pit(true)[known])
                found["crps"][shown].append(seen.density.crps(true)[known])
    if not sum(map(len, rows)):
        raise ValueError(
            f"split {study.test_split!r}: has no galaxy with an image, a spectrum and a known redshift; the task hides either"
        )
    at = np.concatenate(rows)
    order = np.argsort(at)
    joined = [
        {s: torch.cat(v).double().cpu().numpy()[order] for s, v in parts.items() if v} for parts in found.values()
    ]
    return Redshifts(at[order], *joined)
