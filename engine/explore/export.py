"""What leaves the page: a selection as CSV or FITS, and everything as the Parquet file that embedding-atlas opens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from armillary.engine.atomic_file import atomic_path
from armillary.engine.data.format.embedding_files import EmbeddingFiles
from armillary.engine.evaluate.search.index import Index
from armillary.engine.explore.objects import Objects

__all__ = ["Format", "as_csv", "as_fits", "write_atlas"]

Format = Literal["csv", "fits"]

ROWS = 4096  # written at a time
NEIGHBOURS = 10  # of each object in the file for embedding-atlas


def as_csv(table: pa.Table) -> bytes:
    """A table as CSV with a line of titles; what is unknown is empty."""
    buffer = io.BytesIO()
    pa.csv.write_csv(pa.table({name: _without_nan(table[name]) for name in table.column_names}), buffer)
    return buffer.getvalue()


def _without_nan(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return column
    values = column.to_numpy()
    return pa.chunked_array([pa.array(values, mask=np.isnan(values))])


def as_fits(table: pa.Table, about: dict[str, str]) -> bytes:
    """A table as a FITS binary table.

    Args:
        table: The rows.
        about: Meanings of columns, kept as comments of the table's header.
    """
    from astropy.io import fits

    columns = []
    for name in table.column_names:
        column = table[name]
        if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
            values = column.to_numpy()
        else:
            values = np.array([v or "" for v in column.cast(pa.string()).to_pylist()]).astype("S")
        columns.append(fits.Column(name, _code(values), array=values))
    made = fits.BinTableHDU.from_columns(columns, name="SELECTION")
    for name, meaning in about.items():
        made.header.add_comment(f"{name}: {meaning}".encode("ascii", "replace").decode())
    buffer = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), made]).writeto(buffer)
    return buffer.getvalue()


def _code(values: np.ndarray) -> str:
    """FITS's code of an array's type."""
    if values.dtype.kind == "S":
        return f"{max(1, values.dtype.itemsize)}A"
    codes = {"f4": "E", "f8": "D", "i1": "I", "u1": "B", "i2": "I", "i4": "J", "i8": "K", "u2": "J", "u4": "K"}
    return codes[values.dtype.str[1:]]


def write_atlas(path: Path, objects: Objects, files: EmbeddingFiles) -> None:
    """Write what `embedding-atlas FILE --x x --y y --neighbors neighbors` opens: a row an object, in the order of the embeddings.

    Columns are key, split, ra, dec, every label, x and y of the map, and neighbors: the rows of the most similar objects and
    their distances, one less the cosine.

    Args:
        path: The Parquet file.
        objects: The objects.
        files: Their embeddings.

    Raises:
        ValueError: The embeddings cannot be searched.
        OSError: The file cannot be written.
    """
    index = Index.read_files([files.path])
    near: Any = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])
    k = min(NEIGHBOURS, len(objects) - 1)
    with atomic_path(path) as temporary:
        writer = None
        at = 0
        for chunk in files.chunks():
            for start in range(0, len(chunk), ROWS):
                vectors = chunk[start : start + ROWS]
                rows = np.arange(at, at + len(vectors))
                at += len(vectors)
                table = objects.table(objects.number[rows]).rename_columns({"map_x": "x", "map_y": "y"})
                neighbours: list[dict[str, Any]] = [{"ids": [], "distances": []} for _ in rows]
                if k:
                    found = index.search(vectors, k, leave_out=rows)
                    pairs = zip(found.row.tolist(), (1 - found.similarity).tolist(), strict=True)
                    neighbours = [{"ids": ids, "distances": distances} for ids, distances in pairs]
                table = table.append_column("neighbors", pa.array(neighbours, near))
                writer = writer or pq.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
        if writer is not None:
            writer.close()
