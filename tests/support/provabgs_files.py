"""Writes a PROVABGS catalogue in the published layout."""

import warnings

import h5py
import numpy as np
from astropy.table import Table

COUNT = 12


def columns(**changes):
    """Columns of the catalogue, with its names and types; rows 1, 4 and 6 fail one cut each, row 7 two."""
    rng = np.random.default_rng(3)
    data = {
        "TARGETID": 39627652591521181 + 7 * np.arange(COUNT),
        "RA": rng.uniform(0, 360, COUNT),
        "DEC": rng.uniform(-20, 80, COUNT),
        "TRACER": np.full(COUNT, b"BGS_ANY"),
        "Z_HP": rng.uniform(0.02, 0.5, COUNT),
        "ZERR": rng.uniform(0, 1e-4, COUNT),
        "ZWARN": np.zeros(COUNT, np.int64),
        "MAG_G": rng.uniform(17, 22, COUNT).astype(np.float32),
        "MAG_R": rng.uniform(16, 20, COUNT).astype(np.float32),
        "MAG_Z": rng.uniform(15, 19, COUNT).astype(np.float32),
        "IS_BGS_BRIGHT": np.arange(COUNT) % 2 == 0,
        "PROVABGS_MCMC": rng.normal(0, 1, (COUNT, 10, 13)).astype(np.float32),
        "PROVABGS_THETA_BF": rng.normal(0, 1, (COUNT, 13)).astype(np.float32),
        "PROVABGS_LOGMSTAR_BF": rng.uniform(8, 12, COUNT).astype(np.float32),
    }
    data["PROVABGS_LOGMSTAR_BF"][[1, 7]] = -1
    data["MAG_G"][4] = np.nan
    data["MAG_Z"][[6, 7]] = 0
    return {k: v for k, v in (data | changes).items() if v is not None}


def write(path, data):
    if path.suffix == ".hdf5":
        with warnings.catch_warnings(action="ignore"):  # that the name is the default one
            Table(data).write(path, path="__astropy_table__", serialize_meta=True, overwrite=True)
    else:
        with h5py.File(path, "w") as file:
            for name, values in data.items():
                file[name] = values
    return path
