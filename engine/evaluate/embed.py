"""Embeddings of a survey: computed by a trained run, its untrained twin or a baseline, kept as Parquet.

Shape legend: N samples, D embedding dimensions, B samples of a batch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from armillary.engine.data.eval_view import EvalView
from armillary.engine.data.survey import Survey
from armillary.engine.evaluate.baselines import View
from armillary.engine.tensors import state_digest
from armillary.models.method import Batch, Method

__all__ = [
    "Embeddings",
    "Encoder",
    "Pipeline",
    "embed",
    "embed_readouts",
    "encoder_digest",
    "first_samples",
    "load_pipeline",
    "open_batches",
    "stack_splits",
]

Encode = Callable[[Batch], Mapping[str, Tensor]]
METADATA_KEY = b"armillary"
MODALITY_KEYS = {"image": ("image", "valid", "blobs", "sizes"), "spectrum": ("spectrum", "spectrum_ivar")}
"""What a batch holds of a modality."""


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N samples.

    Attributes:
        key: [N] sample keys.
        split: [N] split of each.
        vector: [N, D] float32.
        metadata: run, encoder, survey, readout and whatever else tells where they come from.
    """

    key: np.ndarray
    split: np.ndarray
    vector: np.ndarray
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the arrays against each other."""
        if self.vector.ndim != 2 or not len(self.key) == len(self.split) == len(self.vector):
            raise ValueError(
                f"embeddings: need N keys, N splits and [N, D] vectors, got {len(self.key)}, {len(self.split)} and "
                f"{self.vector.shape}"
            )
        if len(np.unique(self.key)) != len(self.key):
            raise ValueError("embeddings: keys repeat; each sample may appear once")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.key)

    def save(self, path: Path) -> None:
        """Write a Parquet file: key, split, and vector as fixed-size lists of float32."""
        values = pa.array(np.ascontiguousarray(self.vector, np.float32).reshape(-1))
        table = pa.table(
            {
                "key": pa.array(self.key, pa.string()),
                "split": pa.array(self.split, pa.string()),
                "vector": pa.FixedSizeListArray.from_arrays(values, self.vector.shape[1]),
            }
        ).replace_schema_metadata({METADATA_KEY: json.dumps(self.metadata)})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        pq.write_table(table, temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Embeddings:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds something else.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no embeddings here; make them with `armillary embed`")
        try:
            table = pq.read_table(path)
            column = table["vector"].combine_chunks()
            vector = column.flatten().to_numpy().reshape(len(table), column.type.list_size).astype(np.float32)
            key, split = (np.array(table[name].to_pylist(), dtype=object) for name in ("key", "split"))
            metadata = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
        except (pa.ArrowInvalid, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of embeddings (key, split, vector): {error}") from error
        return cls(key, split, vector, metadata)

    def aligned(self, key: np.ndarray) -> np.ndarray:
        """[len(key), D] vectors of the given samples.

        Raises:
            ValueError: Some of them have no embedding.
        """
        place = {k: i for i, k in enumerate(self.key)}
        missing = [k for k in key if k not in place]
        if missing:
            raise ValueError(
                f"embeddings: {len(missing)} of {len(key)} samples have none, e.g. {str(missing[0])!r}; were they made from "
                "this survey?"
            )
        return self.vector[[place[k] for k in key]]


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
def embed(
    pipelines: Mapping[str, Pipeline], batches: Iterable[Batch], *, precision: torch.dtype = torch.float32
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Embed batches of whole objects with several encoders in one pass over the data.

    Args:
        pipelines: Encoders by name.
        batches: Batches with `row` and what the views read: `image` and, where needed, `valid`; or `blobs` and `sizes`
            where every view decodes them itself.
        precision: float32, or bfloat16 to run the encoders under autocast.

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
            named = _encoded(view, encode, batch, precision)
            chosen = next(iter(named)) if readout is None else readout
            if chosen not in named:
                raise ValueError(f"readout: {chosen!r} is none of this encoder's embeddings, {sorted(named)}")
            vectors[name].append(_checked(named[chosen], rows[-1], name or "encoder", chosen))
    if not rows:
        raise ValueError("nothing to embed: the split is empty")
    return np.concatenate(rows), {name: np.concatenate(v) for name, v in vectors.items()}


@torch.no_grad()
def embed_readouts(
    pipeline: Pipeline, batches: Iterable[Batch], *, precision: torch.dtype = torch.float32
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Embed objects of which each may lack a modality; every embedding covers the objects that have what it needs.

    Args:
        pipeline: The encoder; its `readout` names the one embedding wanted, or is None for all of them.
        batches: As for `embed`, with `has_image` and `has_spectrum` where objects lack one.
        precision: float32, or bfloat16 to run the encoder under autocast.

    Returns:
        By readout, [n] rows of the catalogue and [n, D] float32 embeddings; the encoder's default readout first.

    Raises:
        ValueError: There is nothing to embed, the readout does not exist, or an embedding is not a [B, D] matrix of
            finite numbers.
    """
    found: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for batch in batches:
        for part in _by_modality(batch):
            rows = part["row"].cpu().numpy()
            for name, vector in _encoded(pipeline.view, pipeline.encode, part, precision).items():
                kept_rows, kept = found.setdefault(name, ([], []))
                kept_rows.append(rows)
                kept.append(_checked(vector, rows, "encoder", name))
    if not found:
        raise ValueError("nothing to embed: the split is empty, or its objects lack what the encoder reads")
    if pipeline.readout is not None and pipeline.readout not in found:
        raise ValueError(f"readout: {pipeline.readout!r} is none of this encoder's embeddings, {sorted(found)}")
    wanted = found if pipeline.readout is None else [pipeline.readout]
    return {name: (np.concatenate(found[name][0]), np.concatenate(found[name][1])) for name in wanted}


def open_batches(folder: Path, split: str, view: View, batch: int, device: torch.device) -> Iterable[Batch]:
    """Batches of a split, in catalogue order, with what a run's view reads.

    Args:
        folder: The survey.
        split: The split.
        view: An `EvalView`, or a function that reads images.
        batch: Samples a batch.
        device: Where batches are delivered.
    """
    from armillary.engine.data.loader import SequentialLoader
    from armillary.engine.data.rows import SequentialRowLoader

    if not isinstance(view, EvalView):
        return SequentialLoader(folder, split=split, batch=batch, device=device, modalities=("image",))
    if view.modalities:
        return SequentialLoader(
            folder, split=split, batch=batch, device=device, modalities=view.modalities, packed=view.packed
        )
    return SequentialRowLoader(folder, split=split, batch=batch, device=device)


def first_samples(batches: Iterable[Batch], samples: int) -> Iterable[Batch]:
    """Batches of the first samples only.

    Args:
        batches: Batches.
        samples: How many samples; the last batch is cut.
    """
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


def encoder_digest(module: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of an encoder's parameters and buffers, by name and value."""
    return state_digest(module.state_dict())


@dataclass(frozen=True)
class Encoder:
    """A run's frozen method with the views it was trained on, both on one device.

    Attributes:
        method: In evaluation mode.
        view: Makes its inputs of a survey's batches.
        metadata: What embeddings by it should say of themselves: run, encoder, survey.
        run: The run's record (`engine.run.Run`).
    """

    method: Method
    view: EvalView
    metadata: dict[str, str]
    run: Any

    @classmethod
    def load(cls, run_dir: Path, survey: Survey, device: torch.device, *, trained: bool = True) -> Encoder:
        """Load the encoder of a run to embed a survey with.

        Args:
            run_dir: The run's folder, or an encoder that was exported from it.
            survey: The survey to embed.
            device: Where to run.
            trained: False for the untrained twin: the same configuration, initialised anew, keyed by the run's seed.

        Raises:
            FileNotFoundError: There is no such run, or it has no checkpoint.
            ValueError: The survey lacks what the encoder reads, or was taken with other bands, units or wavelengths.
        """
        from armillary.engine.export import load_encoder, trained_inputs, trained_pixels
        from armillary.engine.initial import input_mismatch
        from armillary.engine.provenance import survey_fingerprint
        from armillary.engine.run import Run

        pixels, inputs = trained_pixels(run_dir), trained_inputs(run_dir)
        if trained:
            method, run = load_encoder(run_dir)
        else:
            run = Run.load(run_dir)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(run.seed)
                method = run.method.build(inputs)
        wanted = run.views.modalities
        shared = [m for m in wanted if m in survey.modalities]
        if wanted and not shared:
            has, reads = ", ".join(survey.modalities), " and ".join(wanted)
            raise ValueError(f"{survey.name}: has {has}, but {run.name} embeds {reads}")
        if problem := input_mismatch(pixels, survey, shared):
            raise ValueError(f"{survey.name}: {problem}")
        method = method.to(device).eval()
        metadata = {
            "run": run.name,
            "trained": str(trained).lower(),
            "encoder": encoder_digest(method),
            "survey": survey.name,
            "fingerprint": survey_fingerprint(survey),
        }
        fitted = replace(
            pixels,
            bands=survey.bands,
            height=survey.height,
            width=survey.width,
            codec=survey.codec,
            spectrum=survey.spectrum,
            labels=survey.labels,
            folder=survey.folder,
        )
        view = run.views.eval_view(fitted, device)
        if view.columns is not None:
            view = replace(view, columns=view.columns.scaled(inputs.column_mean, inputs.column_std))
        return cls(method, view, metadata, run)


def load_pipeline(
    run_dir: Path, survey: Survey, device: torch.device, *, trained: bool = True, readout: str | None = None
) -> tuple[Pipeline, dict[str, str], Any]:
    """`Encoder.load` as a pipeline for `embed`.

    Args:
        run_dir: The run's folder.
        survey: The survey to embed.
        device: Where to run.
        trained: False for the untrained twin.
        readout: Which of the method's embeddings; None for its default.

    Returns:
        The pipeline, the metadata that its embeddings should carry, and the run's record (`engine.run.Run`).
    """
    loaded = Encoder.load(run_dir, survey, device, trained=trained)
    metadata = loaded.metadata | {"readout": readout or "default"}
    return Pipeline(loaded.view, loaded.method.encode, readout), metadata, loaded.run


def stack_splits(
    survey_dir: Path, parts: Mapping[str, tuple[np.ndarray, np.ndarray]], metadata: dict[str, str]
) -> Embeddings:
    """Put keys to embedded rows.

    Args:
        survey_dir: The survey; its catalogue gives the keys.
        parts: By split, [n] catalogue rows and [n, D] vectors.
        metadata: What the file shall say of itself.
    """
    catalogue: Any = pq.read_table(survey_dir / "catalog.parquet", columns=["key"])["key"]
    rows = np.concatenate([rows for rows, _ in parts.values()])
    return Embeddings(
        key=np.array(catalogue.take(rows).to_pylist(), dtype=object),
        split=np.concatenate([np.full(len(rows), name, dtype=object) for name, (rows, _) in parts.items()]),
        vector=np.concatenate([vectors for _, vectors in parts.values()]),
        metadata=metadata,
    )
