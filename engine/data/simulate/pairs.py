"""A simulated survey of pairs: the image of each galaxy and its spectrum, with physical properties and votes as labels.

The galaxies are those of `SimulatedSurvey` with the same seed: same light, shape, neighbours and noise realisation. Image
and spectrum come from one bulge and one disk, so that they tell of one galaxy; the spirals have arms and bars besides.
Every draw is keyed by (seed, purpose, galaxy), as there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from armillary.engine.data.format.survey import SpectrumRecord
from armillary.engine.data.simulate.exposures import Exposure
from armillary.engine.data.simulate.population import DEFAULT_SEED, keyed_generator
from armillary.engine.data.simulate.scene import Scene
from armillary.engine.data.simulate.spectra import Motion, SpectrumModel, fibre_share
from armillary.engine.data.simulate.stellar_populations import STELLAR_LABELS, Stars, stars_of
from armillary.engine.data.simulate.survey import LEGACY, SimulatedSurvey
from armillary.engine.data.simulate.votes import (
    VOTE_LABELS,
    Shape,
    Structure,
    add_structure,
    draw_structure,
    draw_votes,
)
from armillary.engine.data.sources.files.desi_coadd import DESI_GRID
from armillary.engine.data.sources.source import Sample

__all__ = ["SimulatedPairs"]

STARS_STREAM, STRUCTURE_STREAM, EXPOSURE_STREAM, VOTES_STREAM, PHOTOMETRY_STREAM = range(16, 21)
BURST_DEX = 0.1  # scatter of the present star-formation rate about its mean
CALIBRATION_MAG = 0.02
HALF_MASS = 1.1774  # a round Gaussian's half-light radius in sigmas
R_BAND = 1


class SimulatedPairs(SimulatedSurvey):
    """A `Source` of simulated galaxies with spectra; `Spectral`.

    Args:
        count: Galaxies.
        seed: Keys everything.
        size: Side of a cutout in pixels.
        magnitude_limit: Faintest AB magnitude in z.
        grouped: Put some galaxies into groups on the sky, see `groups`.

    Raises:
        ModuleNotFoundError: GalSim or speclite is not installed.
        ValueError: See `SimulatedSurvey`.
    """

    spectrum: SpectrumRecord | None = SpectrumRecord(DESI_GRID, "1e-17 erg/s/cm2/angstrom")
    labels = (
        SimulatedSurvey.labels
        | {f"mag_{b.name}": "measured AB magnitude, all of the galaxy's light" for b in LEGACY}
        | STELLAR_LABELS
        | {
            "arm_fraction": "share of the spiral arms in the disk's light",
            "bar_fraction": "share of the bar in the disk's light",
        }
        | VOTE_LABELS
    )

    def __init__(
        self,
        count: int,
        *,
        seed: int = DEFAULT_SEED,
        size: int = 72,
        magnitude_limit: float = 19.5,
        grouped: bool = False,
    ) -> None:
        super().__init__(count, seed=seed, size=size, magnitude_limit=magnitude_limit, bands=LEGACY, grouped=grouped)
        self.model = SpectrumModel(DESI_GRID)
        self.exposure = Exposure.of(DESI_GRID.angstrom())

    def read(self, index: int) -> Sample:
        """Draw galaxy `index`: image, spectrum and labels.

        Raises:
            IndexError: There is no such galaxy.
        """
        sample = super().read(index)
        rng = keyed_generator(self.seed, EXPOSURE_STREAM, index)
        burst = 10 ** (BURST_DEX * rng.standard_normal())
        return replace(sample, spectrum=self.exposure.observe(self._spectrum(index, burst), rng))

    def noiseless_spectrum(self, index: int) -> np.ndarray:
        """[L] float64, 1e-17 erg/s/cm2/Angstrom: the spectrum that `read` observes.

        Raises:
            IndexError: There is no such galaxy.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"galaxy {index}: this simulated survey has {len(self)}")
        burst = 10 ** (BURST_DEX * keyed_generator(self.seed, EXPOSURE_STREAM, index).standard_normal())
        return self._spectrum(index, burst)

    def stars(self, index: int) -> Stars:
        """Stellar populations of galaxy `index`."""
        return stars_of(self.population, index, keyed_generator(self.seed, STARS_STREAM, index))

    def fibre_shares(self, index: int) -> np.ndarray:
        """[2] share of the bulge's and the disk's light in the fibre."""
        p = self.population
        bulge = fibre_share(p.sersic_bulge[index], p.radius_bulge[index], p.axis_bulge[index])
        return np.array([bulge, fibre_share(1.0, p.radius_disk[index], p.axis_disk[index])])

    def _spectrum(self, index: int, burst: float) -> np.ndarray:
        p, stars = self.population, self.stars(index)
        flux = np.array([p.flux_bulge[index, R_BAND], p.flux_disk[index, R_BAND]])
        motion = Motion.of(stars, float(p.axis_disk[index]))
        return self.model(stars, flux, self.fibre_shares(index), motion, burst)

    def _arms_and_bar(self, index: int) -> Structure:
        p = self.population
        rng = keyed_generator(self.seed, STRUCTURE_STREAM, index)
        return draw_structure(bool(p.early[index]), float(p.radius_disk[index]), float(p.share_bulge[index]), rng)

    def _structure(self, scene: Scene, index: int, angle: Any, x: float, y: float) -> float:
        p = self.population
        radius, axis = float(p.radius_disk[index]), float(p.axis_disk[index])
        return add_structure(scene, self._arms_and_bar(index), radius, axis, angle, p.flux_disk[index], x, y)

    def _magnitudes(self, index: int) -> dict[str, float]:
        """Measured magnitudes: a galaxy's noise is that of all pixels that a matched filter of its size weighs."""
        rng = keyed_generator(self.seed, PHOTOMETRY_STREAM, index)
        labels = {}
        for c, band in enumerate(self.conditions):
            flux = float(self.population.flux()[index, c])
            pixels = math.hypot(band.fwhm_arcsec / 2.3548, self._radius[index] / HALF_MASS) / self._scale
            sigma = math.sqrt(4 * math.pi) * pixels * float(self._sky_sigma[c])
            measured = max(flux + sigma * rng.standard_normal(), sigma / 2)
            magnitude = 22.5 - 2.5 * math.log10(measured) + CALIBRATION_MAG * rng.standard_normal()
            labels[f"mag_{band.name}"] = float(magnitude)
        return labels

    def _label(self, index: int) -> dict[str, float | str]:
        p, structure = self.population, self._arms_and_bar(index)
        labels = super()._label(index)
        shape = Shape(
            bulge=float(labels["bulge_fraction"]),
            radius=float(self._radius[index]),
            axis=float(labels["axis_ratio"]),
            axis_disk=float(p.axis_disk[index]),
            early=bool(p.early[index]),
            fwhm=self.conditions[R_BAND].fwhm_arcsec,
        )
        votes = draw_votes(shape, structure, keyed_generator(self.seed, VOTES_STREAM, index))
        more = {"arm_fraction": structure.arm_share, "bar_fraction": structure.bar_share}
        return {**labels, **self._magnitudes(index), **self.stars(index).labels(), **more, **votes}
