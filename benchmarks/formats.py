"""Bytes, error, encode and decode rate of one cutout format against another, on one thread and in memory.

    OMP_NUM_THREADS=1 python benchmarks/formats.py --cutouts FOLDER    # about four minutes with real cutouts
    OMP_NUM_THREADS=1 python benchmarks/formats.py --quick             # a quarter of the cutouts, less than a minute

`loader.py` times whole readers; this times what a format costs whichever reader uses it. The same cutouts go through
every format: simulated ones (`loader.Cutouts`), and pieces of the Legacy Survey FITS cutouts of a folder. All formats
start from float32 arrays and fill one float32 array. They are timed in turn, repeat by repeat, so that a busy machine
slows all alike, and the ratios are taken within a repeat.

Nothing is timed before every decoded pixel has been found within the format's own tolerance.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import astropy
import h5py
import imagecodecs
import numpy as np
import torch
from astropy.io import fits
from common import append_rows
from loader import BANDS, SKY_SIGMA, Cutouts

from armillary.engine.data.building.measure import robust_sigma
from armillary.engine.data.format import codec
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.fits import CUTOUTS, FitsCutouts

STEPS_A_SIGMA = 8  # quantisation steps in the sky noise: the error is at most a sixteenth of it
ROUNDING = 2.0**-22  # of the flux: float32 arithmetic of quantising and scaling back
REAL_FOLDER = "legacysurvey_fits"  # in the folder that ARMILLARY_REAL_DATA names


@dataclass(frozen=True)
class Pieces:
    """Cutouts of one size, N x C x H x W.

    Attributes:
        name: Where they come from.
        images: [N, C, H, W] float32, 0 where there is no data.
        sigma: [N, C] float32, sky noise.
        valid: [N, C, H, W] bool, False where there is no data.
    """

    name: str
    images: np.ndarray
    sigma: np.ndarray
    valid: np.ndarray

    def __len__(self) -> int:
        """Number of cutouts."""
        return len(self.images)

    @property
    def steps(self) -> np.ndarray:
        """[N, C, 1, 1] float32, the quantisation step."""
        return (self.sigma / STEPS_A_SIGMA)[:, :, None, None]

    def first(self, count: int) -> Pieces:
        """The first cutouts."""
        return Pieces(self.name, self.images[:count], self.sigma[:count], self.valid[:count])


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


def simulated(count: int, size: int) -> Pieces:
    """The cutouts of `loader.py`."""
    source = Cutouts(count, size)
    images = np.stack([source.image(index) for index in range(count)])
    sigma = np.tile(np.array(SKY_SIGMA, np.float32), (count, 1))
    return Pieces("simulated", images, sigma, np.ones(images.shape, bool))


def unrepeated(image: np.ndarray) -> np.ndarray:
    """Drop the rows and columns that equal the one before: undoes enlargement by repetition of pixels."""
    rows = np.append(True, (image[:, 1:] != image[:, :-1]).any((0, 2)))
    columns = np.append(True, (image[:, :, 1:] != image[:, :, :-1]).any((0, 1)))
    return image[:, rows][:, :, columns]


def real(folder: Path, count: int, size: int) -> list[Pieces]:
    """Pieces of a folder's Legacy Survey cutouts, each set repeated to at least `count`; prints what is left out.

    Some published cutouts were enlarged by repeating pixels, which a general compressor finds. The first set holds all
    files, repeated rows and columns dropped; the second holds the enlarged ones as they are.
    """
    native, enlarged = [], []
    for path in sorted(path for path in folder.rglob("*") if path.name.lower().endswith(CUTOUTS)):
        try:
            image = FitsCutouts(path).read(0).image
        except (BadSample, ValueError) as error:
            print(f"left out: {error}")
            continue
        once = unrepeated(image)
        native.append((path, once))
        if once.shape != image.shape:
            enlarged.append((path, image))
    sets = [tiled(name, files, count, size) for name, files in (
        ("Legacy Survey", native), ("Legacy Survey, enlarged by repeated pixels", enlarged),
    )]  # fmt: skip
    if not native:
        print(f"no real cutouts: no FITS file in {folder}")
    return [pieces for pieces in sets if pieces is not None]


def tiled(name: str, files: Sequence[tuple[Path, np.ndarray]], count: int, size: int) -> Pieces | None:
    """Tile images from their centres without overlap; the sky noise is measured in the whole image.

    Tiles without a pixel of data in some band are dropped.
    """
    images, sigmas, masks = [], [], []
    for path, image in files:
        bands, *shape = image.shape
        if bands != len(BANDS) or min(shape) < size:
            print(f"left out: {path}: {bands}x{shape[0]}x{shape[1]}, pieces are {len(BANDS)}x{size}x{size}")
            continue
        valid = image != 0
        sigma = robust_sigma(image, valid).astype(np.float32)
        starts = [[n % size // 2 + size * i for i in range(n // size)] for n in shape]
        for top, left in itertools.product(*starts):
            tile = np.s_[:, top : top + size, left : left + size]
            if valid[tile].any((1, 2)).all():
                images.append(image[tile])
                sigmas.append(sigma)
                masks.append(valid[tile])
    if not images:
        return None
    print(f"{name}: {len(images)} pieces of {len(files)} files, {1 - np.mean(masks):.1%} of the pixels without data")
    copies = -(-count // len(images))
    repeated = [np.tile(np.stack(part), (copies, *[1] * part[0].ndim)) for part in (images, sigmas, masks)]
    return Pieces(name, *repeated)


def checked(form: Format, pieces: Pieces) -> dict[str, float]:
    """KiB a cutout and largest error in units of the sky noise, after a check of every pixel that has data.

    Raises:
        SystemExit: A pixel is further off than the format allows.
    """
    stored = form.encode(pieces)
    out = np.full(pieces.images.shape, np.nan, np.float32)
    form.decode(stored, pieces, out)
    error = np.abs(out.astype(np.float64) - pieces.images)
    wrong = ~(error <= form.tolerance(stored, pieces)) & pieces.valid
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0].tolist())
        raise SystemExit(
            f"{form.name}, {pieces.name}: {wrong.sum()} pixels are beyond the tolerance, first {place}: "
            f"{out[place]} for {pieces.images[place]}; nothing was timed"
        )
    relative = (error / pieces.sigma[:, :, None, None])[pieces.valid]
    return {"KiB": form.size(stored) / len(pieces) / 1024, "error": float(relative.max())}


def measure(pieces: Pieces, formats: Sequence[Format], slow_images: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Check all formats, then time them in turn.

    Args:
        pieces: What to store.
        formats: Ways to store it.
        slow_images: Cutouts that the slow formats are timed on.
        repeats: Rounds.

    Returns:
        For each format "KiB" and "error", and a list over repeats of images/s ("encode", "decode") and of CPU ms an
        image ("encode CPU", "decode CPU").
    """
    found: dict[str, dict[str, Any]] = {form.name: checked(form, pieces) for form in formats}
    for _ in range(repeats):
        for form in formats:
            some = pieces.first(slow_images) if form.slow else pieces
            out = np.zeros_like(some.images)  # written, so that no page is new to the decoder
            clocks = [(time.perf_counter(), time.process_time())]
            stored = form.encode(some)
            clocks.append((time.perf_counter(), time.process_time()))
            form.decode(stored, some, out)
            clocks.append((time.perf_counter(), time.process_time()))
            for name, (before, after) in zip(("encode", "decode"), itertools.pairwise(clocks), strict=True):
                found[form.name].setdefault(name, []).append(len(some) / (after[0] - before[0]))
                found[form.name].setdefault(f"{name} CPU", []).append(1e3 * (after[1] - before[1]) / len(some))
    return found


def report(found: dict[str, dict[str, Any]], common: dict[str, object]) -> list[dict[str, object]]:
    """Print and return the rows; ratios are medians over repeats of the ratio to "packed" in a repeat."""
    ours = found["packed"]
    print(
        f"\n{common['cutouts']}\n{'':34}{'KiB':>8}{'/ packed':>9}{'error':>9}{'encode/s':>10}{'/ packed':>9}{'CPU ms':>9}"
        f"{'decode/s':>10}{'/ packed':>9}{'CPU ms':>9}"
    )
    rows: list[dict[str, object]] = []
    for name, values in found.items():
        row = {**common, "name": name}
        size = values["KiB"] / ours["KiB"]
        rows.append({**row, "quantity": "size", "unit": "KiB", "value": values["KiB"], "ratio_to_packed": size})
        rows.append({**row, "quantity": "largest error", "unit": "sky sigma", "value": values["error"]})
        line = f"{name:34}{values['KiB']:8.1f}{size:9.2f}{values['error']:9.4f}"
        for quantity in ("encode", "decode"):
            ratio = statistics.median(a / b for a, b in zip(values[quantity], ours[quantity], strict=True))
            low, median, high = np.percentile(values[quantity], [20, 50, 80]).tolist()
            cpu = statistics.median(values[f"{quantity} CPU"])
            line += f"{median:10.0f}{ratio:9.3f}{cpu:9.3f}"
            rows.append(
                {**row, "quantity": quantity, "unit": "images/s", "value": median, "p20": low, "p80": high,
                 "ratio_to_packed": ratio, "cpu_ms_per_image": cpu}
            )  # fmt: skip
        print(line)
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="16 cutouts, 4 of them for FITS, 3 repeats")
    parser.add_argument("--images", type=int, help="cutouts (64)")
    parser.add_argument("--slow-images", type=int, help="cutouts that FITS is timed on (8)")
    parser.add_argument("--repeats", type=int, help="repeats (7)")
    parser.add_argument("--size", type=int, default=152, help="side in pixels (152)")
    data = os.environ.get("ARMILLARY_REAL_DATA")
    where = Path(data) / REAL_FOLDER if data else None
    text = f"folder of Legacy Survey FITS cutouts ({REAL_FOLDER} in the folder that ARMILLARY_REAL_DATA names)"
    parser.add_argument("--cutouts", type=Path, default=where, help=text)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/formats.csv"), help="rows are appended")
    options = parser.parse_args()
    for name, quick, full in (("images", 16, 64), ("slow_images", 4, 8), ("repeats", 3, 7)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return options


def main() -> None:
    """Measure, print and append to the CSV."""
    options = parse()
    torch.set_num_threads(1)  # nothing here uses torch's threads; the CSV's column says one
    sets = [simulated(options.images, options.size)]
    if options.cutouts is None:
        print("no real cutouts: give --cutouts FOLDER or set ARMILLARY_REAL_DATA")
    else:
        sets += real(options.cutouts, options.images, options.size)
    rows = []
    for pieces in sets:
        shape = "x".join(map(str, pieces.images.shape[1:]))
        common = {
            "benchmark": "formats", "device": "cpu", "cutouts": pieces.name, "shape": shape, "images": len(pieces),
            "slow_images": options.slow_images, "repeats": options.repeats, "astropy": astropy.__version__,
            "h5py": h5py.__version__, "imagecodecs": imagecodecs.__version__,
        }  # fmt: skip
        rows += report(measure(pieces, FORMATS, options.slow_images, options.repeats), common)
    append_rows(options.csv, rows)
    print(f"appended {len(rows)} rows to {options.csv}")


if __name__ == "__main__":
    main()
