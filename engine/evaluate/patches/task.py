"""The task "patches": principal components of patch tokens as colours, attention of the class token, likeness of regions."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.embedding.patches import image_encoder
from armillary.engine.evaluate.page import html
from armillary.engine.evaluate.page.pictures import channels_rgb, data_uri
from armillary.engine.evaluate.patches.regions import Regions
from armillary.engine.evaluate.study.options import Options
from armillary.engine.evaluate.study.study import Measure, Outcome, Study

__all__ = ["patches"]

SHOWN = 8
HEADS = 3  # drawn one by one, beside the mean
TILE = 144  # pixels of a picture on the page, at least
MAP_COLOURS = "magma"


def patches(study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
    """Draw the patches of some galaxies as the first vision transformer among the encoders sees them.

    Args:
        study: Embeddings of images.
        options: Label to choose the galaxies by, at even steps.
        encoders: Of the runs.

    Raises:
        ValueError: Nothing in the study is of images.
    """
    encoder = next(e for e in encoders if image_encoder(e.method) is not None)
    names = [*study.of("image"), *(n for n, f in study.features.items() if f.modality == "image")]
    if not names:
        raise ValueError("no features are of images")
    split, rows = study.shown(names[0])
    label = options.first_label(list(study.survey.labels))
    if label in study.survey.labels:
        value = study.label(label, rows)
        rows = rows[np.argsort(value)][: max(int(np.isfinite(value).sum()), 1)]
    rows = rows[np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)]
    regions = Regions.of(encoder, study.folder, rows)
    name, within = encoder.run.name, regions.within
    measure = Measure("patches", name, "", "", "variance within images", within, samples=len(rows))
    told = (
        f"patch tokens of {len(rows)} galaxies: {within:.0%} of their variance is within galaxies, the rest between them"
        if len(rows) > 1
        else "one galaxy's patches are drawn",
    )
    return Outcome("patches", (measure,), told, (_parts(regions, name, split), _likeness(regions)))


def _parts(regions: Regions, name: str, split: str) -> Markup:
    """Crops, colours, attention: a galaxy a column."""
    attention = regions.attention / regions.attention.max((2, 3), keepdims=True)
    heads = attention.shape[1]
    lines = [
        ("what it sees", [channels_rgb(crop) for crop in regions.crop]),
        ("components", [_upright(c) for c in regions.colours()]),
        ("within", [_upright(c) for c in regions.colours(within=True)]),
        (
            "attention",
            [_painted(a) for a in regions.attention.mean(1) / regions.attention.mean(1).max((1, 2), keepdims=True)],
        ),
    ]
    lines += [(f"head {h + 1}", [_painted(a) for a in attention[:, h]]) for h in range(min(heads, HEADS))]
    h, w = regions.tokens.shape[1:3]
    return html.section(
        "Parts of galaxies",
        f"How {name} sees {h} x {w} patches of galaxies of the {split} split, one in each column. The first three principal "
        "components of all these patch tokens are red, green and blue: like colours are like tokens; below them the same after each "
        "galaxy's mean token is taken off, so that its parts are told apart. Then the attention of "
        f"the class token in the last block, the mean over its {heads} heads and some heads alone, each map from 0 to its largest "
        "weight.",
        html.sky(*(_row(title, pictures) for title, pictures in lines)),
    )


def _likeness(regions: Regions) -> Markup:
    """The central patch of the galaxy in the middle, and what is like it in all of them."""
    count, height, width = regions.tokens.shape[:3]
    query, row, column = count // 2, height // 2, width // 2
    maps = regions.similarity(query, row, column)
    shown = [_painted(np.clip(m, 0, 1)) for m in maps]
    shown[query][height - 1 - row, column] = (0, 255, 255)
    crops = [channels_rgb(crop) for crop in regions.crop]
    return html.section(
        "Likeness of regions",
        "Cosine similarity of one patch, the cyan one in the middle of its galaxy, to all patches of that galaxy and of the others, "
        "from 0 (dark) to 1.",
        html.sky(_row("", crops), _row("", shown)),
    )


def _row(title: str, pictures: Sequence[np.ndarray]) -> Markup:
    figures = []
    for i, picture in enumerate(pictures):
        source = data_uri(picture, enlarge=max(1, TILE // len(picture)))
        figures.append(html.figure(html.picture(source, title, pixelated=True), (title if i == 0 else "",)))
    return html.row(figures, len(pictures))


def _upright(values: np.ndarray) -> np.ndarray:
    """A map with its first row at the bottom, as pictures have it."""
    return values[::-1]


def _painted(values: np.ndarray) -> np.ndarray:
    """[h, w, 3] uint8 of values in 0 .. 1."""
    colours = matplotlib.colormaps[MAP_COLOURS](_upright(values))
    return (255 * colours[..., :3] + 0.5).astype(np.uint8)
