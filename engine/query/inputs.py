"""What is given, row by row: the batches that a method answers from, out of a table or a packed survey.

Shape legend: B rows of a batch, e entries of all quantities.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import torch
from torch import Tensor

from armillary.engine.data.format.catalog import catalog_file
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.tables.catalogue import Catalogue
from armillary.engine.data.views.quantities import QuantityReader
from armillary.engine.evaluate.embedding.embed import open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.query.column_map import SCANNED, QuantityColumns, find_columns, some
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import Batch
from armillary.models.quantities import Quantity

__all__ = ["Inputs", "Part", "SurveyInputs", "TableInputs", "check_parts", "known", "part_of"]

MODALITIES = ("image", "spectrum")
IDENTIFIERS = ("key", "id", "object_id", "objectid", "objid", "targetid", "source_id", "galaxy_id", "name")
"""Columns that are taken for identifiers where none is named."""


def part_of(given: str) -> tuple[str, slice]:
    """Name of a quantity, and which of its components: all, or of `name[first:end]` those from first to before end.

    Raises:
        ValueError: It is neither.
    """
    match = re.fullmatch(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?", given)
    if match is None:
        raise ValueError(f"given: must be a name, or NAME[FIRST:END] for some of its components, got {given!r}")
    return match[1], slice(int(match[2]) if match[2] else None, int(match[3]) if match[3] else None)


def check_parts(given: Sequence[str], quantities: Sequence[Quantity]) -> None:
    """Refuse components that a quantity does not have.

    Args:
        given: As for `part_of`.
        quantities: Those of the method's inputs.
    """
    sizes = {quantity.name: quantity.size for quantity in quantities}
    for text in given:
        name, part = part_of(text)
        size = sizes.get(name, 0)  # an image or a spectrum has no components
        if part != slice(None) and not 0 <= (part.start or 0) < (size if part.stop is None else part.stop) <= size:
            raise ValueError(f"given: {text}: must be components within 0:{size}, the first one before the end")


@dataclass(frozen=True)
class Part:
    """Some rows.

    Attributes:
        identifiers: Columns of B rows, those of `Inputs.identifiers`.
        batch: Model inputs with `row`.
    """

    identifiers: dict[str, pa.Array]
    batch: Batch


class Inputs(Protocol):
    """A table or a survey.

    Attributes:
        identifiers: Name and type of the columns that tell rows apart.
        notes: What was taken from where, in sentences.
        refused: By quantity of a table, how many values its scaling has no entry for; counted while `parts` is read.
    """

    identifiers: dict[str, pa.DataType]
    notes: list[str]
    refused: Counter[str]

    def parts(self, size: int) -> Iterator[Part]:
        """All rows in order, `size` of them or fewer at a time."""

    def absent(self) -> list[str]:
        """What is given and not known in any row."""


class TableInputs:
    """Rows of a table; see `Inputs`.

    Args:
        table: The table.
        quantities: Those of the method's inputs, in their order.
        given: Names of quantities, or of parts of them: see `part_of`.
        columns: Declared columns: see `column_map.find_columns`.
        units: Units by column.
        missing: Numbers that mean "no value"; None: found by the rule of `sentinels`.
        keys: Columns that are identifiers; where there are none those of a usual name.
        floors: By quantity, the fraction of a value that training added to its error in quadrature; of a quantity that is not
            named, no error is looked at, as training had none.
        device: Where the method is.

    Raises:
        ValueError: A quantity is not in the table or does not fit, or a key column is not there.
    """

    def __init__(
        self,
        table: Catalogue,
        quantities: Sequence[Quantity],
        given: Sequence[str],
        *,
        columns: Mapping[str, Sequence[str]],
        units: Mapping[str, str],
        missing: Sequence[float] | None,
        keys: Sequence[str],
        floors: Mapping[str, float],
        device: torch.device,
    ) -> None:
        names = list(dict.fromkeys(part_of(name)[0] for name in given))
        if pictures := [name for name in names if name not in {q.name for q in quantities}]:
            raise ValueError(
                f"given: {' and '.join(pictures)} cannot come out of a table; pack a survey with `armillary data build` "
                "and ask with its folder in place of the table"
            )
        _check_declared(table, names, columns, units)
        self.table, self.quantities, self.device, self._given = table, tuple(quantities), device, tuple(given)
        self.found = {q.name: find_columns(q, table, columns, units, missing) for q in quantities if q.name in names}
        usual = next((c for name in IDENTIFIERS for c in table.columns if c.lower() == name), None)
        self._keys = list(keys) or ([] if usual is None else [usual])
        for name in self._keys:
            if table.column(name, "key").size is not None:
                raise ValueError(f"key: column {name!r} has several numbers a row, which tell no rows apart")
        self._floors = floors
        self.identifiers = {"row": pa.int64()} | {name: table.identifier_type(name) for name in self._keys}
        self.notes = [_note(found, found.quantity.name in floors) for found in self.found.values()]
        self.refused: Counter[str] = Counter()

    def parts(self, size: int) -> Iterator[Part]:
        """All rows in order."""
        for start in range(0, self.table.count, size):
            stop = min(start + size, self.table.count)
            entries, errors = [], []
            for quantity in self.quantities:
                t, error = self._entries(quantity, start, stop)
                entries.append(t)
                errors.append(error)
            row = torch.arange(start, stop)
            batch = Batch(
                row=row, position=row, quantities=torch.cat(entries, dim=1), quantity_errors=torch.cat(errors, dim=1)
            )
            on_device = Batch(**{name: x.to(self.device) for name, x in batch.items() if isinstance(x, Tensor)})  # type: ignore[typeddict-item]
            identifiers = {name: self.table.identifiers(name, start, stop) for name in self._keys}
            yield Part({"row": pa.array(row.numpy())} | identifiers, on_device)

    def absent(self) -> list[str]:
        """What is given and not known in any row, or only as values that its scaling has no entry for."""
        return [name for name in self._given if not self._is_somewhere(*part_of(name))]

    def _is_somewhere(self, name: str, components: slice) -> bool:
        found = self.found[name]
        for start in range(0, self.table.count, SCANNED):
            values = torch.from_numpy(found.read(self.table, start, min(start + SCANNED, self.table.count))[0])
            if bool((~_usable(found.quantity, values)[:, components].isnan()).any()):
                return True
        return False

    def _entries(self, quantity: Quantity, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Entries and their errors [B, e] float32 of one quantity, NaN where it is not given."""
        if quantity.name not in self.found:
            nothing = torch.full((stop - start, quantity.scaling.entries), torch.nan)
            return nothing, nothing
        values, errors = map(torch.from_numpy, self.found[quantity.name].read(self.table, start, stop))
        lost = ~values.isnan() & _usable(quantity, values).isnan()
        self.refused[quantity.name] += int(lost.sum())
        floor = self._floors.get(quantity.name, torch.nan)
        return quantity.scaling(values).float(), quantity.scaling.errors(values, errors.hypot(floor * values)).float()


class SurveyInputs:
    """Objects of a packed survey, as the run's own views show them; see `Inputs`.

    Args:
        folder: The survey.
        source: The run.
        given: What is read of it.
        splits: Splits; all where none is named.
        device: Where the method is.

    Raises:
        ValueError: The survey lacks what is given, was taken with other bands, units or wavelengths, or has no such split.
    """

    def __init__(
        self, folder: Path, source: TrainedEncoder, given: Sequence[str], splits: Sequence[str], device: torch.device
    ) -> None:
        survey = Survey.load(folder)
        if lacking := [m for m in MODALITIES if m in given and m not in survey.modalities]:
            raise ValueError(f"{survey.name}: has {', '.join(survey.modalities)}, so no {lacking[0]} can be given")
        have = tuple(dict.fromkeys(s.split for s in survey.shards))
        for name in splits:
            if name not in have:
                raise ValueError(f"split: no samples in {name!r}; the survey has {', '.join(have)}")
        view = Encoder.load(source, survey, device).view
        quantities = view.quantities
        if quantities is not None:  # a row with nothing known is an answer of NaN here
            quantities = QuantityReader(quantities.views, survey, quantities.quantities, anything_else=True)
        image = view.image if "image" in given else None
        self._view = replace(view, image=image, spectrum="spectrum" in given, quantities=quantities)
        self._folder, self._splits, self._device = folder, tuple(splits) or have, device
        self._catalogue = Catalogue(catalog_file(survey))
        self._given, self._quantities = tuple(given), source.inputs.quantities
        self.identifiers = {"row": pa.int64(), "key": pa.string(), "split": pa.string()}
        self.notes: list[str] = []
        self.refused: Counter[str] = Counter()

    def parts(self, size: int) -> Iterator[Part]:
        """All objects of the splits, in stored order."""
        for split in self._splits:
            for batch in open_batches(self._folder, split, self._view, size, self._device):
                row = batch["row"].cpu().numpy()
                first, last = int(row.min()), int(row.max()) + 1
                places = pa.array(row - first)
                keys = {n: self._catalogue.identifiers(n, first, last).take(places) for n in ("key", "split")}
                yield Part({"row": pa.array(row)} | keys, self._view(batch))

    def absent(self) -> list[str]:
        """What is given and not known of any object."""
        left = list(self._given)
        for part in self.parts(256):
            left = [name for name in left if not bool(known(part.batch, name, self._quantities).any())]
            if not left:
                break
        return left


def known(batch: Batch, given: str, quantities: Sequence[Quantity]) -> Tensor:
    """[B] bool: of which rows anything is known of the image, the spectrum, or a quantity or part of it."""
    row = batch["row"]
    found = torch.zeros(len(row), dtype=torch.bool, device=row.device)
    for name, key in (("image", "crop"), ("spectrum", "spectrum")):
        if name == given and key in batch:
            there = batch.get(f"has_{name}")
            found |= there if isinstance(there, Tensor) else True
    wanted, components = part_of(given)
    start = 0
    for quantity in quantities:
        stop = start + quantity.scaling.entries
        if quantity.name == wanted and "quantities" in batch:
            found |= (~quantity.scaling.inverse(batch["quantities"][:, start:stop])[:, components].isnan()).any(1)
        start = stop
    return found


def _usable(quantity: Quantity, values: Tensor) -> Tensor:
    """Values [B, n] as a method sees them: NaN where the scaling has no entry for them."""
    return quantity.scaling.inverse(quantity.scaling(values))


def _check_declared(
    table: Catalogue, given: Sequence[str], columns: Mapping[str, Sequence[str]], units: Mapping[str, str]
) -> None:
    """Refuse options that would have no effect."""
    allowed = {name + ending for name in given for ending in ("", "_err", "_axis")}
    if strangers := [name for name in columns if name not in allowed]:
        raise ValueError(
            f"column: {strangers[0]!r} is not given ({', '.join(given)}), nor errors (NAME_err) or axis (NAME_axis) of it"
        )
    for column in units:
        table.column(column, "unit")


def _note(found: QuantityColumns, with_errors: bool) -> str:
    """Where a quantity was found, in a sentence."""
    there = [c for c in found.values if c is not None]
    text = f"{found.quantity.name}: from {some(there, 6)}"
    lacking = [c for c, v in zip(found.quantity.components, found.values, strict=False) if v is None]
    text += f"; no column for {some(lacking, 6)}, which is unknown" if lacking else ""
    wide = [c for c in found.errors if c is not None]
    if wide:
        text += (
            f"; errors from {some(wide, 6)}" if with_errors else f"; {some(wide, 6)} not read, trained without errors"
        )
    marks = sorted({mark for column in found.missing.values() for mark in column if mark == mark})
    text += f"; {' and '.join(f'{mark:g}' for mark in marks)} taken for no value" if marks else ""
    return text + (f"; no unit stated, taken as {found.quantity.unit}" if found.unstated else "")
