"""PROVABGS: physical properties of the galaxies in DESI's Bright Galaxy Survey (Hahn et al. 2023), from its catalogue.

The file of the early data release, `BGS_ANY_full.provabgs.sv3.v0.hdf5`, is an astropy table in HDF5 (one data set of
records, `__astropy_table__`); copies with a data set a column, in Parquet or in FITS are read as well. Its posterior
samples, PROVABGS_MCMC, are left on disk.

Metallicity (Z_MW), age (TAGE_MW) and star-formation rate (AVG_SFR) of the best fit are not in that file: the `provabgs`
package computes them from PROVABGS_THETA_BF and Z_HP with its emulator, `Models.NMF(burst=True, emulator=True)`. They
are labels where columns of these names were added to the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from armillary.engine.data.sources.source import Rows
from armillary.engine.data.sources.tables.catalogue import Catalogue
from armillary.engine.data.sources.tables.rows import Duplicates, TableRows

__all__ = ["THETA", "Provabgs"]

MASS, METALLICITY, SFR = "PROVABGS_LOGMSTAR_BF", "Z_MW", "AVG_SFR"
CUTS = (MASS, "MAG_G", "MAG_R", "MAG_Z")  # all must be positive: rows without a fit or a flux have 0, -1 or NaN
MOST_MASSIVE = 14.0  # log10 of solar masses; no galaxy has more, and a mass that is no logarithm has much more
REQUIRED = {
    "TARGETID": ("targetid", "DESI TARGETID"),
    "Z_HP": ("redshift", "redshift of the best fit by Redrock"),
    MASS: ("log_mstar", "log10 of the stellar mass in solar masses, best fit"),
    "MAG_G": ("mag_g", "AB mag"),
    "MAG_R": ("mag_r", "AB mag"),
    "MAG_Z": ("mag_z", "AB mag"),
}
OPTIONAL = {
    METALLICITY: ("z_mw", "mass-weighted metallicity, a mass fraction"),
    "TAGE_MW": ("tage_mw", "mass-weighted age, Gyr"),
    SFR: ("avg_sfr", "star-formation rate over the last Gyr, Msun/yr"),
    "ZERR": ("zerr", "error of the redshift"),
    "ZWARN": ("zwarn", "Redrock's warning bits; 0 is a good redshift"),
    "TSNR2_BGS": ("tsnr2_bgs", "template signal-to-noise squared"),
    "MAG_W1": ("mag_w1", "AB mag"),
    "FIBMAG_R": ("fibmag_r", "AB mag in the fibre"),
    "SCHLEGEL_COLOR": ("schlegel_color", "colour that decides on fainter targets, mag"),
    "PROVABGS_Z_MAX": ("provabgs_z_max", "greatest redshift at which the galaxy is in the sample"),
    "PROVABGS_W_ZFAIL": ("provabgs_w_zfail", "weight for failed redshifts"),
    "PROVABGS_W_FIBASSIGN": ("provabgs_w_fibassign", "weight for galaxies without a fibre"),
    "IS_BGS_BRIGHT": ("is_bgs_bright", "1 for targets of the bright sample"),
    "IS_BGS_FAINT": ("is_bgs_faint", "1 for targets of the faint sample"),
}
DERIVED = {
    "ln_z_mw": "natural logarithm of z_mw",
    "log_ssfr": "log10 of avg_sfr / stellar mass, 1/yr",
}
THETA = (
    *("logmstar", "beta1_sfh", "beta2_sfh", "beta3_sfh", "beta4_sfh", "fburst", "tburst"),
    *("gamma1_zh", "gamma2_zh", "dust1", "dust2", "dust_index", "f_fiber"),
)
"""Parameters of the best fit: mass, four coefficients of the star-formation history, share and age (Gyr) of a burst, two
coefficients of the metallicity's history, two optical depths and a slope of dust, and the share of light in the fibre."""


class Provabgs(TableRows):
    """A `Source` of the PROVABGS catalogue: labels, and the vector `theta` of best-fit parameters (see `THETA`).

    The key is the TARGETID, which is also the label `targetid`, as text. Where the file has Z_MW and AVG_SFR, `ln_z_mw`
    and `log_ssfr` are derived from them.

    Args:
        path: One file, several, or a folder.
        cuts: Keep only rows with a fit and fluxes: mass and the magnitudes in g, r and z above 0, as AstroCLIP's
            benchmark has it. `removed` counts what each cut takes.
        duplicates: Refuse a table in which a TARGETID occurs twice, or keep its first row.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is not of this layout, a mass is not a logarithm, or no row is left.
    """

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        *,
        cuts: bool = True,
        duplicates: Duplicates = "error",
    ) -> None:
        catalogue = Catalogue(path)
        for column in (*REQUIRED, "PROVABGS_THETA_BF"):
            catalogue.column(column, "part of PROVABGS")
        size = catalogue.columns["PROVABGS_THETA_BF"].size
        if size not in (len(THETA) - 1, len(THETA)):
            raise ValueError(
                f"{catalogue.files[0]}: column 'PROVABGS_THETA_BF' has rows of length {size or 1}, but a model with a burst "
                f"has {len(THETA)} parameters, or {len(THETA) - 1} without the fibre's share"
            )
        known = REQUIRED | {c: what for c, what in OPTIONAL.items() if c in catalogue.columns}
        super().__init__(
            path,
            key="TARGETID",
            labels={column: label for column, (label, _) in known.items()},
            vectors={"theta": "PROVABGS_THETA_BF"},
            units=dict(known.values()),
            components={"theta": THETA[:size]},
            text=("TARGETID",),
            duplicates=duplicates,
        )
        for column in set(known) - {"TARGETID"}:
            if catalogue.columns[column].kind == "text":
                raise ValueError(f"{catalogue.files[0]}: column {column!r}: text, must be numbers")
        self._needs = {"ln_z_mw": METALLICITY in known, "log_ssfr": SFR in known}
        self.labels |= {name: meaning for name, meaning in DERIVED.items() if self._needs[name]}
        self._check_mass()
        if cuts:
            for column in CUTS:
                self.keep(self.values(column) > 0, f"{column} > 0")

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels of rows [start, stop); see `Described`."""
        rows = super().describe(start, stop)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self._needs["ln_z_mw"]:
                rows.columns["ln_z_mw"] = _finite(np.log(np.asarray(rows.columns["z_mw"])))
            if self._needs["log_ssfr"]:
                rate = np.log10(np.asarray(rows.columns["avg_sfr"]))
                rows.columns["log_ssfr"] = _finite(rate - np.asarray(rows.columns["log_mstar"]))
        return rows

    def _check_mass(self) -> None:
        mass = self.values(MASS)
        high = np.flatnonzero(mass > MOST_MASSIVE)
        if high.size:
            row = int(high[0] if self.rows is None else self.rows[high[0]])
            raise ValueError(
                f"{self.catalogue.where(row)}, column {MASS!r}: {mass[high[0]]:g} must be the log10 of a mass in solar "
                f"masses, at most {MOST_MASSIVE:g}"
            )


def _finite(values: np.ndarray) -> np.ndarray:
    """Values with what is infinite unknown: a rate of zero has no logarithm."""
    return np.where(np.isfinite(values), values, np.nan)
