"""A simulated survey of photometry, star-formation histories and energy distributions, limited in i."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from armillary.engine.data.building.workers import in_order
from armillary.engine.data.format.survey import VectorRecord
from armillary.engine.data.simulate.population import DEFAULT_SEED, keyed_generator
from armillary.engine.data.simulate.populations.histories import FINE_BINS, draw_histories
from armillary.engine.data.simulate.populations.light import CompositeLight
from armillary.engine.data.simulate.populations.photometry import (
    LSST_BANDS,
    channels,
    measure,
    observe,
    sed_bins,
    sky_errors,
)
from armillary.engine.data.simulate.populations.smooth_ssp import smooth_ssp
from armillary.engine.data.simulate.populations.ssp import read_ssp
from armillary.engine.data.sources.source import Rows, Sample
from armillary.models.file_hash import sha256_of

__all__ = ["SED_FRAMES", "SedFrame", "SimulatedPhotometry"]

SedFrame = Literal["rest", "observed"]
SED_FRAMES: tuple[SedFrame, ...] = get_args(SedFrame)

GALAXY_STREAM, NOISE_STREAM = 32, 33
BLOCK = 2000  # candidates drawn together
BARREN = 5  # blocks without a galaxy after which the limits are taken to be wrong
BRIGHTEST = 14.0
SFH_BINS = 36
I_BAND = LSST_BANDS.index("i")

LABELS = {
    "redshift": "cosmological redshift",
    "stellar_mass": "Msun alive",
    "halo_mass": "Msun",
    "sfr": "Msun/yr, mean of the last 100 Myr",
    "metallicity": "log10 of the metal mass fraction in solar units",
    "dust": "A_V of the stars, magnitudes",
    "mean_age": "Gyr, weighted by the mass formed",
    "halo_half_mass_time": "cosmic time in Gyr when the halo had half of its mass",
    "magnitude_i": "true AB magnitude",
}


@dataclass(frozen=True, eq=False)
class _Galaxies:
    """Columns of the labels [N], and vectors [N, n] float32, by name."""

    labels: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.labels["redshift"])


class SimulatedPhotometry:
    """A `Source` of simulated galaxies as vectors; there are no images.

    All are made when the source is; about 1.6 KB each stay in memory. Which galaxies there are depends on the seed, the limit and
    the table only: the first n are the same for every count and number of processes.

    Args:
        count: Galaxies.
        seed: Keys everything.
        magnitude_limit: Faintest true AB magnitude in i.
        noise: Store measured fluxes, and the errors that a catalogue would state. Otherwise fluxes are true and errors are those
            of the sky, so that noise can be drawn when galaxies are shown.
        sed: Frame of the grid of wavelengths of the energy distribution.
        ssp: File of simple stellar populations; see `ssp.read_ssp`. By default our own table.
        processes: Processes that compute.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: speclite is not installed.
        ValueError: An argument or the file is wrong.
    """

    bands: tuple[str, ...] = ()
    pixel_scale_arcsec: float | None = None
    unit = "uJy"
    labels = LABELS

    def __init__(
        self,
        count: int,
        *,
        seed: int = DEFAULT_SEED,
        magnitude_limit: float = 21.5,
        noise: bool = False,
        sed: SedFrame = "rest",
        ssp: Path | str | None = None,
        processes: int = 1,
    ) -> None:
        for name, value, least in (("count", count, 1), ("seed", seed, 0), ("processes", processes, 1)):
            if value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value}")
        if sed not in SED_FRAMES:
            raise ValueError(f"sed: must be one of {', '.join(SED_FRAMES)}, got {sed!r}")
        if not magnitude_limit > BRIGHTEST:
            raise ValueError(f"magnitude_limit: must be above {BRIGHTEST:g}, got {magnitude_limit:g}")
        table = None if ssp is None else Path(ssp)
        _light(table)  # a bad file is refused here, not in a process
        self._table = "our own" if table is None else f"{table.name}, SHA-256 {sha256_of(table)}"
        self._settings = f"count={count}, seed={seed}, magnitude_limit={magnitude_limit}, noise={noise}, sed={sed!r}"
        self._seed = seed
        self.vectors = _records(noise, sed)
        one_block = functools.partial(_block, table, seed, magnitude_limit, noise, sed)
        parts: list[_Galaxies] = []
        found = 0
        for block, part in enumerate(_in_order(one_block, processes)):
            parts.append(part)
            found += len(part)
            if found >= count:
                break
            if block + 1 == BARREN and not found:
                raise ValueError(
                    f"magnitude_limit: none of {BARREN * BLOCK} candidates is brighter than {magnitude_limit:g}; "
                    "choose a fainter one"
                )
        self._galaxies = _Galaxies(
            {name: np.concatenate([p.labels[name] for p in parts])[:count] for name in LABELS},
            {r.name: np.concatenate([p.vectors[r.name] for p in parts])[:count] for r in self.vectors},
        )

    def __len__(self) -> int:
        """Number of galaxies."""
        return len(self._galaxies)

    def read(self, index: int) -> Sample:
        """One galaxy.

        Raises:
            IndexError: There is no such galaxy.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"galaxy {index}: this simulated survey has {len(self)}")
        vectors = {name: values[index] for name, values in self._galaxies.vectors.items()}
        source = f"simulation seed {self._seed}, galaxy {index}"
        return self.describe(index, index + 1).sample(0, LABELS, source, vectors=vectors)

    def describe(self, start: int, stop: int) -> Rows:
        """Keys and labels of galaxies [start, stop); they have no positions."""
        stop = min(stop, len(self))
        nowhere = np.full(stop - start, np.nan)
        columns: dict[str, Any] = {name: values[start:stop] for name, values in self._galaxies.labels.items()}
        keys = [f"pop{self._seed}-{i:08d}" for i in range(start, stop)]
        return Rows(keys, {"ra": nowhere, "dec": nowhere, **columns})

    def inputs(self) -> dict[str, str]:
        """Everything that determines the galaxies."""
        versions = {name: version(name) for name in ("astropy", "numpy", "speclite")}
        return {"simulation": f"SimulatedPhotometry({self._settings})", "stellar populations": self._table, **versions}


def _records(noise: bool, sed: SedFrame) -> tuple[VectorRecord, ...]:
    """The vectors, in stored order."""
    wave = channels()[1]
    spherex = tuple(f"{w:.4f} um" for w in wave[len(LSST_BANDS) :])
    kind = "measured" if noise else "true"
    states = "stated error" if noise else "noise of the sky"
    ages = tuple(f"{(i + 0.5) / SFH_BINS:.4f} t/t(z)" for i in range(SFH_BINS))
    points = tuple(f"{w:.4f} um" for w in sed_bins(sed)[1])
    at = "observed flux density at rest wavelengths" if sed == "rest" else "flux density at observed wavelengths"
    return (
        VectorRecord("photometry_lsst", LSST_BANDS, "uJy", f"{kind} flux density in LSST's bands"),
        VectorRecord("photometry_lsst_err", LSST_BANDS, "uJy", f"{states}, 1 sigma"),
        VectorRecord("photometry_spherex", spherex, "uJy", f"{kind} flux density in SPHEREx-like channels"),
        VectorRecord("photometry_spherex_err", spherex, "uJy", f"{states}, 1 sigma"),
        VectorRecord("sfh", ages, "Msun/yr", "star-formation rate in even bins from the beginning to t(z)"),
        VectorRecord("sed", points, "uJy", f"{at}, true, means over even bins of log wavelength"),
    )


@functools.lru_cache(maxsize=1)
def _light(table: Path | None) -> CompositeLight:
    return CompositeLight(smooth_ssp() if table is None else read_ssp(table))


def _block(table: Path | None, seed: int, limit: float, noise: bool, frame: SedFrame, block: int) -> _Galaxies:
    """Those of a block's candidates that are bright enough."""
    candidates = draw_histories(BLOCK, keyed_generator(seed, GALAXY_STREAM, block), limit)
    light = _light(table)
    rest = light(candidates)
    seen = observe(rest, candidates.redshift)
    flux = seen @ channels()[0].T.astype(np.float32)
    with np.errstate(divide="ignore"):
        magnitude = 23.9 - 2.5 * np.log10(flux[:, I_BAND].astype(np.float64))
    keep = np.flatnonzero((magnitude <= limit) & (magnitude >= BRIGHTEST))

    rng = keyed_generator(seed, NOISE_STREAM, block)
    flux, error = flux.astype(np.float64), sky_errors(BLOCK, rng)
    if noise:
        flux, error = measure(flux, error, rng)
    formed = light.formed_mass(candidates)
    bins = candidates.formed.reshape(BLOCK, SFH_BINS, FINE_BINS // SFH_BINS).sum(2)
    sfh = bins * (formed / (candidates.age / SFH_BINS * 1e9))[:, None]
    sed = (rest if frame == "rest" else seen) @ sed_bins(frame)[0].T.astype(np.float32)
    n = len(LSST_BANDS)
    vectors = {"photometry_lsst": flux[:, :n], "photometry_lsst_err": error[:, :n]}
    vectors |= {"photometry_spherex": flux[:, n:], "photometry_spherex_err": error[:, n:], "sfh": sfh, "sed": sed}
    labels = {
        "redshift": candidates.redshift,
        "stellar_mass": candidates.stellar_mass,
        "halo_mass": candidates.halo_mass,
        "sfr": candidates.recent_share() * formed / 1e8,
        "metallicity": candidates.metallicity,
        "dust": candidates.dust,
        "mean_age": candidates.mean_age(),
        "halo_half_mass_time": candidates.half_mass_time,
        "magnitude_i": magnitude,
    }
    return _Galaxies(
        {name: values[keep] for name, values in labels.items()},
        {name: values[keep].astype(np.float32) for name, values in vectors.items()},
    )


def _in_order(one_block: Any, processes: int) -> Iterator[_Galaxies]:
    """Blocks 0, 1, 2, ... without end."""
    if processes == 1:
        yield from map(one_block, itertools.count())
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from in_order(lambda block: pool.submit(one_block, block), itertools.count(), processes)
