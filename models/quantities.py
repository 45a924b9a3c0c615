r"""Named quantities of a galaxy, scalars and vectors, and how their values become numbers that a network takes.

Each kind of scaling is followed by (t - mean) / std, entry by entry, fitted on the training split:

    linear   t = x
    log10    t = log10 x
    log1p    t = ln(1 + x): redshifts
    asinh    t = arsinh(x / s), s a softening of each component: fluxes that may be negative
    shape    t = (log10 m, x_1 / m, ..., x_n / m), m the mean of the known components: level and shape apart

All but `shape` may split levels off as well, of each of several equal runs of neighbouring components: with u = t - mean, the
entries of a run are its level l, the mean of its known u, and the u - l, all divided by their std. A run's entries then say
nothing of other runs, which may be hidden.

A component is unknown where it is NaN, or where its scaling has no value (log10 of a number that is not positive; a vector
whose mean is not positive under `shape`).

Shape legend: B samples, n components, e entries: n, n + 1 under `shape`, n + r with levels of r runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from armillary.models.constants import constant

__all__ = ["Answer", "Distribution", "Quantity", "Questions", "Scaling", "ScalingKind"]

ScalingKind = Literal["linear", "log10", "log1p", "asinh", "shape"]


@dataclass(frozen=True)
class Scaling:
    """From values in a quantity's unit to entries of about unit variance, and back.

    Attributes:
        kind: See the module's docstring.
        mean: Of each entry over the training split.
        std: Its standard deviation.
        softening: s of each component under `asinh`, in the quantity's unit; else empty.
        levels: Runs r of neighbouring components whose level is an entry of its own, before those of the run; 0 for none.
    """

    kind: ScalingKind = "linear"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    softening: tuple[float, ...] = ()
    levels: int = 0

    @classmethod
    def fitted(cls, kind: ScalingKind, values: Tensor, softening: tuple[float, ...] = (), levels: int = 0) -> Scaling:
        """Fit mean and standard deviation.

        Args:
            kind: See the module's docstring.
            values: [B, n] of the training split, in the quantity's unit, NaN where unknown.
            softening: Of each component, under `asinh`.
            levels: Runs whose level is split off.

        Raises:
            ValueError: No value is known, or an entry does not vary; it is named by its number.
        """
        if levels:
            return cls._fitted_with_levels(kind, values, softening, levels)
        entries = values.shape[1] + (kind == "shape")
        raw = replace(cls(kind, softening=softening), mean=(0.0,) * entries, std=(1.0,) * entries)
        scaled = raw(values.double())
        if not bool((known := ~scaled.isnan()).any(0).all()):
            raise ValueError(f"entry {int((~known.any(0)).nonzero()[0])}: has no known value over the training split")
        mean = scaled.nanmean(0)
        std = (scaled - mean).square().nanmean(0).sqrt()
        if bool((std <= 1e-12 * mean.abs()).any()) or bool((std == 0).any()):
            raise ValueError(f"entry {int(std.argmin())}: is the same over the whole training split")
        return replace(raw, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    @classmethod
    def _fitted_with_levels(
        cls, kind: ScalingKind, values: Tensor, softening: tuple[float, ...], levels: int
    ) -> Scaling:
        size = values.shape[1]
        if kind == "shape" or levels < 1 or size % levels or size == levels:
            raise ValueError(
                f"levels: {levels} of {size} components must be equal runs of two or more, and not of `shape`"
            )
        plain = cls.fitted(kind, values, softening)
        mean = torch.tensor(plain.mean, dtype=torch.float64).view(levels, -1)
        mean = torch.cat([mean.new_zeros(levels, 1), mean], dim=1).flatten()
        raw = replace(plain, mean=tuple(mean.tolist()), std=(1.0,) * len(mean), levels=levels)
        std = raw(values.double()).square().nanmean(0).sqrt()
        if bool((std < 1e-12).any()):
            raise ValueError(f"entry {int(std.argmin())}: is the same over the whole training split")
        return replace(raw, std=tuple(std.tolist()))

    @property
    def entries(self) -> int:
        """e."""
        return len(self.mean)

    def __call__(self, values: Tensor) -> Tensor:
        """Entries [..., e] of values [..., n] in the quantity's unit; NaN where unknown."""
        if self.kind == "log10":
            t = values.where(values > 0, math.nan).log10()
        elif self.kind == "log1p":
            t = values.where(values > -1, math.nan).log1p()
        elif self.kind == "asinh":
            t = (values / self._like(self.softening, values)).asinh()
        elif self.kind == "shape":
            level = self._level(values)
            t = torch.cat([level.log10(), values / level], dim=-1)
        else:
            t = values
        mean, std = self._like(self.mean, values), self._like(self.std, values)
        if self.levels:
            u = t.unflatten(-1, (self.levels, -1)) - mean.view(self.levels, -1)[:, 1:]
            level = u.nanmean(-1, keepdim=True)
            return torch.cat([level, u - level], dim=-1).flatten(-2) / std
        return (t - mean) / std

    def inverse(self, entries: Tensor) -> Tensor:
        """Values [..., n] in the quantity's unit of entries [..., e]."""
        t = entries * self._like(self.std, entries) + self._like(self.mean, entries)
        if self.levels:
            runs = t.unflatten(-1, (self.levels, -1))
            t = (runs[..., 1:] + runs[..., :1]).flatten(-2)
        if self.kind == "log10":
            return 10**t
        if self.kind == "log1p":
            return t.expm1()
        if self.kind == "asinh":
            return t.sinh() * self._like(self.softening, entries)
        if self.kind == "shape":
            return t[..., 1:] * 10 ** t[..., :1]
        return t

    def errors(self, values: Tensor, errors: Tensor) -> Tensor:
        """Errors [..., e] of the entries, to first order, of errors [..., n] of the values; of a level NaN.

        Those of a shape leave out what the level adds.
        """
        if self.kind == "log10":
            slope = 1 / (values.where(values > 0, math.nan) * math.log(10))
        elif self.kind == "log1p":
            slope = 1 / (1 + values)
        elif self.kind == "asinh":
            slope = (values.square() + self._like(self.softening, values).square()).rsqrt()
        elif self.kind == "shape":
            level = self._level(values)
            scaled = torch.cat([torch.full_like(level, math.nan), errors / level], dim=-1)
            return scaled / self._like(self.std, values)
        else:
            slope = torch.ones_like(values)
        scaled = errors * slope
        if self.levels:
            runs = scaled.unflatten(-1, (self.levels, -1))
            scaled = torch.cat([torch.full_like(runs[..., :1], math.nan), runs], dim=-1).flatten(-2)
        return scaled / self._like(self.std, values)

    @staticmethod
    def _level(values: Tensor) -> Tensor:
        mean = values.nanmean(-1, keepdim=True)
        return mean.where(mean > 0, math.nan)

    @staticmethod
    def _like(numbers: tuple[float, ...], values: Tensor) -> Tensor:
        return constant(numbers, values)


@dataclass(frozen=True)
class Quantity:
    """A scalar or a vector that a method is given, or asked for.

    Attributes:
        name: What recipes and queries call it.
        unit: Of its components; "" for a pure number.
        components: Name of each: bands, channels, ages; one for a scalar.
        axis: What the components are sorted along (wavelengths in angstrom, times); empty where nothing.
        scaling: Fitted on the training split.
        runs: Equal runs of neighbouring components; a method may take each as one token.
    """

    name: str
    unit: str = ""
    components: tuple[str, ...] = ("value",)
    axis: tuple[float, ...] = ()
    scaling: Scaling = Scaling()
    runs: int = 1

    @property
    def size(self) -> int:
        """n."""
        return len(self.components)

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> Quantity:
        """Rebuild from `dataclasses.asdict` after a way through JSON, which has no tuples."""
        scaling: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described["scaling"].items()}
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
        fields["scaling"] = Scaling(**scaling)
        return cls(**fields)


@dataclass(frozen=True)
class Questions:
    """What a method can be asked.

    Attributes:
        given: Names that may be given: "image", "spectrum", quantities of the inputs.
        want: What may be asked for, with units and axes.
    """

    given: tuple[str, ...]
    want: tuple[Quantity, ...]


class Distribution(Protocol):
    """Distributions [B] or [B, 1] of the scaled entry of a scalar; `armillary.models.masked.density` has some."""

    def cdf(self, x: Tensor) -> Tensor:
        """Cumulative probabilities [..., m] at x [..., m]."""

    def quantile(self, probability: Tensor) -> Tensor:
        """Numbers [..., m] below which probabilities [..., m], in [0, 1], lie."""

    def median(self) -> Tensor:
        """[...] medians."""


@dataclass(frozen=True, eq=False)
class Answer:
    """Joint draws from a method's distribution of what was asked, given what was given.

    Attributes:
        draws: [B, S, n] float32 by name, in the quantity's unit. Draw s of one belongs to draw s of the others.
        median: [B, n] float32 by name, of each component's own distribution; from the draws where it has no closed form.
        densities: Of scalars, by name, where the method has them: what each is drawn from, given what was given alone.
    """

    draws: dict[str, Tensor]
    median: dict[str, Tensor]
    densities: dict[str, Distribution] = field(default_factory=dict)

    def quantile(self, name: str, probability: float) -> Tensor:
        """[B, n] of the draws of one quantity, linear between them; NaN where a draw is."""
        # Not `Tensor.quantile`, which takes 16 million numbers at most.
        ordered = self.draws[name].sort(dim=1).values
        place = probability * (ordered.shape[1] - 1)
        low = min(int(place), max(ordered.shape[1] - 2, 0))
        found = torch.lerp(ordered[:, low], ordered[:, min(low + 1, ordered.shape[1] - 1)], place - low)
        return found.where(~ordered[:, -1].isnan(), math.nan)
