"""Pictures of what a search finds: a query and its best answers side by side, as galaxies or as spectra.

Shape legend: L pixels of a spectrum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.colour import galaxy_picture
from armillary.engine.evaluate.embedding.cutouts import having, read_cutouts, read_spectra
from armillary.engine.evaluate.page import html, pictures

__all__ = ["Tile", "binned_spectrum", "draw_objects", "spectrum_tile", "tile_row"]

SIDE = 120  # of a spectrum's tile
SHADE, LINE, AXIS = "#0d1420", "#8fc1f2", "#5b6880"  # tiles lie on black in either theme
BINS = 110  # of a spectrum's curve
STYLE = "width:100%;height:auto;display:block"


class Tile(NamedTuple):
    """One object in a row.

    Attributes:
        picture: `draw_objects` makes it; empty for an object without that modality.
        caption: Lines under it, plain text.
        outlined: Whether it is marked: the query, or its partner.
    """

    picture: Markup
    caption: Sequence[str] = ()
    outlined: bool = False


def tile_row(tiles: Sequence[Tile], width: int) -> Markup:
    """Objects side by side, in a row of `width` places; lies in a `sky`."""
    blank = _square("", "Not observed")
    return html.row([html.figure(t.picture or blank, t.caption, outlined=t.outlined) for t in tiles], width)


def draw_objects(folder: Path, survey: Survey, modality: str, rows: Sequence[int] | np.ndarray) -> Mapping[int, Markup]:
    """Pictures of catalogue rows by their "image" or "spectrum", each drawn once: HTML by row, of objects that have it.

    Raises:
        ValueError: The survey has no spectra.
    """
    wanted = having(folder, sorted({int(row) for row in rows}), modality)
    if modality == "spectrum":
        if survey.spectrum is None:
            raise ValueError(f"{folder}: survey {survey.name!r} has no spectra")
        wave = survey.spectrum.grid.angstrom()
        return {row: spectrum_tile(wave, s) for row, s in zip(wanted, read_spectra(folder, wanted), strict=True)}
    drawn = {}
    for row, (image, valid) in zip(wanted, read_cutouts(folder, wanted), strict=True):
        drawn[row] = html.picture(pictures.data_uri(galaxy_picture(image, valid, survey)))
    return drawn


def binned_spectrum(wave: np.ndarray, spectrum: Spectrum, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of a spectrum's flux in bins of equal width, weighted by inverse variance.

    Args:
        wave: [L] angstrom.
        spectrum: The spectrum.
        bins: Bins, at most; there are no more than pixels.

    Returns:
        Middle in angstrom and mean flux of those bins that have data.
    """
    bins = min(bins, len(wave))
    edges = np.linspace(wave[0], wave[-1], bins + 1)
    place = np.clip(np.searchsorted(edges, wave, side="right") - 1, 0, bins - 1)
    weight = np.bincount(place, spectrum.ivar.astype(np.float64), bins)
    total = np.bincount(place, spectrum.ivar.astype(np.float64) * np.nan_to_num(spectrum.flux), bins)
    seen = np.flatnonzero(weight > 0)
    return (edges[seen] + edges[seen + 1]) / 2, total[seen] / weight[seen]


def spectrum_tile(wave: np.ndarray, spectrum: Spectrum) -> Markup:
    """A spectrum as a small square SVG: means of the flux in bins, weighted by inverse variance.

    The curve fills the height from the 1% to the 99.5% quantile of the bins; the line is zero flux.
    """
    at, value = binned_spectrum(wave, spectrum, BINS)
    body = ""
    if len(value):
        low, high = min(0.0, float(np.quantile(value, 0.01))), float(np.quantile(value, 0.995))
        span = max(high - low, 1e-30)
        y = SIDE * (0.72 - 0.62 * np.clip((value - low) / span, -0.1, 1.1))
        x = SIDE * (at - wave[0]) / (wave[-1] - wave[0])
        zero = SIDE * (0.72 + 0.62 * low / span)
        body += f'<path d="M0 {zero:.1f}H{SIDE}" stroke="{AXIS}" stroke-width=".6"/>'
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        body += f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="1"/>'
    return _square(body, "Spectrum")


def _square(body: str, label: str) -> Markup:
    back = f'<rect width="{SIDE}" height="{SIDE}" rx="6" fill="{SHADE}"/>'
    return Markup(
        f'<svg viewBox="0 0 {SIDE} {SIDE}" style="{STYLE}" role="img" aria-label="{label}">{back}{body}</svg>'
    )
