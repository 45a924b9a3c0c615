"""Quantities of an object, scalars and vectors, as scaled entries of a batch with the errors of what was measured.

A quantity is a vector of the survey or made of columns of its catalogue; NaN is unknown, and an object may lack any of them
but not all. Its scaling is fitted on the training split and kept with the run.

Values may be stored with their noise in them, as measured, or without it, as simulated. Of the latter, training draws noise
of the stated errors anew in each epoch, keyed by position; every evaluation adds one and the same draw, keyed by the row of
the catalogue. Noise comes before scaling.

Shape legend: B samples, n components of a quantity, e entries of all quantities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from armillary.engine.data.format.columns import known_columns
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.quantity_view import QuantityView, conversion
from armillary.kernels.pixels.philox import Purpose, normals, streams
from armillary.models.method import Batch, BatchKey
from armillary.models.quantities import Quantity, Scaling

__all__ = ["QuantityReader", "fitted_quantities"]

FIT_SAMPLES = 20_000
"""Samples that scalings are fitted on: the first of the split, which is stored in random order."""

EVALUATION = 2**32 - 1  # in place of an epoch: no training gets there


class _Values(NamedTuple):
    """Values [B, n] of a quantity in its unit, and their errors, NaN where none are stated; float32."""

    values: Tensor
    errors: Tensor


class QuantityReader:
    """Declared quantities, fixed for a survey.

    Args:
        views: The declarations.
        survey: Loaded from its folder.
        quantities: With their scalings; None: fitted on this survey, when they are first needed.
        anything_else: Whether a sample may have no known quantity, because it has an image or a spectrum.

    Attributes:
        reads_vectors: Whether batches must have the survey's vectors.
    """

    def __init__(
        self,
        views: tuple[QuantityView, ...],
        survey: Survey,
        quantities: tuple[Quantity, ...] | None = None,
        *,
        anything_else: bool = False,
    ) -> None:
        self.views, self.survey, self.anything_else, self._quantities = views, survey, anything_else, quantities
        self._parts: list[Callable[[Batch], _Values]] | None = None
        self.reads_vectors = any(v.vector in {r.name for r in survey.vectors} for v in views if v.vector)

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """In the order of their entries."""
        if self._quantities is None:
            self._quantities = fitted_quantities(self.views, self.survey, anything_else=self.anything_else)
        return self._quantities

    def scaled(self, quantities: tuple[Quantity, ...]) -> QuantityReader:
        """The same with the scalings, units and components of another survey: the one a method was trained on."""
        return QuantityReader(self.views, self.survey, quantities, anything_else=self.anything_else)

    def add(self, batch: Batch, key: BatchKey | None) -> None:
        """Add `quantities` and `quantity_errors` to a batch.

        Args:
            batch: With `row`, `position` where `key` is given, and `vectors`.
            key: Of the noise that training draws; None in an evaluation.

        Raises:
            ValueError: Nothing is known of a sample; its row is named.
        """
        entries, errors = [], []
        for number, (view, quantity, part) in enumerate(zip(self.views, self.quantities, self._readers(), strict=True)):
            found = _with_errors(view, part(batch), batch, key, number)
            entries.append(quantity.scaling(found.values))
            stated = found.errors if view.noise != "none" else torch.full_like(found.errors, torch.nan)
            errors.append(quantity.scaling.errors(found.values, stated))
        batch["quantities"], batch["quantity_errors"] = torch.cat(entries, dim=1), torch.cat(errors, dim=1)
        nothing = batch["quantities"].isnan().all(1)
        if not self.anything_else and bool(nothing.any()):
            raise ValueError(
                f"views.quantities: nothing is known of row {int(batch['row'][nothing][0])} of catalog.parquet; leave such "
                "objects out when building the survey"
            )

    def _readers(self) -> list[Callable[[Batch], _Values]]:
        if self._parts is None:
            pairs = zip(self.views, self.quantities, strict=True)
            self._parts = [_reader(view, quantity, self.survey) for view, quantity in pairs]
        return self._parts


def _with_errors(view: QuantityView, found: _Values, batch: Batch, key: BatchKey | None, number: int) -> _Values:
    """Values with their noise, and what is stated of it, which knows the noisy value only."""
    if view.noise == "none":
        return found
    floor = view.error_floor * found.values.abs()
    if view.noise == "stored":
        return _Values(found.values, found.errors.hypot(floor))
    noisy = _noisy(_Values(found.values, found.errors.hypot(floor)), batch, key, number)
    return _Values(noisy, found.errors.hypot(view.error_floor * noisy.abs()))


def _noisy(found: _Values, batch: Batch, key: BatchKey | None, number: int) -> Tensor:
    """Add noise where an error is stated."""
    if key is None:
        seed, stream = 0, streams(Purpose.MEASUREMENT_NOISE, number, batch["row"].cpu().numpy(), EVALUATION)
    else:
        seed = key.seed
        stream = streams(Purpose.MEASUREMENT_NOISE, number, batch["position"].cpu().numpy(), key.epoch)
    z = torch.from_numpy(normals(stream, seed, found.values.shape[1])).to(found.values)
    return found.values + z * found.errors.nan_to_num(0.0)


def _reader(view: QuantityView, quantity: Quantity, survey: Survey) -> Callable[[Batch], _Values]:
    """Values and errors of a batch, NaN where this survey has none."""
    factor = conversion(view.unit_in(survey), quantity.unit)
    if view.vector:
        values, errors = (_vector_places(name, quantity, survey) for name in (view.vector, view.errors[:1]))

        def of_vectors(batch: Batch) -> _Values:
            found = []
            for places in (values, errors):
                if "vectors" not in batch or (places < 0).all():
                    found.append(torch.full((len(batch["row"]), quantity.size), torch.nan, device=batch["row"].device))
                    continue
                there = batch["vectors"][:, places.clamp(min=0).to(batch["vectors"].device)]
                found.append(factor * there.masked_fill((places < 0).to(there.device), torch.nan))
            return _Values(*found)

        return of_vectors

    columns = [factor * known_columns(survey, names, quantity.size) for names in (view.names, view.errors)]
    tables = [torch.from_numpy(c.astype(np.float32)) for c in columns]

    def of_columns(batch: Batch) -> _Values:
        row = batch["row"].cpu()
        return _Values(*(table[row].to(batch["row"].device) for table in tables))

    return of_columns


def _vector_places(name: str | tuple[str, ...], quantity: Quantity, survey: Survey) -> Tensor:
    """[n] places of the components among all the survey's vectors, -1 where it lacks one.

    Raises:
        ValueError: It has the vector, but none of the components.
    """
    wanted = name if isinstance(name, str) else "".join(name)
    start = 0
    for record in survey.vectors:
        if record.name == wanted:
            at = {component: start + i for i, component in enumerate(record.components)}
            places = torch.tensor([at.get(component, -1) for component in quantity.components])
            if bool((places < 0).all()):
                raise ValueError(
                    f"{survey.name}: vector {wanted!r} has the components {_some(record.components)}, but "
                    f"{quantity.name!r} was trained on {_some(quantity.components)}"
                )
            return places
        start += record.size
    return torch.full((quantity.size,), -1)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names if len(names) <= 8 else (*names[:7], f"... ({len(names)})"))


def fitted_quantities(
    views: tuple[QuantityView, ...], survey: Survey, *, anything_else: bool = False
) -> tuple[Quantity, ...]:
    """Fit scalings on the training split, or on all samples where there is none.

    Args:
        views: The declarations; they break no rule for this survey.
        survey: Loaded from its folder.
        anything_else: Whether a sample may have no known quantity.

    Raises:
        ValueError: A quantity is unknown throughout, has no scaled value or does not vary; or nothing is known of a sample.
    """
    assert survey.folder is not None, "a survey that was loaded from its folder"
    stamps = [(survey.folder / name).stat().st_mtime_ns for name in ("survey.json", "catalog.parquet")]
    return _fitted(views, survey.folder.absolute(), anything_else, *stamps)


@lru_cache(maxsize=4)  # checks, input spec and views of a run all ask for the same
def _fitted(views: tuple[QuantityView, ...], folder: object, anything_else: bool, *_: int) -> tuple[Quantity, ...]:
    survey = Survey.load(str(folder))
    described = tuple(view.described(survey) for view in views)
    readers = [_reader(view, quantity, survey) for view, quantity in zip(views, described, strict=True)]
    found: list[list[_Values]] = [[] for _ in views]
    rows = []
    for batch in _first_samples(survey, any(view.vector for view in views)):
        rows.append(batch["row"])
        for number, (view, part) in enumerate(zip(views, readers, strict=True)):
            read = part(batch)
            bad = (~read.values.isnan() & (read.errors < 0)).any(1)
            if bool(bad.any()):
                raise ValueError(
                    f"quantity {view.name!r}: errors must not be negative, but are in row {int(batch['row'][bad][0])}; NaN "
                    "stands for unknown"
                )
            found[number].append(_with_errors(view, read, batch, None, number))
    row = torch.cat(rows)
    known = torch.zeros(len(row), dtype=torch.bool)
    quantities = []
    for view, quantity, parts in zip(views, described, found, strict=True):
        values, errors = (torch.cat(column) for column in zip(*parts, strict=True))
        scaling = _scaling(view, quantity, values, errors)
        known |= ~scaling(values).isnan().all(1)
        quantities.append(replace(quantity, scaling=scaling))
    if not anything_else and not bool(known.all()):
        raise ValueError(
            f"nothing is known of {int((~known).sum())} of {len(row)} samples, first row {int(row[~known][0])} of "
            "catalog.parquet; leave such objects out when building the survey"
        )
    return tuple(quantities)


def _scaling(view: QuantityView, quantity: Quantity, values: Tensor, errors: Tensor) -> Scaling:
    where, size = f"quantity {view.name!r}", len(values)
    if not bool((there := ~values.isnan()).any()):
        raise ValueError(
            f"{where}: is unknown for all {size} samples of the training split; leave it out of the recipe"
        )
    absent = ~there.any(0)
    if bool(absent.any()):
        lacking = _some(tuple(c for c, a in zip(quantity.components, absent.tolist(), strict=True) if a))
        raise ValueError(f"{where}: {lacking} unknown for all {size} samples of the training split")
    softening: tuple[float, ...] = ()
    if view.scaling == "asinh":
        typical = 2 * errors.double().where(there, torch.nan).nanmedian(0).values
        softening = (view.softening,) * quantity.size if view.softening else tuple(typical.tolist())
        if not all(s > 0 for s in softening):
            raise ValueError(f"{where}: asinh needs errors above 0 in every component, or a `softening`")
    try:
        scaling = Scaling.fitted(view.scaling, values, softening, view.runs if view.levels else 0)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    lost = there.any(1) & scaling(values).isnan().all(1)
    if 2 * int(lost.sum()) > int(there.any(1).sum()):
        raise ValueError(
            f"{where}: {view.scaling} has no value for {int(lost.sum())} of {size} samples, which are 0 or negative; use asinh"
        )
    return scaling


def _first_samples(survey: Survey, vectors: bool) -> Iterator[Batch]:
    # Here, since recipes import this module before a run is chosen.
    from armillary.engine.data.loading.catalog_loader import SequentialCatalogLoader
    from armillary.engine.data.loading.loader import SequentialLoader

    split = "train" if survey.count("train") else survey.shards[0].split
    assert survey.folder is not None
    parts = [range(min(FIT_SAMPLES, survey.count(split)))]
    plain = {"split": split, "batch": 1024, "device": "cpu", "parts": parts}
    if vectors:
        yield from SequentialLoader(survey.folder, modalities=("vectors",), reader="webdataset", **plain)  # type: ignore[arg-type]
    else:
        yield from SequentialCatalogLoader(survey.folder, **plain)  # type: ignore[arg-type]
