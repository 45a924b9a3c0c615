"""Faint galaxies on sky noise, for benchmarks of the codec and the loader; every pixel is a function of the index."""

from __future__ import annotations

import numpy as np

__all__ = ["BANDS", "SKY_SIGMA", "cutout"]

BANDS = ("g", "r", "z")
SKY_SIGMA = (0.004, 0.006, 0.014)  # nanomaggy a pixel of .262 arcsec, near the depth of the Legacy Survey
SOURCES = 16  # a cutout


def cutout(index: int, size: int) -> np.ndarray:
    """Exponential profiles with lognormal fluxes on Gaussian sky noise.

    Args:
        index: Which.
        size: Side in pixels.

    Returns:
        [3, size, size] float32, nanomaggies.
    """
    rng = np.random.default_rng(index)
    axis = np.arange(size, dtype=np.float32)
    image = np.zeros((len(BANDS), size, size), np.float32)
    for source in range(SOURCES):
        x, y = (size / 2, size / 2) if source == 0 else rng.uniform(0, size, 2)
        scale = rng.lognormal(1.6 if source == 0 else 0.4, 0.4)
        flux = np.exp(rng.normal(3.0 if source == 0 else 0.0, 1.0)) * np.array([0.5, 1.0, 1.8])
        radius = np.hypot(axis[:, None] - y, axis[None] - x)
        profile = np.exp(-radius / scale) / (2 * np.pi * scale**2)
        image += (flux[:, None, None] * profile).astype(np.float32)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    return image + noise * np.array(SKY_SIGMA, np.float32)[:, None, None]
