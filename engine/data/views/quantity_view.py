"""What a recipe says of a quantity: where its values lie, in which unit, and how they are scaled."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from armillary.engine.data.format.survey import Survey, VectorRecord
from armillary.models.quantities import Quantity, ScalingKind
from armillary.models.rules import choices

__all__ = ["QuantityView", "conversion"]


@dataclass(frozen=True, kw_only=True)
class QuantityView:
    """A quantity of a survey: one of its vectors, or columns of the catalogue.

    Attributes:
        name: What queries call it: letters, digits and underscores.
        vector: The survey's vector; "" for columns.
        columns: Columns of the catalogue, one a component; without them and without a vector the column called `name`.
        errors: The vector of its errors, or a column for each component; empty where none are stated.
        error_floor: Fraction of the value that is added to errors in quadrature.
        noise: "stored": values carry their noise. "redrawn": they are without, and noise of the errors is added. "none": they
            are without and stay so, and errors serve as a softening only.
        components: Components to take of the vector, in this order; empty for all, as they come.
        unit: Unit to convert to; "" for the survey's.
        axis: What components are sorted along, where their names are not these numbers.
        scaling: See `armillary.models.quantities`.
        softening: Under asinh, in the quantity's unit; 0: twice the median error of each component.
        runs: Equal runs of neighbouring components; a method may take each as one token.
        levels: Split the level off each run.
    """

    name: str
    vector: str = ""
    columns: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    error_floor: float = 0.0
    noise: Literal["stored", "redrawn", "none"] = "stored"
    components: tuple[str, ...] = ()
    unit: str = ""
    axis: tuple[float, ...] = ()
    scaling: ScalingKind = "linear"
    softening: float = 0.0
    runs: int = 1
    levels: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of the catalogue."""
        return () if self.vector else self.columns or (self.name,)

    def record(self, survey: Survey) -> VectorRecord | None:
        """The survey's vector; None where it has none of this name."""
        return next((r for r in survey.vectors if r.name == self.vector), None)

    def unit_in(self, survey: Survey) -> str:
        """Unit of the survey's values; of a column only where its description is a unit."""
        if self.vector:
            record = self.record(survey)
            return record.unit if record else ""
        units = {survey.labels.get(name, "") for name in self.names}
        return units.pop() if len(units) == 1 and _parsed(next(iter(units))) is not None else ""

    def described(self, survey: Survey) -> Quantity:
        """The quantity without its scaling."""
        record = self.record(survey)
        components = record.components if record else self.names if len(self.names) > 1 else ("value",)
        components = self.components or components
        axis = self.axis or _numbers(components)
        return Quantity(self.name, self.unit or self.unit_in(survey), components, axis, runs=self.runs)

    def problems(self, survey: Survey) -> list[str]:
        """Every rule that it breaks for a survey, as `views.quantities.NAME.field: rule, got value`."""
        found: list[str] = []

        def rule(field: str, broken: bool, text: str, value: object) -> None:
            if broken:
                found.append(f"views.quantities.{self.name}.{field}: {text}, got {value!r}")

        rule("name", re.fullmatch(r"[A-Za-z]\w*", self.name) is None, "must be letters, digits and _", self.name)
        found += [f"views.quantities.{self.name}.{p}" for p in choices(self)]
        rule("columns", bool(self.vector and self.columns), "must be empty with a vector", self.columns)
        rule("runs", self.runs < 1, "must be at least 1", self.runs)
        rule("softening", not 0 <= self.softening < math.inf, "must be finite and not negative", self.softening)
        rule("error_floor", not 0 <= self.error_floor < 1, "must be in [0, 1)", self.error_floor)
        rule("noise", self.noise == "redrawn" and not self.errors, "needs errors to be redrawn from", self.noise)
        lacks_softening = self.scaling == "asinh" and not (self.errors or self.softening)
        rule("softening", lacks_softening, "must be given for asinh without errors", self.softening)
        found += self._sources(survey)
        if found:
            return found
        size = self.described(survey).size
        rule("runs", size % self.runs > 0, f"must divide its {size} components", self.runs)
        bad_levels = self.levels and (self.scaling == "shape" or size < 2 * self.runs)
        rule("levels", bad_levels, "must be off under shape and with runs of one component", self.levels)
        for axis in filter(None, (self.axis, self.described(survey).axis)):
            rising = all(a < b for a, b in zip(axis, axis[1:], strict=False))
            rule("axis", len(axis) != size or not rising, f"must be {size} increasing numbers", axis)
        try:
            conversion(self.unit_in(survey), self.unit)
        except ValueError as error:
            found.append(f"views.quantities.{self.name}.unit: {error}")
        return found

    def _sources(self, survey: Survey) -> list[str]:
        """Whether the survey has what is named."""
        have: dict[str, tuple[str, ...]] = {r.name: r.components for r in survey.vectors}
        where = f"views.quantities.{self.name}"
        if not self.vector:
            names = [*(("columns", n) for n in self.names), *(("errors", n) for n in self.errors)]
            labels = ", ".join(survey.labels) or "none"
            found = [
                f"{where}.{field}: must be labels of the survey ({labels}), got {name!r}"
                for field, name in names
                if name not in survey.labels
            ]
            if self.errors and len(self.errors) != len(self.names):
                found.append(f"{where}.errors: must be one column a component, {len(self.names)}, got {self.errors}")
            if self.components and len(self.components) != len(self.names):
                found.append(f"{where}.components: must name its {len(self.names)} columns, got {self.components}")
            return found
        found = [
            f"{where}.{field}: must be a vector of the survey ({', '.join(have) or 'none'}), got {name!r}"
            for field, name in (("vector", self.vector), *(("errors", n) for n in self.errors))
            if name not in have
        ]
        if len(self.errors) > 1:
            found.append(f"{where}.errors: must be one vector, got {self.errors}")
        if found:
            return found
        components = self.components or have[self.vector]
        for name in (self.vector, *self.errors):
            if lacking := [c for c in components if c not in have[name]]:
                found.append(
                    f"{where}.components: must be components of vector {name!r} ({len(have[name])}: "
                    f"{', '.join(have[name][:6])} ...), got {lacking[0]!r}"
                )
        return found


def conversion(given: str, wanted: str) -> float:
    """Factor from one unit to another; 1 where either is not stated.

    Raises:
        ValueError: One is not a unit, or they measure different things.
    """
    if not wanted or not given or given == wanted:
        return 1.0
    units = [_parsed(text) for text in (given, wanted)]
    for text, unit in zip((given, wanted), units, strict=True):
        if unit is None:
            raise ValueError(f"{text!r} is not a unit, so values cannot be converted from {given!r} to {wanted!r}")
    try:
        return float(units[0].to(units[1]))
    except ValueError as error:
        raise ValueError(f"{given!r} cannot be converted to {wanted!r}") from error


def _parsed(text: str) -> Any:
    """The astropy unit; None where the text is none."""
    from astropy import units  # here, since recipes import this module and astropy takes its time

    try:
        return units.Unit(text) if text else None
    except ValueError:
        return None


def _numbers(names: tuple[str, ...]) -> tuple[float, ...]:
    """Numbers that the names are, or begin with if they all go on alike ("4000 angstrom"); empty where they do not."""
    found = [re.fullmatch(r"([-+]?[\d.]+(?:[eE][-+]?\d+)?)(\s.*)?", name) for name in names]
    matches = [m for m in found if m is not None]
    if len(matches) < len(names) or len(names) < 2 or len({m[2] for m in matches}) > 1:
        return ()
    return tuple(float(m[1]) for m in matches)
