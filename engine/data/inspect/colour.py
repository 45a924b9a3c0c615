"""Colour composites of cutouts for the eye.

Shape legend: C bands, H x W pixels.
"""

from __future__ import annotations

import numpy as np

from armillary.engine.data.format.survey import Survey

__all__ = ["galaxy_picture", "lupton_rgb"]

BALANCE = {"g": 6.0, "r": 3.4, "i": 3.0, "z": 2.2}  # of nanomaggies; the Legacy Survey viewer's: galaxies look familiar
LINEAR_SIGMA = 2.0  # the curve turns from linear to logarithmic at this intensity, in sky noise,
WHITE_SIGMA = 90.0  # and reaches white at this one
BLACK_SIGMA = -0.5
MASKED = (70, 0, 80)  # no astronomical image is violet


def lupton_rgb(image: np.ndarray, valid: np.ndarray | None, survey: Survey) -> np.ndarray:
    """Colour composite after Lupton et al. (2004, PASP 116, 133): one asinh curve for the mean of the channels.

    All channels are scaled by f(I) / I, so that hues survive in bright cores. The last band becomes red, the middle one
    green, the first blue; one band gives grey. Display pictures (unit "count") are shown as they are.

    Args:
        image: [C, H, W] in the survey's flux unit, C at least 1.
        valid: [C, H, W] bool, False where a pixel carries no data, or None; pixels without data in any band are violet.
        survey: Its bands, unit and noise.

    Returns:
        [H, W, 3] uint8, rows in the order of the image: for fluxes the first row is the lowest on the sky.
    """
    count = len(image)
    finite = np.nan_to_num(image)
    if survey.unit == "count":
        top = 255.0 if finite.max(initial=0) <= 255 else 65_535.0
        rgb = np.clip(finite[[0, count // 2, count - 1]] / top, 0, 1)
    else:
        chosen = [count - 1, count // 2, 0]
        scale = np.array([_balance(survey, band) for band in chosen])
        sky = np.array([survey.sky_sigma[band] or survey.statistics.std[band] / 20 or 1.0 for band in chosen])
        noise = float((sky * scale).mean())
        x = np.maximum(finite[chosen] * scale[:, None, None] / noise - BLACK_SIGMA, 0)
        intensity = np.maximum(x.mean(0), 1e-6)
        rgb = x * (np.arcsinh(intensity / LINEAR_SIGMA) / np.arcsinh(WHITE_SIGMA / LINEAR_SIGMA) / intensity)
        rgb /= np.maximum(rgb.max(0), 1)  # a saturated core keeps its hue
    out = (255 * rgb + 0.5).astype(np.uint8).transpose(1, 2, 0)
    if valid is not None:
        out[~valid.any(0)] = MASKED
    return out


def galaxy_picture(image: np.ndarray, valid: np.ndarray | None, survey: Survey) -> np.ndarray:
    """Colour composite as on the sky: the first row of a flux image is its lowest, that of a display picture its top.

    Args:
        image: [C, H, W] in the survey's flux unit.
        valid: [C, H, W] bool, False where a pixel carries no data; None where every pixel does.
        survey: Its unit and noise.

    Returns:
        [H, W, 3] uint8.
    """
    picture = lupton_rgb(image, valid, survey)
    return picture if survey.unit == "count" else picture[::-1]


def _balance(survey: Survey, band: int) -> float:
    """Weight of a band: the viewer's for nanomaggies, else such that a typical galaxy is white."""
    known = BALANCE.get(survey.bands[band])
    if survey.unit == "nanomaggy" and known is not None:
        return known
    return 1.0 / (survey.statistics.std[band] or 1.0)
