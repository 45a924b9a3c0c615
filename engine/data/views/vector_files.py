"""Embeddings made before, as inputs: files of `armillary embed`, one vector a galaxy, in the order of a survey's catalogue."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from armillary.engine.data.format.survey import Survey

__all__ = ["read_vectors"]


def read_vectors(path: Path, survey: Survey) -> Tensor:
    """[N, V] float32 vectors of a file by row of the catalogue, NaN where a galaxy has none.

    Args:
        path: Parquet with columns key and vector.
        survey: Loaded from its folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else, or vectors of none of the survey's galaxies.
    """
    assert survey.folder is not None, "a survey that was loaded from its folder"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no embeddings here; make them with `armillary embed`")
    stamps = (path.stat().st_mtime_ns, (survey.folder / "catalog.parquet").stat().st_mtime_ns)
    return _read(path, survey.folder, *stamps)


@lru_cache(maxsize=4)  # checks, input spec and views of a run all ask for the same
def _read(path: Path, folder: Path, *_: int) -> Tensor:
    import pyarrow as pa  # here, since recipes import this module; it starts threads, and most runs read no vectors
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from armillary.engine.data.format.catalog import read_catalog

    try:
        table = pq.read_table(path, columns=["key", "vector"])
        column = table["vector"].combine_chunks()
        stored = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a file of `armillary embed` (key, vector): {error}") from error
    keys = read_catalog(folder, ["key"])["key"]
    place = pc.index_in(keys, value_set=table["key"].combine_chunks()).to_pandas().to_numpy()
    found = torch.full((len(keys), stored.shape[1]), torch.nan)
    known = torch.from_numpy(place == place)
    if not known.any():
        raise ValueError(f"{path}: holds vectors of none of the galaxies in {folder}; make them from this survey")
    found[known] = torch.from_numpy(stored[place[known.numpy()].astype(int)].astype("float32"))
    return found
