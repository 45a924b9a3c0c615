"""Columns of SuperMock's matrices of magnitudes: their names, and the order of wavelength where it is known.

The files of release 3 hold no names; the authors' reader (SuperMockLoad) ships them as band_names.json, with names such as LSST_z
and SPHEREx_band1_ch16. Its order as of July 2026 is kept here for LSST and SPHEREx, whose columns are not in order of
wavelength; a band_names.json beside the data comes first, and other surveys are read by it only.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

__all__ = ["PUBLISHED", "band_names", "short_name", "wavelength_order"]

_CHANNELS = (
    (16, 14, 11, 12, 13, 9, 17, 5, 8, 7, 2, 15, 6, 4, 10, 1, 3),
    (8, 10, 12, 13, 15, 14, 9, 5, 1, 4, 7, 3, 2, 16, 11, 6, 17),
    (7, 6, 5, 3, 11, 15, 9, 1, 4, 16, 8, 13, 14, 17, 2, 10, 12),
    (8, 17, 10, 12, 16, 11, 15, 7, 1, 5, 4, 13, 14, 6, 3, 9, 2),
    (6, 17, 9, 10, 15, 11, 1, 13, 16, 8, 7, 3, 12, 4, 2, 5, 14),
    (9, 10, 6, 11, 15, 17, 5, 13, 7, 3, 1, 16, 12, 2, 14, 4, 8),
)
PUBLISHED = {
    "LSST": tuple(f"LSST_{band}" for band in "zgryui"),
    "SPHEREx": tuple(f"SPHEREx_band{b + 1}_ch{c}" for b, channels in enumerate(_CHANNELS) for c in channels),
}
LSST = "ugrizy"


def band_names(file: Path | None) -> dict[str, tuple[str, ...]]:
    """Names of the columns of each survey's matrix.

    Args:
        file: band_names.json; None for what is known without it.

    Raises:
        ValueError: The file does not hold lists of names.
    """
    if file is None:
        return dict(PUBLISHED)
    try:
        read = json.loads(file.read_text())
        return {survey: tuple(map(str, names)) for survey, names in read.items() if isinstance(names, list)}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not a table of band names: {error}") from error


def short_name(survey: str, column: str) -> str:
    """A band's name without that of its survey."""
    return column.removeprefix(f"{survey}_").removeprefix(f"{survey.lower()}_")


def wavelength_order(survey: str, names: tuple[str, ...]) -> np.ndarray:
    """Places of the columns by increasing wavelength; as they are where the names do not say it.

    Raises:
        ValueError: A band of LSST or SPHEREx has another name.
    """
    short = [short_name(survey, name) for name in names]
    if survey == "LSST":
        rank: list[tuple[int, ...]] = []
        for name in short:
            if name.lower() not in LSST or len(name) != 1:
                raise ValueError(f"band {name!r} of LSST: must be one of {', '.join(LSST)}")
            rank.append((LSST.index(name.lower()),))
    elif survey == "SPHEREx":
        rank = []
        for name in short:
            band, _, channel = name.removeprefix("band").partition("_ch")
            if not (band.isdecimal() and channel.isdecimal()):
                raise ValueError(f"channel {name!r} of SPHEREx: must be like band1_ch16")
            rank.append((int(band), int(channel)))
    else:
        return np.arange(len(names))
    return np.array(sorted(range(len(names)), key=rank.__getitem__))
