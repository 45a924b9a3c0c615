"""Embedding a survey, batch by batch, with one or several frozen encoders.

Shape legend: N samples, D embedding dimensions, B samples of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.evaluate.probes.baselines import View
from armillary.models.method import Batch

if TYPE_CHECKING:
    from armillary.engine.data.loading.batches import OnePass

__all__ = ["Pipeline", "embed", "embed_readouts", "embedded_batches", "first_samples", "open_batches"]

Encode = Callable[[Batch], Mapping[str, Tensor]]
MODALITY_KEYS = {"image": ("image", "valid", "blobs", "sizes"), "spectrum": ("spectrum", "spectrum_ivar")}
"""What a batch holds of a modality."""


class Pipeline(NamedTuple):
    """All that turns stored objects into embeddings.

    Attributes:
        view: Makes the model's inputs of what the loader reads.
        encode: Makes named embeddings of them.
        readout: Which of them to keep; None for the first.
    """

    view: View
    encode: Encode
    readout: str | None = None


@torch.no_grad()
def embed(pipelines: Mapping[str, Pipeline], batches: Iterable[Batch]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Embed batches of whole objects with several encoders in one pass over the data.

    Args:
        pipelines: Encoders by name.
        batches: Batches with `row` and what the views read: `image` and, where needed, `valid`; or `blobs` and `sizes`
            where every view decodes them itself.

    Returns:
        [N] rows of the catalogue, and by name [N, D] float32 embeddings.

    Raises:
        ValueError: There is nothing to embed, a readout does not exist, or an embedding is not a [B, D] matrix of finite
            numbers.
    """
    rows: list[np.ndarray] = []
    vectors: dict[str, list[np.ndarray]] = {name: [] for name in pipelines}
    for batch in batches:
        rows.append(batch["row"].cpu().numpy())
        for name, (view, encode, readout) in pipelines.items():
            named = encode(view(batch))
            chosen = next(iter(named)) if readout is None else readout
            if chosen not in named:
                raise ValueError(f"readout: {chosen!r} is none of this encoder's embeddings, {sorted(named)}")
            vectors[name].append(_checked(named[chosen], rows[-1], name or "encoder", chosen))
    if not rows:
        raise ValueError("nothing to embed: the split is empty")
    return np.concatenate(rows), {name: np.concatenate(v) for name, v in vectors.items()}


def embed_readouts(pipeline: Pipeline, batches: Iterable[Batch]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Embed objects of which each may lack a modality; every embedding covers the objects that have what it needs.

    Args:
        pipeline: The encoder; its `readout` names the one embedding wanted, or is None for all of them.
        batches: As for `embed`, with `has_image` and `has_spectrum` where objects lack one.

    Returns:
        By readout, [n] rows of the catalogue and [n, D] float32 embeddings; the encoder's default readout first.

    Raises:
        ValueError: There is nothing to embed, the readout does not exist, or an embedding is not a [B, D] matrix of
            finite numbers.
    """
    found: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for named in embedded_batches(pipeline, batches):
        for name, (rows, vectors) in named.items():
            kept_rows, kept = found.setdefault(name, ([], []))
            kept_rows.append(rows)
            kept.append(vectors)
    if not found:
        raise ValueError("nothing to embed: the split is empty, or its objects lack what the encoder reads")
    if pipeline.readout is not None and pipeline.readout not in found:
        raise ValueError(f"readout: {pipeline.readout!r} is none of this encoder's embeddings, {sorted(found)}")
    wanted = found if pipeline.readout is None else [pipeline.readout]
    return {name: (np.concatenate(found[name][0]), np.concatenate(found[name][1])) for name in wanted}


@torch.no_grad()
def embedded_batches(
    pipeline: Pipeline, batches: Iterable[Batch], *, precision: torch.dtype = torch.float32
) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Embed batch by batch: by readout, rows of the catalogue in rising order and their [n, D] float32 embeddings.

    Arguments and errors are those of `embed_readouts`; bfloat16 runs the encoder under autocast. A readout that no object of a
    batch allows is absent.
    """
    for batch in batches:
        found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for part in _by_modality(batch):
            rows = part["row"].cpu().numpy()
            for name, vector in _encoded(pipeline.view, pipeline.encode, part, precision).items():
                found.setdefault(name, []).append((rows, _checked(vector, rows, "encoder", name)))
        yield {name: _in_order(parts) for name, parts in found.items()}


def _in_order(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    rows, vectors = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], vectors[order]


def open_batches(
    folder: Path, split: str, view: View, batch: int, device: torch.device, parts: Iterable[range] | None = None
) -> OnePass:
    """Batches of a split, in catalogue order, with what a run's view (or a function that reads images) reads.

    Args:
        folder: The survey.
        split: The split.
        view: What will see them.
        batch: Samples at a time.
        device: Where batches are delivered.
        parts: Only these places of the split; the last batch of each may be short.
    """
    from armillary.engine.data.loading.catalog_loader import SequentialCatalogLoader
    from armillary.engine.data.loading.loader import SequentialLoader

    if not isinstance(view, EvalView):
        return SequentialLoader(folder, split=split, batch=batch, device=device, modalities=("image",), parts=parts)
    if view.modalities:
        return SequentialLoader(
            folder,
            split=split,
            batch=batch,
            device=device,
            modalities=view.modalities,
            packed=view.packed,
            parts=parts,
        )
    return SequentialCatalogLoader(folder, split=split, batch=batch, device=device, parts=parts)


def first_samples(batches: Iterable[Batch], samples: int) -> Iterable[Batch]:
    """Batches of the first samples only; the last batch is cut."""
    left = samples
    for batch in batches:
        count = len(batch["row"])
        if count > left:
            cut: dict[str, torch.Tensor] = {k: v[:left] for k, v in batch.items() if isinstance(v, torch.Tensor)}
            yield Batch(**cut)  # type: ignore[typeddict-item]
            return
        yield batch
        left -= count
        if not left:
            return


def _by_modality(batch: Batch) -> Iterator[Batch]:
    """Parts of a batch whose objects have the same modalities, without the empty tensors of what they lack."""
    flags = {m: batch.get(f"has_{m}") for m in MODALITY_KEYS}
    lacking = {m: ~f for m, f in flags.items() if isinstance(f, Tensor) and not bool(f.all())}
    if not lacking:
        yield batch
        return
    for absent in itertools.product((False, True), repeat=len(lacking)):
        chosen = torch.ones_like(batch["row"], dtype=torch.bool)
        dropped: set[str] = set()
        for (modality, lacks), is_absent in zip(lacking.items(), absent, strict=True):
            chosen &= lacks if is_absent else ~lacks
            dropped |= {*MODALITY_KEYS[modality], f"has_{modality}"} if is_absent else {f"has_{modality}"}
        if bool(chosen.any()):
            kept = {k: v[chosen] for k, v in batch.items() if k not in dropped and isinstance(v, Tensor)}
            yield Batch(**kept)  # type: ignore[typeddict-item]


def _encoded(view: View, encode: Encode, batch: Batch, precision: torch.dtype) -> Mapping[str, Tensor]:
    with torch.autocast(batch["row"].device.type, precision, enabled=precision != torch.float32):
        return encode(view(batch))


def _checked(embedding: Tensor, rows: np.ndarray, encoder: str, name: str) -> np.ndarray:
    """[B, D] float32 on the CPU."""
    vector = embedding.float().cpu().numpy()
    if vector.ndim != 2 or len(vector) != len(rows):
        raise ValueError(f"{encoder}: embedding {name!r} must be [{len(rows)}, D], got {vector.shape}")
    if not np.isfinite(vector).all():
        bad = rows[~np.isfinite(vector).all(1)]
        raise ValueError(
            f"{encoder}: embeddings {name!r} of {len(bad)} samples are not finite, first catalogue row {bad[0]}"
        )
    return vector
