"""What a survey holds, as numbers and as one page of figures: labels, redshifts, sky coverage, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.survey import Survey

__all__ = ["LabelSummary", "draw_statistics", "summarise_labels"]

REDSHIFTS = ("z", "redshift", "z_spec", "specz_redshift", "z_phot_median")  # in order of preference
BINS = 48
PANELS = 12  # labels drawn, at most
SKY_BINS = 2.0  # degrees


@dataclass(frozen=True)
class LabelSummary:
    """One label over a survey.

    Attributes:
        name: The label.
        meaning: Its unit or meaning.
        known: Samples that have a value.
        percentiles: 0, 5, 50, 95 and 100 % of a number; empty for text.
        most: The commonest texts with their counts; empty for numbers.
    """

    name: str
    meaning: str
    known: int
    percentiles: tuple[float, ...] = ()
    most: tuple[tuple[str, int], ...] = ()


def summarise_labels(folder: Path | str, split: str | None = None) -> list[LabelSummary]:
    """Summaries of all labels.

    Args:
        folder: The survey.
        split: Only of this split.

    Raises:
        ValueError: The split has no samples.
    """
    survey = Survey.load(folder)
    table = _catalog(folder, survey, split, list(survey.labels))
    found = []
    for name, meaning in survey.labels.items():
        column = table[name]
        if pa.types.is_string(column.type):
            texts, counts = np.unique([t for t in column.to_pylist() if t], return_counts=True)
            order = np.argsort(-counts, kind="stable")[:5]
            most = tuple((str(texts[i]), int(counts[i])) for i in order)
            found.append(LabelSummary(name, meaning, int(counts.sum()), most=most))
            continue
        values = column.to_numpy()
        values = values[np.isfinite(values)]
        percentiles = tuple(np.percentile(values, (0, 5, 50, 95, 100)).tolist()) if values.size else ()
        found.append(LabelSummary(name, meaning, values.size, percentiles))
    return found


def draw_statistics(
    folder: Path | str, out: Path | str, *, labels: Sequence[str] | None = None, split: str | None = None
) -> Path:
    """Draw redshift distribution, sky coverage and histograms of labels and vectors.

    Args:
        folder: The survey.
        out: The picture; its ending chooses the format (.png, .pdf, .svg).
        labels: Labels to draw; by default the first twelve that vary.
        split: Only of this split.

    Returns:
        `out`.

    Raises:
        ValueError: There is no such label or split.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    survey = Survey.load(folder)
    for label in labels or ():
        if label not in survey.labels:
            raise ValueError(f"labels: no {label!r}; the survey has {', '.join(survey.labels) or 'none'}")
    chosen = list(survey.labels) if labels is None else list(labels)
    table = _catalog(folder, survey, split, ["split", "ra", "dec", *dict.fromkeys([*chosen, *_redshift(survey)])])
    if labels is None:
        chosen = [name for name in chosen if _varies(table[name])][:PANELS]
    histograms = [name for name in chosen if name not in _redshift(survey)]
    rows = 1 + math.ceil(len(histograms) / 3)
    figure = pyplot.figure(figsize=(13, 3.6 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 3)
    placed = bool(_placed(table).any())
    if placed:
        _draw_sky(figure.add_subplot(grid[0, :2], projection="mollweide"), table)
    _draw_redshift(figure.add_subplot(grid[0, 2] if placed else grid[0, :]), table, _redshift(survey))
    for i, name in enumerate(histograms):
        axes = figure.add_subplot(grid[1 + i // 3, i % 3])
        _draw_label(axes, table[name])
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel(survey.labels[name], fontsize=8)
    title = f"{survey.name}: {len(table):,} objects{f' of {split}' if split else ''}, {', '.join(survey.modalities)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return Path(out)


def _catalog(folder: Path | str, survey: Survey, split: str | None, columns: list[str]) -> pa.Table:
    table = read_catalog(survey, [*dict.fromkeys(["split", *columns])])
    table = table if split is None else table.filter(pc.field("split") == split)
    if not len(table):
        known = ", ".join(dict.fromkeys(s.split for s in survey.shards))
        raise ValueError(f"split: no samples in {split!r}; the survey has {known or 'none'}")
    return table


def _redshift(survey: Survey) -> list[str]:
    """The label that holds the redshift, if any."""
    return [name for name in REDSHIFTS if name in survey.labels][:1]


def _varies(column: pa.ChunkedArray) -> bool:
    if pa.types.is_string(column.type):
        return 1 < len(column.unique()) <= 40
    values = column.to_numpy()
    values = values[np.isfinite(values)]
    return values.size > 1 and values.min() < values.max()


def _placed(table: pa.Table) -> np.ndarray:
    """Which rows have a position."""
    known: np.ndarray = np.isfinite(table["ra"].to_numpy()) & np.isfinite(table["dec"].to_numpy())
    return known


def _draw_sky(axes: Any, table: pa.Table) -> None:
    """Density of the objects on the whole sky in Mollweide's projection, right ascension growing to the left."""
    ra, dec, known = table["ra"].to_numpy(), table["dec"].to_numpy(), _placed(table)
    axes.set_title(f"sky: {known.sum():,} objects with a position", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.set_xticklabels([])
    axes.tick_params(labelsize=7)
    longitude = -np.deg2rad((ra[known] + 180) % 360 - 180)
    bins = (np.deg2rad(np.arange(-180, 180.1, SKY_BINS)), np.deg2rad(np.arange(-90, 90.1, SKY_BINS)))
    counts, x, y = np.histogram2d(longitude, np.deg2rad(dec[known]), bins)
    area = np.rad2deg(x[1] - x[0]) * np.diff(np.sin(y)) * np.rad2deg(1)
    density = np.where(counts > 0, counts / area, np.nan)
    mesh = axes.pcolormesh(x, y, density.T, cmap="viridis", shading="flat", rasterized=True)
    axes.figure.colorbar(mesh, ax=axes, shrink=0.7, label="objects per square degree")


def _draw_redshift(axes: Any, table: pa.Table, names: list[str]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if not names:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no redshift among the labels", ha="center", va="center", color="0.5")
        return
    values = table[names[0]].to_numpy()
    splits = table["split"].to_numpy(zero_copy_only=False)
    known = np.isfinite(values)
    axes.set_title(f"{names[0]}: {known.sum():,} known", fontsize=10, loc="left")
    axes.set_xlabel("redshift", fontsize=8)
    if not known.any():
        return
    bins = np.linspace(values[known].min(), np.percentile(values[known], 99.5) + 1e-9, BINS)
    for split in dict.fromkeys(splits):
        axes.hist(values[known & (splits == split)], bins, histtype="step", density=True, label=split, linewidth=1.4)
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=8)


def _draw_label(axes: Any, column: pa.ChunkedArray) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if pa.types.is_string(column.type):
        texts, counts = np.unique([t for t in column.to_pylist() if t], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:12]
        axes.barh([str(texts[i]) for i in order[::-1]], counts[order[::-1]], color="#3b6ea8")
        return
    values = column.to_numpy()
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (0.5, 99.5))
    axes.hist(values[(values >= low) & (values <= high)], BINS, color="#3b6ea8")
    axes.set_yticks([])
