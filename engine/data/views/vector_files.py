"""Embeddings made before, as inputs: files or folders of `armillary embed`, one vector a galaxy, in the order of a survey's catalogue."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from armillary.engine.data.format.survey import Survey

__all__ = ["read_vectors"]


def read_vectors(path: Path, survey: Survey) -> Tensor:
    """[N, V] float32 vectors of a file or folder by row of the catalogue, NaN where a galaxy has none.

    Args:
        path: Embeddings.
        survey: Loaded from its folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else, is not finished or damaged, or has vectors of none of the survey's galaxies.
    """
    from armillary.engine.data.format.embedding_files import EmbeddingFiles  # here: it starts threads, see `_read`

    assert survey.folder is not None, "a survey that was loaded from its folder"
    files = EmbeddingFiles.open(path)
    stamps = (files.record.stat().st_mtime_ns, (survey.folder / "catalog.parquet").stat().st_mtime_ns)
    return _read(path, survey.folder, *stamps)


@lru_cache(maxsize=4)  # checks, input spec and views of a run all ask for the same
def _read(path: Path, folder: Path, *_: int) -> Tensor:
    import pyarrow as pa  # here, since recipes import this module; it starts threads, and most runs read no vectors
    import pyarrow.compute as pc

    from armillary.engine.data.format.catalog import read_catalog
    from armillary.engine.data.format.embedding_files import EmbeddingFiles, vectors_of

    files = EmbeddingFiles.open(path)
    keys = read_catalog(folder, ["key"])["key"].cast(pa.large_string())
    place = pc.index_in(files.keys(), value_set=keys).to_pandas().to_numpy(np.float64, na_value=np.nan)
    found, at = torch.full((len(keys), files.dimensions), torch.nan), 0
    if not (place == place).any():
        raise ValueError(f"{path}: holds vectors of none of the galaxies in {folder}; make them from this survey")
    for batch in files.batches():
        rows = place[at : at + len(batch)]
        known = rows == rows
        found.numpy()[rows[known].astype(np.int64)] = vectors_of(batch)[known]
        at += len(batch)
    return found
