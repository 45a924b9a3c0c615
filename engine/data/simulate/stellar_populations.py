"""Masses, ages, metallicities and star-formation rates of simulated galaxies, from what makes their colours.

Bulge and disk each have a position in the template sequence and a spectral slope (see `seds`). From these follow

- stellar mass: log M/L_z = -0.223 + 0.689 (g - r) (Bell et al. 2003, table 7, their "diet Salpeter" less 0.15 dex),
  with 0.08 dex of scatter;
- specific star-formation rate: by type, from a star-forming main sequence (late types) to a quiescent tail (ellipticals);
- mass-weighted age: a share of the age of the universe by type, older where more massive;
- metallicity: the mass-metallicity relation of Gallazzi et al. (2005), with 0.12 dex of scatter.

A template redder than its type is partly old and partly metal-rich: the slope moves both. `spectra` draws lines from the
same numbers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from armillary.engine.data.simulate.population import REDSHIFTS, Population
from armillary.engine.data.simulate.seds import colour_table

__all__ = ["STELLAR_LABELS", "Stars", "luminosity_distance_cm", "stars_of"]

STELLAR_LABELS = {
    "log_mstar": "log10 of the stellar mass in solar masses",
    "log_ssfr": "log10 of the star-formation rate by stellar mass, 1/yr",
    "tage_mw": "mass-weighted age, Gyr",
    "ln_z_mw": "natural logarithm of the mass-weighted metallicity, a mass fraction",
}

REST_FILTERS = ("decam2014-g", "decam2014-r", "decam2014-z")
SUN_Z = 4.50  # absolute AB magnitude of the Sun in z (Willmer 2018)
SOLAR_METALLICITY = 0.02  # as Gallazzi et al. (2005) have it
TYPE_SLOPE = 0.06  # scatter of the slopes in `population`
LOG_SSFR = ((0.0, 0.3, 1.0, 2.0, 3.0), (-12.2, -11.5, -10.6, -10.05, -9.4))  # by type, at log M = 10.5
AGE_SHARE = ((0.0, 1.0, 2.0, 3.0), (0.78, 0.58, 0.45, 0.30))  # of the age of the universe, by type
GRID = 600


@dataclass(frozen=True)
class Stars:
    """Stellar populations of one galaxy's bulge and disk; each array is [2], in that order.

    Attributes:
        redshift: Cosmological redshift.
        kind: Position in the template sequence.
        slope: Spectral tilt.
        ebv: Colour excess of the stars.
        mass: Solar masses.
        ssfr: Star-formation rate by mass, 1/yr.
        age: Gyr.
        metallicity: log10 of the metal mass fraction in solar units.
    """

    redshift: float
    kind: np.ndarray
    slope: np.ndarray
    ebv: np.ndarray
    mass: np.ndarray
    ssfr: np.ndarray
    age: np.ndarray
    metallicity: np.ndarray

    def labels(self) -> dict[str, float]:
        """What `STELLAR_LABELS` names, of the whole galaxy."""
        total = float(self.mass.sum())
        metals = SOLAR_METALLICITY * float((self.mass * 10**self.metallicity).sum()) / total
        return {
            "log_mstar": math.log10(total),
            "log_ssfr": math.log10(float((self.mass * self.ssfr).sum()) / total),
            "tage_mw": float((self.mass * self.age).sum()) / total,
            "ln_z_mw": math.log(metals),
        }


def stars_of(population: Population, index: int, rng: np.random.Generator) -> Stars:
    """Draw the stellar populations of one galaxy.

    Args:
        population: Its last band is taken for z.
        index: Which galaxy.
        rng: The galaxy's own generator; eight normal numbers are taken from it.
    """
    p, z = population, float(population.redshift[index])
    kind = np.array([p.type_bulge[index], p.type_disk[index]])
    slope = np.array([p.slope_bulge[index], p.slope_disk[index]])
    share = np.clip([p.share_bulge[index], 1 - p.share_bulge[index]], 1e-9, 1)
    draw = rng.standard_normal((4, 2))
    redness = slope / TYPE_SLOPE

    rest = colour_table(REST_FILTERS)(kind, np.zeros(2), slope)
    luminosity = share * 10 ** (-0.4 * (float(p.absolute[index]) - SUN_Z))
    mass = luminosity * 10 ** (-0.223 + 0.689 * (rest[:, 0] - rest[:, 1]) - 0.15 + 0.08 * draw[0])
    log_mass = math.log10(mass.sum())

    # A slope of one sigma moves age and metallicity together by .6 of their scatter, the rest is not seen in colours.
    share_of_time = np.interp(kind, *AGE_SHARE) + 0.06 * (log_mass - 10.5)
    age = age_of_universe(z) * np.clip(share_of_time * np.exp(0.15 * (0.6 * redness + 0.8 * draw[1])), 0.1, 0.95)
    relation = -0.25 + 0.4 * math.tanh((log_mass - 10.1) / 0.5)
    metallicity = np.clip(relation + np.array([0.05, -0.05]) + 0.12 * (0.6 * redness + 0.8 * draw[2]), -1.5, 0.4)

    scatter = np.interp(kind, (0.3, 1.0), (0.35, 0.2))
    log_ssfr = np.interp(kind, *LOG_SSFR) - 0.15 * (log_mass - 10.5) + scatter * draw[3]
    return Stars(
        redshift=z,
        kind=kind,
        slope=slope,
        ebv=np.array([0.0, p.ebv_disk[index]]),
        mass=mass,
        ssfr=10**log_ssfr,
        age=age,
        metallicity=metallicity,
    )


def age_of_universe(redshift: float) -> float:
    """Gyr, in the cosmology of `population`."""
    grid, ages, _ = _cosmology()
    return float(np.interp(redshift, grid, ages))


def luminosity_distance_cm(redshift: float) -> float:
    """Luminosity distance in centimetres, in the cosmology of `population`."""
    grid, _, distances = _cosmology()
    return float(np.interp(redshift, grid, distances))


@functools.cache
def _cosmology() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from astropy.cosmology import FlatLambdaCDM

    cosmology = FlatLambdaCDM(H0=70, Om0=0.3)
    grid = np.linspace(REDSHIFTS[0], REDSHIFTS[1], GRID)
    return grid, cosmology.age(grid).value, cosmology.luminosity_distance(grid).to("cm").value
