"""Galaxies and stars drawn together in Fourier space, through each band's PSF.

Shape legend: C bands, H x W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Scene"]

MOFFAT_BETA = 3.5
MARGIN_PIXELS = 120  # of the Fourier grid around the image


class Scene:
    """Galaxies added up in Fourier space, seen through the PSF of each band and the pixel.

    GalSim gives each profile's transform once; all bands share it, and one inverse transform a band makes the image.
    The PSF leaves nothing beyond the pixel's Nyquist frequency, so this is GalSim's own drawing but for the light that
    folds back from farther away than the margin.

    Args:
        size: Side of the image in pixels.
        scale: Arcseconds a pixel.
        fwhm: [C] seeing in arcsec.
    """

    def __init__(self, size: int, scale: float, fwhm: np.ndarray) -> None:
        import galsim

        self.size, self.scale = size, scale
        side = 2 * ((size + MARGIN_PIXELS + 1) // 2)
        self._bounds = galsim.BoundsI(0, side // 2, -side // 2, side // 2 - 1)
        self._step = 2 * np.pi / (side * scale)
        self._x = np.arange(side // 2 + 1) / side  # cycles a pixel
        self._y = np.arange(-side // 2, side // 2)[:, None] / side
        pixel = np.sinc(self._x) * np.sinc(self._y)
        psfs = [galsim.Moffat(beta=MOFFAT_BETA, fwhm=w) for w in fwhm]
        self._response = np.stack([self._transform(psf).real * pixel for psf in psfs])
        self._light = np.zeros(self._response.shape, complex)

    def _transform(self, profile: Any) -> np.ndarray:
        import galsim

        return profile.drawKImage(galsim.ImageCD(self._bounds, scale=self._step), recenter=False).array

    def add(self, profile: Any | None, flux: np.ndarray, x: float, y: float) -> None:
        """Add one source.

        Args:
            profile: A GalSim profile of unit flux, or None for a point.
            flux: [C] in each band.
            x: Pixels to the right of the image's centre.
            y: Pixels above the image's centre.
        """
        middle = (self.size - 1) / 2
        light = np.exp(-2j * np.pi * self._x * (middle + x)) * np.exp(-2j * np.pi * self._y * (middle + y))
        if profile is not None:
            light = light * self._transform(profile)
        self._light += flux[:, None, None] * light

    def add_points(
        self, profile: Any, places: np.ndarray, weights: np.ndarray, flux: np.ndarray, x: float, y: float
    ) -> None:
        """Add many copies of one profile.

        Args:
            profile: A GalSim profile of unit flux.
            places: [P, 2] of each copy, right and up from the source's place, arcsec.
            weights: [P] share of each copy.
            flux: [C] of all of them together.
            x: Pixels of the source's place to the right of the image's centre.
            y: Pixels above the image's centre.
        """
        middle = (self.size - 1) / 2
        right, up = places.T / self.scale + middle + np.array([[x], [y]])
        columns = np.exp(-2j * np.pi * right[:, None] * self._x)
        rows = np.exp(-2j * np.pi * self._y * up) * weights
        self._light += flux[:, None, None] * ((rows @ columns) * self._transform(profile))

    def image(self) -> np.ndarray:
        """[C, H, W] float64: everything added so far, in the unit of the fluxes."""
        spectrum = np.fft.ifftshift(self._light * self._response, axes=1)
        side = spectrum.shape[1]
        return np.fft.irfft2(spectrum, s=(side, side))[:, : self.size, : self.size].copy()
