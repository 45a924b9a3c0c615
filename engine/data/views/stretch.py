"""From flux to model input: the last step of every view, and the only one of an embedding run.

A stretch is a frozen dataclass of a recipe. `numbers` reduces it, for a survey, to one of the three forms that kernels
know (`armillary.kernels.pixels.stretch`); `build` returns a function on [B, C, H, W] float32 crops in the survey's flux unit that
applies them. Pixels without data hold flux 0 when they get here, so they enter the model as blank sky.

Shape legend: B crops, C bands of the survey, K channels of the model input, H x W pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from armillary.engine.data.format.survey import Survey
from armillary.kernels.pixels.asinh import asinh_
from armillary.kernels.pixels.rgb import rgb
from armillary.kernels.pixels.stretch import Affine, AsinhMatrix, Lupton, StretchNumbers

__all__ = ["AsinhScale", "AsinhWhiten", "Identity", "Stretch", "StretchFunction", "ToRGB", "ZScore"]

StretchFunction = Callable[[Tensor], Tensor]
"""[B, C, H, W] float32 flux -> [B, K, H, W] float32 model input. May overwrite its argument."""


def _function(numbers: StretchNumbers, device: torch.device) -> StretchFunction:
    """A function that applies a stretch's numbers on a device."""
    if isinstance(numbers, Lupton):
        return lambda flux: rgb(flux.contiguous(), numbers.order, numbers.scales, numbers.m, numbers.q)

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)

    if isinstance(numbers, Affine):
        shift, divisor = column(numbers.shift), column(numbers.divisor)
        shifts, divides = any(numbers.shift), set(numbers.divisor) != {1.0}

        def affine(flux: Tensor) -> Tensor:
            flux = flux.sub_(shift) if shifts else flux
            return flux.div_(divisor) if divides else flux

        return affine

    softening, offset = column(numbers.softening), column(numbers.offset)
    columns = [column(values) for values in zip(*numbers.matrix, strict=True)]

    def asinh_matrix(flux: Tensor) -> Tensor:
        a = asinh_(flux.contiguous().mul_(softening))
        # Sums of scaled bands, not a matrix product: those may be run in TF32, and whitening cancels digits.
        out = offset.expand(len(a), -1, *a.shape[2:]).clone()
        for band, values in enumerate(columns):
            out.addcmul_(a[:, band : band + 1], values)
        return out

    return asinh_matrix


class _Stretch(ABC):
    @abstractmethod
    def numbers(self, survey: Survey) -> StretchNumbers:
        """What kernels apply, for a survey's bands and statistics."""

    def channels(self, survey: Survey) -> int:
        """Channels K of the model input."""
        return len(survey.bands)

    def build(self, survey: Survey, device: torch.device) -> StretchFunction:
        """Fix the stretch for a survey's bands and statistics."""
        return _function(self.numbers(survey), device)


@dataclass(frozen=True)
class ToRGB(_Stretch):
    """Colour-preserving asinh picture clipped to [0, 1], as AstroCLIP feeds it (after Lupton et al. 2004).

        y_b = scale_b flux_b + m,   I = mean_b max(0, y_b),   out_b = clip(y_b arcsinh(Q I) / (sqrt(Q) I), 0, 1)

    The clip is per channel. Channels come out in the reverse order of `bands`: (z, r, g), red first, for (g, r, z).

    Attributes:
        bands: The survey's bands that are shown, by name; others are left out.
        scales: Scale of each of them, 1 / nanomaggy.
        m: Offset added to every scaled flux.
        Q: Strength of the compression.
    """

    bands: tuple[str, ...] = ("g", "r", "z")
    scales: tuple[float, ...] = (6.0, 3.4, 2.2)
    m: float = 0.03
    Q: float = 20.0

    def channels(self, survey: Survey) -> int:
        """Channels K of the model input."""
        return len(self.bands)

    def problems(self, survey: Survey) -> list[str]:
        """Every rule this stretch breaks for a survey, as `stretch.field: rule, got value`."""
        found = []
        missing = [b for b in self.bands if b not in survey.bands]
        if not self.bands or missing or len(set(self.bands)) != len(self.bands):
            found.append(f"stretch.bands: must be distinct bands of the survey {survey.bands}, got {self.bands}")
        if len(self.scales) != len(self.bands) or not all(math.isfinite(s) and s > 0 for s in self.scales):
            found.append(f"stretch.scales: must be one positive number a band {self.bands}, got {self.scales}")
        if not (math.isfinite(self.Q) and self.Q > 0):
            found.append(f"stretch.Q: must be > 0, got {self.Q}")
        if not (math.isfinite(self.m) and self.m >= 0):
            found.append(f"stretch.m: must be >= 0, got {self.m}")
        if survey.unit != "nanomaggy":
            found.append(f'stretch: ToRGB is made for fluxes in "nanomaggy", got a survey in "{survey.unit}"')
        return found

    def numbers(self, survey: Survey) -> Lupton:
        """The stretch for a survey's bands."""
        return Lupton(tuple(survey.bands.index(b) for b in reversed(self.bands)), self.scales[::-1], self.m, self.Q)


@dataclass(frozen=True)
class AsinhWhiten(_Stretch):
    """asinh(flux / (3 sky sigma)), then the channels made uncorrelated and of about unit variance over the survey.

        a = asinh(flux / (3 sky_sigma)),   out = (cov(a) + ridge I)^(-1/2) (a - mean(a))

    The symmetric square root keeps each output channel closest to its band. Mean and covariance are the survey's
    (training split). The ridge bounds the gain of directions in which the bands hardly differ.

    Attributes:
        ridge: Variance added to every direction.
    """

    ridge: float = 0.03

    def problems(self, survey: Survey) -> list[str]:
        """Every rule this stretch breaks for a survey, as `stretch.field: rule, got value`."""
        found = []
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            found.append(f"stretch.ridge: must be > 0, got {self.ridge}")
        if not all(math.isfinite(s) and s > 0 for s in survey.sky_sigma) or not survey.sky_sigma:
            found.append(
                f"stretch: AsinhWhiten needs the survey's sky noise in every band, got sky_sigma {survey.sky_sigma}"
            )
        return found

    def matrix(self, survey: Survey) -> np.ndarray:
        """The whitening matrix, [C, C] float64."""
        values, vectors = np.linalg.eigh(np.asarray(survey.statistics.asinh_covariance, np.float64))
        # Rounding can leave an eigenvalue of a singular covariance below 0.
        return (vectors / np.sqrt(np.maximum(values, 0.0) + self.ridge)) @ vectors.T

    def numbers(self, survey: Survey) -> AsinhMatrix:
        """The whitening of a survey's statistics."""
        matrix = self.matrix(survey)
        offset = -(matrix @ np.asarray(survey.statistics.asinh_mean, np.float64))
        softening = 1.0 / (3.0 * np.asarray(survey.sky_sigma, np.float64))
        return AsinhMatrix(tuple(softening.tolist()), tuple(map(tuple, matrix.tolist())), tuple(offset.tolist()))


@dataclass(frozen=True)
class AsinhScale(_Stretch):
    """(asinh(flux / scale) - mean) / std a band, with numbers that are given.

    Attributes:
        bands: The survey's bands, all of them and in its order: the numbers belong to them.
        scale: Where the stretch turns from linear to logarithmic, a band, in the flux unit.
        mean: Of the stretched pixels, a band.
        std: Likewise.
    """

    bands: tuple[str, ...] = ()
    scale: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def problems(self, survey: Survey) -> list[str]:
        """Every rule this stretch breaks for a survey, as `stretch.field: rule, got value`."""
        found = []
        if self.bands != survey.bands:
            found.append(f"stretch.bands: must be the survey's, in its order, {survey.bands}, got {self.bands}")
        for name in ("scale", "std"):
            values = getattr(self, name)
            if len(values) != len(self.bands) or not all(math.isfinite(v) and v > 0 for v in values):
                found.append(f"stretch.{name}: must be one positive number a band {self.bands}, got {values}")
        if len(self.mean) != len(self.bands) or not all(math.isfinite(v) for v in self.mean):
            found.append(f"stretch.mean: must be one finite number a band {self.bands}, got {self.mean}")
        return found

    def numbers(self, survey: Survey) -> AsinhMatrix:
        """The given numbers, bands apart."""
        scale, mean, std = (np.asarray(v, np.float64) for v in (self.scale, self.mean, self.std))
        matrix = np.diag(1 / std)
        return AsinhMatrix(
            tuple((1 / scale).tolist()), tuple(map(tuple, matrix.tolist())), tuple((-mean / std).tolist())
        )


@dataclass(frozen=True)
class ZScore(_Stretch):
    """(flux - mean) / std a band.

    Attributes:
        mean: A band, in the flux unit; the survey's own where not given.
        std: A band, in the flux unit; the survey's own where not given.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def problems(self, survey: Survey) -> list[str]:
        """Every rule this stretch breaks for a survey, as `stretch.field: rule, got value`."""
        found = []
        mean, std = self._moments(survey)
        if len(mean) != len(survey.bands) or not all(math.isfinite(v) for v in mean):
            found.append(f"stretch.mean: must be one finite number a band {survey.bands}, got {mean}")
        if len(std) != len(survey.bands) or not all(math.isfinite(v) and v > 0 for v in std):
            found.append(f"stretch.std: must be one positive number a band {survey.bands}, got {std}")
        return found

    def _moments(self, survey: Survey) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean = survey.statistics.mean if self.mean is None else self.mean
        return mean, survey.statistics.std if self.std is None else self.std

    def numbers(self, survey: Survey) -> Affine:
        """Mean and standard deviation of a survey's bands."""
        return Affine(*self._moments(survey))


@dataclass(frozen=True)
class Identity(_Stretch):
    """flux / divide_by: nothing for data that come ready, 255 for display pictures on [0, 255].

    Attributes:
        divide_by: In the flux unit.
    """

    divide_by: float = 1.0

    def problems(self, survey: Survey) -> list[str]:
        """Every rule this stretch breaks for a survey, as `stretch.field: rule, got value`."""
        if math.isfinite(self.divide_by) and self.divide_by > 0:
            return []
        return [f"stretch.divide_by: must be > 0, got {self.divide_by}"]

    def numbers(self, survey: Survey) -> Affine:
        """The divisor for each of a survey's bands."""
        return Affine((0.0,) * len(survey.bands), (self.divide_by,) * len(survey.bands))


Stretch = ToRGB | AsinhWhiten | AsinhScale | ZScore | Identity
