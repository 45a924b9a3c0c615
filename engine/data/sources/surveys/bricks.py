"""Cutouts from the brick images of the DESI Legacy Surveys, around the positions of a catalogue.

A brick is a piece of sky of .25 x .25 degrees with an image of 3600 x 3600 pixels of .262 arcsec in every band, on a
tangential projection of its own: `legacysurvey-<brick>-image-<band>.fits.fz` (nanomaggies), `...-invvar-<band>.fits.fz`
(1 / nanomaggies^2, 0 where there is no data) and `...-maskbits.fits.fz`. Neighbours overlap by some 80 pixels a side.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from armillary.engine.data.format.survey import VectorRecord
from armillary.engine.data.sources.files.brickfiles import find_bricks
from armillary.engine.data.sources.files.fits_headers import DAMAGED, image_hdu
from armillary.engine.data.sources.files.fits_tables import open_fits
from armillary.engine.data.sources.match import unit_vectors
from armillary.engine.data.sources.source import (
    POSITION,
    BadSample,
    Rows,
    Sample,
    Source,
    describe,
    inputs,
    listing_mark,
    position_problem,
    vectors_of,
)
from armillary.engine.data.sources.tables.rows import TableRows

__all__ = ["BrickCutouts", "open_bricks"]

LABELS = {
    "cutout_brick": "brick that the pixels come from",
    "cutout_offset_x": "position less the cutout's centre along x, pixels",
    "cutout_offset_y": "position less the cutout's centre along y, pixels",
    "cutout_coverage": "fraction of the cutout's pixels that lie on the brick",
}
ROWS = 16384  # positions placed at a time
OPEN_BRICKS = 8  # whose files stay open


class BrickCutouts:
    """A `Source` of `size` x `size` pixels around each position, without resampling.

    A cutout is centred to the nearest pixel; what remains is in the labels `cutout_offset_x` and `cutout_offset_y`. Of
    several bricks with a position the one that has most of the cutout is taken, then the one whose centre is nearest,
    then the first by path (a brick of north and south).
    Pixels off the brick, not finite, with an invvar of 0 (where a band has no invvar: of exactly 0) or in a band that the
    brick does not have carry no data. Positions on no brick are unusable samples, reported by name.

    Args:
        bricks: Folder (searched recursively), or files.
        positions: A source, whose keys, labels and vectors the cutouts keep; or (ra, dec) or (keys, ra, dec) as arrays.
        size: Pixels a side.
        bands: Bands in the order of the image's channels.
        mask_bits: Pixels with any of these bits in maskbits carry no data, e.g. 2 for those near bright stars.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: There are no bricks, a header is unreadable or has no projection, a brick's files differ, a band is
            nowhere, or no position is on a brick.
    """

    unit = "nanomaggy"

    def __init__(
        self,
        bricks: Path | str | Sequence[Path | str],
        positions: Source | tuple[Any, ...],
        *,
        size: int,
        bands: Sequence[str] = ("g", "r", "z"),
        mask_bits: int = 0,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: must be at least 1, got {size}")
        if not bands or len(set(bands)) != len(bands):
            raise ValueError(f"bands: must be one or more different names, got {tuple(bands)}")
        self.size, self.bands, self.mask_bits = size, tuple(bands), mask_bits
        self.positions: Any = _Positions(*positions) if isinstance(positions, tuple) else positions
        if self.positions.bands:
            raise ValueError("positions: this source has images of its own")
        if taken := set(LABELS) & set(self.positions.labels):
            raise ValueError(f"positions: label {sorted(taken)[0]!r} is one of the cutouts' own; rename it")
        self.labels = self.positions.labels | LABELS
        self.vectors: tuple[VectorRecord, ...] = vectors_of(self.positions)
        self.bricks = find_bricks(bricks, self.bands, mask_bits)
        self.pixel_scale_arcsec: float | None = round(self.bricks[0].scale, 6)
        self._open: OrderedDict[int, tuple[ExitStack, dict[tuple[str, str], Any]]] = OrderedDict()
        self._owner = os.getpid()
        self._place()

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.positions)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files."""
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        """Close the files."""
        for stack, _ in getattr(self, "_open", {}).values():
            stack.close()

    def inputs(self) -> dict[str, str]:
        """The positions, and the bricks' files (checksum of names and sizes)."""
        files = [(f.name, f.stat().st_size) for brick in self.bricks for f in brick.files.values()]
        how = f"{self.size} pixels, {' '.join(self.bands)}, mask_bits {self.mask_bits}"
        return inputs(self.positions) | {f"{len(self.bricks)} bricks, {how}": listing_mark(sorted(files))}

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels; see `Described`."""
        found = describe(self.positions, start, stop)
        chosen, bad = self._brick[start:stop], dict(found.bad)
        for i in np.flatnonzero(chosen < 0).tolist():
            ra, dec = (float(np.asarray(found.columns[name])[i]) for name in ("ra", "dec"))
            why = "it has no position" if math.isnan(ra + dec) else f"ra {ra:.5f}, dec {dec:.5f} is on no brick"
            bad.setdefault(start + i, f"position {start + i} ({found.keys[i]}): {why} of {len(self.bricks)}")
        own: dict[str, np.ndarray | list[str]] = {
            "cutout_brick": [self.bricks[b].name if b >= 0 else "" for b in chosen.tolist()],
            "cutout_offset_x": self._offset[start:stop, 0].astype(np.float64),
            "cutout_offset_y": self._offset[start:stop, 1].astype(np.float64),
            "cutout_coverage": self._coverage[start:stop].astype(np.float64),
        }
        return Rows(found.keys, found.columns | own, found.splits, bad)

    def read(self, index: int) -> Sample:
        """Cut one position out.

        Raises:
            BadSample: It is on no brick, or the brick's files are damaged.
            IndexError: There is no such position.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"position {index}: this source has {len(self)}")
        rows = self.describe(index, index + 1)
        if rows.bad:
            raise BadSample(rows.bad[index])
        number = int(self._brick[index])
        brick = self.bricks[number]
        image = np.zeros((len(self.bands), self.size, self.size), np.float32)
        valid = np.zeros(image.shape, bool)
        x, y = self._corner[index].tolist()
        left, right, low, high = max(x, 0), min(x + self.size, brick.width), max(y, 0), min(y + self.size, brick.height)
        inside = (slice(low - y, high - y), slice(left - x, right - x))
        part = (slice(low, high), slice(left, right))
        for channel, band in enumerate(self.bands):
            if ("image", band) not in brick.files:
                continue
            flux = self._cut(number, ("image", band), part)
            weighted = ("invvar", band) in brick.files
            good = self._cut(number, ("invvar", band), part) > 0 if weighted else flux != 0
            good &= np.isfinite(flux)
            if self.mask_bits:
                good &= (self._cut(number, ("maskbits", ""), part).astype(np.int64) & self.mask_bits) == 0
            image[channel][inside] = np.where(good, flux, 0)
            valid[channel][inside] = good
        labels = {
            name: v[0] if isinstance(v, list) else float(v[0]) for name, v in rows.columns.items() if name in LABELS
        }
        own = self.positions.read(index)
        return replace(
            own,
            image=image,
            valid=None if valid.all() else valid,
            labels=own.labels | labels,
            source=f"{own.source}; {brick.name} x {x} y {y}",
        )

    def _cut(self, number: int, what: tuple[str, str], part: tuple[slice, slice]) -> np.ndarray:
        """Part of one of a brick's images."""
        path = self.bricks[number].files[what]
        try:
            return np.asarray(self._hdus(number)[what].section[part])
        except DAMAGED as error:
            raise BadSample(f"{path}: rows {part[0].start} to {part[0].stop}: not readable: {error}") from error

    def _hdus(self, number: int) -> dict[tuple[str, str], Any]:
        """A brick's open images; those of the least recently used brick are closed."""
        if self._owner != os.getpid():  # a forked process must not share file positions with its parent
            self._open, self._owner = OrderedDict(), os.getpid()
        if number not in self._open:
            while len(self._open) >= OPEN_BRICKS:
                self._open.popitem(last=False)[1][0].close()
            stack = ExitStack()
            with stack:
                wanted = {k: f for k, f in self.bricks[number].files.items() if k[0] != "maskbits" or self.mask_bits}
                hdus = {k: image_hdu(stack.enter_context(open_fits(f)), axes=(2,)) for k, f in wanted.items()}
                self._open[number] = (stack.pop_all(), hdus)
        self._open.move_to_end(number)
        return self._open[number][1]

    def _place(self) -> None:
        """Choose a brick and the pixels for every position."""
        count = len(self.positions)
        self._brick = np.full(count, -1, np.int32)
        self._corner = np.zeros((count, 2), np.int32)
        self._offset = np.full((count, 2), np.nan, np.float32)
        self._coverage = np.zeros(count, np.float32)
        distance = np.full(count, np.inf)
        tree = cKDTree(unit_vectors(np.array([b.ra for b in self.bricks]), np.array([b.dec for b in self.bricks])))
        reach = max(math.hypot(b.height, b.width) * b.scale for b in self.bricks) / 2 / 3600 * 1.01
        for start in range(0, count, ROWS):
            columns = describe(self.positions, start, min(start + ROWS, count)).columns
            ra, dec = (np.asarray(columns[name], np.float64) for name in ("ra", "dec"))
            known = np.flatnonzero(~np.isnan(ra + dec))
            near = tree.query_ball_point(unit_vectors(ra[known], dec[known]), 2 * math.sin(math.radians(reach) / 2))
            rows = np.repeat(known, [len(n) for n in near])
            numbers = np.fromiter((b for n in near for b in n), np.int64, len(rows))
            for number in np.unique(numbers).tolist():
                here = rows[numbers == number]
                self._offer(number, start + here, ra[here], dec[here], distance)
        if count and (self._brick < 0).all():
            raise ValueError(f"positions: none of {count} is on any of the {len(self.bricks)} bricks")

    def _offer(self, number: int, rows: np.ndarray, ra: np.ndarray, dec: np.ndarray, distance: np.ndarray) -> None:
        """Give a brick those positions that it covers better than the bricks before it."""
        brick = self.bricks[number]
        x, y = brick.pixels(ra, dec)
        on = (x >= -0.5) & (x < brick.width - 0.5) & (y >= -0.5) & (y < brick.height - 0.5)
        rows, place = rows[on], np.stack([x[on], y[on]], axis=1)
        sides = np.array([brick.width, brick.height])
        corner = np.floor(place - (self.size - 1) / 2 + 0.5).astype(np.int64)
        coverage = np.prod(np.minimum(corner + self.size, sides) - np.maximum(corner, 0), axis=1) / self.size**2
        from_centre = np.hypot(*(place - (sides - 1) / 2).T)
        had, has = self._coverage[rows], coverage.astype(np.float32)
        better = (self._brick[rows] < 0) | (has > had) | ((has == had) & (from_centre < distance[rows]))
        rows = rows[better]
        self._brick[rows], self._corner[rows], self._coverage[rows] = number, corner[better], has[better]
        self._offset[rows] = (place - (corner + (self.size - 1) / 2))[better]
        distance[rows] = from_centre[better]


class _Positions:
    """Arrays of positions as a `Source`."""

    bands: tuple[str, ...] = ()
    pixel_scale_arcsec: float | None = None
    unit = ""

    def __init__(self, *arrays: Any) -> None:
        if len(arrays) not in (2, 3):
            raise ValueError(f"positions: must be (ra, dec) or (keys, ra, dec), got {len(arrays)} arrays")
        self.ra, self.dec = (np.asarray(values, np.float64) for values in arrays[-2:])
        self.keys = [str(k) for k in arrays[0]] if len(arrays) == 3 else [f"{i:07d}" for i in range(len(self.ra))]
        if not len(self.keys) == len(self.ra) == len(self.dec):
            raise ValueError(f"positions: {len(self.keys)} keys, {len(self.ra)} ra and {len(self.dec)} dec")
        for name, values in (("ra", self.ra), ("dec", self.dec)):
            low, high = POSITION[name]
            if (wrong := (values < low) | (values > high)).any():
                row = int(np.argmax(wrong))
                raise ValueError(f"positions: row {row}: {name} {position_problem(name, values[row])}")
        self.labels: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.ra)

    def inputs(self) -> dict[str, str]:
        """Checksum of the positions."""
        raw = repr(self.keys).encode() + self.ra.tobytes() + self.dec.tobytes()
        return {f"{len(self)} positions": f"sha256:{hashlib.sha256(raw).hexdigest()}"}

    def describe(self, start: int, stop: int) -> Rows:
        """Keys and positions."""
        return Rows(self.keys[start:stop], {"ra": self.ra[start:stop], "dec": self.dec[start:stop]})

    def read(self, index: int) -> Sample:
        """One position."""
        return self.describe(index, index + 1).sample(0, (), f"position {index}")


def open_bricks(
    bricks: Path | str, *, positions: Path | str, size: int, bands: Sequence[str] = ("g", "r", "z"), mask_bits: int = 0
) -> BrickCutouts:
    """Cutouts around the positions of a table in a file (Parquet, CSV, ECSV, VOTable, FITS or HDF5 with columns ra and dec).

    Args:
        bricks: Folder of brick images.
        positions: The table, see `tables.rows.TableRows`; its columns become labels.
        size: Pixels a side.
        bands: Bands in the order of the image's channels.
        mask_bits: As for `BrickCutouts`.
    """
    return BrickCutouts(bricks, TableRows(positions), size=size, bands=tuple(bands), mask_bits=mask_bits)
