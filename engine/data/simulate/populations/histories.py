"""Galaxies with masses, haloes and star-formation histories: what was, before there is light.

- Stellar mass and redshift: uniform in comoving volume; a Schechter function of log M* = 10.85 and slope -1.4 whose density
  falls as (1 + z)^-1.6, a rough description of Weaver et al. (2023).
- Halo mass: the inverse of the mean relation of Moster, Naab & White (2013, their equations 2 and 11 to 14) at that redshift. At
  a given stellar mass, haloes that assembled early are lighter: log M_halo = mean - 0.18 x + 0.10 n, with x the
  standardised deviate of the formation time and n normal.
- Assembly: M(z') = M exp(-alpha (z' - z)) (Wechsler et al. 2002), alpha = 0.8 (M / 10^12.5)^0.12 10^(-0.12 x).
- Star formation: a delayed exponential (t - t_0) exp(-(t - t_0) / tau) that starts about when the halo had a twentieth of its
  mass and whose tau is a multiple of the time from then to half of it: short in massive galaxies, long in light ones. So the history
  tells of x, and with the stellar mass of the halo. On it: a log-normal wander of 0.25 dex, correlated over a gigayear;
  in a third of the galaxies a burst of 1 to 30 % of the mass; quenching, more likely in massive and in early haloes.
- Metallicity by mass (Gallazzi et al. 2005), lower at high redshift; dust by mass and star formation. Slopes and scatters are rough.

Shape legend: N galaxies, T fine bins of cosmic time from the beginning to t(z).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

__all__ = ["FINE_BINS", "REDSHIFTS", "Cosmology", "Histories", "cosmology", "draw_histories", "mean_halo_mass"]

FINE_BINS = 144
REDSHIFTS = (0.02, 3.0)
LOG_MASS = (7.5, 12.2)
KNEE, SLOPE, EVOLUTION = 10.85, -1.4, -1.6
LEAST_MASS_TO_LIGHT = 0.25  # Msun/Lsun in i, as observed: lighter galaxies that would be seen all the same are left out
SUN_I = 4.53  # absolute AB magnitude (Willmer 2018)
BURSTY, WANDER_DEX, WANDER_GYR = 0.35, 0.25, 1.0
EARLIEST_REDSHIFT = 15.0
RECENT_GYR = 0.1


@dataclass(frozen=True, eq=False)
class Cosmology:
    """Times and distances on a grid of redshifts: FlatLambdaCDM(H0=67.77, Om0=0.307115), that of SuperMock.

    Attributes:
        redshift: [G], increasing.
        age: [G] Gyr since the beginning.
        modulus: [G] distance modulus.
        volume: [G] comoving volume a unit of redshift, of arbitrary scale.
    """

    redshift: np.ndarray
    age: np.ndarray
    modulus: np.ndarray
    volume: np.ndarray

    def age_at(self, redshift: np.ndarray) -> np.ndarray:
        """Gyr since the beginning."""
        return np.interp(redshift, self.redshift, self.age)

    def distance_cm(self, redshift: np.ndarray) -> np.ndarray:
        """Luminosity distance."""
        return 10 ** (0.2 * np.interp(redshift, self.redshift, self.modulus) + 1) * 3.0857e18


@functools.cache
def cosmology() -> Cosmology:
    """The grid."""
    from astropy.cosmology import FlatLambdaCDM

    model = FlatLambdaCDM(H0=67.77, Om0=0.307115)
    z = np.concatenate([np.linspace(0.01, 4.0, 800), np.linspace(4.05, EARLIEST_REDSHIFT + 1, 240)])
    return Cosmology(z, model.age(z).value, model.distmod(z).value, model.differential_comoving_volume(z).value)


@dataclass(frozen=True, eq=False)
class Histories:
    """N galaxies.

    Attributes:
        redshift: [N].
        age: [N] Gyr, t(z): cosmic time of the observation.
        stellar_mass: [N] Msun alive at t(z).
        halo_mass: [N] Msun.
        half_mass_time: [N] Gyr: cosmic time when the halo had half of that.
        formed: [N, T] share of all stars ever formed, by bins of equal time from 0 to t(z).
        metallicity: [N] log10 of the metal mass fraction in solar units.
        dust: [N] A_V of the stars in magnitudes.
    """

    redshift: np.ndarray
    age: np.ndarray
    stellar_mass: np.ndarray
    halo_mass: np.ndarray
    half_mass_time: np.ndarray
    formed: np.ndarray
    metallicity: np.ndarray
    dust: np.ndarray

    def formed_before(self, lookback: np.ndarray) -> np.ndarray:
        """[N, K] share of the stars that are older than each of K lookback times in Gyr."""
        total = np.concatenate([np.zeros((len(self.age), 1)), np.cumsum(self.formed, axis=1)], axis=1)
        place = np.clip((1 - lookback / self.age[:, None]) * FINE_BINS, 0, FINE_BINS)
        i = np.minimum(place.astype(int), FINE_BINS - 1)
        return np.take_along_axis(total, i, 1) + (place - i) * np.take_along_axis(self.formed, i, 1)

    def recent_share(self) -> np.ndarray:
        """[N] share of the stars that formed in the last 100 Myr."""
        return 1 - self.formed_before(np.array([RECENT_GYR]))[:, 0]

    def mean_age(self) -> np.ndarray:
        """[N] Gyr, weighted by the mass formed."""
        lookback = 1 - (np.arange(FINE_BINS) + 0.5) / FINE_BINS
        return self.age * (self.formed @ lookback)


def draw_histories(count: int, rng: np.random.Generator, magnitude_limit: float) -> Histories:
    """Draw candidates that may be brighter than a limit in i; most of them are fainter all the same.

    Args:
        count: N.
        rng: Every number is drawn from it.
        magnitude_limit: AB magnitude in i.
    """
    z, log_mass = _redshifts_and_masses(count, rng, magnitude_limit)
    now = cosmology().age_at(z)
    early = rng.standard_normal(count)
    log_halo = mean_halo_mass(log_mass, z) - 0.18 * early + 0.10 * rng.standard_normal(count)
    alpha = 0.8 * 10 ** (0.12 * (log_halo - 12.5) - 0.12 * early)
    half = cosmology().age_at(np.minimum(z + np.log(2) / alpha, EARLIEST_REDSHIFT))
    begin = cosmology().age_at(np.minimum(z + np.log(20) / alpha, EARLIEST_REDSHIFT))

    start = np.clip(begin * np.exp(0.15 * rng.standard_normal(count)), 0.1, 0.8 * now)
    stretch = 10 ** (0.25 - 0.35 * np.clip(log_mass - 10.2, -1.5, 1.5) + 0.12 * rng.standard_normal(count))
    tau = np.clip((half - begin) * stretch, 0.1, 20.0)
    time = (np.arange(FINE_BINS) + 0.5) / FINE_BINS * now[:, None]
    since = np.maximum(time - start[:, None], 0)
    rate = since * np.exp(-since / tau[:, None]) * 10 ** (WANDER_DEX * _wander(now, rng))

    likely = 0.85 / (1 + np.exp(-(log_halo - 12.5 + 0.15 * early) / 0.3))
    quenched = rng.random(count) < likely
    when = start + (now - start) * rng.uniform(0.3, 1.0, count)
    fade = 0.3 * np.exp(0.5 * rng.standard_normal(count))
    after = np.where(quenched[:, None], np.maximum(time - when[:, None], 0) / fade[:, None], 0)
    rate *= np.exp(-np.minimum(after, 12.0))
    rate /= rate.sum(1, keepdims=True)

    size = np.where(rng.random(count) < BURSTY, 10 ** rng.uniform(-2, -0.5, count), 0)
    at = start + (now - start) * rng.beta(2, 1.2, count)
    width = 0.15 * np.exp(0.4 * rng.standard_normal(count))
    burst = np.exp(-0.5 * ((time - at[:, None]) / width[:, None]) ** 2)
    rate += size[:, None] * burst / np.maximum(burst.sum(1, keepdims=True), 1e-12)
    rate /= rate.sum(1, keepdims=True)

    metals = -0.25 + 0.4 * np.tanh((log_mass - 10.1) / 0.5) - 0.12 * z + 0.12 * rng.standard_normal(count)
    drawn = Histories(
        redshift=z,
        age=now,
        stellar_mass=10**log_mass,
        halo_mass=10**log_halo,
        half_mass_time=half,
        formed=rate,
        metallicity=np.clip(metals, -1.6, 0.4),
        dust=np.zeros(count),
    )
    activity = np.log10(np.maximum(drawn.recent_share(), 1e-6) / RECENT_GYR) - 9  # of the specific rate, 1/yr
    mean = 0.12 + 0.7 * 10 ** (0.3 * (log_mass - 10.3)) / (1 + np.exp(-(activity + 10.8) / 0.3))
    drawn.dust[:] = np.clip(mean * np.exp(0.4 * rng.standard_normal(count) - 0.08), 0, 3.5)
    return drawn


def mean_halo_mass(log_mass: np.ndarray, redshift: np.ndarray) -> np.ndarray:
    """log10 of the halo mass in Msun whose mean galaxy has this log10 stellar mass; 15.5 at most.

    Moster, Naab & White (2013), equation 2 and table 1, inverted.
    """
    grid = np.linspace(9.5, 15.5, 301)
    x = (redshift / (1 + redshift))[:, None]
    ratio = 10 ** (grid - (11.590 + 1.195 * x))
    share = 2 * (0.0351 - 0.0247 * x) / (ratio ** -(1.376 - 0.826 * x) + ratio ** (0.608 + 0.329 * x))
    log_star = np.maximum.accumulate(grid + np.log10(share), axis=1)
    i = np.clip((log_star < log_mass[:, None]).sum(1), 1, len(grid) - 1)[:, None]
    low, high = (np.take_along_axis(log_star, k, 1)[:, 0] for k in (i - 1, i))
    part = np.clip((log_mass - low) / np.maximum(high - low, 1e-9), 0, 1)
    return grid[i[:, 0] - 1] + part * (grid[1] - grid[0])


def _redshifts_and_masses(count: int, rng: np.random.Generator, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Redshifts and log10 of stellar masses, drawn in cells of a grid and evenly within a cell."""
    edges_z, edges_m = np.linspace(*REDSHIFTS, 151), np.linspace(*LOG_MASS, 189)
    z, m = (edges_z[1:] + edges_z[:-1]) / 2, (edges_m[1:] + edges_m[:-1]) / 2
    ratio = 10 ** (m - KNEE)
    density = np.outer(
        (1 + z) ** EVOLUTION * np.interp(z, cosmology().redshift, cosmology().volume), ratio ** (SLOPE + 1)
    )
    density *= np.exp(-ratio)
    modulus = np.interp(z, cosmology().redshift, cosmology().modulus) - 2.5 * np.log10(1 + z)
    density[m < 0.4 * (SUN_I + modulus - limit)[:, None] + np.log10(LEAST_MASS_TO_LIGHT)] = 0
    total = np.cumsum(density.ravel())
    if not total[-1] > 0:
        raise ValueError(f"magnitude_limit: no galaxy is brighter than {limit:g}; choose a fainter one")
    i, j = np.unravel_index(np.searchsorted(total, rng.random(count) * total[-1], side="right"), density.shape)
    u, v = rng.random((2, count))
    return edges_z[i] + u * (edges_z[1] - edges_z[0]), edges_m[j] + v * (edges_m[1] - edges_m[0])


def _wander(now: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[N, T] normal numbers, correlated over `WANDER_GYR`."""
    keep = np.exp(-now / FINE_BINS / WANDER_GYR)
    steps = rng.standard_normal((FINE_BINS, len(now)))
    out = np.empty_like(steps)
    out[0] = steps[0]
    for t in range(1, FINE_BINS):
        out[t] = keep * out[t - 1] + np.sqrt(1 - keep**2) * steps[t]
    return out.T
