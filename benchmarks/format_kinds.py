"""Ways to store cutouts, each with the error that it allows."""

from __future__ import annotations

import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import h5py
import imagecodecs
import numpy as np
from astropy.io import fits
from format_pieces import Pieces

from armillary.engine.data.format import codec

__all__ = ["FORMATS", "Format"]

ROUNDING = 2.0**-22  # of the flux: float32 arithmetic of quantising and scaling back


class Format(ABC):
    """One way to store cutouts.

    Attributes:
        name: For people.
        slow: True where tens of cutouts take seconds, so that fewer are timed.
    """

    name: str
    slow = False

    @abstractmethod
    def encode(self, pieces: Pieces) -> Any:
        """Store all cutouts in memory, so that each can be read alone."""

    @abstractmethod
    def decode(self, stored: Any, pieces: Pieces, out: np.ndarray) -> None:
        """Read them back one by one into `out` [N, C, H, W] float32; of `pieces` only the steps are used."""

    @abstractmethod
    def tolerance(self, stored: Any, pieces: Pieces) -> np.ndarray:
        """Largest error that the format allows, broadcastable to [N, C, H, W], in the unit of the images."""

    def size(self, stored: Any) -> int:
        """Bytes of all cutouts."""
        return sum(map(len, stored))


class Packed(Format):
    """This project's codec, checksum and mask of missing pixels included."""

    def __init__(self, name: str) -> None:
        self.name = name

    def encode(self, pieces: Pieces) -> list[bytes]:
        """A blob a cutout."""
        steps = pieces.steps[:, :, 0, 0] if self.name == "packed" else itertools.repeat(None)
        masks = [None if valid.all() else valid for valid in pieces.valid]
        return [codec.encode(*each) for each in zip(pieces.images, steps, masks, strict=False)]

    def decode(self, stored: list[bytes], pieces: Pieces, out: np.ndarray) -> None:
        """As the loader does, with one thread."""
        bad = codec.decode_batch(stored, out, threads=1)
        assert not bad, bad

    def tolerance(self, stored: list[bytes], pieces: Pieces) -> np.ndarray:
        """Half a step, or half a unit in the last place of float16."""
        flux = np.abs(pieces.images)
        return pieces.steps / 2 + ROUNDING * flux if self.name == "packed" else 2.0**-11 * flux + 2.0**-25


class Raw(Format):
    """Bytes of float32, copied."""

    name = "float32"

    def encode(self, pieces: Pieces) -> list[bytes]:
        """The array's own bytes."""
        return [image.tobytes() for image in pieces.images]

    def decode(self, stored: list[bytes], pieces: Pieces, out: np.ndarray) -> None:
        """A copy."""
        for blob, image in zip(stored, out, strict=True):
            image[...] = np.frombuffer(blob, np.float32).reshape(image.shape)

    def tolerance(self, stored: list[bytes], pieces: Pieces) -> np.ndarray:
        """None."""
        return np.zeros(1)


def quantised(image: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Steps nearest to each pixel, int16.

    Raises:
        ValueError: int16 cannot hold them.
    """
    steps = np.rint(image / step)
    if max(steps.max(), -steps.min()) > np.iinfo(np.int16).max:
        raise ValueError(f"a pixel of {np.abs(steps).max():.0f} steps is beyond int16")
    return steps.astype(np.int16)


class Coded(Format):
    """int16 steps of an eighth of the sky noise, through a general compressor.

    Args:
        name: For people.
        compress: int16 [C, H, W] to bytes.
        expand: Bytes and shape to int16 [C, H, W].
    """

    def __init__(
        self,
        name: str,
        compress: Callable[[np.ndarray], bytes],
        expand: Callable[[bytes, tuple[int, ...]], np.ndarray],
    ) -> None:
        self.name, self.compress, self.expand = name, compress, expand

    def encode(self, pieces: Pieces) -> list[bytes]:
        """Quantise and compress."""
        return [self.compress(quantised(*each)) for each in zip(pieces.images, pieces.steps, strict=True)]

    def decode(self, stored: list[bytes], pieces: Pieces, out: np.ndarray) -> None:
        """Expand and scale."""
        for blob, step, image in zip(stored, pieces.steps, out, strict=True):
            np.multiply(self.expand(blob, image.shape), step, out=image)

    def tolerance(self, stored: list[bytes], pieces: Pieces) -> np.ndarray:
        """Half a step."""
        return pieces.steps / 2 + ROUNDING * np.abs(pieces.images)


def bitshuffled(name: str) -> Coded:
    """Bitshuffle and then LZ4 or zstd at its default level, a cutout as one block."""
    compress, expand = getattr(imagecodecs, f"{name}_encode"), getattr(imagecodecs, f"{name}_decode")

    def back(blob: bytes, shape: tuple[int, ...]) -> np.ndarray:
        shuffled = np.frombuffer(expand(blob, out=2 * int(np.prod(shape))), np.int16)
        return imagecodecs.bitshuffle_decode(shuffled).reshape(shape)

    return Coded(f"int16, bitshuffle + {name}", lambda steps: compress(imagecodecs.bitshuffle_encode(steps)), back)


class HDF5(Format):
    """A chunk a cutout of a dataset in memory, no chunk cache.

    Args:
        name: For people.
        dtype: float32, or int16 for steps.
        filters: Filter options of h5py.
    """

    names = itertools.count()

    def __init__(self, name: str, dtype: str, **filters: Any) -> None:
        self.name, self.dtype, self.filters = name, dtype, filters

    def encode(self, pieces: Pieces) -> h5py.Dataset:
        """Write them one by one."""
        name = f"formats-{next(self.names)}.h5"  # only a name: the file stays in memory
        file = h5py.File(name, "w", driver="core", backing_store=False, rdcc_nbytes=0)
        shape = pieces.images.shape
        stored = file.create_dataset("images", shape, self.dtype, chunks=(1, *shape[1:]), **self.filters)
        for index, (image, step) in enumerate(zip(pieces.images, pieces.steps, strict=True)):
            stored[index] = quantised(image, step) if self.dtype == "int16" else image
        file.flush()
        return stored

    def decode(self, stored: h5py.Dataset, pieces: Pieces, out: np.ndarray) -> None:
        """Read them one by one."""
        for index, step in enumerate(pieces.steps):
            if self.dtype == "int16":
                np.multiply(stored[index], step, out=out[index])
            else:
                stored.read_direct(out, np.s_[index], np.s_[index])

    def tolerance(self, stored: h5py.Dataset, pieces: Pieces) -> np.ndarray:
        """Half a step, or none."""
        return pieces.steps / 2 + ROUNDING * np.abs(pieces.images) if self.dtype == "int16" else np.zeros(1)

    def size(self, stored: h5py.Dataset) -> int:
        """Bytes of the chunks; the file's own structures, which many cutouts share, are left out."""
        return stored.id.get_storage_size()


class TiledFITS(Format):
    """A compressed FITS file a cutout, written and read by astropy.

    Args:
        name: For people.
        compression: ZCMPTYPE of the FITS standard.
        level: Steps in the noise that the compressor measures in each tile; None: the steps of the other formats,
            which needs one HDU a band.
        rows: A tile a row, as astropy has it by default; otherwise a tile a band.
    """

    slow = True

    def __init__(self, name: str, compression: str, level: float | None, rows: bool = False) -> None:
        self.name, self.compression, self.level, self.rows = name, compression, level, rows

    def encode(self, pieces: Pieces) -> list[bytes]:
        """A file a cutout."""
        blobs = []
        for image, steps in zip(pieces.images, pieces.steps[:, :, 0, 0], strict=True):
            parts = [(image, self.level)] if self.level else zip(image, -steps, strict=True)  # negative: absolute
            hdus = fits.HDUList([fits.PrimaryHDU()])
            for data, level in parts:
                tile = None if self.rows else (1,) * (data.ndim - 2) + data.shape[-2:]
                options = {"compression_type": self.compression, "quantize_level": level, "tile_shape": tile}
                hdus.append(fits.CompImageHDU(data, **options))
            hdus.writeto(file := io.BytesIO())
            blobs.append(file.getvalue())
        return blobs

    def decode(self, stored: list[bytes], pieces: Pieces, out: np.ndarray) -> None:
        """Open each file and read its images."""
        for blob, image in zip(stored, out, strict=True):
            with fits.open(io.BytesIO(blob), memmap=False) as hdus:
                if len(hdus) == 2:
                    image[...] = hdus[1].data
                else:
                    for band, hdu in zip(image, hdus[1:], strict=True):
                        band[...] = hdu.data

    def tolerance(self, stored: list[bytes], pieces: Pieces) -> np.ndarray:
        """Half of the largest step that the file states for a tile of the band (none for a tile stored exactly)."""
        steps = np.zeros(pieces.sigma.shape)
        for blob, largest in zip(stored, steps, strict=True):
            with fits.open(io.BytesIO(blob), memmap=False, disable_image_compression=True) as hdus:
                scales = np.concatenate([hdu.data["ZSCALE"] for hdu in hdus[1:]])
                largest[:] = scales.reshape(len(largest), -1).max(1)
        return steps[:, :, None, None] / 2 + ROUNDING * np.abs(pieces.images)


FORMATS: tuple[Format, ...] = (
    Packed("packed"),
    Packed("float16"),
    Raw(),
    bitshuffled("lz4"),
    bitshuffled("zstd"),
    Coded(
        "int16, Rice",
        lambda steps: imagecodecs.rcomp_encode(steps, nblock=32),
        lambda blob, shape: imagecodecs.rcomp_decode(blob, shape=shape, dtype=np.int16, nblock=32),
    ),
    HDF5("int16, HDF5 shuffle + gzip", "int16", compression="gzip", shuffle=True),
    HDF5("float32, HDF5 gzip", "float32", compression="gzip"),
    TiledFITS("FITS Rice, same steps", "RICE_1", None),
    TiledFITS("FITS Rice, level 8, tile a band", "RICE_1", 8),
    TiledFITS("FITS Rice, astropy's defaults", "RICE_1", 16, rows=True),
    TiledFITS("FITS GZIP_2, same steps", "GZIP_2", None),
)
