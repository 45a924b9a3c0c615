"""What is searched for: the embedding of an object that is known by its key, or of a file with one object in it.

Shape legend: D embedding dimensions, C bands, H x W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armillary.engine.data.format.embedding_files import EmbeddingFiles
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.kinds import open_source
from armillary.engine.data.sources.source import Sample, Source, spectrum_of
from armillary.engine.evaluate.embedding.embed import embed_readouts
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.search.index import Index
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import Batch

__all__ = ["Query", "query_by_key", "query_from_file"]


@dataclass(frozen=True)
class Query:
    """One query.

    Attributes:
        name: Key, or name of the file.
        vector: [1, D] float32.
        own: Row in the index of the same object's embedding of the same kind, which is no answer; None where there is none.
        sample: What was in the file; None for a query by key.
        survey: The file's bands and unit, for a picture of it; None for a query by key.
    """

    name: str
    vector: np.ndarray
    own: int | None = None
    sample: Sample | None = None
    survey: Survey | None = None


def query_by_key(index: Index, key: str, files: tuple[Path, ...] = ()) -> Query:
    """Look a key up, in the index itself or in a file of embeddings of the same space.

    Args:
        index: What will be searched.
        key: Key of the object.
        files: Files or folders of embeddings to look in: the ones that were indexed, or those of another modality of the same encoder. The
            index's own vectors where none is given.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: No embedding has that key, or the file's are of another survey or encoder.
    """
    if not files:
        row = index.find(key)
        return Query(key, index.vectors([row]), row)
    for path in files:
        file = EmbeddingFiles.open(path)
        index.check(file.metadata, ("survey", "fingerprint", "encoder"))
        vector = file.vector_of(key)
        if len(vector):
            alike = file.metadata.get("readout") == index.metadata.get("readout")
            return Query(key, vector, index.find(key) if alike and key in index else None)
    raise ValueError(f"key {key!r}: has no embedding in {', '.join(map(str, files))}")


def query_from_file(
    index: Index,
    path: Path,
    run: Path,
    readout: str | None,
    device: torch.device,
    *,
    kind: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> Query:
    """Embed a file with one object by the run whose embeddings are indexed.

    Args:
        index: What will be searched.
        path: A FITS cutout, a picture, a spectrum, ...: whatever `armillary data build` reads.
        run: The run's folder.
        readout: Which of its embeddings; by default the indexed one, or else the file's modality's own.
        device: Where to run.
        kind: What the file holds, as of `open_source`.
        options: Of the kind's reader.

    Raises:
        FileNotFoundError: There is no such file or run.
        ValueError: It holds no object or several, was taken with other bands, units, pixels or wavelengths than the encoder
            was trained on, the encoder is not the indexed one, or the readout lies in another space.
    """
    trained = TrainedEncoder.open(run)
    if columns := trained.inputs.columns:
        raise ValueError(f"run: {run} reads the catalogue's {', '.join(columns)}, which a file does not have")
    sample, source = _read_one(path, kind, options or {})
    size = (0, 0) if sample.image is None else sample.image.shape[1:]
    survey = replace(
        trained.pixels,
        name=path.name,
        bands=() if sample.image is None else tuple(source.bands),
        unit=source.unit,
        pixel_scale_arcsec=source.pixel_scale_arcsec,
        height=int(size[0]),
        width=int(size[1]),
        spectrum=None if sample.spectrum is None else spectrum_of(source),
        vectors=(),
        labels={},
    )
    encoder = Encoder.load(trained, survey, device)
    index.check(encoder.metadata, ("encoder",))
    named = {
        name: vector
        for name, (_, vector) in embed_readouts(encoder.pipeline(readout), [_batch(sample, device)]).items()
    }
    indexed = index.metadata.get("readout", "default")
    known = encoder.method.readouts()
    if indexed == "default":
        indexed = next(iter(known or named))
    chosen = readout or (indexed if indexed in named else next(iter(named)))
    aligned = [name in known and known[name].aligned for name in (chosen, indexed)]
    if chosen != indexed and not all(aligned):
        raise ValueError(
            f"readout: {chosen!r} of the query and {indexed!r} of the index do not lie in one space; search an index of "
            f"{chosen!r}"
        )
    return Query(path.name, named[chosen], None, sample, survey)


def _read_one(path: Path, kind: str, options: Mapping[str, Any]) -> tuple[Sample, Source]:
    """The one object of a file, by the reader for its kind."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with tempfile.TemporaryDirectory(prefix="armillary-query-") as place:
        # Alone in a folder: some readers take folders only, and labels that lie beside the file are for others.
        (Path(place) / path.name).symlink_to(path.resolve())
        try:
            source = open_source(Path(place), kind, **options)
            if len(source) == 1:
                return source.read(0), source
        except ValueError as error:
            raise ValueError(str(error).replace(place, str(path.parent))) from error
    raise ValueError(f"{path}: holds {len(source)} objects; a query is a file with one")


def _batch(sample: Sample, device: torch.device) -> Batch:
    batch = Batch(row=torch.zeros(1, dtype=torch.int64, device=device))
    if sample.image is not None:
        batch["image"] = torch.from_numpy(sample.image)[None].to(device)
        if sample.valid is not None:
            batch["valid"] = torch.from_numpy(sample.valid)[None].to(device)
    if sample.spectrum is not None:
        batch["spectrum"] = torch.from_numpy(sample.spectrum.flux)[None].to(device)
        batch["spectrum_ivar"] = torch.from_numpy(sample.spectrum.ivar)[None].to(device)
    return batch
