"""A DESI-like exposure: throughput, sky, read noise and lost pixels, added to a noiseless spectrum.

The numbers are of the right order for an exposure of the Bright Galaxy Survey (180 s effective, moon up; Hahn et al.
2023) with DESI's 3.8 m mirror: throughput and sky continuum are smooth curves through a few points, the OH forest
beyond 7,000 Angstrom is a fixed forest of random lines, with the real [O I] and Na lines of the night sky.

Shape legend: L pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from armillary.engine.data.format.spectra import Spectrum

__all__ = ["Exposure"]

AREA_CM2 = 8.6e4
SECONDS = 300.0
READ_ELECTRONS = 7.0  # rms of one extracted pixel: some four rows at 3.2 electrons
FOREST_KEY = 20_220_921
FOREST_LINES = 200
PHOTON_ERG = 1.98645e-8  # h c in erg Angstrom

THROUGHPUT = (
    (3600.0, 3800.0, 4000.0, 4500.0, 5000.0, 5500.0, 6000.0, 6500.0, 7000.0, 8000.0, 8500.0, 9000.0, 9400.0, 9824.0),
    (0.045, 0.10, 0.15, 0.21, 0.25, 0.27, 0.28, 0.31, 0.33, 0.34, 0.34, 0.31, 0.27, 0.17),
)
ARM_OVERLAPS = ((5780.0, 70.0, 0.25), (7580.0, 70.0, 0.25))  # centre, sigma in Angstrom, share lost at the centre
SKY = (  # in the fibre, 1e-17 erg/s/cm2/Angstrom
    (3600.0, 4000.0, 4500.0, 5000.0, 6000.0, 7000.0, 8000.0, 9000.0, 9824.0),
    (5.0, 4.6, 4.2, 3.6, 3.0, 2.6, 2.6, 2.9, 3.2),
)
SKY_LINES = (
    (5578.89, 60.0),
    (5891.6, 6.0),
    (5897.6, 4.0),
    (6302.05, 18.0),
    (6365.54, 6.0),
)  # Angstrom, 1e-17 erg/s/cm2
LINE_SIGMA = 0.75  # Angstrom
OXYGEN = 5578.89
COSMICS, RESIDUAL = 0.4, 0.2  # shares of spectra with lost pixels


@dataclass(frozen=True)
class Exposure:
    """What a pixel records.

    Attributes:
        wavelength: [L] vacuum, Angstrom.
        electrons: [L] electrons by a flux density of 1e-17 erg/s/cm2/Angstrom.
        sky: [L] sky in the fibre, 1e-17 erg/s/cm2/Angstrom.
    """

    wavelength: np.ndarray
    electrons: np.ndarray
    sky: np.ndarray

    @classmethod
    def of(cls, wavelength: np.ndarray) -> Exposure:
        """On a grid of even steps in Angstrom."""
        step = float(wavelength[1] - wavelength[0])
        throughput = np.interp(wavelength, *THROUGHPUT)
        for centre, sigma, loss in ARM_OVERLAPS:
            throughput = throughput * (1 - loss * np.exp(-0.5 * ((wavelength - centre) / sigma) ** 2))
        rng = np.random.Generator(np.random.Philox(FOREST_KEY))
        at = rng.uniform(7000, 9900, FOREST_LINES)
        brightness = rng.lognormal(2.4, 1.1, FOREST_LINES) * np.interp(at, (7000, 7700, 9900), (0.25, 1.0, 1.3))
        sky = np.interp(wavelength, *SKY)
        for centre, flux in (*SKY_LINES, *zip(at, brightness, strict=True)):
            near = np.abs(wavelength - centre) < 6 * LINE_SIGMA
            profile = np.exp(-0.5 * ((wavelength[near] - centre) / LINE_SIGMA) ** 2)
            sky[near] += flux * profile / (np.sqrt(2 * np.pi) * LINE_SIGMA)
        electrons = 1e-17 * step * AREA_CM2 * SECONDS * throughput * wavelength / PHOTON_ERG
        return cls(wavelength, electrons, sky)

    def observe(self, flux: np.ndarray, rng: np.random.Generator) -> Spectrum:
        """Add noise, and lose a few pixels of about half of the spectra to cosmic rays and the [O I] line of the sky.

        The inverse variance is that of the noise that was added. Moon and transparency differ between exposures.

        Args:
            flux: [L] noiseless spectrum.
            rng: The galaxy's own generator.

        Returns:
            float32 flux and inverse variance, both 0 in lost pixels.
        """
        electrons = self.electrons * rng.uniform(0.75, 1.25)
        sky = self.sky * rng.uniform(0.8, 1.4)
        variance = (np.maximum(flux, 0) + sky) / electrons + (READ_ELECTRONS / electrons) ** 2
        seen = flux + np.sqrt(variance) * rng.standard_normal(len(flux))
        lost = np.zeros(len(flux), bool)
        if rng.random() < COSMICS:
            for start in rng.integers(0, len(flux), int(rng.integers(1, 4))):
                lost[start : start + int(rng.integers(1, 6))] = True
        if rng.random() < RESIDUAL:
            lost |= np.abs(self.wavelength - OXYGEN) < 2.5
        return Spectrum(
            flux=np.where(lost, 0, seen).astype(np.float32), ivar=np.where(lost, 0, 1 / variance).astype(np.float32)
        )
