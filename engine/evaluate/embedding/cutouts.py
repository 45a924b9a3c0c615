"""Single cutouts and spectra out of a packed survey, for pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from armillary.engine.data.format import codec
from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.shards import Member, Part, read_index
from armillary.engine.data.format.spectra import Spectrum, decode_spectrum
from armillary.engine.data.format.survey import MODALITIES, Survey

__all__ = ["having", "read_cutouts", "read_spectra"]


def read_cutouts(survey_dir: Path, rows: Sequence[int] | np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Read cutouts by catalogue row.

    Returns:
        For each row the image, [C, H, W] float32 in the survey's unit, masked pixels 0, and valid, [C, H, W] bool, or
        None where every pixel carries data.

    Raises:
        codec.CorruptBlob: A cutout is corrupt.
        IndexError: There is no such row.
        ValueError: An object has no image.
    """
    return [codec.decode(blob) for blob in _blobs(survey_dir, rows, "image")]


def read_spectra(survey_dir: Path, rows: Sequence[int] | np.ndarray) -> list[Spectrum]:
    """Spectra of catalogue rows, on the wavelength grid of the survey's description; raises as `read_cutouts`."""
    return [decode_spectrum(blob) for blob in _blobs(survey_dir, rows, "spectrum")]


def having(survey_dir: Path, rows: Sequence[int] | np.ndarray, modality: str) -> list[int]:
    """Those of the catalogue rows whose objects have a modality: "image", "spectrum" or "vectors"."""
    return [row for row, _, part in _parts(survey_dir, rows, modality) if part is not None]


def _blobs(survey_dir: Path, rows: Sequence[int] | np.ndarray, modality: str) -> Iterator[bytes]:
    for row, path, part in _parts(survey_dir, rows, modality):
        if part is None:
            raise ValueError(f"{survey_dir}: row {row} of catalog.parquet has no {modality}")
        with open(path, "rb") as f:
            f.seek(part.offset)
            yield f.read(part.size)


def _parts(
    survey_dir: Path, rows: Sequence[int] | np.ndarray, modality: str
) -> Iterator[tuple[int, Path, Part | None]]:
    """Each row with its shard and its blob's place there, None where it has none."""
    survey = Survey.load(survey_dir)
    table = read_catalog(survey, ["shard", "index"])
    shard, place = (table[name].to_numpy() for name in ("shard", "index"))
    indices: dict[Path, list[Member]] = {}
    for row in rows:
        path = survey_dir / survey.shards[shard[row]].name
        if path not in indices:
            indices[path] = read_index(path.with_suffix(".idx"))
        yield int(row), path, indices[path][place[row]].part(MODALITIES[modality])
