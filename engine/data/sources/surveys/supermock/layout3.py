"""Files of SuperMock's release 3 (2026): which belong together, and what they hold.

A patch of the sky is up to four HDF5 files below one folder, row i of one being row i of the others:

    lightcone_catalogs/lightcone_galaxies_skypatch_P.h5   groups core_<n>: core_tag, fof_halo_tag, ra, dec (degrees),
        redshift, stellar_mass (Msun, at a = 1), stellar_mass_zobs (Msun, at the observation), central, merged, peak_mass, mah and
        mah_host (n, 101; Msun/h), sfh (n, 117; Msun/yr, at cosmic ages, to a = 1)
    photometry/photometry_skypatch_P.h5                   LSST (N, 6), SPHEREx (N, 102), ...: AB magnitudes
    luminosities/luminosities_skypatch_P.h5               L_BOL_LSUN (N), L_8_33UM_LSUN (N), ...
    seds/seds_skypatch_P.h5                               SED (N, points): f_nu at wave_rest (1 + z), Jy as float32 or
        mJy as float16; wave_rest (points), angstrom; core_tag (N)

Rows of the flat files follow the groups in the order of their names as text: core_0, core_1, core_10, ... The OpenCosmo form
is one file, SuperMock_v3_z_LO_HI.hdf5: the catalogue's columns and mag_<band> in the group `data`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from armillary.engine.data.sources.files.hdf5 import checked, column_names, opened
from armillary.engine.data.sources.surveys.supermock.bands import wavelength_order

__all__ = ["Layout", "Patch", "find_patches", "read_times"]

CATALOGUE = re.compile(r"lightcone_galaxies_skypatch_(\d+)\.h5")
OPENCOSMO = re.compile(r"supermock_v3_z_.+\.hdf5", re.IGNORECASE)
FLAT = {"photometry": "photometry", "luminosities": "luminosities", "seds": "seds"}
LARGEST_MICRON = 1000.0  # a last wavelength beyond it is in angstrom


@dataclass(frozen=True)
class Patch:
    """Files of one patch; those that are not there are None.

    Attributes:
        catalogue: Of the galaxies; of the OpenCosmo form the only file.
        photometry: Magnitudes.
        luminosities: Luminosities.
        seds: Energy distributions.
    """

    catalogue: Path
    photometry: Path | None = None
    luminosities: Path | None = None
    seds: Path | None = None


def find_patches(path: Path) -> list[Patch]:
    """Patches below a folder, or those of a catalogue's file; empty where there are none of this release."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.h*5") if p.is_file())
    found = []
    for file in files:
        if OPENCOSMO.fullmatch(file.name):
            found.append(Patch(file))
        elif match := CATALOGUE.fullmatch(file.name):
            root, number = file.parent.parent, match[1]
            others = {kind: root / kind / f"{stem}_skypatch_{number}.h5" for kind, stem in FLAT.items()}
            found.append(Patch(file, **{kind: other if other.is_file() else None for kind, other in others.items()}))
    return found


class Layout:
    """What the files of a patch hold.

    Attributes:
        patch: The files.
        groups: Rows of each group, in the order of the flat files.
        offsets: Row of the flat files that each group starts at.
        columns: Columns of one value a row.
        histories: Columns of one vector a row.
        contents: Names of the columns of each survey's matrix.
        luminosities: Columns of that file.
        wave: Rest wavelengths in micrometres; None without SEDs.
    """

    def __init__(self, patch: Patch, names: dict[str, tuple[str, ...]]) -> None:
        self.patch = patch
        place = str(patch.catalogue)
        self.groups: dict[str, int] = {}
        with opened(patch.catalogue) as file:
            flat = "data" in file
            for group in ["data"] if flat else sorted(name for name in file if name.startswith("core_")):
                where = f"{place}: group {group!r}"
                rows = checked(where, file[group], "redshift", "f").shape[0]
                for column in ("ra", "dec", "stellar_mass_zobs"):
                    checked(where, file[group], column, "f", rows=rows)
                checked(where, file[group], "core_tag", "iu", rows=rows)
                self.groups[group] = rows
            if not self.groups:
                raise ValueError(f"{place}: there are no groups core_<n>")
            group = next(iter(self.groups))
            self.columns = tuple(c for c in column_names(place, file[group], self.groups[group]) if c[:4] != "mag_")
            self.histories = tuple(c for c in ("sfh", "mah", "mah_host") if c in file[group])
            for column in self.histories:
                checked(place, file[group], column, "f", None, rows=self.groups[group])
            bands = [c.removeprefix("mag_") for c in file[group] if c.startswith("mag_")]
        ends = np.cumsum([0, *self.groups.values()])
        self.offsets = dict(zip(self.groups, ends[:-1].tolist(), strict=True))
        total = int(ends[-1])
        self.contents: dict[str, tuple[str, ...]] = {}
        for band in bands:
            survey = band.partition("_")[0]
            self.contents[survey] = (*self.contents.get(survey, ()), band)
        if patch.photometry is not None:
            self.contents = _matrices(patch.photometry, names, total)
        for survey, columns in self.contents.items():
            wavelength_order(survey, columns)
        self.luminosities: tuple[str, ...] = ()
        if patch.luminosities is not None:
            with opened(patch.luminosities) as file:
                there = column_names(str(patch.luminosities), file, total)
                self.luminosities = tuple(c for c in there if c not in (*self.columns, "redshift"))
        self.wave: np.ndarray | None = None
        if patch.seds is not None:
            with opened(patch.seds) as file:
                place = str(patch.seds)
                wave = np.asarray(checked(place, file, "wave_rest", "f")[:], np.float64)
                if not (np.isfinite(wave).all() and wave[0] > 0 and (np.diff(wave) > 0).all()):
                    raise ValueError(f"{place}: column 'wave_rest' must be positive, finite and increase")
                checked(place, file, "SED", "f", len(wave), rows=total)
                checked(place, file, "core_tag", "iu", rows=total)
            self.wave = wave * 1e-4 if wave[-1] > LARGEST_MICRON else wave


def _matrices(path: Path, names: dict[str, tuple[str, ...]], rows: int) -> dict[str, tuple[str, ...]]:
    """Matrices of magnitudes whose columns' names are known."""
    found = {}
    with opened(path) as file:
        for survey in sorted(name for name in file if name in names):
            found[survey] = names[survey]
            checked(str(path), file, survey, "f", len(names[survey]), rows=rows)
        if not found:
            raise ValueError(
                f"{path}: none of {', '.join(sorted(file))} has known bands; put band_names.json into `details`"
            )
    return found


def read_times(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Cosmic ages in Gyr of the columns of `sfh` and of `mah`."""
    try:
        with np.load(path) as file:
            ages = [np.asarray(file[name], np.float64) for name in ("sfh_age_gyr", "mah_age_gyr")]
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{path}: not a table of sfh_age_gyr and mah_age_gyr: {error}") from error
    for age in ages:
        if age.ndim != 1 or not (np.isfinite(age).all() and age[0] > 0 and (np.diff(age) > 0).all()):
            raise ValueError(f"{path}: ages must be positive, finite and increase")
    return ages[0], ages[1]
