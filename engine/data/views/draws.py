"""The scalar draws of views: where a crop lies, how it is turned, how much blur, light and noise it gets.

They are made on the CPU in float64, at once for all crops of one kind in a micro-batch, from keyed streams
(`armillary.kernels.pixels.philox`), so that a sample's views depend on its own key only.

Shape legend: B samples, N = crops x B crops (crop-major), C bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from armillary.kernels.pixels.philox import normals

__all__ = ["CropDraws", "LogNormal", "origins"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LogNormal:
    """Shifted log-normal of a survey's image quality, a band: exp(shape z + ln scale) + loc for standard normal z.

    Attributes:
        shape: Standard deviation of the logarithm.
        loc: Shift, in the unit of the quantity.
        scale: Median before the shift, in the unit of the quantity.
    """

    shape: tuple[float, ...]
    loc: tuple[float, ...]
    scale: tuple[float, ...]

    def problems(self, field: str, bands: tuple[str, ...]) -> list[str]:
        """Every rule these numbers break, as `field: rule, got value`."""
        found = []
        for name, positive in (("shape", True), ("loc", False), ("scale", True)):
            values = getattr(self, name)
            if len(values) != len(bands) or not all(math.isfinite(v) and (v > 0 or not positive) for v in values):
                kind = "positive" if positive else "finite"
                found.append(f"{field}.{name}: must be one {kind} number a band {bands}, got {values}")
        return found

    def degradations(self, stream: NDArray[np.uint32], seed: int) -> Floats:
        """Widths to add in quadrature to take one drawn quality to another: sqrt(max(0, final^2 - present^2)).

        Present and final quality are drawn independently, so half of all widths are 0 (Stein et al. 2021; AstroCLIP).

        Args:
            stream: [N, 3] uint32 streams of draws.
            seed: The run's seed.

        Returns:
            [N, C] float64, in the unit of the quantity.
        """
        z = normals(stream, seed, 2 * len(self.shape)).reshape(len(stream), 2, len(self.shape))
        quality = np.asarray(self.scale) * np.exp(np.asarray(self.shape) * z) + np.asarray(self.loc)
        return np.sqrt(np.maximum(quality[:, 1] ** 2 - quality[:, 0] ** 2, 0.0))


@dataclass(frozen=True)
class CropDraws:
    """Everything random of N crops but the noise of single pixels.

    Attributes:
        origin: [N, 2] int64, top and left pixel of the crop in its cutout.
        orientation: [N] int64, hflip + 2 vflip + 4 quarter turns (`armillary.kernels.pixels.crop`).
        angle: [N] float64, rotation in radians; None where crops are not rotated.
        blur: [N, C] float64, Gaussian sigma in pixels; 0 where not blurred.
        gain: [N] float64, factor on all bands; None where crops keep their brightness.
        noise: [N, C] float64, sigma of the added noise in the flux unit; 0 where none is added.
    """

    origin: NDArray[np.int64]
    orientation: NDArray[np.int64]
    angle: Floats | None
    blur: Floats
    gain: Floats | None
    noise: Floats


def origins(u: Floats, shape: tuple[int, int], size: int, jitter_px: int | None) -> NDArray[np.int64]:
    """Top and left pixels of square crops.

    Args:
        u: [N, 2] uniform draws on (0, 1).
        shape: Height and width of the cutouts, at least `size`.
        size: Side of the crops.
        jitter_px: Greatest offset of the crop's centre from the cutout's, either way along each axis, as far as the
            cutout reaches; None: anywhere in the cutout.

    Returns:
        [N, 2] int64.
    """
    room = np.asarray(shape) - size
    if jitter_px is None:
        return (u * (room + 1)).astype(np.int64)
    offset = (u * (2 * jitter_px + 1)).astype(np.int64) - jitter_px
    return np.clip(room // 2 + offset, 0, room)
