"""Pictures of a survey and of what an encoder makes of it: map, neighbours, cutouts, model inputs.

Shape legend: M samples of the shown split, D embedding dimensions, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.page import figures, html, pictures
from armillary.engine.evaluate.probes.probes import nearest

__all__ = ["Gallery", "data", "embedding_map", "inputs", "layout_map", "neighbours"]

MAP_SAMPLES = 3000
INPUT_COLUMNS = 8


@dataclass(frozen=True)
class Gallery:
    """Samples of the shown split, with pictures.

    Attributes:
        split: Which split they are from.
        vector: [M, D] embeddings.
        label: [M] label, NaN where unknown; None where the survey has none.
        picture: M colour pictures [H, W, 3] uint8.
        inputs: By title, pictures [S, S, 3] uint8 of what the model sees of the first samples.
    """

    split: str
    vector: np.ndarray
    label: np.ndarray | None
    picture: Sequence[np.ndarray]
    inputs: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the lengths against each other."""
        lengths = {len(self.vector), len(self.picture), *([] if self.label is None else [len(self.label)])}
        if len(lengths) != 1 or not len(self.vector):
            raise ValueError(
                f"gallery: need as many embeddings as pictures and labels, one or more, got {len(self.vector)}, "
                f"{len(self.picture)} and {'no' if self.label is None else len(self.label)}"
            )


def layout_map(vector: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Two-dimensional map [M, 2] of embeddings [M, D], and the name of its method.

    t-SNE on directions (the cosine geometry of the search); principal components where there are few samples, or where
    all embeddings are alike.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit = vector / np.maximum(np.linalg.norm(vector, axis=1, keepdims=True), 1e-12)
    if len(vector) >= 50 and len(np.unique(unit.round(6), axis=0)) >= 50:
        kept = PCA(min(32, *unit.shape), random_state=seed).fit_transform(unit)
        layout = TSNE(init="pca", perplexity=min(30, len(unit) / 4), random_state=seed, n_jobs=2).fit_transform(kept)
        return layout.astype(np.float64), "t-SNE"
    centred = unit - unit.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    flat = np.zeros((len(vector), 2))
    flat[:, : len(axes)] = centred @ axes.T
    return flat, "principal components"


def embedding_map(gallery: Gallery, name: str) -> Markup:
    """The embeddings in two dimensions, as points and as galaxies."""
    count = min(len(gallery.vector), MAP_SAMPLES)
    points, method = layout_map(gallery.vector[:count])
    label = None if gallery.label is None else gallery.label[:count]
    sheet = pictures.picture_map(points, gallery.picture[:count])
    coloured = f", coloured by {name}" if name and label is not None else ""
    galaxies = html.picture(pictures.data_uri(sheet), "Galaxies at their place in the map", sheet=True)
    return html.section(
        "Map of the embeddings",
        f"{method} of {count:,} {gallery.split} embeddings{coloured}; beside it the galaxies that lie there, one in each "
        "occupied cell.",
        html.grid((html.card(figures.point_map(points, label, label=name)), html.card(galaxies))),
    )


def neighbours(gallery: Gallery, name: str, queries: int = 6, shown: int = 8) -> Markup:
    """Galaxies, each with its nearest neighbours by cosine."""
    count = len(gallery.vector)
    if count < 3:
        return Markup()
    shown = min(shown, count - 1)
    order = _by_label(gallery.label, np.arange(count))
    if gallery.label is not None and (known := int(np.isfinite(gallery.label).sum())):
        order = order[:known]
    chosen = order[np.linspace(0, len(order) - 1, min(queries, len(order)) + 2).astype(int)[1:-1]]
    found, distance = nearest(gallery.vector, gallery.vector[chosen], shown + 1)
    rows = []
    for query, index, far in zip(chosen, found, distance, strict=True):
        others = [(i, d) for i, d in zip(index, far, strict=True) if i != query][:shown]
        cells = [_picture(gallery, query, name, outlined=True)]
        cells += [_picture(gallery, i, name, f"{1 - d:.3f}") for i, d in others]
        rows.append(html.row(cells, shown + 1))
    value = f"{name} and " if name else ""
    return html.section(
        "Nearest neighbours",
        "The outlined galaxy is the query; to its right the galaxies whose embeddings point in the most similar direction, "
        f"with {value}cosine similarity. All are from the {gallery.split} split.",
        html.sky(*rows),
    )


def data(survey: Survey, gallery: Gallery, name: str, shown: int = 96) -> Markup:
    """Cutouts of the survey."""
    count = min(shown, len(gallery.picture))
    chosen = _by_label(None if gallery.label is None else gallery.label[:count], np.arange(count))
    order = f", in order of {name}" if name else ""
    sheet = pictures.mosaic([gallery.picture[int(i)] for i in chosen], 12 if count > 24 else 6)
    height, width = survey.height, survey.width
    side = f"{width} x {height} pixels"
    if survey.pixel_scale_arcsec:
        side += f" ({width * survey.pixel_scale_arcsec:.0f} x {height * survey.pixel_scale_arcsec:.0f} arcsec)"
    bands = [survey.bands[i] for i in (len(survey.bands) - 1, len(survey.bands) // 2, 0)]
    composite = ", ".join(f"{b} as {c}" for b, c in zip(bands, ("red", "green", "blue"), strict=True))
    stretch = (
        "Display pictures, as they are."
        if survey.unit == "count"
        else f"Colours are {composite} with an asinh stretch (Lupton et al. 2004)."
    )
    return html.section(
        "The data",
        f"{count} cutouts of the {gallery.split} split{order}, {side}. {stretch}",
        html.sky(html.picture(pictures.data_uri(sheet), "Cutouts of the survey", sheet=True)),
    )


def inputs(gallery: Gallery) -> Markup:
    """What the encoder is given; nothing where that is unknown."""
    cards = []
    for title, row in gallery.inputs.items():
        sheet = pictures.mosaic(list(row), min(len(row), INPUT_COLUMNS))
        source = pictures.data_uri(sheet, enlarge=min(max(1, 900 // sheet.shape[1]), 3))
        cards.append(html.card(html.picture(source, title, sheet=True, pixelated=True), title=title))
    if not cards:
        return Markup()
    return html.section(
        "What the encoder sees",
        "Model inputs after crop and stretch, each channel from its 1% to its 99.7% quantile.",
        html.stack(cards),
    )


def _by_label(label: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Rows in order of their label, unknown ones last."""
    return rows if label is None else rows[np.argsort(np.where(np.isfinite(label), label, np.inf))]


def _picture(gallery: Gallery, index: int, name: str, note: str = "", *, outlined: bool = False) -> Markup:
    value = ""
    if gallery.label is not None and np.isfinite(gallery.label[index]):
        value = f"{'z' if name == 'redshift' else name} {gallery.label[index]:.3f}"
    return html.figure(html.picture(pictures.data_uri(gallery.picture[index])), (value, note), outlined=outlined)
