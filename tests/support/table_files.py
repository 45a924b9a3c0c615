"""A small table in every format that tables are read from."""

import gzip
import warnings

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
from astropy.table import Table

IDS = 39627_000_000_000_001 + np.arange(6)  # above 2^53: the last digits are lost in float64
COLUMNS = {
    "TARGETID": IDS,
    "RA": np.array([0.0, 10.5, 180.25, 359.9, 42.0, 7.0]),
    "Dec": np.array([-89.0, 0.0, 45.5, 89.5, 1.0, 2.0]),
    "Z": np.array([0.1, -99.0, 0.3, 0.4, np.nan, 0.6], np.float32),
    "nobs": np.array([1, 2, 3, 4, 5, 6], np.int16),
    "bright": np.array([True, False, True, True, False, False]),
    "SPECTYPE": np.array(["GALAXY", "QSO", "", "GALAXY", "STAR", "GALAXY"]),
    "mag_g": np.array([20.5, 21.5, 99.0, 23.5, np.inf, 25.5], np.float32),
    "mag_r": np.array([20, 21, 22, 23, 24, 25], np.float64),
}
FLUX = np.arange(18, dtype=np.float32).reshape(6, 3)
FORMATS = (
    "a.parquet",
    "a.csv",
    "a.csv.gz",
    "a.ecsv",
    "a.vot",
    "a.fits",
    "a.fits.gz",
    "a.hdf5",
    "records.h5",
    "compressed.h5",
)


def write(path, columns=None, **changes):
    """A table in the format that the name says; text as each format keeps it."""
    columns = {k: v for k, v in ((COLUMNS if columns is None else columns) | changes).items() if v is not None}
    name = path.name
    if name.endswith((".parquet", ".csv", ".csv.gz")):
        arrays = {
            k: pa.FixedSizeListArray.from_arrays(v.ravel(), v.shape[1]) if v.ndim == 2 else pa.array(v)
            for k, v in columns.items()
        }
        table = pa.table(arrays)
        if name.endswith(".parquet"):
            pq.write_table(table, path, row_group_size=2)
        else:
            with gzip.open(path, "wb") if name.endswith(".gz") else open(path, "wb") as f:
                pc_csv.write_csv(table, f)
    elif ".fits" in name or name.endswith((".ecsv", ".vot")):
        options = {"format": "votable"} if name.endswith(".vot") else {}
        Table(columns).write(path, overwrite=True, **options)
    elif name.startswith("records"):
        records = Table({k: v.astype("S") if v.dtype.kind == "U" else v for k, v in columns.items()})
        with warnings.catch_warnings(action="ignore"):  # that the name is the default one
            records.write(path, path="__astropy_table__", overwrite=True, serialize_meta=True)
    else:
        with h5py.File(path, "w") as file:
            for k, v in columns.items():
                options = {"compression": "gzip", "chunks": True} if name.startswith("compressed") else {}
                file.create_dataset(f"photometry/{k}", data=v.astype("S") if v.dtype.kind == "U" else v, **options)
    return path
