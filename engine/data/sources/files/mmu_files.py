"""What the files of the Multimodal Universe hold (see `mmu`), and the arrays of one row, from HDF5 or Parquet alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from armillary.engine.data.sources.files.hdf5 import checked, column_names, is_text, opened
from armillary.engine.data.sources.files.nested_parquet import NestedParquet, dense, field, open_parquet

__all__ = ["hdf5_arrays", "look_into_hdf5", "look_into_parquet", "parquet_arrays", "scalars"]

WARNINGS = ("ZWARN", "ZWARNING")  # which Parquet files hold as truth values, true where there is no warning
IMAGES = ("image_array", "image_flux")  # the older name and the newer one
PARTS = {"image": ("flux", "ivar", "mask", "band", "scale"), "spectrum": ("flux", "ivar", "lambda", "mask")}


def hdf5_arrays(file: Any, row: int, has: Mapping[str, bool]) -> dict[str, Any]:
    """Image and spectrum of a row, by names such as `image_flux`; None for a part that is not stored.

    Args:
        file: The open file.
        row: Its row.
        has: Whether the survey has images ("image") and spectra ("spectrum").
    """
    arrays: dict[str, Any] = {}
    for kind in (k for k, there in has.items() if there):
        for name in (f"{kind}_{part}" for part in PARTS[kind]):
            column = next((n for n in (IMAGES if name == "image_flux" else (name,)) if n in file), None)
            arrays[name] = None if column is None else file[column][row]
    return arrays


def parquet_arrays(file: NestedParquet, row: int, has: Mapping[str, bool]) -> dict[str, Any]:
    """The same from Parquet; a row may lack its image or its spectrum altogether."""
    arrays: dict[str, Any] = {}
    for kind, stored in file.row(row, [k for k, there in has.items() if there]).items():
        if stored.null_count:
            continue
        for part in PARTS[kind]:
            values = field(stored, part)
            if values is None and (kind, part) == ("image", "flux"):
                values = field(stored, "array")
            try:
                arrays[f"{kind}_{part}"] = None if values is None else dense(values)[0]
            except ValueError as error:
                raise ValueError(f"column '{kind}.{part}': {error}") from error
    return arrays


def look_into_hdf5(path: Path) -> tuple[int, Mapping[str, str]]:
    """Rows, and each column with "text", "number", "inverted" (a flag) or, for arrays, its type and shape."""
    place = str(path)
    with opened(path) as file:
        count = checked(place, file, "object_id", "SOUiu").shape[0]
        names = column_names(place, file, count)
        columns = {c: "text" if t else "number" for c, t in names.items() if not c.startswith(("image_", "spectrum_"))}
        name = next((n for n in IMAGES if n in file), None)
        if name is not None:
            shape = checked(place, file, name, "f", None, None, None, rows=count).shape[1:]
            checked(place, file, "image_band", "SOU", shape[0], rows=count)
            columns["image"] = str(shape)
            if "image_ivar" in file:
                checked(place, file, "image_ivar", "f", *shape, rows=count)
            if "image_mask" in file:
                per_band = file["image_mask"].ndim == 4
                checked(place, file, "image_mask", "biu", *(shape if per_band else shape[1:]), rows=count)
            if "image_scale" in file:
                checked(place, file, "image_scale", "f", shape[0], rows=count)
        if "spectrum_flux" in file:
            pixels = checked(place, file, "spectrum_flux", "f", None, rows=count).shape[1]
            columns["spectrum"] = "flux, ivar, lambda"
            for part in ("ivar", "lambda"):
                checked(place, file, f"spectrum_{part}", "f", pixels, rows=count)
            if "spectrum_mask" in file:
                checked(place, file, "spectrum_mask", "biu", pixels, rows=count)
    return count, columns


def look_into_parquet(path: Path) -> tuple[int, Mapping[str, str]]:
    """The same of a Parquet file, whose arrays show their shapes only when they are read."""
    file = open_parquet(path)
    try:
        schema, count = file.schema, file.count
    finally:
        file.close()
    if "object_id" not in schema.names:
        raise ValueError(f"{path}: column 'object_id' is missing; there is {', '.join(schema.names[:12])}")
    columns = {}
    for column in schema:
        kind = column.type
        if column.name in ("image", "spectrum"):
            of = kind if pa.types.is_struct(kind) else getattr(kind, "value_type", kind)
            has = {f.name for f in of} if pa.types.is_struct(of) else set()
            needs = {"band"} if column.name == "image" else {"flux", "ivar", "lambda"}
            if missing := sorted(needs - has) + (["flux"] if not has & {"flux", "array"} else []):
                raise ValueError(
                    f"{path}: column '{column.name}.{missing[0]}' is missing; {column.name!r} is of type {kind}"
                )
            columns[column.name] = str(of)
        elif column.name.startswith("_"):
            continue  # HATS's own
        elif _is_text(kind):
            columns[column.name] = "text"
        elif column.name in WARNINGS and pa.types.is_boolean(kind):
            columns[column.name] = "inverted"
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            columns[column.name] = "text" if is_text(column.name, np.dtype(kind.to_pandas_dtype())) else "number"
    return count, columns


def scalars(column: pa.ChunkedArray) -> np.ndarray:
    """Values of a Parquet column; NaN or "" where there is none. Bytes are text in UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_text(column.type):
        texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in column.to_pylist()]
        return np.array([v or "" for v in texts], dtype=object)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    return column.to_numpy()


def _is_text(kind: pa.DataType) -> bool:
    of = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(of) for test in (*tests, pa.types.is_fixed_size_binary))
