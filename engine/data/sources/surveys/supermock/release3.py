"""SuperMock's release 3 (2026): galaxies painted onto the Last Journey simulation, as vectors; there are no images.

The files are described in `layout3`. Vectors are named and measured as those of `armillary data simulate-photometry`:
photometry_lsst, photometry_spherex, ... in microjansky in order of wavelength, `sed` in microjansky at rest wavelengths, and
`sfh` on even bins from the beginning to the observation: at cosmic ages it would end at t(z), and so tell the redshift. What
comes after t(z) is cut off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from armillary.engine.data.format.survey import VectorRecord
from armillary.engine.data.sources.files.hdf5 import (
    is_text,
    label_name,
    open_hdf5,
    plain,
)
from armillary.engine.data.sources.files.parts import Part, PartSource
from armillary.engine.data.sources.source import Rows, listing_mark
from armillary.engine.data.sources.surveys.supermock.bands import band_names, short_name, wavelength_order
from armillary.engine.data.sources.surveys.supermock.grids import (
    HUBBLE,
    age_at,
    at_times,
    history_on_relative_times,
    named,
    resample_sed,
    sed_grid,
)
from armillary.engine.data.sources.surveys.supermock.layout3 import Layout, find_patches, read_times

__all__ = ["SuperMockRelease3"]

SFH_BINS = 36
MOST_OPEN = 3  # files beside the catalogue: those of one patch
BLOCK = 256  # rows that are read together
RENAMED = {"stellar_mass": "stellar_mass_a1", "stellar_mass_zobs": "stellar_mass", "core_tag": "core_tag"}
TAGS = ("core_tag", "fof_halo_tag")  # 64 bits: float64 would round them
MEANING = {
    "redshift": "observed redshift",
    "stellar_mass": "Msun, at the observation",
    "stellar_mass_a1": "Msun, at a = 1",
    "halo_mass": "Msun, of the galaxy's own halo at the observation",
    "host_halo_mass": "Msun, of the host halo at the observation",
    "sfr": "Msun/yr, at the observation",
    "core_tag": "core, as text",
    "fof_halo_tag": "halo, as text",
}


class SuperMockRelease3(PartSource):
    """A `Source` of mock galaxies; the key of a sample is its file's name and row.

    Args:
        path: The folder above `lightcone_catalogs`, one catalogue, or a file of the OpenCosmo form.
        details: Folder with band_names.json and time_grids.npz, which the authors' reader ships (SuperMockLoad,
            supermockload/data); by default `path`.
        sfh_bins: Bins of the star-formation history.
        resample_sed: Replace the SED's own points by means over 500 bins of a logarithmic grid from 0.09 to 35 micrometres.
        leave_out: Names of vectors that are not to be read, such as ("sed",).
        every: Take every n-th galaxy: a patch holds 36 million.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file is not of this layout, the files of a patch are not of the same rows, or an option is wrong.
    """

    bands: tuple[str, ...] = ()
    pixel_scale_arcsec: float | None = None
    unit = "uJy"

    def __init__(
        self,
        path: Path | str,
        *,
        details: Path | str | None = None,
        sfh_bins: int = SFH_BINS,
        resample_sed: bool = False,
        leave_out: Sequence[str] = (),
        every: int = 1,
    ) -> None:
        path = Path(path)
        patches = find_patches(path)
        if not patches:
            raise ValueError(f"{path}: no SuperMock of release 3 (lightcone_galaxies_skypatch_P.h5) in it")
        for name, value in (("sfh_bins", sfh_bins), ("every", every)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        folder = Path(details) if details is not None else path if path.is_dir() else path.parent
        names = folder / "band_names.json"
        self._names = band_names(names if names.is_file() else None)
        grids = folder / "time_grids.npz"
        self._times = read_times(grids) if grids.is_file() else None
        self._resample, self._every, self._bins = resample_sed, every, sfh_bins
        layouts = [Layout(patch, self._names) for patch in patches]
        for layout in layouts[1:]:
            if layout.columns != layouts[0].columns or layout.contents != layouts[0].contents:
                raise ValueError(f"{layout.patch.catalogue}: columns differ from those of {patches[0].catalogue}")
        self._layout = layouts[0]
        self._patches = {layout.patch.catalogue: layout for layout in layouts}
        if self._times is None and "sfh" in self._layout.histories and "sfh" not in leave_out:
            raise ValueError(
                f"{folder}: there is no time_grids.npz, without which the ages of `sfh` are not known; take it from "
                "SuperMockLoad (supermockload/data) and name its folder with `details`, or leave_out ('sfh',)"
            )
        records = self._records()
        for name in leave_out:
            if name not in {record.name for record in records} | set(self._layout.histories):
                raise ValueError(f"leave_out: no vector {name!r}; there is {', '.join(r.name for r in records)}")
        self.vectors = tuple(record for record in records if record.name not in leave_out)
        if not self.vectors:
            raise ValueError(f"{path}: no vectors are left")
        self.labels = {
            name: MEANING.get(name, f"{column} of the file") for name, column in self._label_columns().items()
        }
        parts = [
            Part(layout.patch.catalogue, layout.patch.catalogue.stem, -(-count // every), group=group)
            for layout in layouts
            for group, count in layout.groups.items()
        ]
        super().__init__(parts, open_hdf5)

    def _forget(self) -> None:
        super()._forget()
        self._others: tuple[int, dict[Path, Any]] = (0, {})
        self._kept: tuple[Path, str, int, dict[str, np.ndarray]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but open files and what was read."""
        return {**super().__getstate__(), "_others": (0, {}), "_kept": None}

    def inputs(self) -> dict[str, str]:
        """The files (checksum of names, sizes and rows)."""
        files = [f for layout in self._patches.values() for f in vars(layout.patch).values() if f is not None]
        listing = [(f.name, f.stat().st_size) for f in files]
        return {f"{len(files)} files from {files[0].name}, {len(self)} rows": listing_mark((listing, self._every))}

    def _records(self) -> list[VectorRecord]:
        records = [
            VectorRecord(
                f"photometry_{survey.lower()}",
                tuple(short_name(survey, names[i]) for i in wavelength_order(survey, names)),
                "uJy",
                f"flux density in the bands of {survey}",
            )
            for survey, names in self._layout.contents.items()
        ]
        if self._times is not None and "sfh" in self._layout.histories:
            times = tuple(f"{(i + 0.5) / self._bins:.4f} t/t(z)" for i in range(self._bins))
            records.append(
                VectorRecord("sfh", times, "Msun/yr", "star-formation rate in even bins from the beginning to t(z)")
            )
        if self._layout.wave is not None:
            points = sed_grid()[0] if self._resample else self._layout.wave
            records.append(VectorRecord("sed", named(points, "um"), "uJy", "observed flux density at rest wavelengths"))
        return records

    def _label_columns(self) -> dict[str, str]:
        """Column of each label."""
        found = {RENAMED.get(c, label_name(c)): c for c in self._layout.columns if c not in ("ra", "dec")}
        if self._times is not None:
            for label, column in (("halo_mass", "mah"), ("host_halo_mass", "mah_host"), ("sfr", "sfh")):
                if column in self._layout.histories:
                    found[label] = column
        return found | {label_name(c): c for c in self._layout.luminosities}

    def _columns(self, part: Part, low: int, high: int) -> Rows:
        layout = self._patches[part.path]
        group = self._file(part)[part.group]
        rows = slice(low * self._every, (high - 1) * self._every + 1, self._every)
        numbers = range(*rows.indices(layout.groups[part.group]))
        first = layout.offsets[part.group]
        keys = [
            f"{part.path.stem.removeprefix('lightcone_galaxies_')}-{first + i:08d}".replace(".", "_") for i in numbers
        ]
        columns: dict[str, Any] = {axis: plain(group[axis][rows], False) for axis in ("ra", "dec")}
        now = age_at(np.asarray(group["redshift"][rows], np.float64))
        times = {}
        if self._times is not None:
            times = {"sfh": self._times[0], "mah": self._times[1], "mah_host": self._times[1]}
        for label, column in self._label_columns().items():
            if column in times:
                values = np.asarray(group[column][rows], np.float64)
                is_mass = column != "sfh"  # halo masses are in Msun/h
                columns[label] = at_times(values / HUBBLE if is_mass else values, times[column], now, log=is_mass)
            elif column in layout.luminosities:
                flat = self._other(layout.patch.luminosities)[column]
                columns[label] = plain(flat[first + rows.start : first + rows.stop : self._every], False)
            else:
                columns[label] = plain(group[column][rows], column in TAGS or is_text(column, group[column].dtype))
        return Rows(keys, columns)

    def _payload(self, part: Part, row: int) -> dict[str, Any]:
        start = row // BLOCK * BLOCK
        if self._kept is None or self._kept[:3] != (part.path, part.group, start):
            stop = min(start + BLOCK, part.count)
            self._kept = (part.path, part.group, start, dict(self._read(part, start, stop)))
        vectors = {}
        for name, values in self._kept[3].items():
            vector = values[row - start]
            if np.isfinite(vector).any():
                vectors[name] = vector.copy()
        if not vectors:
            raise ValueError(f"vectors {', '.join(self._kept[3])}: no component is known")
        return {"vectors": vectors}

    def _read(self, part: Part, low: int, high: int) -> Iterator[tuple[str, np.ndarray]]:
        """Vectors [n, size] of kept rows [low, high) of a group."""
        layout = self._patches[part.path]
        group = self._file(part)[part.group]
        rows = slice(low * self._every, (high - 1) * self._every + 1, self._every)
        first = layout.offsets[part.group]
        flat = slice(first + rows.start, first + rows.stop, self._every)
        wanted = {record.name for record in self.vectors}
        for survey, names in layout.contents.items():
            if (name := f"photometry_{survey.lower()}") in wanted:
                if layout.patch.photometry is not None:
                    magnitudes = self._other(layout.patch.photometry)[survey][flat]
                else:
                    magnitudes = np.stack([group[f"mag_{band}"][rows] for band in names], axis=1)
                yield name, _microjansky(magnitudes)[:, wavelength_order(survey, names)]
        if "sfh" in wanted:
            assert self._times is not None
            now = age_at(np.asarray(group["redshift"][rows], np.float64))
            rates = np.asarray(group["sfh"][rows])
            yield (
                "sfh",
                np.stack(
                    [
                        history_on_relative_times(r, self._times[0], t, self._bins)
                        for r, t in zip(rates, now, strict=True)
                    ]
                ),
            )
        if "sed" in wanted:
            assert layout.wave is not None
            file = self._other(layout.patch.seds)
            tags, theirs = group["core_tag"][rows], file["core_tag"][flat]
            if not np.array_equal(tags, theirs):
                at = int(np.flatnonzero(tags != theirs)[0])
                raise ValueError(f"core_tag {tags[at]}: the file of SEDs has {theirs[at]} in this row")
            stored = file["SED"]
            sed = np.asarray(stored[flat], np.float32) * np.float32(1e3 if stored.dtype == np.float16 else 1e6)
            yield "sed", np.stack([resample_sed(s, layout.wave) for s in sed]) if self._resample else _finite(sed)

    def _other(self, path: Path | None) -> Any:
        """An open file beside the catalogue."""
        assert path is not None
        if self._others[0] != os.getpid():
            self._others = (os.getpid(), {})
        files = self._others[1]
        if path not in files:
            if len(files) >= MOST_OPEN:  # those of another patch
                for file in files.values():
                    file.close()
                files.clear()
            files[path] = open_hdf5(path)
        return files[path]


def _microjansky(magnitudes: np.ndarray) -> np.ndarray:
    """AB magnitudes as flux densities; an infinite magnitude is no flux."""
    with np.errstate(over="ignore"):
        return _finite((10 ** (-0.4 * (np.asarray(magnitudes, np.float64) - 23.9))).astype(np.float32))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.float32(np.nan))
