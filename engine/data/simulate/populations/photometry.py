"""What LSST and SPHEREx measure: fluxes in microjansky and their errors.

LSST: the throughputs of 2023 (speclite's lsst2023-*), with the atmosphere. SPHEREx: 102 channels, six bands of 17, each a
top hat in the logarithm of wavelength; the real channels differ over the sky and have wings.

Depths are 5 sigma AB magnitudes: LSST's design after ten years (26.1, 27.4, 27.5, 26.8, 26.1, 24.9 in ugrizy; Ivezic et al. 2019)
less half a magnitude, since galaxies are not points; SPHEREx about what is expected of the whole mission (Dore et al. 2014 and later
estimates). They vary from galaxy to galaxy. Noise is Gaussian in flux: sky, and a calibration error of 1 % of the flux.

Shape legend: N galaxies, C channels, W wavelengths of the rest grid, O of the observed one.
"""

from __future__ import annotations

import functools

import numpy as np

from armillary.engine.data.simulate.populations.light import LOG_STEP, REST_WAVE

__all__ = ["CALIBRATION", "LSST_BANDS", "SED_MICRON", "channels", "measure", "observe", "sed_bins", "sky_errors"]

LSST_BANDS = tuple("ugrizy")
LSST_DEPTH = np.array([26.1, 27.4, 27.5, 26.8, 26.1, 24.9]) - 0.5
SPHEREX_EDGES = ((0.75, 1.11), (1.11, 1.64), (1.64, 2.42), (2.42, 3.82), (3.82, 4.42), (4.42, 5.0))  # micrometres
SPHEREX_DEPTH = np.repeat([19.5, 19.6, 19.7, 19.3, 18.2, 17.8], 17)
DEPTH_SCATTER = {"lsst": 0.10, "spherex": 0.15}  # of ln sigma, over galaxies
CALIBRATION = 0.01  # of the flux: what calibration and templates leave
OBSERVED_WAVE = np.exp(np.arange(np.log(2900.0), np.log(51_000.0), LOG_STEP))
SED_MICRON = {"rest": (0.1, 4.8), "observed": (0.35, 4.8)}
SED_POINTS = 120


@functools.cache
def channels() -> tuple[np.ndarray, np.ndarray]:
    """Weights [C, O] of f_nu at OBSERVED_WAVE, each row of sum 1, and effective wavelengths [C] in micrometres.

    Raises:
        ModuleNotFoundError: speclite is not installed.
    """
    import speclite.filters

    rows = []
    for band in LSST_BANDS:
        curve = speclite.filters.load_filter(f"lsst2023-{band}")
        rows.append(np.interp(OBSERVED_WAVE, curve.wavelength, curve.response, left=0, right=0))
    low, high = (OBSERVED_WAVE * np.exp(sign * LOG_STEP / 2) for sign in (-1, 1))
    for first, last in SPHEREX_EDGES:
        edges = np.geomspace(first, last, 18) * 1e4
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            rows.append(np.clip(np.log(np.minimum(high, end) / np.maximum(low, begin)) / LOG_STEP, 0, 1))
    weights = np.array(rows)  # photons of f_nu: dlog(lambda) R, and the grid is even in log(lambda)
    weights /= weights.sum(1, keepdims=True)
    return weights, np.exp(weights @ np.log(OBSERVED_WAVE)) * 1e-4


def observe(rest: np.ndarray, redshift: np.ndarray) -> np.ndarray:
    """[N, O] flux density at OBSERVED_WAVE, of [N, W] at REST_WAVE (1 + z); 0 beyond the rest grid's blue end."""
    shift = (np.log(OBSERVED_WAVE[0] / REST_WAVE[0]) - np.log1p(redshift)) / LOG_STEP
    whole = np.floor(shift).astype(int)
    part = (shift - whole)[:, None].astype(np.float32)
    index = whole[:, None] + np.arange(len(OBSERVED_WAVE))
    at = np.clip(index, 0, len(REST_WAVE) - 2)
    flux = np.take_along_axis(rest, at, 1) * (1 - part) + np.take_along_axis(rest, at + 1, 1) * part
    return np.where(index < 0, np.float32(0), flux)


@functools.cache
def sed_bins(frame: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights [P, W or O] that average f_nu over even bins of log wavelength, and their centres [P] in micrometres."""
    wave = REST_WAVE if frame == "rest" else OBSERVED_WAVE
    first, last = np.log(np.array(SED_MICRON[frame]) * 1e4)
    edges = np.linspace(first, last, SED_POINTS + 1)
    low, high = np.log(wave) - LOG_STEP / 2, np.log(wave) + LOG_STEP / 2
    overlap = np.minimum(high, edges[1:, None]) - np.maximum(low, edges[:-1, None])
    weights = np.maximum(overlap, 0)
    return weights / weights.sum(1, keepdims=True), np.exp((edges[1:] + edges[:-1]) / 2) * 1e-4


def sky_errors(count: int, rng: np.random.Generator) -> np.ndarray:
    """[N, C] sky noise in microjansky."""
    errors = []
    for name, depth in (("lsst", LSST_DEPTH), ("spherex", SPHEREX_DEPTH)):
        sigma = 10 ** (-0.4 * (depth - 23.9)) / 5
        errors.append(sigma * np.exp(DEPTH_SCATTER[name] * rng.standard_normal((count, 1))))
    return np.concatenate(errors, axis=1)


def measure(flux: np.ndarray, sky: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Measured fluxes and the errors that a catalogue would state, which know the measured flux only.

    Args:
        flux: [N, C] true.
        sky: [N, C] sky noise, in the same unit.
        rng: Draws the noise.
    """
    measured = flux + np.hypot(sky, CALIBRATION * flux) * rng.standard_normal(flux.shape)
    return measured, np.hypot(sky, CALIBRATION * measured)
