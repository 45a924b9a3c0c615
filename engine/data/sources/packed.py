"""A packed survey as a source: samples are decoded one by one, to draw them, export them or pack them again."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from armillary.engine.data.format import codec
from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.shards import Member, read_index
from armillary.engine.data.format.spectra import decode_spectrum
from armillary.engine.data.format.survey import MODALITIES, Survey
from armillary.engine.data.format.vectors import decode_vectors
from armillary.engine.data.sources.source import BadSample, Rows, Sample

__all__ = ["CatalogSource", "PackedSurvey"]


class CatalogSource:
    """A `Source` of what was packed before, described by a survey's description and catalogue; the base of readers.

    Args:
        survey: The description.
        catalog: Its rows: key, split, ra, dec, source and the labels.

    Attributes:
        survey: The description.
        catalog: The rows.
    """

    def __init__(self, survey: Survey, catalog: pa.Table) -> None:
        self.survey, self.catalog = survey, catalog
        self.bands, self.pixel_scale_arcsec = survey.bands, survey.pixel_scale_arcsec
        self.unit, self.labels = survey.unit, survey.labels
        self.spectrum, self.vectors = survey.spectrum, survey.vectors
        self.lossless_step = survey.step or None  # packing again with it loses nothing
        self.sky_sigma = survey.sky_sigma or None

    def __len__(self) -> int:
        """Samples."""
        return len(self.catalog)

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions, labels and splits from the catalogue."""
        rows = self.catalog.slice(start, stop - start)
        columns: dict[str, np.ndarray | list[str]] = {}
        for name in ("ra", "dec", *self.labels):
            column = rows[name]
            columns[name] = column.to_pylist() if pa.types.is_string(column.type) else column.to_numpy()
        return Rows(rows["key"].to_pylist(), columns, rows["split"].to_pylist())

    def _row(self, index: int) -> dict[str, Any]:
        """A row of the catalogue.

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index}: this survey has {len(self)}")
        return self.catalog.slice(index, 1).to_pylist()[0]

    def _sample(self, row: dict[str, Any], **payload: Any) -> Sample:
        """A row with its image, mask, spectrum and vectors."""
        known = {name: row[name] for name in ("key", "ra", "dec", "source", "split")}
        labels = {name: row[name] for name in self.labels}
        return Sample(**known, labels=labels, **{"image": None, "valid": None} | payload)


class PackedSurvey(CatalogSource):
    """A `Source` of the samples of a packed survey, in stored order, with their splits.

    Args:
        folder: The survey's folder.
        split: Only the samples of this split.

    Raises:
        FileNotFoundError: There is no survey, or its catalogue is missing.
        ValueError: It is not readable, its catalogue is not the one it was built with, or the split has no samples.
    """

    def __init__(self, folder: Path | str, split: str | None = None) -> None:
        self.folder = Path(folder)
        survey = Survey.load(folder)
        catalog = read_catalog(survey)
        if split is not None:
            catalog = catalog.filter(pc.field("split") == split)
        if not len(catalog):
            known = ", ".join(dict.fromkeys(s.split for s in survey.shards))
            raise ValueError(f"{folder}: no samples in split {split!r}; the survey has {known or 'none'}")
        super().__init__(survey, catalog)

    def inputs(self) -> dict[str, str]:
        """Shards and catalogue with their checksums."""
        marks = {str(self.folder / shard.name): f"sha256:{shard.sha256}" for shard in self.survey.shards}
        if self.survey.catalog_sha256:
            marks[str(self.folder / "catalog.parquet")] = f"sha256:{self.survey.catalog_sha256}"
        return marks

    def read(self, index: int) -> Sample:
        """Decode one sample.

        Raises:
            BadSample: It is corrupt or missing.
            IndexError: There is no such sample.
        """
        row = self._row(index)
        path = self.folder / self.survey.shards[row["shard"]].name
        where = f"{path}: sample {row['key']!r} (row {index})"
        try:
            member = _members(path)[row["index"]]
            with open(path, "rb") as f:
                f.seek(member.offset)
                data = f.read(member.size)
        except (OSError, ValueError, IndexError) as error:
            raise BadSample(f"{where}: not readable: {error}") from error
        blobs = {p.extension: data[p.offset - member.offset :][: p.size] for p in member.parts}
        image, valid, spectrum, vectors = None, None, None, {}
        try:
            if (blob := blobs.get(MODALITIES["image"])) is not None:
                image, valid = codec.decode(blob)
            if (blob := blobs.get(MODALITIES["spectrum"])) is not None:
                spectrum = decode_spectrum(blob)
            if (blob := blobs.get(MODALITIES["vectors"])) is not None:
                values = decode_vectors(blob, self.vectors)
                ends = np.cumsum([record.size for record in self.vectors])[:-1]
                parts = zip(self.vectors, np.split(values, ends), strict=True)
                vectors = {record.name: part for record, part in parts if not np.isnan(part).all()}
        except codec.CorruptBlob as error:
            raise BadSample(f"{where}: {error}") from error
        return self._sample(row, image=image, valid=valid, spectrum=spectrum, vectors=vectors)


@lru_cache(maxsize=16)
def _members(shard: Path) -> list[Member]:
    return read_index(shard.with_suffix(".idx"))
