"""SuperMock in the layout of its earlier writer: one file a core, one data set a band. There are no images.

Layout (HDF5, one value or vector a row): `galaxy_id`, `halo_id` (64 bits), `ra_true`, `dec_true` (degrees),
`redshift_true`, `stellar_mass`, `halo_mass` (Msun), `is_central`; AB magnitudes, a data set a band: `mag_u_sdss` to
`mag_Y_sdss` (LSST's six, in spite of the name), `mag_0_spherex` to `mag_101_spherex`, and the same for COSMOS (31), WISE
(7), the Legacy Surveys (8) and 2MASS (3); `SFH` (n, 117), Msun/yr, at the cosmic ages `time_bins_SFH` (117), Gyr; `SED`
(n, points), Jy, at the wavelengths `SED_wavelength` (points), angstrom or micrometres.

Each survey's magnitudes are one vector, `lsst`, `spherex`, `cosmos`, ..., each spectral band one of its components;
`sfh` and `sed` are vectors too. Magnitudes that are not finite (no flux) are NaN.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from armillary.engine.data.format.survey import VectorRecord
from armillary.engine.data.sources.files.hdf5 import (
    HDF5_SUFFIXES,
    checked,
    column_names,
    label_name,
    open_hdf5,
    opened,
    plain,
)
from armillary.engine.data.sources.files.parts import Part, PartSource, short_names
from armillary.engine.data.sources.listing import find_files
from armillary.engine.data.sources.source import Rows
from armillary.engine.data.sources.surveys.supermock.grids import named, resample_sed, sed_grid

__all__ = ["EarlierSuperMock"]

MAGNITUDE = re.compile(r"mag_(.+)_([A-Za-z0-9]+)")
NAMES = {"sdss": "lsst"}  # vectors whose name is not the suffix of the columns
LSST = "ugrizyY"
EXPECTED = {"lsst": 6, "spherex": 102}
LARGEST_MICRON = 5.0  # a first wavelength beyond it is in angstrom
AXES = ("time_bins_SFH", "SED_wavelength")  # one value a component, not a row
BLOCK = 512  # rows whose magnitudes are read together: they are in some 160 data sets
MEANING = {
    "redshift": "true redshift, without peculiar velocity",
    "stellar_mass": "Msun",
    "halo_mass": "Msun",
    "is_central": "1 = central, 0 = satellite",
    "galaxy_id": "galaxy, as text",
    "halo_id": "halo, as text",
}


class EarlierSuperMock(PartSource):
    """A `Source` of mock galaxies; the key of a sample is its galaxy_id.

    Args:
        path: One file, several, or a folder of them.
        resample_sed: Replace the SED's own points (11,149 in the published files) by means over 500 bins of a
            logarithmic grid from 0.09 to 35 micrometres.
        leave_out: Names of vectors that are not to be read, such as ("sed",).

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file is not of this layout, the files differ, or there is no such vector to leave out.
    """

    bands: tuple[str, ...] = ()
    pixel_scale_arcsec: float | None = None
    unit = "mag"

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        *,
        resample_sed: bool = False,
        leave_out: Sequence[str] = (),
    ) -> None:
        files = find_files(path, HDF5_SUFFIXES, "HDF5 file")
        self._resample = resample_sed
        parts: list[Part] = []
        layouts: list[tuple[Path, _Layout]] = []
        for file, name in zip(files, short_names(files), strict=True):
            layout = _Layout(file, resample_sed)
            layouts.append((file, layout))
            parts.append(Part(file, name, layout.count))
        reference, first = layouts[0]
        for file, layout in layouts[1:]:
            if difference := first.difference(layout):
                raise ValueError(f"{file}: {difference} is missing or differs from that of {reference}")
        if not sum(part.count for part in parts):
            raise ValueError(f"{files[0]}: column 'galaxy_id' has no rows")
        for name in leave_out:
            if name not in {record.name for record in first.vectors}:
                have = ", ".join(record.name for record in first.vectors)
                raise ValueError(f"leave_out: no vector {name!r}; there is {have}")
        self.vectors = tuple(record for record in first.vectors if record.name not in leave_out)
        self._magnitudes = {name: columns for name, columns in first.magnitudes.items() if name not in leave_out}
        self._labels = first.labels
        self.labels = {name: MEANING.get(name, f"{column} of the file") for name, (column, _) in self._labels.items()}
        self._wave = first.wave
        super().__init__(parts, open_hdf5)

    def _forget(self) -> None:
        super()._forget()
        self._kept: tuple[Path, int, dict[str, np.ndarray]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what was read."""
        return {**super().__getstate__(), "_kept": None}

    def _columns(self, part: Part, low: int, high: int) -> Rows:
        file = self._file(part)
        columns: dict[str, np.ndarray | list[str]] = {
            name: plain(file[column][low:high], text) for name, (column, text) in self._labels.items()
        }
        for axis in ("ra", "dec"):
            columns[axis] = plain(file[f"{axis}_true"][low:high], False)
        return Rows(list(plain(file["galaxy_id"][low:high], True)), columns)

    def _payload(self, part: Part, row: int) -> dict[str, Any]:
        file = self._file(part)
        start = row // BLOCK * BLOCK
        if self._kept is None or self._kept[:2] != (part.path, start):
            stop = min(start + BLOCK, part.count)
            read = {
                name: np.stack([file[column][start:stop] for column in columns], axis=1).astype(np.float32)
                for name, columns in self._magnitudes.items()
            }
            self._kept = (part.path, start, read)
        vectors = {name: _finite(values[row - start].copy()) for name, values in self._kept[2].items()}
        names = {record.name for record in self.vectors}
        if "sfh" in names:
            vectors["sfh"] = _finite(np.asarray(file["SFH"][row], np.float32))
        if "sed" in names:
            assert self._wave is not None
            sed = np.asarray(file["SED"][row], np.float32)
            vectors["sed"] = _finite(resample_sed(sed, self._wave) if self._resample else sed)
        vectors = {name: values for name, values in vectors.items() if not np.isnan(values).all()}
        if not vectors:
            raise ValueError(f"columns {', '.join(sorted(names))}: no component is known")
        return {"vectors": vectors}


class _Layout:
    """What a file holds.

    Attributes:
        count: Rows.
        vectors: All of them.
        magnitudes: Data sets of each vector of magnitudes, in the order of its components.
        labels: Data set of each label and whether it is text.
        wave: Wavelengths of the SED, micrometres; None where there is none.
    """

    def __init__(self, path: Path, resample: bool) -> None:
        place = str(path)
        with opened(path) as file:
            self.count: int = checked(place, file, "galaxy_id", "SOUiu").shape[0]
            for column in ("ra_true", "dec_true", "redshift_true"):
                checked(place, file, column, "f", rows=self.count)
            columns = column_names(place, {k: v for k, v in file.items() if k not in AXES}, self.count)
            self.magnitudes = _magnitudes(place, file, columns)
            records = [
                VectorRecord(name, tuple(_band(c) for c in of), "AB mag", f"observed magnitudes, {name}")
                for name, of in self.magnitudes.items()
            ]
            if "SFH" in file:
                ages = _axis(place, file, "time_bins_SFH")
                checked(place, file, "SFH", "f", len(ages), rows=self.count)
                components = named(ages, "Gyr")
                records.append(VectorRecord("sfh", components, "Msun/yr", "star-formation rate at cosmic ages"))
            self.wave: np.ndarray | None = None
            if "SED" in file:
                wave = _axis(place, file, "SED_wavelength")
                checked(place, file, "SED", "f", len(wave), rows=self.count)
                self.wave = wave * 1e-4 if wave[0] > LARGEST_MICRON else wave
                points = sed_grid()[0] if resample else self.wave
                records.append(VectorRecord("sed", named(points, "um"), "Jy", "flux density at wavelengths"))
        if not records:
            raise ValueError(f"{path}: it holds no vectors: there are no columns mag_BAND_SURVEY, SFH or SED")
        self.vectors = tuple(records)
        taken = {c for of in self.magnitudes.values() for c in of} | {"ra_true", "dec_true"}
        self.labels = {
            "redshift" if column == "redshift_true" else label_name(column): (column, text)
            for column, text in columns.items()
            if column not in taken
        }

    def difference(self, other: _Layout) -> str | None:
        """What another file has not, or has otherwise."""
        if odd := sorted(set(self.labels.values()) ^ set(other.labels.values())):
            return f"column {odd[0][0]!r}"
        mine, others = ({record.name: record for record in layout.vectors} for layout in (self, other))
        odd_names = sorted(name for name in mine | others if mine.get(name) != others.get(name))
        return f"vector {odd_names[0]!r}" if odd_names else None


def _magnitudes(place: str, file: Any, columns: dict[str, bool]) -> dict[str, tuple[str, ...]]:
    """Data sets of each survey's magnitudes, in order of number or, for LSST, wavelength."""
    found: dict[str, list[str]] = {}
    for column in columns:
        if match := MAGNITUDE.fullmatch(column):
            checked(place, file, column, "f")
            survey = match[2].lower()
            found.setdefault(NAMES.get(survey, survey), []).append(column)
    for name, count in EXPECTED.items():
        if name in found and len(found[name]) != count:
            raise ValueError(f"{place}: {len(found[name])} columns of magnitudes of {name!r}, must be {count}")
    for band in found.get("lsst", ()):
        if _band(band) not in LSST:
            raise ValueError(f"{place}: column {band!r}: LSST has no band {_band(band)!r}")
    return {name: tuple(sorted(of, key=partial(_order, name))) for name, of in sorted(found.items())}


def _order(name: str, column: str) -> tuple[int, str]:
    band = _band(column)
    if name == "lsst":
        return LSST.index(band), ""
    return (int(band), "") if band.isdecimal() else (1 << 30, band)


def _band(column: str) -> str:
    match = MAGNITUDE.fullmatch(column)
    assert match is not None
    return match[1]


def _axis(place: str, file: Any, name: str) -> np.ndarray:
    """Ages or wavelengths: finite and increasing."""
    values = np.asarray(checked(place, file, name, "fiu")[:], np.float64)
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise ValueError(f"{place}: row {int(np.flatnonzero(wrong)[0])}: column {name!r} is not finite")
    falls = np.flatnonzero(np.diff(values) <= 0)
    if len(values) < 2 or falls.size or values[0] <= 0:
        row = int(falls[0]) + 1 if falls.size else 0
        raise ValueError(f"{place}: row {row}: column {name!r}: must be positive and increase")
    return values


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.float32(np.nan))
