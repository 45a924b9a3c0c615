"""Numbers of the catalogue as tensors of a batch: labels to predict, and columns that are inputs.

Shape legend: N rows of the catalogue, B samples of a batch, n columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armillary.engine.data.format.survey import Survey

__all__ = ["Columns", "column_problems", "known_columns", "numbers"]


def numbers(column: Any) -> np.ndarray | None:
    """[N] float64 values of a catalogue's column (a pyarrow array), NaN where unknown; None if it holds no numbers."""
    if not str(column.type).startswith(("float", "double", "int", "uint", "bool")):
        return None
    return column.to_numpy().astype(np.float64)


def column_problems(survey: Survey, field: str, names: tuple[str, ...]) -> list[str]:
    """Why columns cannot be read or standardised, as `field: rule, got value`; empty if they can.

    Args:
        survey: Loaded from its folder.
        field: Name of the recipe's field, for the message.
        names: Columns.
    """
    have = ", ".join(survey.labels) or "none"
    found = [f"{field}: must be labels of the survey ({have}), got {n!r}" for n in names if n not in survey.labels]
    if found or not names:
        return found
    if survey.folder is None:
        return [f"{field}: needs a survey's folder, got a description without one"]
    try:
        columns = Columns.read(survey, names)
    except ValueError as error:
        return [f"{field}: {error}"]
    return [
        f"{field}: must vary over the training split, got {name!r}, which is {value:g} throughout"
        for name, value, std in zip(names, columns.mean, columns.std, strict=True)
        if not std > 0
    ]


@dataclass(frozen=True)
class Columns:
    """Columns of a catalogue, standardised by the training split.

    Attributes:
        names: The columns.
        mean: Mean over the training split's known values, each in its unit.
        std: Standard deviation, likewise.
        values: [N, n] float32, (value - mean) / std, NaN where unknown.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    values: Tensor

    @classmethod
    def read(cls, survey: Survey, names: tuple[str, ...], *, split: str = "train") -> Columns:
        """Read columns of a survey that was loaded from its folder.

        Args:
            survey: The survey.
            names: Columns of numbers.
            split: Split whose values set mean and standard deviation; all samples where it is empty.

        Raises:
            ValueError: A column is text, or nothing of it is known in the split.
        """
        assert survey.folder is not None, "a survey that was loaded from its folder"
        path = survey.folder / "catalog.parquet"
        stamp = path.stat()
        return cls._read(path, names, split, stamp.st_mtime_ns, stamp.st_size)

    @classmethod
    @lru_cache(maxsize=4)  # checks, input spec and views of a run all ask for the same
    def _read(cls, path: Path, names: tuple[str, ...], split: str, *_: int) -> Columns:
        import pyarrow.compute as pc  # here, since recipes import this module and most read no columns

        from armillary.engine.data.format.catalog import read_catalog

        table: Any = read_catalog(path.parent, ["split", *dict.fromkeys(names)])
        chosen = pc.equal(table["split"], split).to_numpy()
        if not chosen.any():
            chosen[:] = True
        values = _raw(table, names)
        for place, name in enumerate(names):
            if not np.isfinite(values[chosen, place]).any():
                raise ValueError(f"column {name!r} is unknown for all {chosen.sum()} samples of split {split!r}")
        mean, std = np.nanmean(values[chosen], 0), np.nanstd(values[chosen], 0)
        scaled = (values - mean) / np.where(std > 0, std, 1.0)
        return cls(names, tuple(mean.tolist()), tuple(std.tolist()), torch.from_numpy(scaled.astype(np.float32)))

    def scaled(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Columns:
        """The same, standardised by other moments: those of the survey that an encoder was trained on."""
        own = [torch.tensor(x, dtype=torch.float64) for x in (self.mean, self.std)]
        new = [torch.tensor(x, dtype=torch.float64) for x in (mean, std)]
        own[1], new[1] = (torch.where(x > 0, x, 1.0) for x in (own[1], new[1]))
        raw = self.values.double() * own[1] + own[0]
        return Columns(self.names, mean, std, ((raw - new[0]) / new[1]).float())

    def of(self, row: Tensor) -> Tensor:
        """[B, n] float32 of catalogue rows [B], on their device."""
        return self.values[row.cpu()].to(row.device)


def known_columns(survey: Survey, names: tuple[str, ...], size: int) -> np.ndarray:
    """Columns of the catalogue as they are.

    Args:
        survey: Loaded from its folder.
        names: Columns of numbers; those that the survey does not have are unknown throughout.
        size: Columns of the result, where there are no names.

    Returns:
        [N, n] float64, NaN where unknown.

    Raises:
        ValueError: A column is text.
    """
    from armillary.engine.data.format.catalog import read_catalog

    assert survey.folder is not None, "a survey that was loaded from its folder"
    there = tuple(dict.fromkeys(n for n in names if n in survey.labels))
    table: Any = read_catalog(survey, ["split", *there])
    values = np.full((len(table), len(names) or size), np.nan)
    for place, name in enumerate(names):
        if name in there:
            values[:, place] = _raw(table, (name,))[:, 0]
    return values


def _raw(table: Any, names: tuple[str, ...]) -> np.ndarray:
    """[N, n] float64 values of a table's columns, NaN where they are not finite."""
    values = np.empty((len(table), len(names)))
    for place, name in enumerate(names):
        found = numbers(table[name])
        if found is None:
            raise ValueError(f"column {name!r} must hold numbers (classes as codes 0, 1, ...), got {table[name].type}")
        values[:, place] = np.where(np.isfinite(found), found, np.nan)
    return values
