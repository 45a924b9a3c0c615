"""A packed survey on disk: `survey.json`, `catalog.parquet` and WebDataset tars, described and loaded.

SURVEY/
  survey.json            this module's `Survey`
  catalog.parquet        one row a sample, in stored order (see `CATALOG_COLUMNS`), plus the survey's labels
  train-000000.tar ...   shards: USTAR archives whose members are `<key>.img` blobs (see `codec`)
  train-000000.idx ...   DALI index of each shard
  test-000000.tar ...    a shard holds samples of one split only
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

__all__ = ["CATALOG_COLUMNS", "FORMAT_VERSION", "ShardRecord", "Statistics", "Survey"]

FORMAT_VERSION = 1

CATALOG_COLUMNS = {
    "key": "string",  # unique in the survey; the tar member is <key>.img
    "split": "string",  # train, test, ...
    "shard": "int32",  # index into Survey.shards
    "index": "int32",  # place in the shard
    "offset": "int64",  # first byte of the blob in the tar
    "size": "int32",  # bytes of the blob
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
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    asinh_mean: tuple[float, ...]
    asinh_covariance: tuple[tuple[float, ...], ...]
    samples: int


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
        format_version: Version of this layout.
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
    format_version: int = FORMAT_VERSION

    def count(self, split: str | None = None) -> int:
        """Samples in a split, or in all of the survey."""
        return sum(s.count for s in self.shards if split in (None, s.split))

    def pixels(self) -> Survey:
        """What a stretch is fitted to, without the samples: bands, unit, sizes, noise and statistics."""
        return replace(self, shards=(), labels={}, provenance={})

    def to_json(self) -> dict[str, Any]:
        """The description as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> Survey:
        """Rebuild what `to_json` described.

        Raises:
            ValueError: It is of another format version.
            TypeError, KeyError, AttributeError: It is not a survey's description.
        """
        raw = dict(described)
        version = raw.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, this program reads {FORMAT_VERSION}")
        stats = dict(raw.pop("statistics"))
        stats["asinh_covariance"] = tuple(tuple(row) for row in stats["asinh_covariance"])
        shards = tuple(ShardRecord(**s) for s in raw.pop("shards"))
        fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        numbers: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stats.items()}
        return cls(**fixed, shards=shards, statistics=Statistics(**numbers))

    def save(self, folder: Path) -> None:
        """Write survey.json atomically into the survey's folder."""
        target = folder / "survey.json"
        temporary = target.with_suffix(".json.tmp")
        with open(temporary, "w") as f:
            json.dump(self.to_json(), f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)

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
            return cls.from_json(json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: not a readable survey description: {error}") from error
