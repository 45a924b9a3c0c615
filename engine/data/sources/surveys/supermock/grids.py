"""Grids that SuperMock's long vectors are brought to: wavelengths of the SED, times of the star-formation history."""

from __future__ import annotations

import functools

import numpy as np

__all__ = ["HUBBLE", "age_at", "at_times", "history_on_relative_times", "named", "resample_sed", "sed_grid"]

HUBBLE = 0.6777
GRID_MICRON = (0.09, 35.0, 500)  # first, last, points, evenly in the logarithm


def sed_grid() -> tuple[np.ndarray, np.ndarray]:
    """Wavelengths [500] of the grid and edges [501] of its bins, micrometres."""
    first, last, points = GRID_MICRON
    step = np.log(last / first) / (points - 1)
    return first * np.exp(step * np.arange(points)), first * np.exp(step * (np.arange(points + 1) - 0.5))


def resample_sed(sed: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """Means over the bins of `sed_grid`, in the logarithm of wavelength: the light of narrow lines is kept.

    Args:
        sed: [L]; linear between its points.
        wave: [L] micrometres, increasing.

    Returns:
        [500] float32; NaN for bins that reach beyond `wave` or touch a value that is not finite.
    """
    edges, x = np.log(sed_grid()[1]), np.log(wave)
    known = np.isfinite(sed)
    values = np.where(known, sed, 0).astype(np.float64)
    means = np.diff(_integral(values, x, edges)) / np.diff(edges)
    touched = np.diff(_integral((~known).astype(np.float64), x, edges)) > 0
    outside = (edges[:-1] < x[0]) | (edges[1:] > x[-1])
    return np.where(touched | outside, np.nan, means).astype(np.float32)


def _integral(y: np.ndarray, x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Integral of a piecewise linear function from x[0] to each of `at`."""
    whole = np.concatenate([[0], np.cumsum((y[1:] + y[:-1]) / 2 * np.diff(x))])
    place = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    along = np.clip(at, x[0], x[-1]) - x[place]
    slope = (y[place + 1] - y[place]) / (x[place + 1] - x[place])
    return whole[place] + y[place] * along + slope * along**2 / 2


def history_on_relative_times(rate: np.ndarray, age: np.ndarray, now: float, bins: int) -> np.ndarray:
    """Means of a star-formation rate over even bins from the beginning to the time of observation.

    Args:
        rate: [T] at cosmic ages `age`; linear between them, and from 0 at the beginning to the first.
        age: [T] Gyr, positive and increasing.
        now: Cosmic age of the observation, Gyr; what comes later is not looked at.
        bins: Number of bins.

    Returns:
        [bins] float32 in the unit of `rate`; NaN where a value that is not finite is touched.
    """
    x, y = np.concatenate([[0.0], age]), np.concatenate([[0.0], rate.astype(np.float64)])
    edges = np.linspace(0, now, bins + 1)
    known = np.isfinite(y)
    means = np.diff(_integral(np.where(known, y, 0), x, edges)) / (now / bins)
    touched = np.diff(_integral((~known).astype(np.float64), x, edges)) > 0
    return np.where(touched, np.nan, means).astype(np.float32)


def named(values: np.ndarray, unit: str) -> tuple[str, ...]:
    """Names of components: as few digits as keep them apart."""
    for digits in range(4, 18):
        names = tuple(f"{v:.{digits}g} {unit}" for v in values.tolist())
        if len(set(names)) == len(names):
            break
    return names


def age_at(redshift: np.ndarray) -> np.ndarray:
    """Cosmic age in Gyr at redshifts up to 30."""
    return np.interp(redshift, *_cosmic_ages())


@functools.cache
def _cosmic_ages() -> tuple[np.ndarray, np.ndarray]:
    """Redshifts, increasing, and cosmic ages in Gyr: FlatLambdaCDM(H0=67.77, Om0=0.307115)."""
    from astropy.cosmology import FlatLambdaCDM

    redshift = np.expm1(np.linspace(0, np.log(31), 2000))
    return redshift, FlatLambdaCDM(H0=100 * HUBBLE, Om0=0.307115).age(redshift).value


def at_times(values: np.ndarray, times: np.ndarray, now: np.ndarray, log: bool = False) -> np.ndarray:
    """[n] rows of [n, T] at one time each, linear in the values or their logarithms."""
    if log:
        with np.errstate(divide="ignore"):
            values = np.log10(np.where(values > 0, values, np.nan))
    place = np.interp(now, times, np.arange(len(times)))
    i = np.minimum(place.astype(int), len(times) - 2)
    low, high = (np.take_along_axis(values, k[:, None], 1)[:, 0] for k in (i, i + 1))
    found = np.where(place == i, low, low + (high - low) * (place - i))
    return 10**found if log else found
