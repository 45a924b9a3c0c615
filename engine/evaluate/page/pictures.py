"""Pictures of galaxies: colour composites, sheets of them, and maps made of them.

Shape legend: C bands, H x W pixels, M samples.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

__all__ = ["channels_rgb", "data_uri", "mosaic", "picture_map"]


def channels_rgb(image: np.ndarray) -> np.ndarray:
    """Model input as colours: each channel from its 1% to its 99.7% quantile, which is what the encoder sees of it.

    Args:
        image: [C, S, S] float; the first and last channel show as blue and red.

    Returns:
        [S, S, 3] uint8.
    """
    count = len(image)
    picked = np.nan_to_num(image[[count - 1, count // 2, 0]])
    low, high = (np.quantile(picked, q, axis=(1, 2), keepdims=True) for q in (0.01, 0.997))
    unit = np.clip((picked - low) / np.where(high > low, high - low, 1), 0, 1)
    return (255 * unit + 0.5).astype(np.uint8).transpose(1, 2, 0)[::-1]


def data_uri(picture: np.ndarray, *, enlarge: int = 1) -> str:
    """A PNG of [H, W, 3] uint8 as a data URI; `enlarge` repeats every pixel."""
    buffer = io.BytesIO()
    if enlarge > 1:
        picture = picture.repeat(enlarge, 0).repeat(enlarge, 1)
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def mosaic(pictures: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Pictures [H, W, 3] of equal size in rows of `columns` on black; the last row may be short."""
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), np.uint8)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = picture
    return sheet


def picture_map(
    points: np.ndarray, pictures: Sequence[np.ndarray], *, cells: int = 22, cell_pixels: int = 44
) -> np.ndarray:
    """Pictures where their samples lie in a two-dimensional map, one in each occupied cell of a grid.

    Args:
        points: [M, 2] map coordinates.
        pictures: M of [H, W, 3] uint8; their centres are shown.
        cells: Cells along each side.
        cell_pixels: Side of a cell.

    Returns:
        Square [S, S, 3] uint8 on black.
    """
    spread = np.ptp(points, axis=0)
    unit = (points - points.min(0)) / np.where(spread > 0, spread, 1)
    place = np.minimum((unit * cells).astype(int), cells - 1)
    off_centre = ((unit * cells - place - 0.5) ** 2).sum(1)
    sheet = np.zeros((cells * cell_pixels, cells * cell_pixels, 3), np.uint8)
    taken: set[tuple[int, int]] = set()
    for i in np.argsort(off_centre):
        column, row = int(place[i, 0]), int(cells - 1 - place[i, 1])
        if (column, row) in taken:
            continue
        taken.add((column, row))
        picture = pictures[i]
        half = max(4, int(min(picture.shape[:2]) * 0.3))
        y, x = picture.shape[0] // 2, picture.shape[1] // 2
        small = Image.fromarray(picture[y - half : y + half, x - half : x + half])
        tile = small.resize((cell_pixels - 2, cell_pixels - 2), Image.Resampling.BICUBIC)
        top, left = row * cell_pixels + 1, column * cell_pixels + 1
        sheet[top : top + cell_pixels - 2, left : left + cell_pixels - 2] = np.asarray(tile)
    return sheet
