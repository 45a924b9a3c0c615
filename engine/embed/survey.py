"""Embedding a survey that may be larger than memory, by one process or many: read, embed, write, batch by batch."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armillary.engine.atomic_file import atomic_path
from armillary.engine.data.format.catalog import CatalogKeys
from armillary.engine.data.format.embedding_files import FILL, EmbeddingWriter
from armillary.engine.data.format.survey import Survey
from armillary.engine.embed.group import Together
from armillary.engine.embed.parts import Part, Parts
from armillary.engine.evaluate.embedding.embed import Pipeline, embedded_batches, open_batches

__all__ = ["SurveyEmbedder", "embed_to_file", "embed_to_folder"]

SAY_EVERY_S = 30.0
PROBED = 8
"""Samples that are embedded before work starts: what cannot be embedded ends there."""


@dataclass(frozen=True)
class SurveyEmbedder:
    """An encoder with the survey that it shall embed.

    Attributes:
        survey: Loaded from its folder.
        pipeline: View and encoder, with the readout wanted; None for the first of each batch.
        metadata: What the embeddings shall say of themselves.
        batch: Samples at a time.
        device: Where to run.
        precision: float32, or bfloat16 to run the encoder under autocast.
    """

    survey: Survey
    pipeline: Pipeline
    metadata: dict[str, str]
    batch: int = 256
    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32

    def open(self, split: str, places: Sequence[range]) -> Iterator[Any]:
        """Embedded batches of some places of a split, by readout; must be closed."""
        assert self.survey.folder is not None, "a survey that was loaded from its folder"
        batches = open_batches(self.survey.folder, split, self.pipeline.view, self.batch, self.device, places)
        return embedded_batches(self.pipeline, batches, precision=self.precision)

    def probe(self, split: str) -> dict[str, int]:
        """Dimensions by readout of the first samples of a split.

        Raises:
            ValueError: They cannot be embedded, or the readout does not exist.
        """
        named: dict[str, int] = {}
        with closing(self.open(split, [range(min(PROBED, self.survey.count(split)))])) as batches:  # type: ignore[type-var]
            for found in batches:
                named |= {name: vectors.shape[1] for name, (_, vectors) in found.items()}
        return named

    def chosen(self, batches: Iterable[Any], count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows and vectors of the wanted readout in the next batches that have it."""
        for named in itertools.islice(batches, count):
            name = self.pipeline.readout or next(iter(named), None)
            if name in named and len(named[name][0]):
                yield named[name]


class _Progress:
    """Says now and then how far this process is; the others are about as far."""

    def __init__(self, group: Together, samples: int) -> None:
        self._samples, self._done, self._world = samples, 0, group.me.world
        self._begin = self._said = time.monotonic()
        self._speaks = group.first

    def add(self, samples: int) -> None:
        self._done += samples
        now = time.monotonic()
        if not self._speaks or now - self._said < SAY_EVERY_S:
            return
        self._said = now
        rate = self._done / (now - self._begin)
        ahead = (self._samples - self._done) / rate / 60
        of = "" if self._world == 1 else f" of rank 0, one of {self._world}"
        print(
            f"{self._done:,} of {self._samples:,} samples{of}, {rate:,.0f} a second, {ahead:.0f} min to go", flush=True
        )


def embed_to_file(embedder: SurveyEmbedder, splits: Sequence[str], out: Path, group: Together) -> tuple[int, int]:
    """Write one Parquet file, in one process; it appears when it is whole.

    Returns:
        Rows and dimensions.

    Raises:
        ValueError: There is nothing to embed, or something cannot be embedded.
    """
    keys, progress = CatalogKeys(embedder.survey), _Progress(group, sum(map(embedder.survey.count, splits)))
    stretches = [(split, range(embedder.survey.count(split))) for split in splits]

    def pieces() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for split, places in stretches:
            with closing(embedder.open(split, [places])) as batches:  # type: ignore[type-var]
                for rows, vectors in embedder.chosen(batches, sys.maxsize):
                    yield split, rows, vectors

    found = pieces()
    first = next(found, None)
    if first is None:
        raise ValueError("nothing to embed: the split is empty, or its objects lack what the encoder reads")
    with atomic_path(out) as temporary, EmbeddingWriter(temporary, embedder.metadata) as file:
        for split, rows, vectors in itertools.chain([first], found):
            file.write(keys.take(rows), split, vectors)
            progress.add(len(rows))
    return file.rows, file.dimensions


def embed_to_folder(embedder: SurveyEmbedder, parts: Parts, width: int | None, group: Together) -> tuple[int, int]:
    """Fill a folder of parts, which rank 0 owns (`engine.exclusive`), by all processes together.

    Returns:
        Rows and dimensions.

    Raises:
        Refused: A process has found the folder to hold something else, or could not embed or write.
    """
    wrong = group.all(lambda: parts.prepare(width) if group.first else [])
    for said in wrong:
        print(f"{said}; it is made again", flush=True)
    group.all(lambda: _look_for(parts.folder))
    if not group.all(lambda: parts.finished):
        pending = group.gather(parts.pending() if group.first else [])[0]
        if group.first and len(pending) < len(parts.all):
            print(f"{parts.folder}: {len(parts.all) - len(pending)} of {len(parts.all)} parts are there", flush=True)
        mine = pending[group.me.rank :: group.me.world]
        progress = _Progress(group, sum(len(part.places) for part in mine))
        group.all(lambda: _said_at_once(lambda: _write(embedder, parts, mine, progress.add), group))
    found = group.all(lambda: parts.finish() if group.first else (0, 0))
    return found


def _look_for(folder: Path) -> None:
    if not (folder / FILL / "plan.json").is_file() and not Parts.is_finished(folder):
        raise ValueError(
            f"out: {folder} must lie where all processes see the same files, got one that finds nothing there"
        )


def _said_at_once(work: Callable[[], None], group: Together) -> None:
    """A process that fails says so when it does; the others still finish their parts."""
    try:
        work()
    except (ValueError, OSError) as error:
        if group.me.world > 1:
            print(f"rank {group.me.rank} stops: {error}", file=sys.stderr, flush=True)
        raise


def _write(embedder: SurveyEmbedder, parts: Parts, mine: Sequence[Part], add: Callable[[int], None]) -> None:
    keys = CatalogKeys(embedder.survey)
    for split, group in itertools.groupby(mine, key=lambda part: part.split):
        of_split = list(group)
        with closing(embedder.open(split, [part.places for part in of_split])) as batches:  # type: ignore[type-var]
            for part in of_split:
                found = embedder.chosen(batches, -(-len(part.places) // embedder.batch))
                rows, width = _write_part(parts.path(part), split, embedder.metadata, found, keys)
                parts.done(part, rows, width)
                add(len(part.places))


def _write_part(
    path: Path, split: str, metadata: dict[str, str], found: Iterator[tuple[np.ndarray, np.ndarray]], keys: CatalogKeys
) -> tuple[int, int]:
    first = next(found, None)
    if first is None:  # no object of this stretch has what the encoder reads
        return 0, 0
    with atomic_path(path) as temporary, EmbeddingWriter(temporary, metadata) as file:
        for rows, vectors in itertools.chain([first], found):
            file.write(keys.take(rows), split, vectors)
    return file.rows, file.dimensions
