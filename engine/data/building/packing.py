"""Packing one shard: read its samples, check, encode and measure them, write the tar, its index and a record of it.

A record (`.build/<shard>.parquet`) holds the catalogue rows of the shard and, as JSON in its schema's metadata, the
shard's checksum, moments and skipped samples. It is written last: a shard with a record is finished.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from armillary.engine.atomic_file import atomic_open
from armillary.engine.data.building.measure import SurveyMoments, robust_sigma
from armillary.engine.data.building.shard_assignment import ShardPlan
from armillary.engine.data.format import codec
from armillary.engine.data.format.shards import ShardWriter, write_index
from armillary.engine.data.format.spectra import encode_spectrum
from armillary.engine.data.format.survey import CATALOG_COLUMNS, MODALITIES, ShardRecord, VectorRecord
from armillary.engine.data.format.vectors import encode_vectors
from armillary.engine.data.sources.source import BadSample, Sample, Source, position_problem

__all__ = ["BUILD_FOLDER", "Packed", "PackTask", "Settings", "SkyTask", "catalog_schema", "measure_sky", "pack"]

BUILD_FOLDER = ".build"  # in the survey's folder, while it is being built
METADATA = b"armillary"


@dataclass(frozen=True)
class Settings:
    """What every shard of a build shares.

    Attributes:
        shape: (C, H, W) of every image; zeros where there are no images.
        codec: "bitplane" or "float16", of images and spectra.
        step: Quantisation step per band in the flux unit; empty for float16.
        sky_sigma: Sky noise per band in the flux unit.
        label_types: "float64" or "string" by label.
        pixels: Pixels of every spectrum; 0 where there are none.
        vectors: Vectors of a sample, in stored order.
    """

    shape: tuple[int, int, int]
    codec: str
    step: tuple[float, ...]
    sky_sigma: tuple[float, ...]
    label_types: dict[str, str]
    pixels: int = 0
    vectors: tuple[VectorRecord, ...] = ()

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Settings:
        """Rebuild what `asdict` and JSON made of it."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        vectors = tuple(VectorRecord(**v | {"components": tuple(v["components"])}) for v in raw["vectors"])
        return cls(**plain | {"vectors": vectors})


@dataclass(frozen=True)
class PackTask:
    """A shard to pack.

    Attributes:
        folder: The survey's folder.
        plan: The shard.
        settings: Shared by all shards.
        on_bad: "error" or "skip".
    """

    folder: Path
    plan: ShardPlan
    settings: Settings
    on_bad: str


@dataclass(frozen=True)
class Packed:
    """What is known of a finished shard.

    Attributes:
        record: Its entry in survey.json; count 0 where all its samples were unusable and there is no tar.
        moments: JSON of its `SurveyMoments`.
        skipped: Reasons for which samples were left out.
    """

    record: ShardRecord
    moments: dict[str, Any]
    skipped: list[str]

    @staticmethod
    def path(folder: Path, name: str) -> Path:
        """Where the record of a shard is kept during a build."""
        return folder / BUILD_FOLDER / f"{name.removesuffix('.tar')}.parquet"

    @classmethod
    def load(cls, folder: Path, name: str) -> Packed | None:
        """The record of a shard, or None where the shard is not finished."""
        path = cls.path(folder, name)
        try:
            raw = json.loads((pq.read_schema(path).metadata or {})[METADATA])
        except (OSError, KeyError, ValueError):  # ValueError: a record cut short by a power failure
            return None
        packed = cls(ShardRecord(**raw["record"]), raw["moments"], raw["skipped"])
        if packed.record.count:
            tar = folder / name
            whole = tar.is_file() and tar.stat().st_size == packed.record.bytes
            if not (whole and tar.with_suffix(".idx").is_file()):
                return None
        return packed


@dataclass(frozen=True)
class SkyTask:
    """Samples whose noise is to be measured."""

    rows: np.ndarray
    on_bad: str


@dataclass(frozen=True)
class SkyNoise:
    """Noise of some samples.

    Attributes:
        sigma: [N, C] robust sigma of each usable sample.
        shape: (C, H, W) of the first usable image; None where there is none.
        label_types: "float64" or "string" by label, of the first usable sample; None where there is none.
    """

    sigma: np.ndarray
    shape: tuple[int, int, int] | None
    label_types: dict[str, str] | None


def catalog_schema(label_types: dict[str, str]) -> pa.Schema:
    """Columns of catalog.parquet."""
    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in (CATALOG_COLUMNS | label_types).items()])


def measure_sky(source: Source, task: SkyTask) -> SkyNoise:
    """Measure the noise of some samples; see `measure.robust_sigma`."""
    sigmas: list[np.ndarray] = []
    shape: tuple[int, int, int] | None = None
    types: dict[str, str] | None = None
    for row in task.rows.tolist():
        try:
            sample = source.read(row)
            _check(sample, len(source.bands), None)
        except BadSample:
            if task.on_bad == "error":
                raise
            continue
        if types is None:
            types = {k: "string" if isinstance(v, str) else "float64" for k, v in sample.labels.items()}
        if sample.image is None:
            continue
        if shape is None:
            shape = (sample.image.shape[0], sample.image.shape[1], sample.image.shape[2])
        sigmas.append(robust_sigma(sample.image, sample.valid))
    return SkyNoise(np.array(sigmas).reshape(len(sigmas), len(source.bands)), shape, types)


def pack(source: Source, task: PackTask) -> Packed:
    """Read, encode and write one shard with its index and record.

    Samples are read in the source's order, whatever the stored one: neighbours in a file are read together.

    Raises:
        BadSample: A sample is unusable and `on_bad` is "error".
        OSError: The shard cannot be written.
    """
    settings, plan = task.settings, task.plan
    moments = SurveyMoments(settings.sky_sigma, tuple(record.size for record in settings.vectors))
    packed: dict[int, tuple[Sample, dict[str, bytes]]] = {}
    skipped = []
    for place in np.argsort(plan.rows).tolist():
        try:
            sample = source.read(int(plan.rows[place]))
            blobs = _encode(sample, settings)
        except BadSample as error:
            if task.on_bad == "error":
                raise
            skipped.append(str(error))
            continue
        if sample.image is not None:
            moments.add(sample.image, sample.valid)
        moments.add_vectors([sample.vectors.get(record.name) for record in settings.vectors])
        packed[place] = (replace(sample, image=None, valid=None, spectrum=None, vectors={}), blobs)
    try:
        record, columns = _write(task, [packed[place] for place in sorted(packed)])
        result = Packed(record, moments.to_json(), sorted(skipped))
        _write_record(task, result, columns)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(task.folder / plan.name)) from error
    return result


def _check(sample: Sample, bands: int, shape: tuple[int, int, int] | None) -> None:
    """Refuse what must not enter a survey."""
    where = f"key {sample.key!r} ({sample.source})"
    if sample.image is not None:
        _check_image(where, sample.image, sample.valid, bands, shape)
    elif sample.spectrum is None and not sample.vectors:
        raise BadSample(f"{where}: holds nothing, neither image nor spectrum nor vectors")
    for axis, value in (("ra", sample.ra), ("dec", sample.dec)):
        if why := position_problem(axis, value):
            raise BadSample(f"{where}: {axis}: {why}")


def _check_image(
    where: str, image: np.ndarray, valid: np.ndarray | None, bands: int, shape: tuple[int, int, int] | None
) -> None:
    found = image.shape
    if len(found) != 3 or found[0] != bands or 0 in found or (shape is not None and found != shape):
        expected = shape if shape is not None else f"({bands}, height, width)"
        raise BadSample(f"{where}: image of {found}, the survey has {expected}")
    if valid is not None and valid.shape != found:
        raise BadSample(f"{where}: mask of {valid.shape} for an image of {found}")
    bad = ~np.isfinite(image)
    if valid is not None:
        if not valid.any():
            raise BadSample(f"{where}: no pixel carries data")
        bad &= valid
    for band in np.flatnonzero(bad.any(axis=(1, 2))).tolist():
        raise BadSample(f"{where}: band {band}: {bad[band].sum()} pixels are not finite, and not masked either")


def _encode(sample: Sample, settings: Settings) -> dict[str, bytes]:
    """The sample's blobs by extension."""
    _check(sample, settings.shape[0], settings.shape)
    for label, kind in settings.label_types.items():
        value = sample.labels.get(label)
        if value is None or isinstance(value, str) != (kind == "string"):
            raise BadSample(f"key {sample.key!r} ({sample.source}): label {label!r}: {value!r} is not of type {kind}")
    blobs: dict[str, bytes] = {}
    try:
        if sample.image is not None:
            step = settings.step if settings.codec == "bitplane" else None
            blobs[MODALITIES["image"]] = codec.encode(sample.image, step, sample.valid)
        if sample.spectrum is not None:
            if len(sample.spectrum.flux) != settings.pixels:
                raise ValueError(
                    f"the spectrum has {len(sample.spectrum.flux)} pixels, those of the survey have {settings.pixels}"
                )
            blobs[MODALITIES["spectrum"]] = encode_spectrum(sample.spectrum, settings.codec)
        if sample.vectors:
            blobs[MODALITIES["vectors"]] = encode_vectors(sample.vectors, settings.vectors)
    except ValueError as error:
        raise BadSample(f"key {sample.key!r} ({sample.source}): {error}") from error
    return blobs


def _write(task: PackTask, packed: list[tuple[Sample, dict[str, bytes]]]) -> tuple[ShardRecord, dict[str, list[Any]]]:
    """Write tar and index; return the record and the catalogue's columns (without the shard's number)."""
    name, split = task.plan.name, task.plan.split
    columns: dict[str, list[Any]] = {c: [] for c in (*CATALOG_COLUMNS, *task.settings.label_types)}
    if not packed:
        (task.folder / name).unlink(missing_ok=True)
        return ShardRecord(name, split, 0, 0, ""), columns
    with ShardWriter(task.folder / name, split) as writer:
        for index, (sample, blobs) in enumerate(packed):
            member = writer.add(sample.key, blobs)
            row = {"key": sample.key, "split": split, "shard": -1, "index": index, "offset": member.offset}
            row |= {"size": member.size, "ra": sample.ra, "dec": sample.dec, "source": sample.source}
            row |= {label: sample.labels[label] for label in task.settings.label_types}
            for column, value in row.items():
                columns[column].append(value)
    write_index(task.folder / name, writer.members)
    return writer.record, columns


def _write_record(task: PackTask, result: Packed, columns: dict[str, list[Any]]) -> None:
    raw = {"record": asdict(result.record), "moments": result.moments, "skipped": result.skipped}
    schema = catalog_schema(task.settings.label_types).with_metadata({METADATA: json.dumps(raw).encode()})
    path = Packed.path(task.folder, task.plan.name)
    with atomic_open(path) as f:
        pq.write_table(pa.table(columns, schema=schema), f)
