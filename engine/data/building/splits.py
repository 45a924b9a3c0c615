"""Rules that assign samples to splits. They look at one sample at a time, so that growing a survey moves none of them; but
of neighbours in two cells of the sky one moves to the split `border` (see `shard_assignment`).

A share of the samples (or of cells of the sky) is the test split, another share the split `validation`, on which settings are
chosen; the rest is the split `train`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from armillary.engine.data.sources.source import Rows

__all__ = [
    "ByHealpix",
    "ByKey",
    "ByRandom",
    "ByRange",
    "BySky",
    "BySkyOrKey",
    "BySource",
    "SplitRule",
    "hash_keys",
    "parse_split",
]


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """[N, 2] uint64: two independent hashes of every key (BLAKE2b, the same on every machine)."""
    raw = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
    return np.frombuffer(raw, dtype="<u8").reshape(-1, 2)


def _splits(test: np.ndarray) -> list[str]:
    return ["test" if t else "train" for t in test]


@dataclass(frozen=True)
class _ByFraction:
    by_position: ClassVar[bool] = False
    """Whether neighbours on the sky shall not be in two splits; see `shard_assignment`."""

    test_fraction: float = 0.1
    validation_fraction: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction: must be at least 0 and below 1, got {self.test_fraction}")
        if not 0 <= self.validation_fraction < 1 - self.test_fraction:
            raise ValueError(
                f"validation_fraction: must be at least 0 and leave samples to train on beside test_fraction "
                f"{self.test_fraction}, got {self.validation_fraction}"
            )

    def _of(self, hashes: np.ndarray) -> list[str]:
        """Split of each hash [N] uint64; the test split does not depend on how many are for validation."""
        shares = (self.test_fraction, self.test_fraction + self.validation_fraction)
        test, either = (hashes < np.uint64(min(int(share * 2.0**64), 2**64 - 1)) for share in shares)
        return ["test" if t else "validation" if e else "train" for t, e in zip(test, either, strict=True)]


@dataclass(frozen=True)
class ByKey(_ByFraction):
    """A fraction of samples, chosen by a hash of the key, is the test split."""

    def assign(self, rows: Rows, hashes: np.ndarray) -> list[str]:
        """Split of each row; `hashes` are those of `hash_keys`."""
        return self._of(hashes[:, 0])


@dataclass(frozen=True)
class ByRandom(_ByFraction):
    """A random fraction of samples is the test split; another seed draws another one.

    Attributes:
        test_fraction: Share of the samples.
        validation_fraction: Likewise of the validation split.
        seed: Of the draw.
    """

    seed: int = 0

    def assign(self, rows: Rows, hashes: np.ndarray) -> list[str]:
        """Split of each row."""
        return self._of(hash_keys([f"random/{self.seed}/{key}" for key in rows.keys])[:, 0])


@dataclass(frozen=True)
class BySky(_ByFraction):
    """A fraction of cells of the sky, chosen by a hash, is the test split: neighbours on the sky stay together.

    Attributes:
        test_fraction: Share of the cells.
        validation_fraction: Likewise of the validation split.
        cell_deg: Height and (nearly) width of a cell in degrees.
    """

    by_position = True
    cell_deg: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not 0 < self.cell_deg <= 90:
            raise ValueError(f"cell_deg: must be above 0 and at most 90, got {self.cell_deg}")

    def assign(self, rows: Rows, hashes: np.ndarray) -> list[str]:
        """Split of each row, from its ra and dec.

        Raises:
            ValueError: A row has no position.
        """
        ra, dec = _column(rows, "ra"), _column(rows, "dec")
        strip = np.floor((dec + 90) / self.cell_deg)
        middle = np.deg2rad((strip + 0.5) * self.cell_deg - 90)
        around = np.maximum(1, np.floor(360 * np.cos(np.clip(middle, -np.pi / 2, np.pi / 2)) / self.cell_deg))
        cell = np.floor((ra % 360) / 360 * around)
        names = [f"{int(s)}/{int(c)}" for s, c in zip(strip, cell, strict=True)]
        return self._of(hash_keys(names)[:, 0])


@dataclass(frozen=True)
class ByHealpix(_ByFraction):
    """A fraction of HEALPix tiles, chosen by a hash, is the test split (Gorski et al. 2005; nested order).

    Tiles have equal areas all over the sky and the same numbers in every survey, so that splits of several surveys agree.

    Attributes:
        test_fraction: Share of the tiles.
        validation_fraction: Likewise of the validation split.
        nside: Resolution, a power of two: 8 gives 768 tiles of 53.7 square degrees, 64 gives 49,152 of .84.
    """

    by_position = True
    nside: int = 64

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not 1 <= self.nside <= 2**20 or self.nside & (self.nside - 1):
            raise ValueError(f"nside: must be a power of two from 1 to 2^20, got {self.nside}")

    def assign(self, rows: Rows, hashes: np.ndarray) -> list[str]:
        """Split of each row, from its ra and dec.

        Raises:
            ValueError: A row has no position.
        """
        from astropy import units  # these take a second, which the other rules need not wait for
        from astropy_healpix import HEALPix

        ra, dec = (np.deg2rad(_column(rows, name)) for name in ("ra", "dec"))
        tiles = HEALPix(self.nside, "nested").lonlat_to_healpix(ra * units.rad, dec * units.rad)
        names = [f"healpix/{self.nside}/{tile}" for tile in tiles.tolist()]
        return self._of(hash_keys(names)[:, 0])


@dataclass(frozen=True)
class BySkyOrKey(_ByFraction):
    """By cell of the sky for samples that have a position, by key for the others.

    Attributes:
        test_fraction: Share of the cells, and of the keys.
        validation_fraction: Likewise of the validation split.
    """

    by_position = True

    def assign(self, rows: Rows, hashes: np.ndarray) -> list[str]:
        """Split of each row."""
        shares = {"test_fraction": self.test_fraction, "validation_fraction": self.validation_fraction}
        splits = ByKey(**shares).assign(rows, hashes)
        ra, dec = (np.asarray(rows.columns[name], np.float64) for name in ("ra", "dec"))
        placed = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec)).tolist()
        by_sky = BySky(**shares).assign(rows.take(placed), hashes[placed])
        for i, split in zip(placed, by_sky, strict=True):
            splits[i] = split
        return splits


@dataclass(frozen=True)
class ByRange:
    """Samples with `low <= column < high` are the test split.

    Attributes:
        column: `ra`, `dec` or a numeric label.
        low: In the column's unit.
        high: In the column's unit. For `ra` it may be below `low`: the range then goes through 0.
    """

    column: str
    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the values."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError(f"split range of {self.column}: needs two finite numbers, got {self.low} and {self.high}")
        if self.low == self.high or (self.low > self.high and self.column != "ra"):
            raise ValueError(f"split range of {self.column}: {self.low} is not below {self.high}")

    @property
    def by_position(self) -> bool:
        """Whether it is a piece of the sky."""
        return self.column in ("ra", "dec")

    def assign(self, rows: Rows, hashes: np.ndarray) -> list[str]:
        """Split of each row.

        Raises:
            ValueError: There is no such column, it holds text, or a row has no value.
        """
        values = _column(rows, self.column)
        inside = (values >= self.low) & (values < self.high)
        if self.low > self.high:
            inside = (values >= self.low) | (values < self.high)
        return _splits(inside)


@dataclass(frozen=True)
class BySource:
    """The source's own split (`Sample.split`; the `split` column of a labels file)."""

    by_position: ClassVar[bool] = False

    def assign(self, rows: Rows, hashes: np.ndarray) -> list[str]:
        """Split of each row.

        Raises:
            ValueError: The source assigns none to a row, or a name that cannot name files.
        """
        out = []
        for i, split in enumerate(rows.splits or [None] * len(rows.keys)):
            if not split:
                raise ValueError(f"key {rows.keys[i]!r}: the source assigns it no split; choose another split rule")
            if not (split.isascii() and split.replace("_", "").isalnum()):
                raise ValueError(f"key {rows.keys[i]!r}: split {split!r}: use letters, digits and _ only")
            out.append(split)
        return out


SplitRule = ByKey | ByRandom | BySky | ByHealpix | BySkyOrKey | ByRange | BySource


def _column(rows: Rows, name: str) -> np.ndarray:
    if name not in rows.columns:
        raise ValueError(f"split by {name!r}: no such column; there are {', '.join(rows.columns)}")
    values = rows.columns[name]
    if isinstance(values, list):
        raise ValueError(f"split by {name!r}: the column holds text, a range needs numbers")
    missing = np.flatnonzero(np.isnan(values))
    if missing.size:
        raise ValueError(
            f"split by {name!r}: unknown for {missing.size} samples, first {rows.keys[missing[0]]!r}; "
            "choose another split rule, such as by key"
        )
    return values


def parse_split(text: str, test_fraction: float | None, validation_fraction: float | None = None) -> SplitRule:
    """A rule from its command-line form: `auto`, `key`, `random:SEED`, `sky`, `healpix[:NSIDE]`, `source` or `COLUMN:LOW:HIGH`.

    Raises:
        ValueError: It is none of these, or a fraction is given with a rule that has none.
    """
    given = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    fraction = {name: value for name, value in given.items() if value is not None}
    if text == "auto":
        return BySkyOrKey(**fraction)
    if text == "key":
        return ByKey(**fraction)
    if text == "sky":
        return BySky(**fraction)
    parts = text.split(":")
    if parts[0] == "random" and len(parts) == 2 and parts[1].isdecimal():
        return ByRandom(**fraction, seed=int(parts[1]))
    if parts[0] == "healpix" and len(parts) <= 2:
        if len(parts) == 2 and not parts[1].isdecimal():
            raise ValueError(f"split: healpix takes a whole number, such as healpix:64, got {text!r}")
        return ByHealpix(**fraction, **({"nside": int(parts[1])} if len(parts) == 2 else {}))  # type: ignore[arg-type]
    if text != "source" and len(parts) != 3:
        raise ValueError(
            f"split: must be auto, key, random:SEED, sky, healpix[:NSIDE], source or COLUMN:LOW:HIGH (such as ra:120:150), got {text!r}"
        )
    if fraction:
        raise ValueError(f"{next(iter(fraction))}: has no effect with split {text!r}; leave it out")
    if text == "source":
        return BySource()
    try:
        return ByRange(parts[0], float(parts[1]), float(parts[2]))
    except ValueError as error:
        raise ValueError(f"split {text!r}: {error}") from error
