"""SuperMock in either layout, told apart by the names of its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from armillary.engine.data.sources.source import Source
from armillary.engine.data.sources.surveys.supermock.earlier import EarlierSuperMock
from armillary.engine.data.sources.surveys.supermock.layout3 import find_patches
from armillary.engine.data.sources.surveys.supermock.release3 import SFH_BINS, SuperMockRelease3

__all__ = ["open_supermock"]


def open_supermock(
    path: Path | str,
    *,
    resample_sed: bool = False,
    leave_out: Sequence[str] = (),
    details: Path | str | None = None,
    sfh_bins: int = SFH_BINS,
    every: int = 1,
) -> Source:
    """Open release 3, or files of the earlier writer, which know the first two options only.

    Args:
        path: A folder or a file.
        resample_sed: See the readers.
        leave_out: See the readers.
        details: See `SuperMockRelease3`.
        sfh_bins: Likewise.
        every: Likewise.

    Raises:
        ValueError: An option has no meaning for the files; see also the readers.
    """
    path = Path(path)
    if path.exists() and find_patches(path):
        return SuperMockRelease3(
            path, details=details, sfh_bins=sfh_bins, resample_sed=resample_sed, leave_out=leave_out, every=every
        )
    for name, value, default in (("details", details, None), ("sfh_bins", sfh_bins, SFH_BINS), ("every", every, 1)):
        if value != default:
            raise ValueError(f"{name}: has no effect on the earlier layout of SuperMock; leave it out")
    return EarlierSuperMock(path, resample_sed=resample_sed, leave_out=leave_out)
