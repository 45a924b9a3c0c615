"""A survey of positions, splits and redshifts without shards: what a sky graph reads."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from armillary.engine.data.format.survey import ShardRecord, Statistics, Survey


def sky(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Galaxies all over the sky, half of them in clumps of an arcminute, some at the poles and at the meridian."""
    rng = np.random.default_rng(seed)
    ra, dec = rng.uniform(0, 360, count), np.rad2deg(np.arcsin(rng.uniform(-1, 1, count)))
    half = count // 2
    first = rng.integers(half, count, half)
    ra[:half] = ra[first] + rng.normal(0, 1 / 60, half)
    dec[:half] = np.clip(dec[first] + rng.normal(0, 1 / 60, half), -90, 90)
    ra[:4], dec[:4] = (0.0, 359.9999, 10.0, 200.0), (0.0, 0.0, 90.0, -90.0)
    return ra % 360, dec


def sky_survey(folder: Path, count: int = 400, **columns) -> Path:
    """Write survey.json and catalog.parquet; a fifth of the rows is the split test."""
    folder.mkdir()
    ra, dec = sky(count)
    split = np.where(np.random.default_rng(1).random(count) < 0.2, "test", "train")
    z = np.random.default_rng(2).uniform(0.01, 0.1, count)
    table = {"split": split, "ra": ra, "dec": dec, "z": z, "type": ["E"] * count} | columns
    pq.write_table(pa.table(table), folder / "catalog.parquet")
    shards = (ShardRecord("train-000000.tar", "train", count, 1, "0"),)
    labels = {"z": "redshift", "type": "Hubble type"}
    Survey(folder.name, (), 0, 0, None, "", "bitplane", (), (), shards, Statistics((), (), (), (), 0), labels).save(
        folder
    )
    return folder
