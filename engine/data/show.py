"""A look at a packed survey: a mosaic of random samples with their labels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from armillary.engine.data import codec
from armillary.engine.data.colour import galaxy_picture
from armillary.engine.data.survey import Survey

__all__ = ["draw_mosaic", "read_samples"]

CELL = 160  # pixels, at least; small cutouts are enlarged by whole factors
GAP = 4
LINE = 12  # pixels of a line of text
WHITE, GREY, BACKGROUND = (255, 255, 255), (170, 170, 170), (18, 18, 22)


def read_samples(
    folder: Path, survey: Survey, count: int, split: str | None, seed: int
) -> tuple[list[tuple[np.ndarray, np.ndarray | None]], pa.Table]:
    """Random samples of a survey with their catalogue rows.

    Args:
        folder: The survey's folder.
        survey: Its description.
        count: Samples; fewer where the split has fewer.
        split: Of this split; None for all.
        seed: Chooses the samples.

    Returns:
        Decoded images with masks, and their rows.

    Raises:
        ValueError: `count` is not positive or the split is empty.
    """
    if count < 1:
        raise ValueError(f"count: must be at least 1, got {count}")
    sizes = {name: survey.count(name) for name in dict.fromkeys(s.split for s in survey.shards)}
    if split is not None and not sizes.get(split):
        raise ValueError(f"split: no samples in {split!r}; the survey has {', '.join(sizes)}")
    catalog = pq.read_table(folder / "catalog.parquet")
    if split is not None:
        catalog = catalog.filter(pc.field("split") == split)
    chosen = np.random.default_rng(seed).permutation(len(catalog))[:count]
    rows = catalog.take(np.sort(chosen))
    images = []
    for row in rows.select(["shard", "offset", "size"]).to_pylist():
        with open(folder / survey.shards[row["shard"]].name, "rb") as f:
            f.seek(row["offset"])
            images.append(codec.decode(f.read(row["size"])))
    return images, rows


def _caption(row: dict[str, float | str], labels: list[str]) -> list[str]:
    """Key, then labels that are known, as short lines."""
    lines = [str(row["key"])]
    for label in labels:
        value = row[label]
        if isinstance(value, str):
            if value:
                lines.append(f"{label} {value}")
        elif not math.isnan(value):
            lines.append(f"{label} {value:.4g}")
    return lines


def draw_mosaic(
    folder: Path,
    out: Path,
    *,
    count: int = 25,
    split: str | None = None,
    seed: int = 0,
    labels: list[str] | None = None,
) -> Path:
    """Write a PNG of random samples with captions.

    Args:
        folder: The survey's folder.
        out: The PNG.
        count: Samples.
        split: Of this split; None for all.
        seed: Chooses the samples.
        labels: Labels in the captions; by default the first three.

    Returns:
        `out`.

    Raises:
        ValueError: There is no such label or split.
    """
    survey = Survey.load(folder)
    shown = list(survey.labels)[:3] if labels is None else labels
    for label in shown:
        if label not in survey.labels:
            raise ValueError(f"labels: no {label!r}; the survey has {', '.join(survey.labels) or 'none'}")
    images, rows = read_samples(folder, survey, count, split, seed)
    factor = max(1, -(-CELL // max(survey.width, survey.height)))
    width, height = survey.width * factor, survey.height * factor
    across = math.ceil(math.sqrt(len(images)))
    cell = (width + GAP, height + GAP + LINE * (1 + len(shown)))
    canvas = Image.new("RGB", (across * cell[0] + GAP, -(-len(images) // across) * cell[1] + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for i, ((image, valid), row) in enumerate(zip(images, rows.to_pylist(), strict=True)):
        x, y = GAP + i % across * cell[0], GAP + i // across * cell[1]
        picture = Image.fromarray(galaxy_picture(image, valid, survey))
        canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for k, text in enumerate(_caption(row, shown)):
            while len(text) > 4 and draw.textlength(text, font) > width:
                text = text[:-2] + "…"
            draw.text((x, y + height + k * LINE), text, fill=GREY if k else WHITE, font=font)
    canvas.save(out)
    return out
