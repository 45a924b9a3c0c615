"""The cutouts that formats are compared on: simulated ones, and pieces of real ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loader import BANDS, SKY_SIGMA, Cutouts

from armillary.engine.data.building.measure import robust_sigma
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.fits import CUTOUTS, FitsCutouts

__all__ = ["Pieces", "real", "simulated"]

STEPS_A_SIGMA = 8  # quantisation steps in the sky noise: the error is at most a sixteenth of it


@dataclass(frozen=True)
class Pieces:
    """Cutouts of one size, N x C x H x W.

    Attributes:
        name: Where they come from.
        images: [N, C, H, W] float32, 0 where there is no data.
        sigma: [N, C] float32, sky noise.
        valid: [N, C, H, W] bool, False where there is no data.
    """

    name: str
    images: np.ndarray
    sigma: np.ndarray
    valid: np.ndarray

    def __len__(self) -> int:
        """Number of cutouts."""
        return len(self.images)

    @property
    def steps(self) -> np.ndarray:
        """[N, C, 1, 1] float32, the quantisation step."""
        return (self.sigma / STEPS_A_SIGMA)[:, :, None, None]

    def first(self, count: int) -> Pieces:
        """The first cutouts."""
        return Pieces(self.name, self.images[:count], self.sigma[:count], self.valid[:count])


def simulated(count: int, size: int) -> Pieces:
    """The cutouts of `loader.py`."""
    source = Cutouts(count, size)
    images = np.stack([source.image(index) for index in range(count)])
    sigma = np.tile(np.array(SKY_SIGMA, np.float32), (count, 1))
    return Pieces("simulated", images, sigma, np.ones(images.shape, bool))


def unrepeated(image: np.ndarray) -> np.ndarray:
    """Drop the rows and columns that equal the one before: undoes enlargement by repetition of pixels."""
    rows = np.append(True, (image[:, 1:] != image[:, :-1]).any((0, 2)))
    columns = np.append(True, (image[:, :, 1:] != image[:, :, :-1]).any((0, 1)))
    return image[:, rows][:, :, columns]


def real(folder: Path, count: int, size: int) -> list[Pieces]:
    """Pieces of a folder's Legacy Survey cutouts, each set repeated to at least `count`; prints what is left out.

    Some published cutouts were enlarged by repeating pixels, which a general compressor finds. The first set holds all
    files, repeated rows and columns dropped; the second holds the enlarged ones as they are.
    """
    native, enlarged = [], []
    for path in sorted(path for path in folder.rglob("*") if path.name.lower().endswith(CUTOUTS)):
        try:
            image = FitsCutouts(path).read(0).image
        except (BadSample, ValueError) as error:
            print(f"left out: {error}")
            continue
        once = unrepeated(image)
        native.append((path, once))
        if once.shape != image.shape:
            enlarged.append((path, image))
    sets = [tiled(name, files, count, size) for name, files in (
        ("Legacy Survey", native), ("Legacy Survey, enlarged by repeated pixels", enlarged),
    )]  # fmt: skip
    if not native:
        print(f"no real cutouts: no FITS file in {folder}")
    return [pieces for pieces in sets if pieces is not None]


def tiled(name: str, files: Sequence[tuple[Path, np.ndarray]], count: int, size: int) -> Pieces | None:
    """Tile images from their centres without overlap; the sky noise is measured in the whole image.

    Tiles without a pixel of data in some band are dropped.
    """
    images, sigmas, masks = [], [], []
    for path, image in files:
        bands, *shape = image.shape
        if bands != len(BANDS) or min(shape) < size:
            print(f"left out: {path}: {bands}x{shape[0]}x{shape[1]}, pieces are {len(BANDS)}x{size}x{size}")
            continue
        valid = image != 0
        sigma = robust_sigma(image, valid).astype(np.float32)
        starts = [[n % size // 2 + size * i for i in range(n // size)] for n in shape]
        for top, left in itertools.product(*starts):
            tile = np.s_[:, top : top + size, left : left + size]
            if valid[tile].any((1, 2)).all():
                images.append(image[tile])
                sigmas.append(sigma)
                masks.append(valid[tile])
    if not images:
        return None
    print(f"{name}: {len(images)} pieces of {len(files)} files, {1 - np.mean(masks):.1%} of the pixels without data")
    copies = -(-count // len(images))
    repeated = [np.tile(np.stack(part), (copies, *[1] * part[0].ndim)) for part in (images, sigmas, masks)]
    return Pieces(name, *repeated)
