"""A magnitude-limited galaxy population: luminosities, redshifts, sizes, shapes and colours of bulges and disks.

Every draw is keyed by (seed, stream, block), where a block is a fixed number of candidates, so that the first n galaxies
of a population do not depend on how many are asked for.

Shape legend: N galaxies, C bands.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy.special import gammainc, gammaincinv

from armillary.engine.data.simulate.seds import attenuation, colour_table

__all__ = ["DEFAULT_SEED", "Population", "draw_population", "half_light_radius", "keyed_generator"]

BLOCK = 20_000  # candidates drawn at a time
DEFAULT_SEED = 42017  # the population was tuned on other seeds
REDSHIFTS = (0.02, 0.6)
ABSOLUTE = (-24.8, -18.0)  # rest-frame magnitude in the last band
KNEE = -22.5  # Schechter M*, faint-end slope -1
BRIGHTEST = 14.0  # apparent magnitude in the last band
MAX_DISK_ARCSEC = 9.0
SERSIC = (1.0, 2.0, 3.0, 4.0)  # GalSim tabulates each index once a process; a continuum would be slow
NOTHING = 1e-9  # share of light below which a component is dark


@dataclass(frozen=True)
class Population:
    """Intrinsic properties of N galaxies.

    Attributes:
        redshift: [N].
        absolute: [N] rest-frame magnitude in the last band, before dust.
        early: [N] bool, True for ellipticals and lenticulars.
        flux_bulge: [N, C] flux in nanomaggies.
        flux_disk: [N, C] flux in nanomaggies.
        radius_bulge: [N] half-light radius along the major axis, arcsec.
        radius_disk: [N] half-light radius along the major axis, arcsec.
        sersic_bulge: [N] Sersic index.
        axis_bulge: [N] minor over major axis.
        axis_disk: [N] minor over major axis.
        share_bulge: [N] share of the bulge in the rest-frame luminosity of `absolute`.
        type_bulge: [N] position in the template sequence; see `seds`.
        type_disk: [N] position in the template sequence.
        slope_bulge: [N] spectral tilt; see `ColourTable`.
        slope_disk: [N] spectral tilt.
        ebv_disk: [N] colour excess E(B-V) of the disk's stars; bulges have no dust.
    """

    redshift: np.ndarray
    absolute: np.ndarray
    early: np.ndarray
    flux_bulge: np.ndarray
    flux_disk: np.ndarray
    radius_bulge: np.ndarray
    radius_disk: np.ndarray
    sersic_bulge: np.ndarray
    axis_bulge: np.ndarray
    axis_disk: np.ndarray
    share_bulge: np.ndarray
    type_bulge: np.ndarray
    type_disk: np.ndarray
    slope_bulge: np.ndarray
    slope_disk: np.ndarray
    ebv_disk: np.ndarray

    def __len__(self) -> int:
        """Number of galaxies."""
        return len(self.redshift)

    def flux(self) -> np.ndarray:
        """[N, C] total flux in nanomaggies."""
        return self.flux_bulge + self.flux_disk

    def bulge_fraction(self) -> np.ndarray:
        """[N] share of the bulge in the last band, as observed."""
        return self.flux_bulge[:, -1] / self.flux()[:, -1]

    def axis_ratio(self) -> np.ndarray:
        """[N] minor over major axis, light-weighted in the last band."""
        b = self.bulge_fraction()
        return b * self.axis_bulge + (1 - b) * self.axis_disk

    @classmethod
    def join(cls, parts: list[Population], count: int) -> Population:
        """The first `count` galaxies of several populations."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts])[:count] for f in fields(cls)})


def keyed_generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Random numbers that depend on nothing but their key: Philox, whose keys need no hashing and cannot collide.

    Args:
        seed: 0 to 2^64 - 1.
        stream: What the numbers are for, 0 to 2^16 - 1.
        index: Which one of them, 0 to 2^48 - 1.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, (stream << 48) + index], np.uint64)))


def draw_population(
    count: int,
    seed: int,
    *,
    filters: tuple[str, ...],
    magnitude_limit: float,
    stream: int = 0,
) -> Population:
    """Draw galaxies uniformly in comoving volume from a Schechter function, limited in the last band's magnitude.

    Late types are disks, bluer the smaller their bulge, that redden with inclination; early types are bulges with an
    often old disk. Sizes follow R ~ L^0.35 (late) and L^0.55 (early) with 0.3 of scatter in ln R.

    Args:
        count: Galaxies wanted.
        seed: Keys every draw, with `stream` and the block number.
        filters: speclite names of the bands.
        magnitude_limit: Faintest apparent magnitude in the last band.
        stream: Sets populations of the same seed apart.

    Raises:
        ValueError: `count` is negative, or the limits leave nothing to draw.
    """
    if count < 0:
        raise ValueError(f"count: must be at least 0, got {count}")
    parts: list[Population] = []
    found = block = 0
    while found < max(count, 1):
        part = _draw_block(keyed_generator(seed, stream, block), filters, BRIGHTEST, magnitude_limit)
        block += 1
        found += len(part)
        parts.append(part)
        if block == 3 and not found:
            raise ValueError(
                f"magnitude limits: no galaxy among {3 * BLOCK} lies between {BRIGHTEST} and {magnitude_limit}; "
                "choose a fainter magnitude_limit"
            )
    return Population.join(parts, count)


def _draw_block(rng: np.random.Generator, filters: tuple[str, ...], bright: float, limit: float) -> Population:
    from astropy.cosmology import FlatLambdaCDM

    cosmology = FlatLambdaCDM(H0=70, Om0=0.3)
    table = colour_table(filters)
    m = BLOCK

    grid = np.linspace(*REDSHIFTS, 1000)
    z = _sample(rng, grid, cosmology.differential_comoving_volume(grid).value, m)
    magnitudes = np.linspace(*ABSOLUTE, 1000)
    absolute = _sample(rng, magnitudes, np.exp(-(10 ** (-0.4 * (magnitudes - KNEE)))), m)
    modulus = np.interp(z, grid, cosmology.distmod(grid).value)
    kpc_per_arcsec = np.interp(z, grid, cosmology.angular_diameter_distance(grid).value) * 1e3 / 206_265

    early = rng.random(m) < 0.1 + 0.65 / (1 + np.exp((absolute + 21.8) / 0.6))
    bulge = np.where(early, rng.beta(6, 2, m), rng.beta(1.3, 5, m))
    old = np.clip(np.abs(0.12 * rng.standard_normal(m)), 0, 1)  # types near E
    young = np.clip(2.4 - 3.5 * bulge + 0.5 * rng.standard_normal(m), 0.3, 3)  # the Hubble sequence: E to Im
    disk_type = np.where(early & (rng.random(m) < 0.7), old, young)
    slope_bulge, slope_disk = 0.06 * rng.standard_normal((2, m))  # age and metallicity that four templates lack

    axis_disk = np.sqrt(rng.random(m) ** 2 * (1 - 0.2**2) + 0.2**2)  # random inclination, intrinsic thickness 0.2
    axis_bulge = rng.uniform(0.55, 1, m)
    ebv = np.where(early, 0.02, 0.05 + 0.3 * np.log10(1 / axis_disk)) * np.exp(0.5 * rng.standard_normal(m))

    base = (absolute + modulus)[:, None]
    dust = attenuation(table.wavelength / (1 + z)[:, None], ebv[:, None])
    flux_bulge = _flux(base + table(old, z, slope_bulge)) * np.maximum(bulge, NOTHING)[:, None]
    flux_disk = _flux(base + table(disk_type, z, slope_disk) + dust) * np.maximum(1 - bulge, NOTHING)[:, None]
    apparent = 22.5 - 2.5 * np.log10((flux_bulge + flux_disk)[:, -1])

    luminosity = 10 ** (-0.4 * (absolute - KNEE))
    radius = np.where(early, 4.5 * luminosity**0.55, 5.5 * luminosity**0.35) * np.exp(0.3 * rng.standard_normal(m))
    arcsec = radius / kpc_per_arcsec
    drawn = Population(
        redshift=z,
        absolute=absolute,
        early=early,
        flux_bulge=flux_bulge,
        flux_disk=flux_disk,
        radius_bulge=np.maximum(np.where(early, 0.8, 0.22) * arcsec, 0.08),
        radius_disk=np.maximum(np.where(early, 1.4, 1.0) * arcsec, 0.15),
        sersic_bulge=np.where(early, 4.0, rng.choice(SERSIC, m)),
        axis_bulge=axis_bulge,
        axis_disk=axis_disk,
        share_bulge=bulge,
        type_bulge=old,
        type_disk=disk_type,
        slope_bulge=slope_bulge,
        slope_disk=slope_disk,
        ebv_disk=ebv,
    )
    keep = (apparent < limit) & (apparent > bright) & (drawn.radius_disk < MAX_DISK_ARCSEC)
    return Population(**{f.name: getattr(drawn, f.name)[keep] for f in fields(Population)})


def _sample(rng: np.random.Generator, grid: np.ndarray, density: np.ndarray, count: int) -> np.ndarray:
    cumulative = np.cumsum(density)
    return np.interp(rng.random(count), cumulative / cumulative[-1], grid)


def _flux(magnitude: np.ndarray) -> np.ndarray:
    return 10 ** (-0.4 * (magnitude - 22.5))


def half_light_radius(population: Population) -> np.ndarray:
    """Major-axis radius of the ellipse that holds half of the last band's light, before the PSF, in arcsec.

    Bulge and disk are added with their own Sersic curves of growth; that their axis ratios differ is neglected.

    Returns:
        [N] arcsec.
    """
    share = population.bulge_fraction()
    low = np.minimum(population.radius_bulge, population.radius_disk) * 0.1
    high = np.maximum(population.radius_bulge, population.radius_disk) * 10
    for _ in range(50):
        middle = np.sqrt(low * high)
        inside = share * _growth(middle / population.radius_bulge, population.sersic_bulge) + (1 - share) * _growth(
            middle / population.radius_disk, np.ones(1)
        )
        low, high = np.where(inside < 0.5, middle, low), np.where(inside < 0.5, high, middle)
    return np.sqrt(low * high)


def _growth(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Share of a Sersic profile's light inside x half-light radii."""
    return gammainc(2 * index, gammaincinv(2 * index, 0.5) * x ** (1 / index))
