"""Noise and pixel statistics of a survey, measured in pieces and merged exactly.

Sums of a piece are taken about its own mean (Chan, Golub & LeVeque 1983) and merged in a fixed order, so that the result
does not depend on how many processes measured. No BLAS: its threads would change the last bits.

Shape legend: C bands, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from armillary.engine.data.format.survey import Statistics

__all__ = ["Moments", "SurveyMoments", "robust_sigma"]

MAD_TO_SIGMA = 1.4826  # of a normal distribution
CLIP_SIGMA = 3.0
CLIP_ROUNDS = 5
ASINH_SOFTENING = 3.0  # a = asinh(flux / (3 sky_sigma)); see `Statistics`


def robust_sigma(image: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Noise of the background of each band: the scaled median absolute deviation of pixels left by clipping.

    Pixels beyond three sigma of the median are dropped and both are measured again, five times at most, so that the
    galaxy in the middle counts little.

    Args:
        image: [C, H, W].
        valid: [C, H, W] bool, False where a pixel carries no data; None where every pixel does.

    Returns:
        [C] float64 in the unit of `image`; NaN for a band without valid pixels.
    """
    sigma = np.full(len(image), np.nan)
    for c, band in enumerate(image):
        pixels = (band.ravel() if valid is None else band[valid[c]]).astype(np.float64)
        for _ in range(CLIP_ROUNDS):
            if not pixels.size:
                break
            centre = np.median(pixels)
            deviation = np.abs(pixels - centre)
            sigma[c] = MAD_TO_SIGMA * np.median(deviation)
            keep = deviation <= CLIP_SIGMA * sigma[c]
            if keep.all() or sigma[c] == 0:
                break
            pixels = pixels[keep]
    return sigma


@dataclass
class Moments:
    """Count, mean and summed products of deviations of D-vectors.

    Attributes:
        count: Vectors measured.
        mean: [D].
        products: [D, D] sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    products: np.ndarray

    @classmethod
    def empty(cls, size: int) -> Moments:
        """Moments of nothing."""
        return cls(0, np.zeros(size), np.zeros((size, size)))

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Moments of vectors [D, N]."""
        if values.shape[1] == 0:
            return cls.empty(len(values))
        x = values.astype(np.float64)
        mean = x.mean(axis=1)
        deviation = x - mean[:, None]
        products = np.empty((len(x), len(x)))
        for i in range(len(x)):
            for j in range(i + 1):
                products[i, j] = products[j, i] = np.sum(deviation[i] * deviation[j])
        return cls(values.shape[1], mean, products)

    def part(self, index: int) -> Moments:
        """Moments of one component."""
        one = slice(index, index + 1)
        return Moments(self.count, self.mean[one], self.products[one, one])

    def merge(self, other: Moments) -> None:
        """Add the vectors of another measurement."""
        if other.count == 0:
            return
        count = self.count + other.count
        shift = other.mean - self.mean
        self.products = self.products + other.products + np.outer(shift, shift) * (self.count * other.count / count)
        self.mean = self.mean + shift * (other.count / count)
        self.count = count

    def covariance(self) -> np.ndarray:
        """[D, D] population covariance; zeros where nothing was measured."""
        return self.products / max(self.count, 1)


class VectorMoments:
    """Count, mean and squared deviations of every component of a vector; NaN components count as unknown.

    Args:
        size: Components.
    """

    def __init__(self, size: int) -> None:
        self.count, self.mean, self.squares = np.zeros(size), np.zeros(size), np.zeros(size)

    def add(self, value: np.ndarray) -> None:
        """Add one vector [size] (Welford 1962)."""
        known = ~np.isnan(value)
        x = value[known].astype(np.float64)
        self.count[known] += 1
        shift = x - self.mean[known]
        self.mean[known] += shift / self.count[known]
        self.squares[known] += shift * (x - self.mean[known])

    def merge(self, other: VectorMoments) -> None:
        """Add the vectors of another measurement."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        shift = other.mean - self.mean
        self.squares = self.squares + other.squares + shift**2 * (self.count * share)
        self.mean = self.mean + shift * share
        self.count = count

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and population standard deviation of each component, NaN where it was never known."""
        seen = self.count > 0
        std = np.sqrt(self.squares / np.maximum(self.count, 1))
        return tuple(np.where(seen, self.mean, np.nan).tolist()), tuple(np.where(seen, std, np.nan).tolist())


class SurveyMoments:
    """Everything that `Statistics` needs, accumulated over samples.

    Args:
        sky_sigma: Sky noise per band in the flux unit, the scale of the asinh.
        vectors: Components of each vector.
    """

    def __init__(self, sky_sigma: tuple[float, ...], vectors: tuple[int, ...] = ()) -> None:
        bands = len(sky_sigma)
        self.vectors = [VectorMoments(size) for size in vectors]
        self.softening = ASINH_SOFTENING * np.array(sky_sigma)[:, None]
        self.flux = [Moments.empty(1) for _ in range(bands)]
        self.asinh = [Moments.empty(1) for _ in range(bands)]
        self.joint = Moments.empty(bands)  # pixels valid in every band
        self.samples = 0

    def add(self, image: np.ndarray, valid: np.ndarray | None) -> None:
        """Add one image [C, H, W] with its mask (None: every pixel is valid)."""
        flux = image.reshape(len(image), -1).astype(np.float64)
        a = np.arcsinh(flux / self.softening)
        mask = None if valid is None else valid.reshape(len(image), -1)
        joint = Moments.of(a if mask is None else a[:, mask.all(axis=0)])
        self.joint.merge(joint)
        for c in range(len(flux)):
            if mask is None:
                self.flux[c].merge(Moments.of(flux[c : c + 1]))
                self.asinh[c].merge(joint.part(c))
            else:
                self.flux[c].merge(Moments.of(flux[c : c + 1, mask[c]]))
                self.asinh[c].merge(Moments.of(a[c : c + 1, mask[c]]))
        self.samples += 1

    def add_vectors(self, values: Sequence[np.ndarray | None]) -> None:
        """Add the vectors of one sample, in the survey's order; None where it lacks one."""
        for moments, value in zip(self.vectors, values, strict=True):
            if value is not None:
                moments.add(value)

    def merge(self, other: SurveyMoments) -> None:
        """Add the samples of another measurement with the same sky sigma and vectors."""
        for mine, theirs in zip(self._all(), other._all(), strict=True):
            mine.merge(theirs)
        for one, another in zip(self.vectors, other.vectors, strict=True):
            one.merge(another)
        self.samples += other.samples

    def statistics(self, names: Sequence[str] = ()) -> Statistics:
        """The merged statistics, with those of the vectors by name.

        The covariance is diagonal where no pixel is valid in all bands.
        """
        std = [float(np.sqrt(m.covariance()[0, 0])) for m in self.flux]
        covariance = self.joint.covariance()
        if self.joint.count == 0:
            covariance = np.diag([m.covariance()[0, 0] for m in self.asinh])
        return Statistics(
            mean=tuple(float(m.mean[0]) for m in self.flux),
            std=tuple(std),
            asinh_mean=tuple(float(m.mean[0]) for m in self.asinh),
            asinh_covariance=tuple(tuple(float(v) for v in row) for row in covariance),
            samples=self.samples,
            vectors={name: m.statistics() for name, m in zip(names, self.vectors, strict=True)},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; floats survive JSON exactly."""
        return {
            "samples": self.samples,
            "moments": [[m.count, m.mean.tolist(), m.products.tolist()] for m in self._all()],
            "vectors": [[m.count.tolist(), m.mean.tolist(), m.squares.tolist()] for m in self.vectors],
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any], sky_sigma: tuple[float, ...]) -> SurveyMoments:
        """The inverse of `to_json`."""
        self = cls(sky_sigma, tuple(len(count) for count, _, _ in raw["vectors"]))
        self.samples = raw["samples"]
        for vector, numbers in zip(self.vectors, raw["vectors"], strict=True):
            vector.count, vector.mean, vector.squares = map(np.array, numbers)
        for mine, (count, mean, products) in zip(self._all(), raw["moments"], strict=True):
            mine.count, mine.mean, mine.products = count, np.array(mean), np.array(products)
        return self

    def _all(self) -> list[Moments]:
        return [*self.flux, *self.asinh, self.joint]
