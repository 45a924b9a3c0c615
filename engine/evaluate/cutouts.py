"""Single cutouts out of a packed survey, for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from armillary.engine.data import codec
from armillary.engine.data.survey import Survey

__all__ = ["read_cutouts"]


def read_cutouts(survey_dir: Path, rows: Sequence[int] | np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Read cutouts by catalogue row.

    Args:
        survey_dir: The survey.
        rows: Catalogue rows.

    Returns:
        For each row the image, [C, H, W] float32 in the survey's unit, masked pixels 0, and valid, [C, H, W] bool, or
        None where every pixel carries data.

    Raises:
        codec.CorruptBlob: A cutout is corrupt.
        IndexError: There is no such row.
    """
    survey = Survey.load(survey_dir)
    table = pq.read_table(survey_dir / "catalog.parquet", columns=["shard", "offset", "size"])
    shard, offset, size = (table[name].to_numpy() for name in ("shard", "offset", "size"))
    images = []
    for row in rows:
        with open(survey_dir / survey.shards[shard[row]].name, "rb") as f:
            f.seek(int(offset[row]))
            images.append(codec.decode(f.read(int(size[row]))))
    return images
