"""Spectra from one wavelength grid to another, conserving flux, with their inverse variance.

Formula (Carnall 2017, SpectRes, arXiv:1705.05165, equations 1 to 5; own implementation), for new pixel j, old pixels i
and overlaps w_ij, the wavelengths in angstrom that both cover:

    flux_j = sum_i w_ij flux_i / sum_i w_ij            sums over the old pixels that carry data (ivar > 0)
    ivar_j = (sum_i w_ij)^2 / sum_i (w_ij^2 / ivar_i)

The flux is a density per angstrom, so sum(flux x width) is the same on both grids wherever every old pixel carries
data. Two new pixels that share an old one have correlated noise, which the inverse variance of each does not say: on a
grid finer than the old one the pixels look as noisy as the old, and averaging them gains less than it seems to.

Grids are those of vacuum wavelengths; nothing here converts from air.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from armillary.engine.data.format.survey import WaveGrid

__all__ = ["pixel_edges", "rebin", "resample"]

SAME_EDGE = 1e-6  # of a pixel: edges closer than this differ by rounding only
FULL = 1e-9  # of a pixel: rounding of a sum of overlaps


def pixel_edges(wave: ArrayLike, *, log: bool = False) -> NDArray[np.float64]:
    """Edges of pixels: half-way between centres; the outer pixels are as wide as the distance to their neighbour.

    Args:
        wave: [L] angstrom, increasing, L at least 2.
        log: Half-way in log(wavelength) instead, as for grids of constant velocity.

    Returns:
        [L + 1] angstrom.

    Raises:
        ValueError: They are not finite, not increasing, fewer than 2, or not positive where `log`.
    """
    x = np.asarray(wave, np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"wavelengths: must be a vector of at least 2, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"wavelengths: pixel {int(np.argmin(np.isfinite(x)))} is not finite")
    if not (np.diff(x) > 0).all():
        raise ValueError(f"wavelengths: must increase, and do not at pixel {int(np.argmin(np.diff(x) > 0)) + 1}")
    if log:
        if x[0] <= 0:
            raise ValueError(f"wavelengths: must be positive for edges half-way in log, the first is {x[0]:g}")
        x = np.log10(x)
    middle = (x[1:] + x[:-1]) / 2
    edges = np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])
    return 10.0**edges if log else edges


def rebin(
    flux: ArrayLike, ivar: ArrayLike, old: ArrayLike, new: ArrayLike, *, coverage: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Rebin spectra between pixels given by their edges. Equal pixels are copied: exactly so in float32.

    Args:
        flux: [..., L] density per angstrom; anything where ivar is 0.
        ivar: [..., L] inverse variance, 0 = no data.
        old: [L + 1] edges of the pixels, angstrom, increasing.
        new: [M + 1] edges of the pixels to make.
        coverage: Share of a new pixel that old pixels with data must cover; with less it carries no data. Its flux is
            the mean over the covered part.

    Returns:
        flux and ivar, each [..., M] in the dtype of `flux` (float32 or float64); both 0 where there is no data.

    Raises:
        ValueError: Shapes do not fit, edges do not increase, ivar is negative, or coverage is outside ]0, 1].
    """
    values, weights = np.asarray(flux), np.asarray(ivar)
    before, after = np.asarray(old, np.float64), np.asarray(new, np.float64)
    for name, x in (("old", before), ("new", after)):
        if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all() or not (np.diff(x) > 0).all():
            raise ValueError(f"{name}: edges must be a finite, increasing vector of at least 2")
    if values.shape != weights.shape or values.ndim < 1 or values.shape[-1] != len(before) - 1:
        raise ValueError(
            f"flux and ivar: must be [..., {len(before) - 1}] for {len(before)} edges, got {values.shape} and "
            f"{weights.shape}"
        )
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage: must be above 0 and at most 1, got {coverage}")
    if (weights < 0).any():
        raise ValueError(f"ivar: must be >= 0, its smallest is {weights.min():g}")
    dtype = np.float32 if values.dtype.newbyteorder("=") == np.float32 else np.float64
    shape = (*values.shape[:-1], len(after) - 1)
    flux_out, ivar_out = np.zeros(shape, dtype), np.zeros(shape, dtype)

    after = _snap(after, before)
    cuts = np.union1d(before, after)
    cuts = cuts[(cuts >= max(before[0], after[0])) & (cuts <= min(before[-1], after[-1]))]
    if len(cuts) < 2:
        return flux_out, ivar_out
    width = np.diff(cuts)  # of pieces, each within one old and one new pixel
    source = np.searchsorted(before, cuts[:-1], side="right") - 1
    target = np.searchsorted(after, cuts[:-1], side="right") - 1
    first = np.flatnonzero(np.diff(target, prepend=-1))
    place = np.repeat(np.arange(len(first)), np.diff(first, append=len(target)))

    good = (weights > 0) & np.isfinite(weights) & np.isfinite(values)
    overlap = np.where(good[..., source], width, 0.0)
    covered = np.add.reduceat(overlap, first, axis=-1)
    filled = covered >= (coverage - FULL) * np.diff(after)[target[first]]
    share = overlap / np.where(filled, covered, 1.0)[..., place]
    variance = 1 / np.where(good, weights, 1.0).astype(np.float64)
    mean = np.add.reduceat(share * np.where(good, values, 0.0)[..., source], first, axis=-1)
    spread = np.add.reduceat(share**2 * variance[..., source], first, axis=-1)
    flux_out[..., target[first]] = np.where(filled, mean, 0.0)
    ivar_out[..., target[first]] = np.where(filled, 1 / np.where(filled, spread, 1.0), 0.0)
    return flux_out, ivar_out


def resample(
    flux: ArrayLike, ivar: ArrayLike, old: WaveGrid, new: WaveGrid, *, coverage: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Rebin spectra between grids; see `rebin`. Edges are half-way in log for grids of kind "log10".

    Raises:
        ValueError: Shapes do not fit, ivar is negative, or coverage is outside ]0, 1].
    """
    edges = [pixel_edges(grid.angstrom(), log=grid.kind == "log10") for grid in (old, new)]
    return rebin(flux, ivar, edges[0], edges[1], coverage=coverage)


def _snap(edges: np.ndarray, onto: np.ndarray) -> np.ndarray:
    """The edges, moved onto those of the other grid from which only rounding separates them."""
    right = np.clip(np.searchsorted(onto, edges), 1, len(onto) - 1)
    nearest = np.where(edges - onto[right - 1] < onto[right] - edges, right - 1, right)
    narrow = np.minimum(_narrowest(edges), _narrowest(onto)[nearest])
    return np.where(np.abs(edges - onto[nearest]) < SAME_EDGE * narrow, onto[nearest], edges)


def _narrowest(edges: np.ndarray) -> np.ndarray:
    """Width of the narrower of the pixels beside each edge."""
    width = np.diff(edges)
    return np.minimum(np.append(width, np.inf), np.insert(width, 0, np.inf))
