"""What a survey reader hands to the builder: samples, by index, and cheap descriptions of them.

A sample holds any mix of an image, a spectrum and named vectors (photometry, a star-formation history, ...), besides
labels. A reader is a `Source`; one with spectra is `Spectral`, one with vectors `Vectorial`. It may also be `Described`
(keys and positions without reading pixels: spares the builder a pass over the data), `Traceable` (names its input files,
for provenance and safe resuming) and `Lossless` (its pixels are multiples of a step). Sources are pickled to worker
processes, so they open files lazily, once in each process.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from armillary.engine.data.format.shards import MAX_KEY
from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, VectorRecord

__all__ = [
    "POSITION",
    "BadSample",
    "Described",
    "Lossless",
    "Measured",
    "Rows",
    "Sample",
    "Source",
    "Spectral",
    "Traceable",
    "Vectorial",
    "bad_files",
    "centre_crop",
    "cut_out",
    "describe",
    "inputs",
    "key_from_name",
    "listing_mark",
    "lossless_step_of",
    "position_problem",
    "sky_sigma_of",
    "spectrum_of",
    "vectors_of",
]

POSITION = {"ra": (0.0, 360.0), "dec": (-90.0, 90.0)}
"""Degrees between which coordinates lie."""


class BadSample(ValueError):
    """One sample is unusable. The message names its file, row or key and says why; the builder stops or skips."""


@dataclass(frozen=True)
class Sample:
    """One object with what is known of it. A modality that it lacks is None, or absent from `vectors`.

    Attributes:
        key: Unique in the survey; letters, digits and `_ + = -`, at most 96 of them. No dots: readers of WebDataset
            tars cut a member's name at its first dot.
        image: [C, H, W] float32 in the survey's flux unit.
        valid: [C, H, W] bool, False where a pixel carries no data; None where every pixel does.
        ra: Degrees, ICRS; NaN where unknown.
        dec: Degrees, ICRS; NaN where unknown.
        labels: A value for each of the source's labels: a number (NaN where unknown) or a text ("" where unknown).
        source: File and row the sample came from.
        split: The split that the source itself assigns; None where it assigns none.
        spectrum: On the grid of the source's `spectrum`.
        vectors: [n] float32 by name, as the source's `vectors` describes them; NaN where a component is unknown.
    """

    key: str
    image: np.ndarray | None
    valid: np.ndarray | None
    ra: float
    dec: float
    labels: dict[str, float | str]
    source: str
    split: str | None = None
    spectrum: Spectrum | None = None
    vectors: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Samples [start, stop) of a source, without their pixels.

    Attributes:
        keys: Key of each.
        columns: `ra`, `dec` (degrees) and the labels: float64 arrays or lists of text.
        splits: The split that the source assigns to each; None where it assigns none.
        bad: Reason by index in the source, for samples known to be unusable before their pixels are read.
    """

    keys: list[str]
    columns: dict[str, np.ndarray | list[str]]
    splits: list[str | None] | None = None
    bad: dict[int, str] = field(default_factory=dict)

    def sample(self, place: int, labels: Iterable[str], source: str, **payload: Any) -> Sample:
        """One of the rows as a sample with some of its labels; `payload` are image, valid, spectrum and vectors."""
        values = {name: self.columns[name][place] for name in labels}
        return Sample(
            key=self.keys[place],
            ra=float(self.columns["ra"][place]),
            dec=float(self.columns["dec"][place]),
            labels={name: v if isinstance(v, str) else float(v) for name, v in values.items()},
            source=source,
            split=None if self.splits is None else self.splits[place],
            **{"image": None, "valid": None} | payload,
        )

    def take(self, places: list[int]) -> Rows:
        """Some of the rows, by their place among these; none of them is bad."""
        columns: dict[str, np.ndarray | list[str]] = {}
        for name, values in self.columns.items():
            columns[name] = [values[i] for i in places] if isinstance(values, list) else values[places]
        splits = None if self.splits is None else [self.splits[i] for i in places]
        return Rows([self.keys[i] for i in places], columns, splits)


class Source(Protocol):
    """Random access to the samples of a survey. The first three describe images; without any, `bands` is empty."""

    @property
    def bands(self) -> tuple[str, ...]:
        """Band names in stored order; empty where no sample has an image."""

    @property
    def pixel_scale_arcsec(self) -> float | None:
        """Arcseconds a pixel; None where unknown."""

    @property
    def unit(self) -> str:
        """Flux unit of a pixel: "nanomaggy", "count" (display images), ..."""

    @property
    def labels(self) -> dict[str, str]:
        """Label columns with their unit or meaning."""

    def __len__(self) -> int:
        """Number of samples, unusable ones included."""

    def read(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            BadSample: This sample is unusable.
        """


@runtime_checkable
class Spectral(Protocol):
    """A source of spectra, all on one grid."""

    @property
    def spectrum(self) -> SpectrumRecord | None:
        """Grid and unit; None where the files turn out to hold no spectra."""


@runtime_checkable
class Vectorial(Protocol):
    """A source of vectors."""

    @property
    def vectors(self) -> tuple[VectorRecord, ...]:
        """Every vector that a sample may have."""


@runtime_checkable
class Described(Protocol):
    """A source that knows its samples' keys, positions and labels without reading pixels."""

    def describe(self, start: int, stop: int) -> Rows:
        """Describe samples [start, stop)."""


@runtime_checkable
class Traceable(Protocol):
    """A source that can name what it reads."""

    def inputs(self) -> dict[str, str]:
        """Input files with a checksum or another mark that changes when their content does."""


@runtime_checkable
class Lossless(Protocol):
    """A source whose pixels are whole multiples of a step, so that quantising by it loses nothing."""

    @property
    def lossless_step(self) -> tuple[float, ...] | None:
        """Step per band in the flux unit; None where there is none after all."""


@runtime_checkable
class Measured(Protocol):
    """A source whose sky noise is known: what was packed before keeps it, and is not measured again with less."""

    @property
    def sky_sigma(self) -> tuple[float, ...] | None:
        """Sky noise per band in the flux unit; None where it is not known after all."""


def describe(source: Source, start: int, stop: int) -> Rows:
    """Describe samples [start, stop) of any source; one that is not `Described` has all of them read."""
    if isinstance(source, Described):
        return source.describe(start, stop)
    keys: list[str] = []
    splits: list[str | None] = []
    bad: dict[int, str] = {}
    values: dict[str, list[float | str]] = {name: [] for name in ("ra", "dec", *source.labels)}
    for index in range(start, stop):
        try:
            sample = source.read(index)
        except BadSample as error:
            bad[index] = str(error)
            keys.append("")
            splits.append(None)
            for column in values.values():
                column.append(float("nan"))
            continue
        keys.append(sample.key)
        splits.append(sample.split)
        for name, column in values.items():
            column.append({"ra": sample.ra, "dec": sample.dec}.get(name, sample.labels.get(name, float("nan"))))
    columns: dict[str, np.ndarray | list[str]] = {}
    for name, column in values.items():
        text = any(isinstance(v, str) for v in column)
        columns[name] = [v if isinstance(v, str) else "" for v in column] if text else np.array(column, np.float64)
    return Rows(keys, columns, splits, bad)


def inputs(source: Source) -> dict[str, str]:
    """What a source reads, for provenance; one that is not `Traceable` is known by its type and its own repr."""
    if isinstance(source, Traceable):
        return source.inputs()
    own = type(source).__repr__ is not object.__repr__
    return {"source": repr(source) if own else type(source).__qualname__}


def lossless_step_of(source: Source) -> tuple[float, ...] | None:
    """The step by which pixels of any source can be quantised without loss; None where there is none."""
    return source.lossless_step if isinstance(source, Lossless) else None


def sky_sigma_of(source: Source) -> tuple[float, ...] | None:
    """The sky noise of any source; None where it has to be measured."""
    return source.sky_sigma if isinstance(source, Measured) else None


def bad_files(source: Source) -> list[str]:
    """Reasons for files that were left out when a source, or one that it is made of, was opened."""
    parts = [getattr(source, "source", None), getattr(source, "positions", None), *getattr(source, "sources", ())]
    own = list(getattr(source, "bad_files", ()))
    return own + [reason for part in parts if part is not None for reason in bad_files(part)]


def spectrum_of(source: Source) -> SpectrumRecord | None:
    """The spectra of any source; None where it has none."""
    return source.spectrum if isinstance(source, Spectral) else None


def vectors_of(source: Source) -> tuple[VectorRecord, ...]:
    """The vectors of any source."""
    return source.vectors if isinstance(source, Vectorial) else ()


def key_from_name(name: str) -> str:
    """A valid key that resembles a file name (without its extension).

    Dots, slashes and blanks become `_`. Where anything else had to go, or the name is too long, eight hex digits of
    its checksum keep keys of different names apart.
    """
    plain = re.sub(r"[./\\ ]", "_", name)
    safe = re.sub(r"[^A-Za-z0-9_+=-]", "_", plain)
    if safe == plain and 0 < len(safe) <= MAX_KEY:
        return safe
    return f"{safe[: MAX_KEY - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def centre_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The central [..., height, width] of an array; an odd pixel too many is cut off at the end."""
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def cut_out(
    stored: np.ndarray, height: int, width: int, valid: np.ndarray | None = None, *, zero_is_missing: bool = False
) -> dict[str, Any]:
    """`image` and `valid` of a sample: the central pixels of a stored image, 0 where they carry no data.

    Args:
        stored: [C, H, W] numbers; what is not finite carries no data.
        height: Pixels to keep.
        width: Pixels to keep.
        valid: [C, H, W] bool, False where the file says that a pixel carries no data.
        zero_is_missing: Pixels of exactly 0 carry no data.
    """
    image = np.array(centre_crop(stored, height, width), np.float32, order="C")
    good = np.isfinite(image)
    if valid is not None:
        good &= centre_crop(valid, height, width)
    if zero_is_missing:
        good &= image != 0
    image[~good] = 0
    return {"image": image, "valid": None if good.all() else good}


def position_problem(axis: str, value: float) -> str | None:
    """Why a coordinate (`ra` or `dec`, degrees) is impossible; None if it is possible or unknown (NaN)."""
    low, high = POSITION[axis]
    return None if value != value or low <= value <= high else f"{value} is outside [{low:g}, {high:g}] degrees"


def listing_mark(listing: object) -> str:
    """A mark that changes with a list of names and sizes, for files that are too many or too large to read twice."""
    return f"listing-sha256:{hashlib.sha256(repr(listing).encode()).hexdigest()}"
