"""Writes files of Stein et al. (2021) in the published layout."""

import h5py
import numpy as np


def write(path, count, *, first=0, size=8, chunks=None, **changes):
    """A file in the published layout."""
    rng = np.random.default_rng(first)
    rows = np.arange(first, first + count)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = rng.normal(0, 0.01, (count, 3, size, size)).astype(np.float32)
    data = {
        "ra": rng.uniform(0, 360, count),
        "dec": rng.uniform(-20, 80, count),
        "release": np.full(count, 9010, np.int16),
        "brickid": (300000 + rows).astype(np.int32),
        "objid": (rows % 7).astype(np.int32),
        "flux": rng.uniform(1, 9, (count, 3)).astype(np.float32),
        "apflux": rng.uniform(1, 9, (count, 2)).astype(np.float32),
        "source_type": np.array([b"DEV", b"SER", b"EXP"])[rows % 3],
        "z_spec": np.where(rows % 2, -99.0, 0.01 * rows),
        "z_training": (rows % 2).astype(bool),
    }
    data |= changes
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, chunks=chunks)
        for name, values in data.items():
            if values is not None:
                file[name] = values
    return images, data
