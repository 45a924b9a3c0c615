"""Cutouts and spectra of single objects, read from the shards when they are asked for."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from PIL import Image

from armillary.engine.data.format import codec
from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.spectra import Spectrum, decode_spectrum
from armillary.engine.data.format.survey import SpectrumRecord, Survey
from armillary.engine.data.inspect.colour import galaxy_picture
from armillary.engine.data.loading.shard_files import ShardFiles
from armillary.engine.evaluate.search.pictures import binned_spectrum

__all__ = ["Pictures", "png", "spectrum_curve"]

KEPT_BYTES = 64 << 20  # of pictures in memory
BINS = 420  # of a spectrum's curve


class Pictures:
    """Pictures of a survey's objects; safe to use from several threads.

    Args:
        survey: Loaded from its folder.
        catalog_row: [N] row of the catalogue, by number of the object.
    """

    def __init__(self, survey: Survey, catalog_row: np.ndarray) -> None:
        self.survey = survey
        table = read_catalog(survey, ["shard", "index"])
        self._shard, self._index = (table[n].to_numpy().astype(np.int32)[catalog_row] for n in ("shard", "index"))
        splits = dict.fromkeys(shard.split for shard in survey.shards)
        assert survey.folder is not None, "a survey that was loaded from its folder"
        self._files = {split: ShardFiles(survey.folder, survey, split) for split in splits}
        counts = dict.fromkeys(splits, 0)
        self._place: list[tuple[ShardFiles, int]] = []
        for record in survey.shards:  # files of a split count their own shards
            self._place.append((self._files[record.split], counts[record.split]))
            counts[record.split] += 1
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def image(self, number: int) -> bytes | None:
        """Colour composite of an object as PNG; None where it has no image.

        Raises:
            OSError, ValueError: Its shard cannot be read, or the cutout is corrupt.
        """
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        blob = self._blob(number, "image")
        if blob is None:
            return None
        image, valid = codec.decode(blob)
        made = png(galaxy_picture(image, valid, self.survey))
        with self._lock:
            if number not in self._kept:
                self._kept[number] = made
                self._bytes += len(made)
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return made

    def spectrum(self, number: int) -> dict[str, Any] | None:
        """Curve of an object's spectrum, see `spectrum_curve`; None where it has none. Raises as `image`."""
        blob = self._blob(number, "spectrum")
        if blob is None or self.survey.spectrum is None:
            return None
        return spectrum_curve(decode_spectrum(blob), self.survey.spectrum)

    def _blob(self, number: int, modality: str) -> bytes | None:
        if modality not in self.survey.modalities:
            return None
        files, shard = self._place[self._shard[number]]
        return files.read(shard, int(self._index[number]))[modality]


def png(picture: np.ndarray) -> bytes:
    """A PNG of [H, W, 3] uint8."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def spectrum_curve(spectrum: Spectrum, record: SpectrumRecord) -> dict[str, Any]:
    """A spectrum as it is drawn: wavelength in angstrom and flux of the bins that have data, and the unit, as JSON types."""
    wave, flux = binned_spectrum(record.grid.angstrom(), spectrum, BINS)
    return {"wavelength": np.round(wave, 2).tolist(), "flux": [float(f"{v:.5g}") for v in flux], "unit": record.unit}
