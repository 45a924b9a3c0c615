"""Embeddings of a survey: computed by a trained run, its untrained twin or a baseline, kept as Parquet.

Shape legend: N samples, D embedding dimensions, B samples of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from armillary.engine.data.augment import EvalInput
from armillary.engine.data.survey import Survey
from armillary.engine.evaluate.baselines import View
from armillary.models.method import Batch

__all__ = ["Embeddings", "Pipeline", "embed", "encoder_digest", "load_pipeline", "stack_splits"]

Encode = Callable[[Tensor], Mapping[str, Tensor]]
METADATA_KEY = b"armillary"


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
    """All that turns stored cutouts into embeddings.

    Attributes:
        view: Makes the model input of an image.
        encode: Makes named embeddings of a model input.
        readout: Which of them to keep; None for the first.
    """

    view: View
    encode: Encode
    readout: str | None = None


@torch.no_grad()
def embed(
    pipelines: Mapping[str, Pipeline], batches: Iterable[Batch], *, precision: torch.dtype = torch.float32
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Embed batches with several encoders in one pass over the data.

    Args:
        pipelines: Encoders by name.
        batches: Batches with `row`, `image` and, where needed, `valid`; or with `row`, `blobs` and `sizes` where every view
            decodes them itself (`EvalInput.decode`).
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
        device = batch["row"].device.type
        rows.append(batch["row"].cpu().numpy())
        for name, (view, encode, readout) in pipelines.items():
            with torch.autocast(device, precision, enabled=precision != torch.float32):
                named = encode(_model_input(view, batch))
            chosen = next(iter(named)) if readout is None else readout
            if chosen not in named:
                raise ValueError(f"readout: {chosen!r} is none of this encoder's embeddings, {sorted(named)}")
            vector = named[chosen].float().cpu().numpy()
            if vector.ndim != 2 or len(vector) != len(rows[-1]):
                raise ValueError(f"{name}: embedding {chosen!r} must be [{len(rows[-1])}, D], got {vector.shape}")
            if not np.isfinite(vector).all():
                bad = rows[-1][~np.isfinite(vector).all(1)]
                raise ValueError(
                    f"{name}: embeddings of {len(bad)} samples are not finite, first catalogue row {bad[0]}"
                )
            vectors[name].append(vector)
    if not rows:
        raise ValueError("nothing to embed: the split is empty")
    return np.concatenate(rows), {name: np.concatenate(v) for name, v in vectors.items()}


def _model_input(view: View, batch: Batch) -> Tensor:
    if "blobs" not in batch:
        return view(batch["image"], batch.get("valid"))
    if not isinstance(view, EvalInput):
        raise ValueError(f"batches: hold undecoded blobs, which the view {view!r} cannot read")
    return view.decode(batch["blobs"], batch["sizes"])


def encoder_digest(module: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of an encoder's parameters and buffers, by name and value."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_pipeline(
    run_dir: Path, survey: Survey, device: torch.device, *, trained: bool = True, readout: str | None = None
) -> tuple[Pipeline, dict[str, str], Any]:
    """The encoder of a run and the input it was trained on, both on `device`.

    Args:
        run_dir: The run's folder.
        survey: The survey to embed; its statistics set the stretch.
        device: Where to run.
        trained: False for the untrained twin: the same configuration, initialised anew, keyed by the run's seed.
        readout: Which of the method's embeddings; None for its default.

    Returns:
        The pipeline, the metadata that its embeddings should carry, and the run's record (`engine.run.Run`).
    """
    from armillary.engine.export import load_encoder, trained_pixels
    from armillary.engine.run import Run

    pixels = trained_pixels(run_dir)
    if problem := _mismatch(pixels, survey):
        raise ValueError(f"{survey.name}: {problem}")
    if trained:
        method, run = load_encoder(run_dir)
    else:
        run = Run.load(run_dir)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            method = run.method.build(run.views.input_spec(pixels))
    method = method.to(device).eval()
    metadata = {
        "run": run.name,
        "trained": str(trained).lower(),
        "encoder": encoder_digest(method),
        "survey": survey.name,
        "readout": readout or "default",
    }
    fitted = replace(pixels, height=survey.height, width=survey.width, codec=survey.codec)
    return Pipeline(run.views.eval_input(fitted, device), method.encode, readout), metadata, run


def _mismatch(trained: Survey, survey: Survey) -> str:
    """Why an encoder trained on one survey cannot read the pixels of another; empty if it can."""
    for name in ("bands", "unit"):
        wanted, got = getattr(trained, name), getattr(survey, name)
        if wanted != got:
            return f"{name}: the encoder was trained on {wanted}, this survey has {got}"
    scales = trained.pixel_scale_arcsec, survey.pixel_scale_arcsec
    if scales[0] and scales[1] and abs(scales[1] / scales[0] - 1) > 0.02:
        return f"pixel_scale_arcsec: the encoder was trained at {scales[0]}, this survey has {scales[1]}; resample it"
    return ""


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
