"""The HDUs of a FITS file, one after the other, as far as it is one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

__all__ = ["all_hdus"]


def all_hdus(hdus: Any) -> Iterator[Any]:
    """HDUs of a file as astropy comes to them.

    Raises:
        ValueError: One has an axis of a negative length, which would lead astropy back to what it has read, for ever.
    """
    for number in itertools.count():
        try:
            hdu = hdus[number]
        except IndexError:
            return
        for axis in range(1, int(hdu.header.get("NAXIS", 0)) + 1):
            if hdu.header.get(f"NAXIS{axis}", 0) < 0:
                raise ValueError(f"NAXIS{axis} of HDU {number} is negative")
        yield hdu
