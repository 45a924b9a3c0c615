"""A packed survey on disk: `survey.json`, `catalog.parquet` and WebDataset tars, described and loaded.

SURVEY/
  survey.json            this module's `Survey`
  catalog.parquet        one row a sample, in stored order (see `CATALOG_COLUMNS`), plus the survey's labels
  train-000000.tar ...   shards: USTAR archives; a sample's members are its modalities, one after the other: an image
                         `<key>.img` and a spectrum `<key>.spc` (see `codec`, `spectra`), vectors `<key>.vec`
  train-000000.idx ...   DALI index of each shard
  test-000000.tar ...    a shard holds samples of one split only
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from armillary.engine.atomic_file import write_json
from armillary.engine.choices import check_choice
from armillary.engine.sealed_json import sealed, unsealed

__all__ = [
    "BORDER",
    "CATALOG_COLUMNS",
    "FORMAT_VERSION",
    "MODALITIES",
    "ShardRecord",
    "SpectrumRecord",
    "Statistics",
    "Survey",
    "VectorRecord",
    "WaveGrid",
]

FORMAT_VERSION = 2
READABLE = (1, 2)  # version 1 had images only
MOST_PIXELS = 2**16 - 1
"""Of a side of a cutout: what a blob's header can say."""

BORDER = "border"
"""Split of samples whose cutouts overlap one that is held out: nothing is trained or tested on them."""

MODALITIES = {"image": "img", "spectrum": "spc", "vectors": "vec"}
"""What a sample may hold, in stored order, and the extension of its member in a shard."""

CATALOG_COLUMNS = {
    "key": "string",  # unique in the survey; the tar member is <key>.img
    "split": "string",  # train, test, ...
    "shard": "int32",  # index into Survey.shards
    "index": "int32",  # place in the shard
    "offset": "int64",  # first byte of the sample's first blob in the tar
    "size": "int32",  # bytes from there to the end of its last blob
    "ra": "float64",  # degrees, ICRS; NaN where unknown
    "dec": "float64",  # degrees, ICRS; NaN where unknown
    "source": "string",  # file and row the sample came from
}


@dataclass(frozen=True)
class ShardRecord:
    """One tar of the survey.

    Attributes:
        name: File name in the survey's folder.
        split: The split all its samples belong to.
        count: Samples in it.
        bytes: Size of the file.
        sha256: Hex digest of the file.
    """

    name: str
    split: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Statistics:
    """Pixel statistics of the training split; valid pixels only.

    Attributes:
        mean: Per band, in the flux unit.
        std: Per band, in the flux unit.
        asinh_mean: Per band, of a = asinh(flux / (3 sky_sigma)).
        asinh_covariance: [C, C] covariance over bands of a, for whitening.
        samples: Samples measured.
        vectors: Mean and standard deviation of every component of every vector, by name; NaN where it is never known.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    asinh_mean: tuple[float, ...]
    asinh_covariance: tuple[tuple[float, ...], ...]
    samples: int
    vectors: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)


GridKind = Literal["linear", "log10", "table"]


@dataclass(frozen=True)
class WaveGrid:
    """Vacuum wavelengths of a spectrum's pixels, in angstrom.

    Attributes:
        kind: "linear": start + step i; "log10": 10^(start + step i); "table": the values of `table`.
        start: Wavelength of the first pixel (its log10 for "log10"); of no meaning for "table".
        step: Spacing; of no meaning for "table".
        count: Pixels L.
        table: Every wavelength of an irregular grid; else empty.
    """

    kind: GridKind
    start: float
    step: float
    count: int
    table: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a grid that does not increase."""
        check_choice("wavelength grid: kind", self.kind, GridKind)
        if self.count < 2 or (self.kind == "table") != (len(self.table) == self.count):
            raise ValueError(
                f"wavelength grid: a {self.kind} grid of {self.count} pixels lists {len(self.table)} wavelengths"
            )
        wave = self.angstrom()
        if not (np.isfinite(wave).all() and wave[0] > 0 and (np.diff(wave) > 0).all()):
            raise ValueError("wavelength grid: wavelengths must be positive, finite and increasing")

    @classmethod
    def of(cls, wave: np.ndarray) -> WaveGrid:
        """The grid of given wavelengths, found to be linear, logarithmic (both to 1e-3 of a pixel) or neither.

        Args:
            wave: [L] angstrom, increasing.

        Raises:
            ValueError: They are not finite, not positive or not increasing.
        """
        values = np.asarray(wave, np.float64)
        if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all() or not (np.diff(values) > 0).all():
            raise ValueError("wavelength grid: wavelengths must be a finite, increasing vector of at least 2")
        if values[0] <= 0:
            raise ValueError(f"wavelength grid: wavelengths must be positive, the first is {values[0]:g}")
        for kind, x in (("linear", values), ("log10", np.log10(values))):
            step = (x[-1] - x[0]) / (len(x) - 1)
            if np.abs(x - (x[0] + step * np.arange(len(x)))).max() < 1e-3 * step:
                return cls(kind, float(x[0]), float(step), len(x))  # type: ignore[arg-type]
        return cls("table", 0.0, 0.0, len(values), tuple(values.tolist()))

    def angstrom(self) -> np.ndarray:
        """[L] float64 wavelengths."""
        if self.kind == "table":
            return np.array(self.table, np.float64)
        x = self.start + self.step * np.arange(self.count)
        return x if self.kind == "linear" else 10.0**x


@dataclass(frozen=True)
class SpectrumRecord:
    """The spectra of a survey.

    Attributes:
        grid: Wavelengths that all of them share.
        unit: Of the flux, e.g. "1e-17 erg/s/cm2/angstrom".
        codec: "bitplane" or "float16"; see `spectra`.
    """

    grid: WaveGrid
    unit: str
    codec: str = "bitplane"


@dataclass(frozen=True)
class VectorRecord:
    """A named vector of a survey's samples: photometry, a star-formation history, an energy distribution.

    Attributes:
        name: Letters, digits and underscores.
        components: Name of each component: bands, ages, wavelengths.
        unit: Unit of the components.
        meaning: One line.
    """

    name: str
    components: tuple[str, ...]
    unit: str
    meaning: str = ""

    @property
    def size(self) -> int:
        """Components n."""
        return len(self.components)


@dataclass(frozen=True)
class Survey:
    """Contents of survey.json.

    Attributes:
        name: Survey name.
        bands: Band names in stored order, e.g. ("g", "r", "z").
        height: Pixels of every cutout.
        width: Pixels of every cutout.
        pixel_scale_arcsec: Arcseconds a pixel; None where unknown.
        unit: Flux unit of a pixel, e.g. "nanomaggy"; "count" for display images.
        codec: "bitplane" or "float16".
        sky_sigma: Sky noise per band in the flux unit, the median over samples.
        step: Quantisation step per band in the flux unit; empty for float16.
        shards: All tars, in order.
        statistics: Pixel statistics of the training split.
        labels: Label columns of the catalogue with their unit or meaning.
        provenance: Command, versions, date and checksums of the inputs.
        spectrum: The spectra; None where there are none.
        vectors: Every vector, in stored order.
        catalog_sha256: Hex digest of catalog.parquet; empty where it was not taken (surveys of before).
        format_version: Version of this layout.
        folder: Where it was loaded from; no part of the description.

    A survey without images has no bands, and height and width 0.
    """

    name: str
    bands: tuple[str, ...]
    height: int
    width: int
    pixel_scale_arcsec: float | None
    unit: str
    codec: str
    sky_sigma: tuple[float, ...]
    step: tuple[float, ...]
    shards: tuple[ShardRecord, ...]
    statistics: Statistics
    labels: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    spectrum: SpectrumRecord | None = None
    vectors: tuple[VectorRecord, ...] = ()
    catalog_sha256: str = ""
    format_version: int = FORMAT_VERSION
    folder: Path | None = field(default=None, compare=False)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What samples may hold, in stored order; a single sample may lack any but one."""
        present = {"image": bool(self.bands), "spectrum": self.spectrum is not None, "vectors": bool(self.vectors)}
        return tuple(name for name in MODALITIES if present[name])

    def count(self, split: str | None = None) -> int:
        """Samples in a split, or in all of the survey."""
        return sum(s.count for s in self.shards if split in (None, s.split))

    def pixels(self) -> Survey:
        """What a stretch is fitted to, without the samples: bands, unit, sizes, noise and statistics."""
        return replace(self, shards=(), labels={}, provenance={}, catalog_sha256="")

    def to_json(self) -> dict[str, Any]:
        """The description as JSON types."""
        described = asdict(self)
        del described["folder"]
        return described

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> Survey:
        """Rebuild what `to_json` described.

        Raises:
            ValueError: It is of another format version.
            TypeError, KeyError, AttributeError: It is not a survey's description.
        """
        raw = dict(described)
        version = raw.pop("format_version")
        if version not in READABLE:
            raise ValueError(f"it has format version {version}, this program reads {' and '.join(map(str, READABLE))}")
        spectrum = raw.pop("spectrum", None)
        if spectrum is not None:
            spectrum = dict(spectrum)
            grid: dict[str, Any] = dict(spectrum.pop("grid"))
            spectrum = SpectrumRecord(WaveGrid(**grid | {"table": tuple(grid["table"])}), **spectrum)
        vectors = tuple(VectorRecord(**v | {"components": tuple(v["components"])}) for v in raw.pop("vectors", ()))
        stats = dict(raw.pop("statistics"))
        stats["asinh_covariance"] = tuple(tuple(row) for row in stats["asinh_covariance"])
        stats["vectors"] = {k: (tuple(mean), tuple(std)) for k, (mean, std) in stats.get("vectors", {}).items()}
        shards = tuple(ShardRecord(**s) for s in raw.pop("shards"))
        for s in shards:
            if type(s.count) is not int or type(s.bytes) is not int or Path(str(s.name)).name != s.name:
                raise ValueError(f"shards must have a file's name, samples and bytes, got {s}")
        if not isinstance(raw["bands"], list | tuple) or not all(isinstance(band, str) for band in raw["bands"]):
            raise ValueError(f"bands must be names, got {raw['bands']!r}")
        if not all(type(raw[side]) is int and 0 <= raw[side] <= MOST_PIXELS for side in ("height", "width")):
            raise ValueError(f"height and width must be 0 .. {MOST_PIXELS}, got {raw['height']!r} and {raw['width']!r}")
        if not all(isinstance(text, str) for pair in dict(raw.get("labels", {})).items() for text in pair):
            raise ValueError(f"labels must be names with their meaning, got {raw['labels']!r}")
        fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        numbers: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stats.items()}
        return cls(**fixed, shards=shards, statistics=Statistics(**numbers), spectrum=spectrum, vectors=vectors)

    def save(self, folder: Path) -> None:
        """Write survey.json atomically into the survey's folder."""
        write_json(folder / "survey.json", sealed(self.to_json()))

    @classmethod
    def load(cls, folder: Path | str) -> Survey:
        """Read survey.json.

        Raises:
            FileNotFoundError: There is no survey in `folder`.
            ValueError: The file is not a survey of this format version.
        """
        path = Path(folder) / "survey.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: no survey here (survey.json is missing); make one with `armillary data build`"
            )
        try:
            return replace(cls.from_json(unsealed(json.loads(path.read_text()))), folder=path.parent)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable survey description: {error}") from error
