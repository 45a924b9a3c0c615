"""Several sources as one: objects matched by identifier or position, with the modalities and labels of all.

    Joined(images, Match(spectra, on=Sky(1.0)), Match(masses, on=Key("targetid"), required=False))

The first source gives key, position and split. Matching happens once, from descriptions alone; no pixel is read for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from armillary.engine.data.format.survey import SpectrumRecord, VectorRecord
from armillary.engine.data.sources.match import Matches, MatchMode, match_keys, match_sky
from armillary.engine.data.sources.source import (
    Rows,
    Sample,
    Source,
    describe,
    inputs,
    lossless_step_of,
    sky_sigma_of,
    spectrum_of,
    vectors_of,
)

__all__ = ["Joined", "Key", "Match", "Sky"]

ROWS = 16384  # described at a time
EXACT = 2.0**53  # whole numbers up to here are exact in float64


@dataclass(frozen=True)
class Sky:
    """Match by position.

    Attributes:
        radius_arcsec: Greatest separation.
        mode: "one_to_one" or "nearest", see `match.match_sky`.
    """

    radius_arcsec: float
    mode: MatchMode = "one_to_one"


@dataclass(frozen=True)
class Key:
    """Match by identifier.

    Attributes:
        column: A label that both sources have; "key" for the samples' keys. Identifiers of 64 bits, such as DESI's
            TARGETID, must be text: numbers are float64.
    """

    column: str = "key"


@dataclass(frozen=True)
class Match:
    """A source to be joined to the first one.

    Attributes:
        source: What is joined.
        on: How its rows are found.
        required: Objects without a match are left out; otherwise they lack its modalities and labels.
        name: Prefix of its labels where another source has one of the same name.
    """

    source: Source
    on: Sky | Key
    required: bool = True
    name: str = ""


class Joined:
    """A `Source` of matched objects.

    Args:
        first: Gives keys, positions and splits.
        matches: What is joined to the first.

    Attributes:
        found: The matches of each joined source.

    Raises:
        ValueError: Two sources have images, or spectra, or a vector of one name; an identifier is missing or repeated;
            or no object has all that is required.
    """

    def __init__(self, first: Source, *matches: Match) -> None:
        if not matches:
            raise ValueError("Joined: needs at least one source to join")
        self.sources: tuple[Source, ...] = (first, *(m.source for m in matches))
        self.matches = matches
        with_images = [s for s in self.sources if s.bands]
        with_spectra = [s for s in self.sources if spectrum_of(s) is not None]
        for what, several in (("images", with_images), ("spectra", with_spectra)):
            if len(several) > 1:
                names = " and ".join(type(s).__name__ for s in several)
                raise ValueError(f"Joined: {what} come from {names}; only one source may have them")
        pictured = with_images[0] if with_images else first
        self.bands = pictured.bands
        self.pixel_scale_arcsec = pictured.pixel_scale_arcsec
        self.unit = pictured.unit
        self.lossless_step, self.sky_sigma = lossless_step_of(pictured), sky_sigma_of(pictured)
        self.spectrum: SpectrumRecord | None = spectrum_of(with_spectra[0]) if with_spectra else None
        self.vectors: tuple[VectorRecord, ...] = tuple(v for s in self.sources for v in vectors_of(s))
        if len({v.name for v in self.vectors}) < len(self.vectors):
            raise ValueError(f"Joined: two sources have a vector of one name, among {[v.name for v in self.vectors]}")
        self._names = self._label_names()
        self.labels = {
            new: source.labels[old]
            for source, names in zip(self.sources, self._names, strict=True)
            for old, new in names.items()
        }
        count = len(first)
        self._rows = np.full((count, len(self.sources)), -1, np.int64)
        self._rows[:, 0] = np.arange(count)
        keep = np.ones(count, bool)
        self.found: list[Matches] = []
        for place, match in enumerate(matches, start=1):
            found = _find(first, match)
            self.found.append(found)
            self._rows[found.left, place] = found.right
            if match.required:
                keep &= self._rows[:, place] >= 0
        self._rows = self._rows[keep]
        if not len(self._rows):
            counts = ", ".join(str(len(f.left)) for f in self.found)
            raise ValueError(
                f"Joined: none of {count} objects has a match in every required source (matches: {counts}); look at "
                "positions, radii and identifiers"
            )

    def _label_names(self) -> list[dict[str, str]]:
        """For each source the name of each of its labels in the joined one."""
        taken = set[str]()
        names = []
        for place, source in enumerate(self.sources):
            mine = {}
            for label in source.labels:
                prefix = (self.matches[place - 1].name or f"source{place}") if place else ""
                new = label if label not in taken else f"{prefix}_{label}"
                if new in taken:
                    raise ValueError(f"Joined: two sources have a label {new!r}; give their `Match` different names")
                taken.add(new)
                mine[label] = new
            names.append(mine)
        return names

    def report(self) -> list[str]:
        """What was matched, one line a source."""
        lines = []
        for match, found in zip(self.matches, self.found, strict=True):
            line = f"{type(match.source).__name__}: {len(found.left):,} of {len(self.sources[0]):,} objects matched"
            if found.separation_arcsec.size:
                line += f", median separation {np.median(found.separation_arcsec):.2g} arcsec"
            if found.candidates:
                line += f"; {found.candidates:,} objects had several candidates"
            if found.shared:
                line += f"; {found.shared:,} of its rows were the nearest of several objects"
            lines.append(line)
        return lines

    def __len__(self) -> int:
        """Objects."""
        return len(self._rows)

    def inputs(self) -> dict[str, str]:
        """What all sources read, and how they are matched."""
        named: dict[str, str] = {}
        for place, source in enumerate(self.sources):
            named |= {f"source {place}: {k}": v for k, v in inputs(source).items()}
        rules = [(repr(m.on), m.required) for m in self.matches]
        return named | {"matching": repr(rules)}

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions, labels and splits of objects [start, stop)."""
        rows = self._rows[start:stop]
        columns: dict[str, np.ndarray | list[str]] = {}
        first: Rows | None = None
        for place, source in enumerate(self.sources):
            taken = _take(source, rows[:, place])
            if first is None:
                first = taken
                columns |= {name: taken.columns[name] for name in ("ra", "dec")}
            columns |= {new: taken.columns[old] for old, new in self._names[place].items()}
        assert first is not None
        bad = {start + i: reason for i, reason in first.bad.items()}
        return Rows(first.keys, columns, first.splits, bad)

    def read(self, index: int) -> Sample:
        """Read one object from all sources.

        Raises:
            BadSample: One of them cannot give its part.
            IndexError: There is no such object.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"object {index}: this source has {len(self)}")
        rows = self._rows[index].tolist()
        joined = self.sources[0].read(rows[0])
        labels: dict[str, float | str] = {}
        for source, row, names in zip(self.sources, rows, self._names, strict=True):
            if row < 0:
                text = describe(source, 0, 1).columns
                labels |= {new: "" if isinstance(text[old], list) else float("nan") for old, new in names.items()}
                continue
            sample = joined if source is self.sources[0] else source.read(row)
            labels |= {new: sample.labels[old] for old, new in names.items()}
            if sample is joined:
                continue
            joined = replace(
                joined,
                image=joined.image if sample.image is None else sample.image,
                valid=joined.valid if sample.image is None else sample.valid,
                spectrum=sample.spectrum or joined.spectrum,
                vectors=joined.vectors | sample.vectors,
                source=f"{joined.source}; {sample.source}",
            )
        return replace(joined, labels=labels)


def _find(first: Source, match: Match) -> Matches:
    """Match the rows of two sources."""
    if isinstance(match.on, Sky):
        a, b = _column(first, ("ra", "dec")), _column(match.source, ("ra", "dec"))
        return match_sky(a["ra"], a["dec"], b["ra"], b["dec"], match.on.radius_arcsec, match.on.mode)
    name = match.on.column
    for source in (first, match.source):
        if name != "key" and name not in source.labels:
            raise ValueError(
                f"match by {name!r}: {type(source).__name__} has no such label; it has {', '.join(source.labels)}"
            )
    mine, theirs = (_identifiers(name, _column(source, (name,))[name]) for source in (first, match.source))
    return match_keys(mine, theirs, what=name)


def _identifiers(name: str, values: np.ndarray) -> list[object]:
    """Text without a fraction of zero, so that "5", 5 and 5.0 agree."""
    if values.dtype == object:
        return values.tolist()
    if (np.abs(values) > EXACT).any():
        raise ValueError(
            f"match by {name!r}: numbers above 2^53 have lost their last digits; read the identifier as text"
        )
    return [None if v != v else f"{v:.0f}" if v == round(v) else repr(v) for v in values.tolist()]


def _pieces(source: Source) -> Iterator[Rows]:
    for start in range(0, len(source), ROWS):
        yield describe(source, start, min(start + ROWS, len(source)))


def _column(source: Source, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Whole columns of a source; text as an array of objects."""
    collected: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for rows in _pieces(source):
        for name in names:
            values = rows.keys if name == "key" else rows.columns[name]
            collected[name].append(np.array(values, object) if isinstance(values, list) else values)
    return {name: np.concatenate(pieces) if pieces else np.zeros(0) for name, pieces in collected.items()}


def _take(source: Source, rows: np.ndarray) -> Rows:
    """Description of some rows of a source, unknown where a row is -1; read in runs of neighbouring rows."""
    there = np.flatnonzero(rows >= 0)
    order = there[np.argsort(rows[there], kind="stable")]
    keys = [""] * len(rows)
    splits: list[str | None] = [None] * len(rows)
    bad: dict[int, str] = {}
    columns: dict[str, np.ndarray | list[str]] = {}
    cuts = np.flatnonzero(np.diff(rows[order]) > 1) + 1
    for run in np.split(order, cuts) if order.size else []:
        low, high = int(rows[run[0]]), int(rows[run[-1]]) + 1
        found = describe(source, low, high)
        places = (rows[run] - low).tolist()
        for name, values in found.columns.items():
            if name not in columns:
                columns[name] = [""] * len(rows) if isinstance(values, list) else np.full(len(rows), np.nan)
            target = columns[name]
            for i, place in zip(run.tolist(), places, strict=True):
                target[i] = values[place]
        for i, place in zip(run.tolist(), places, strict=True):
            keys[i] = found.keys[place]
            splits[i] = None if found.splits is None else found.splits[place]
            if low + place in found.bad:
                bad[i] = found.bad[low + place]
    if not columns:  # none of the rows is there: the names are still needed
        for name, values in describe(source, 0, 1).columns.items():
            columns[name] = [""] * len(rows) if isinstance(values, list) else np.full(len(rows), np.nan)
    return Rows(keys, columns, splits if any(s is not None for s in splits) else None, bad)
