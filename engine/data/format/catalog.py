"""The catalogue of a packed survey, read and compared with the checksum in survey.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from armillary.engine.data.format.survey import Survey
from armillary.models.file_hash import sha256_of

__all__ = ["CatalogKeys", "catalog_file", "catalog_problem", "read_catalog"]

CATALOG = "catalog.parquet"


def read_catalog(survey: Survey | Path | str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read catalog.parquet after a look at its checksum. Raises as `catalog_file`, and ValueError where it is not readable.

    Args:
        survey: Loaded from its folder; or the folder.
        columns: Only these.
    """
    path = catalog_file(survey)
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not readable: {error}") from error


def catalog_file(survey: Survey | Path | str) -> Path:
    """The catalogue's file, compared with its checksum, which is taken once a process for a file that does not change.

    Args:
        survey: Loaded from its folder; or the folder.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is not the one that the survey was built with.
    """
    described = survey if isinstance(survey, Survey) else Survey.load(survey)
    assert described.folder is not None, "a survey that was loaded from its folder"
    path = described.folder / CATALOG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; check the survey with `armillary data check {described.folder}`")
    if problem := catalog_problem(described):
        raise ValueError(f"{path}: {problem}")
    return path


class CatalogKeys:
    """Keys of a survey by row, for readers that go through it in order: one row group is in memory at a time.

    Args:
        survey: Loaded from its folder.

    Raises as `catalog_file`.
    """

    def __init__(self, survey: Survey) -> None:
        self._file = pq.ParquetFile(catalog_file(survey))
        groups = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        self._group, self._keys = -1, pa.chunked_array([], pa.string())

    def take(self, rows: np.ndarray) -> pa.Array:
        """Keys of [n] rising rows, n of at least 1."""
        of = np.searchsorted(self._ends, rows, side="right")
        return pa.concat_arrays([self._of_group(int(g), rows[of == g]) for g in np.unique(of)])

    def _of_group(self, group: int, rows: np.ndarray) -> pa.Array:
        if group != self._group:
            column = self._file.read_row_group(group, columns=["key"])["key"]
            self._group, self._keys = group, column.cast(pa.string())
        first = self._ends[group - 1] if group else 0
        return self._keys.take(pa.array(rows - first)).combine_chunks()


def catalog_problem(survey: Survey) -> str | None:
    """How the catalogue of a survey differs from survey.json's checksum; None if it does not, or there is none."""
    if not survey.catalog_sha256 or survey.folder is None:
        return None
    found = sha256_of(survey.folder / CATALOG)
    if found == survey.catalog_sha256:
        return None
    return (
        f"its SHA-256 is {found[:12]}..., survey.json says {survey.catalog_sha256[:12]}...: it was damaged or changed after "
        "the build; copy it again, or build a survey with the changed labels"
    )
