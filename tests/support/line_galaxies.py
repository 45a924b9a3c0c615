"""Blobs of a colour that tells the redshift, with a spectral line that moves with it."""

from typing import NamedTuple

import numpy as np

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import WaveGrid

GRID = WaveGrid("linear", 4000.0, 10.0, 200)


class LineGalaxy(NamedTuple):
    """Its redshift as a label, NaN for each seventh; image [3, 16, 16]; spectrum on `GRID`, whose first five pixels are unknown."""

    label: float
    image: np.ndarray
    spectrum: Spectrum


def line_galaxy(index: int) -> LineGalaxy:
    """The same for the same index."""
    rng = np.random.default_rng([11, index])
    z = float(rng.uniform(0.05, 0.4))
    y, x = np.indices((16, 16)) - 7.5
    image = np.array([np.exp(-5 * z), 1, np.exp(5 * z)])[:, None, None] * np.exp(-(x**2 + y**2) / 8)
    flux = 1 + 5 * np.exp(-(((GRID.angstrom() / (1 + z) - 4000) / 30) ** 2)) + 0.1 * rng.normal(size=200)
    ivar = np.full(200, 100.0, np.float32)
    ivar[:5] = 0
    image = (image + 0.02 * rng.normal(size=image.shape)).astype(np.float32)
    label = float("nan") if index % 7 == 0 else z
    return LineGalaxy(label, image, Spectrum(np.where(ivar > 0, flux, 0).astype(np.float32), ivar))
