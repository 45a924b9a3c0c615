"""A look at a packed survey: a mosaic of random samples with their labels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.colour import galaxy_picture
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import Sample

__all__ = ["draw_mosaic", "read_samples"]

CELL = 160  # pixels, at least; small cutouts are enlarged by whole factors
GAP = 4
LINE = 12  # pixels of a line of text
WHITE, GREY, BACKGROUND = (255, 255, 255), (170, 170, 170), (18, 18, 22)


def read_samples(folder: Path, survey: Survey, count: int, split: str | None, seed: int) -> list[Sample]:
    """Random samples of a survey.

    Args:
        folder: The survey's folder.
        survey: Its description.
        count: Samples; fewer where the split has fewer.
        split: Of this split; None for all.
        seed: Chooses the samples.

    Raises:
        ValueError: `count` is not positive or the split is empty.
    """
    if count < 1:
        raise ValueError(f"count: must be at least 1, got {count}")
    sizes = {name: survey.count(name) for name in dict.fromkeys(s.split for s in survey.shards)}
    if split is not None and not sizes.get(split):
        raise ValueError(f"split: no samples in {split!r}; the survey has {', '.join(sizes)}")
    source = PackedSurvey(folder, split)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:count])
    return [source.read(i) for i in chosen.tolist()]


def _caption(sample: Sample, labels: list[str]) -> list[str]:
    """Key, then labels that are known, as short lines."""
    lines = [sample.key]
    for label in labels:
        value = sample.labels[label]
        if isinstance(value, str):
            if value:
                lines.append(f"{label} {value}")
        elif not math.isnan(value):
            lines.append(f"{label} {value:.4g}")
    return lines


def _picture(sample: Sample, survey: Survey, size: tuple[int, int]) -> Image.Image:
    """The image of a sample; where it has none its spectrum, or its vectors, as a curve from least to greatest."""
    if sample.image is not None:
        picture = Image.fromarray(galaxy_picture(sample.image, sample.valid, survey))
        return picture.resize(size, Image.Resampling.NEAREST)
    picture = Image.new("RGB", size, BACKGROUND)
    if sample.spectrum is not None:
        curve = np.where(sample.spectrum.ivar > 0, sample.spectrum.flux, np.nan)
        columns = np.array_split(curve, min(size[0], len(curve)))
        curve = np.array([np.nanmean(c) if np.isfinite(c).any() else np.nan for c in columns])
    else:
        curve = np.concatenate(list(sample.vectors.values()))
    x = np.linspace(0, size[0] - 1, len(curve))[np.isfinite(curve)]
    y = curve[np.isfinite(curve)]
    low, high = np.percentile(y, (1, 99))
    y = (size[1] - 1) * (1 - np.clip((y - low) / max(high - low, 1e-30), 0, 1))
    ImageDraw.Draw(picture).line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=WHITE)
    return picture


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
    samples = read_samples(folder, survey, count, split, seed)
    factor = max(1, -(-CELL // max(survey.width, survey.height, 1)))
    width, height = survey.width * factor or CELL, survey.height * factor or CELL
    across = math.ceil(math.sqrt(len(samples)))
    cell = (width + GAP, height + GAP + LINE * (1 + len(shown)))
    canvas = Image.new("RGB", (across * cell[0] + GAP, -(-len(samples) // across) * cell[1] + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for i, sample in enumerate(samples):
        x, y = GAP + i % across * cell[0], GAP + i // across * cell[1]
        canvas.paste(_picture(sample, survey, (width, height)), (x, y))
        for k, text in enumerate(_caption(sample, shown)):
            while len(text) > 4 and draw.textlength(text, font) > width:
                text = text[:-2] + "…"
            draw.text((x, y + height + k * LINE), text, fill=GREY if k else WHITE, font=font)
    canvas.save(out)
    return out
