"""A stack of images in HDF5: one array of all of them, and columns beside it, as many sets for machine learning are published.

The array holds N x C x H x W or N x H x W x C numbers, or N x H x W of one band; columns are data sets of N numbers or texts
in the same group. `ra` and `dec` (degrees, ICRS, in any case) are positions, all others labels.

Shape legend: N images, C bands, H x W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from armillary.engine.data.sources.files.hdf5 import (
    HDF5_SUFFIXES,
    column_names,
    label_name,
    open_hdf5,
    opened,
    plain,
)
from armillary.engine.data.sources.files.parts import Part, PartSource, central_size, refuse_differences, short_names
from armillary.engine.data.sources.listing import find_files
from armillary.engine.data.sources.source import Rows, cut_out, key_from_name

__all__ = ["ImageStack"]

DISPLAY = ("red", "green", "blue")


class ImageStack(PartSource):
    """A `Source` of stacks of images.

    8-bit images are display pictures in counts, and three bands of them red, green and blue. Of others bands and unit must be given.

    Args:
        path: One file, or a folder of files with the same columns.
        bands: Names of the C bands.
        unit: Flux unit of the images, such as "nanomaggy".
        images: Name of the array, with slashes for groups.
        key: Column that names the objects; by default file and row do.
        size: Cut the central `size` x `size` pixels out of every image.
        pixel_scale_arcsec: Arcseconds a pixel.
        zero_is_missing: Pixels of exactly 0 carry no data; those that are not finite never do.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file is not of this form, the files differ, or bands or unit are not given.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        bands: tuple[str, ...] | None = None,
        unit: str | None = None,
        images: str = "images",
        key: str | None = None,
        size: int | None = None,
        pixel_scale_arcsec: float | None = None,
        zero_is_missing: bool = False,
    ) -> None:
        files = find_files(path, HDF5_SUFFIXES, "HDF5 file")
        self._images, self._group = images, images.rpartition("/")[0] or "/"
        self.pixel_scale_arcsec, self._zeros = pixel_scale_arcsec, zero_is_missing
        layouts = [(file, *self._layout(file)) for file in files]
        first, shape, dtype, columns = layouts[0]
        refuse_differences([(f, {images: (s[1:], d)} | c) for f, s, d, c in layouts])
        self.bands = _bands(first, images, shape, dtype, bands)
        self._last = len(shape) == 4 and shape[1] != len(self.bands)  # bands are the last axis
        self.unit = "count" if unit is None and dtype == np.uint8 else unit or ""
        if not self.unit:
            raise ValueError(f"{first}: the unit of {images!r} is not known; give it, such as --option unit=nanomaggy")
        self._height, self._width = central_size(size, *(shape[1:3] if self._last else shape[-2:]))
        if key is not None and key not in columns:
            raise ValueError(f"key: must be a column of {first} ({', '.join(columns) or 'none'}), got {key!r}")
        self._key, self._text = key, columns
        self._place = {axis: next((c for c in columns if c.lower() == axis), None) for axis in ("ra", "dec")}
        self._label = {label_name(c): c for c in columns if c not in (key, *self._place.values())}
        self.labels = {label: f"{column} of {first.name}" for label, column in self._label.items()}
        parts = [Part(f, n, s[0]) for (f, s, _, _), n in zip(layouts, short_names(files), strict=True)]
        super().__init__(parts, open_hdf5)

    def _layout(self, file: Path) -> tuple[tuple[int, ...], np.dtype, dict[str, bool]]:
        """Shape and type of the images; the columns, and whether each is text."""
        with opened(file) as stored:
            if self._images not in stored or not hasattr(stored[self._images], "shape"):
                raise ValueError(
                    f"{file}: no array {self._images!r}; it has {', '.join(sorted(stored)) or 'nothing'}; name it by "
                    "--option images=NAME"
                )
            array = stored[self._images]
            if array.ndim not in (3, 4) or array.dtype.kind not in "fiu" or 0 in array.shape:
                raise ValueError(f"{file}: {self._images!r} must be numbers of images, got {array.shape} {array.dtype}")
            return array.shape, array.dtype, column_names(f"{file}", stored[self._group], len(array))

    def _columns(self, part: Part, low: int, high: int) -> Rows:
        group = self._file(part)[self._group]
        columns: dict[str, Any] = {
            axis: np.full(high - low, np.nan) if column is None else np.asarray(group[column][low:high], np.float64)
            for axis, column in self._place.items()
        }
        columns |= {label: plain(group[c][low:high], self._text[c]) for label, c in self._label.items()}
        if self._key is None:
            stem = part.name.rpartition(".")[0]
            keys = [key_from_name(f"{stem}-{row:07d}") for row in range(low, high)]
        else:
            keys = [key_from_name(str(name)) for name in plain(group[self._key][low:high], True)]
        return Rows(keys, columns)

    def _payload(self, part: Part, row: int) -> dict[str, Any]:
        stored = self._file(part)[self._images][row]
        image = np.moveaxis(stored, -1, 0) if self._last else stored.reshape(-1, *stored.shape[-2:])
        return cut_out(image, self._height, self._width, zero_is_missing=self._zeros)


def _bands(
    file: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, given: tuple[str, ...] | None
) -> tuple[str, ...]:
    counts = (1,) if len(shape) == 3 else (shape[1], shape[3])
    if given is None and dtype == np.uint8 and {1, 3} & set(counts):
        return DISPLAY if 3 in counts else ("grey",)
    if given is None:
        raise ValueError(f"{file}: {name!r} is {shape}, and its bands are not known; name them, such as --bands g r z")
    if len(given) not in counts:
        raise ValueError(f"bands: must be as many as {name!r} of {file} has, {shape}, got {' '.join(given)}")
    return tuple(given)
