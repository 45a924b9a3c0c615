"""HDF5 files of published data sets: opened, their data sets checked, and their columns as labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from armillary.engine.data.format.survey import CATALOG_COLUMNS
from armillary.engine.data.sources.files.text_tables import EXACT

__all__ = ["HDF5_SUFFIXES", "checked", "column_names", "is_text", "label_name", "open_hdf5", "opened", "plain"]

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
CHUNK_CACHE_BYTES = 64 << 20
KINDS = {"f": "floating-point", "fiu": "numeric", "iu": "whole", "SOU": "text", "SOUiu": "text or whole"}


def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file with a large chunk cache."""
    return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open an HDF5 file to look at its layout.

    Raises:
        ValueError: It is not readable (no HDF5, truncated, ...).
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:  # KeyError: a link to nowhere
        raise ValueError(f"{path}: not a readable HDF5 file: {error}") from error


def checked(place: str, group: Any, name: str, kinds: str, *shape: int | None, rows: int | None = None) -> Any:
    """A data set of a group, after a look at its type and shape.

    Args:
        place: File and group, for errors.
        group: The open group.
        name: The data set's name, with slashes for sub-groups.
        kinds: numpy's letters of the types that will do.
        shape: Sizes behind the rows; None for any.
        rows: Rows it must have; None for any number.

    Raises:
        ValueError: It is missing or another one.
    """
    if name not in group or not isinstance(group[name], h5py.Dataset):
        has = ", ".join(sorted(group)[:12]) or "nothing"
        raise ValueError(f"{place}: column {name!r} is missing; there is {has}")
    data = group[name]
    if data.dtype.kind not in kinds:
        raise ValueError(
            f"{place}: column {name!r} is of type {data.dtype}, must be {KINDS.get(kinds, f'one of {kinds}')}"
        )
    fits = len(data.shape) == len(shape) + 1
    if not fits or any(want not in (None, got) for want, got in zip(shape, data.shape[1:], strict=True)):
        wanted = " x ".join(["rows", *("any" if s is None else str(s) for s in shape)])
        raise ValueError(f"{place}: column {name!r} is {data.shape}, must be {wanted}")
    if rows is not None and data.shape[0] != rows:
        raise ValueError(f"{place}: column {name!r} has {data.shape[0]} rows, the others have {rows}")
    return data


def column_names(place: str, group: Any, rows: int, prefix: str = "") -> dict[str, bool]:
    """The data sets of a group with one value a row, by name, and whether each is text (see `is_text`).

    Raises:
        ValueError: One has another number of rows.
    """
    found = {}
    for name in sorted(group):
        data = group[name]
        if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "biufSOU" or data.ndim != 1:
            continue
        if data.shape[0] != rows:
            raise ValueError(f"{place}: column {prefix + name!r} has {data.shape[0]} rows, the others have {rows}")
        found[prefix + name] = is_text(name, data.dtype)
    return found


def is_text(name: str, dtype: np.dtype) -> bool:
    """Whether a column is read as text: text, and identifiers of 64 bits, which float64 would round."""
    return dtype.kind in "SOU" or (dtype.kind in "iu" and dtype.itemsize == 8 and name.lower().endswith("id"))


def plain(values: np.ndarray, text: bool) -> np.ndarray | list[str]:
    """A column as a label: float64, or a list of text.

    Raises:
        ValueError: Whole numbers of a column that is no text are too large for float64.
    """
    if not text:
        if (
            values.dtype.kind in "iu"
            and values.dtype.itemsize == 8
            and (np.abs(values.astype(np.float64)) > EXACT).any()
        ):
            raise ValueError(
                f"whole numbers above 2^53, such as {values.max()}, are identifiers that float64 would round"
            )
        return np.asarray(values, np.float64)
    return [v.decode("utf-8", "replace").strip() if isinstance(v, bytes) else str(v).strip() for v in values.tolist()]


def label_name(column: str) -> str:
    """The name of a column as a label: lower case, without its group, none of the catalogue's own names."""
    name = column.rsplit("/", 1)[-1].lower()
    return f"file_{name}" if name in CATALOG_COLUMNS else name
