"""Images a second from disk to a float32 batch: this loader against random HDF5 reads and plain webdataset.

    python benchmarks/loader.py            # 2,048 cutouts of 3x152x152, about five minutes
    python benchmarks/loader.py --quick    # 512 cutouts and fewer repeats, about a minute

What the formats cost whichever reader uses them, and others beside them, is in `formats.py`.

One run makes cutouts (faint galaxies on sky noise), stores the same pixels as a packed survey, a float16 survey, an
uncompressed float32 HDF5 file and float32 tars, and times every way to read them in turn, repeat by repeat, so that a
busy machine slows all alike. All give batches of the same shape on the same device. The files lie in the page cache:
what is compared is the work that a format and its reader cause, not a disk.

Nothing is timed before both readers' batches have been found equal and the decoded pixels right.
"""

from __future__ import annotations

import argparse
import io
import itertools
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pyarrow.parquet as pq
import torch
import webdataset as wds
from common import append_rows, csv_option, device_name, fill_sizes, summary, timed, verdict
from cutouts import BANDS, SKY_SIGMA, cutout
from torch import Tensor

from armillary.engine.data.building.build import build
from armillary.engine.data.format import codec
from armillary.engine.data.loading.loader import Loader, SequentialLoader
from armillary.engine.data.loading.shard_files import ShardFiles
from armillary.engine.data.sources.source import Sample

PER_SHARD = 512
WARMUP = 6  # batches, more than any way keeps ready
TARGETS = {"reading": 3.0, "decode": 3000.0}


class Cutouts:
    """Cutouts as a source of the builder.

    Args:
        count: Cutouts.
        size: Side in pixels.
    """

    bands = BANDS
    pixel_scale_arcsec = 0.262
    unit = "nanomaggy"
    labels: dict[str, str] = {}

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        """Number of cutouts."""
        return self.count

    def image(self, index: int) -> np.ndarray:
        """One cutout, [3, size, size] float32."""
        return cutout(index, self.size)

    def read(self, index: int) -> Sample:
        """One cutout as the builder wants it."""
        return Sample(f"c{index:06d}", self.image(index), None, np.nan, np.nan, {}, f"simulated {index}", "train")


class RandomHDF5(torch.utils.data.Dataset):
    """One read a sample of an uncompressed dataset, as training scripts do it; the file is opened by each worker."""

    def __init__(self, path: Path, order: np.ndarray) -> None:
        self.path, self.order = path, order
        self.file: h5py.File | None = None

    def __len__(self) -> int:
        """Samples, over and over."""
        return len(self.order)

    def __getitem__(self, place: int) -> Tensor:
        """[3, H, W] float32."""
        if self.file is None:
            self.file = h5py.File(self.path)
        return torch.from_numpy(self.file["images"][int(self.order[place])])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="512 cutouts, 3 repeats of 16 batches")
    parser.add_argument("--images", type=int, help="cutouts (2048)")
    parser.add_argument("--size", type=int, default=152, help="side in pixels (152)")
    parser.add_argument("--batch", type=int, default=128, help="images a batch (128)")
    parser.add_argument("--batches", type=int, help="timed batches a repeat (40)")
    parser.add_argument("--repeats", type=int, help="repeats (7)")
    parser.add_argument("--threads", type=int, default=4, help="threads of this loader (4)")
    parser.add_argument("--workers", type=int, default=4, help="processes of the others (4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where batches go")
    parser.add_argument("--folder", type=Path, help="where to put the files (a temporary folder)")
    csv_option(parser, "loader")
    options = parser.parse_args()
    fill_sizes(parser, options, images=(512, 2048), batches=(16, 40), repeats=(3, 7))
    if options.images < options.batch:
        parser.error(f"--images must be at least --batch = {options.batch}, got {options.images}")
    return options


def store(source: Cutouts, folder: Path) -> None:
    """Write the same cutouts in every format."""
    shape = (source.size, source.size)
    for name in ("bitplane", "float16"):
        build(
            source, folder / name, name=name, codec=name, sky_sigma=SKY_SIGMA, test_fraction=0.0,
            samples_per_shard=PER_SHARD, progress=False,
        )  # fmt: skip
    with h5py.File(folder / "images.h5", "w") as file:
        images = file.create_dataset("images", (len(source), len(BANDS), *shape), "float32")
        for first in range(0, len(source), PER_SHARD):
            indices = range(first, min(first + PER_SHARD, len(source)))
            images[first : indices.stop] = block = np.stack([source.image(i) for i in indices])
            with tarfile.open(folder / f"plain-{first // PER_SHARD:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for index, image in zip(indices, block, strict=True):
                    member = tarfile.TarInfo(f"c{index:06d}.f32")
                    member.size = image.nbytes
                    tar.addfile(member, io.BytesIO(image.tobytes()))


def verify(source: Cutouts, folder: Path, batch: int) -> dict[str, float]:
    """Check that the loader gives what was stored; returns the largest errors in units of the sky noise.

    Raises:
        SystemExit: It does not.
    """
    sigma = np.array(SKY_SIGMA, np.float32)[:, None, None]
    errors = {}
    for name in ("bitplane", "float16"):
        keys = pq.read_table(folder / name / "catalog.parquet", columns=["key"])["key"].to_pylist()
        worst = {"all": 0.0, "sky": 0.0}
        loader = SequentialLoader(folder / name, split="train", batch=batch, device="cpu", reader="webdataset")
        for found in loader:
            for row, image in zip(found["row"].tolist(), found["image"].numpy(), strict=True):
                stored = source.image(int(keys[row][1:]))
                error = np.abs(image - stored) / sigma
                worst["all"] = max(worst["all"], float(error.max()))
                worst["sky"] = max(worst["sky"], float(error[np.abs(stored) < 5 * sigma].max()))
        if worst["sky"] > (0.063 if name == "bitplane" else 0.01):
            raise SystemExit(f"{name}: sky pixels are off by {worst['sky']:.3g} sky sigma; nothing was timed")
        errors |= {f"{name}, all pixels": worst["all"], f"{name}, sky pixels": worst["sky"]}
        with ExitStack() as stack:
            both = [
                stack.enter_context(Loader(folder / name, micro_batch=batch, device="cpu", reader=reader))
                for reader in ("dali", "webdataset")
            ]
            for left, right in itertools.islice(zip(*both, strict=True), 4):
                if not (torch.equal(left["row"], right["row"]) and torch.equal(left["image"], right["image"])):
                    raise SystemExit(f"{name}: the DALI and webdataset readers differ; nothing was timed")
    return errors


def our_batches(folder: Path, reader: str, options: argparse.Namespace) -> Iterator[Tensor]:
    """Batches of this project's loader."""
    with Loader(
        folder, micro_batch=options.batch, device=options.device, reader=reader, threads=options.threads, prefetch=2
    ) as loader:
        for batch in loader:
            yield batch["image"]


def hdf5_batches(folder: Path, workers: int, options: argparse.Namespace) -> Iterator[Tensor]:
    """Batches of random reads of an HDF5 file through a DataLoader."""
    count = (WARMUP + options.batches + 2 * workers + 2) * options.batch
    order = np.random.default_rng(0).integers(options.images, size=count)
    more = {"prefetch_factor": 2} if workers else {}
    data = RandomHDF5(folder / "images.h5", order)
    loader = torch.utils.data.DataLoader(
        data, options.batch, num_workers=workers, pin_memory=options.device != "cpu", **more
    )
    for batch in loader:
        yield batch.to(options.device, non_blocking=True)


def wds_batches(tars: list[Path], decode: Callable, extension: str, options: argparse.Namespace) -> Iterator[Tensor]:
    """Batches of the webdataset package as its documentation shows it: shuffled tars, shuffle buffer, DataLoader."""
    # Resampling draws tars at random, so there is no order of tars left to shuffle.
    data = (
        wds.WebDataset([str(tar) for tar in tars], resampled=True, shardshuffle=False)
        .shuffle(256)
        .map(lambda sample: torch.from_numpy(decode(sample[extension])))
        .batched(options.batch, collation_fn=torch.stack)
    )
    loader = torch.utils.data.DataLoader(
        data, None, num_workers=options.workers, prefetch_factor=2, pin_memory=options.device != "cpu"
    )
    for batch in loader:
        yield batch.to(options.device, non_blocking=True)


def cpu_seconds() -> float:
    """CPU time of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def bytes_read() -> float:
    """Bytes that read calls have given this process and the workers that have ended; NaN where Linux does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return float("nan")
    return float(dict(line.split(": ") for line in lines)["rchar"])


class Pace(NamedTuple):
    """What one way of reading took in one repeat.

    Attributes:
        images_a_second: After the warm-up.
        cpu_ms: CPU milliseconds an image, over all of it.
        kib: KiB read an image, over all of it. Includes what was read ahead and dropped at the end, and the traffic
            between processes that is not shared memory.
    """

    images_a_second: float
    cpu_ms: float
    kib: float


def rate(batches: Iterator[Tensor], options: argparse.Namespace) -> Pace:
    """Time one way. Every batch is touched."""
    shape = (options.batch, len(BANDS), options.size, options.size)
    before, read_before = cpu_seconds(), bytes_read()
    with closing(batches):
        for batch in itertools.islice(batches, WARMUP):
            assert batch.shape == shape and batch.dtype == torch.float32
        start = time.perf_counter()
        total = sum(float(batch[0, 0, 0, 0]) for batch in itertools.islice(batches, options.batches))
        seconds = time.perf_counter() - start
    assert np.isfinite(total)
    images = options.batches * options.batch
    every = images + WARMUP * options.batch
    return Pace(images / seconds, 1e3 * (cpu_seconds() - before) / every, (bytes_read() - read_before) / every / 1024)


def main() -> None:
    """Measure, print and append to the CSV."""
    options = parse()
    shape = (len(BANDS), options.size, options.size)
    common = {
        "benchmark": "loader", "shape": "x".join(map(str, shape)), "batch": options.batch, "images": options.images,
        "repeats": options.repeats, "webdataset": wds.__version__, "h5py": h5py.__version__,
        "dali": version("nvidia-dali-cuda130"), "device": device_name(options.device),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="armillary-benchmark-", dir=options.folder) as temporary:
        folder = Path(temporary)
        source = Cutouts(options.images, options.size)
        store(source, folder)
        errors = verify(source, folder, options.batch)
        plain = sorted(folder.glob("plain-*.tar"))
        packed = sorted((folder / "bitplane").glob("*.tar"))
        ours = {"threads": options.threads, "workers": 0}
        theirs = {"threads": 1, "workers": options.workers}
        ways: dict[str, tuple[Callable[[], Iterator[Tensor]], dict[str, int]]] = {
            "packed, DALI": (lambda: our_batches(folder / "bitplane", "dali", options), ours),
            "packed, webdataset reader": (lambda: our_batches(folder / "bitplane", "webdataset", options), ours),
            "float16, DALI": (lambda: our_batches(folder / "float16", "dali", options), ours),
            "float16, webdataset reader": (lambda: our_batches(folder / "float16", "webdataset", options), ours),
            "h5py random reads": (lambda: hdf5_batches(folder, 0, options), {**theirs, "workers": 0}),
            f"h5py random reads, {options.workers} workers": (
                lambda: hdf5_batches(folder, options.workers, options),
                theirs,
            ),
            "plain webdataset, float32": (
                lambda: wds_batches(plain, lambda b: np.frombuffer(bytearray(b), np.float32).reshape(shape), "f32", options),
                theirs,
            ),
            "plain webdataset, packed": (
                lambda: wds_batches(packed, lambda b: codec.decode(b)[0], "img", options),
                theirs,
            ),
        }  # fmt: skip
        paces: dict[str, list[Pace]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, (make, _settings) in ways.items():
                paces[name].append(rate(make(), options))
        rows = report_reading(paces, {name: settings for name, (_, settings) in ways.items()}, common)
        rows += report_codec(folder, errors, options, common)
    append_rows(options.csv, rows)
    print(f"appended {len(rows)} rows to {options.csv}")


def report_reading(
    paces: dict[str, list[Pace]],
    settings: dict[str, dict[str, int]],
    common: dict[str, object],
) -> list[dict]:
    """Print and return the images a second of each way; ratios are medians over repeats of the ratio in a repeat."""
    rates = {name: [pace.images_a_second for pace in values] for name, values in paces.items()}
    alone = rates["h5py random reads"]
    workers = next(values for name, values in rates.items() if name.startswith("h5py random reads, "))
    print(
        f"{'':32}{'images/s':>10}{'p20':>9}{'p80':>9}{'/ h5py':>9}{'/ h5py + workers':>18}{'CPU ms/image':>14}{'KiB/image':>11}"
    )
    rows = []
    for name, values in rates.items():
        ratios = [statistics.median(a / b for a, b in zip(values, base, strict=True)) for base in (alone, workers)]
        cost = statistics.median(pace.cpu_ms for pace in paces[name])
        kib = statistics.median(pace.kib for pace in paces[name])
        median, low, high = summary(values)
        print(f"{name:32}{median:10.0f}{low:9.0f}{high:9.0f}{ratios[0]:9.2f}{ratios[1]:18.2f}{cost:14.3f}{kib:11.1f}")
        row = {"name": name, "unit": "images/s", "value": median, "p20": low, "p80": high}
        row |= {"ratio_to_h5py": ratios[0], "ratio_to_h5py_workers": ratios[1]}
        rows.append({**common, **settings[name], **row, "cpu_ms_per_image": cost, "read_kib_per_image": kib})
    for column, base in (("ratio_to_h5py", "h5py random reads"), ("ratio_to_h5py_workers", "the same with workers")):
        best = max(row[column] for row in rows if row["name"].startswith("packed"))
        print(f"packed reading: {best:.2f} x {base}, {verdict(best, TARGETS['reading'])}")
    return rows


def report_codec(
    folder: Path, errors: dict[str, float], options: argparse.Namespace, common: dict[str, object]
) -> list[dict]:
    """Print and return decoding speed on one core, size of a cutout and largest error, for both codecs."""
    rows = []
    for name in ("bitplane", "float16"):
        survey = SequentialLoader(folder / name, split="train", batch=1, device="cpu", reader="webdataset").survey
        files = ShardFiles(folder / name, survey, "train")
        members = [(s, i) for s, record in enumerate(files.records) for i in range(record.count)]
        blobs = [files.read(s, i)["image"] for s, i in members]
        files.close()
        some = blobs[:256]
        out = np.empty((len(some), len(BANDS), options.size, options.size), np.float32)
        timing = timed(lambda: codec.decode_batch(some, out, threads=1), 3 * options.repeats)  # noqa: B023
        decode = [len(some) / seconds for seconds in (timing.median, timing.p80, timing.p20)]
        size = sum(map(len, blobs)) / len(blobs) / 1024
        print(
            f"{name}: decodes {decode[0]:.0f} images/s a core (p20 {decode[1]:.0f}, p80 {decode[2]:.0f}), "
            f"{size:.1f} KiB a cutout (float32: {out[0].nbytes / 1024:.1f})"
        )
        if name == "bitplane":
            print(f"decode: {verdict(decode[0], TARGETS['decode'])}")
        rows += [
            {**common, "threads": 1, "workers": 0, "name": f"{name}, decode on one core", "unit": "images/s",
             "value": decode[0], "p20": decode[1], "p80": decode[2]},
            {**common, "name": f"{name}, size of a cutout", "unit": "KiB", "value": size},
        ]  # fmt: skip
    for name, error in errors.items():
        print(f"{name}: largest error {error:.4f} sky sigma")
        rows.append({**common, "name": f"{name}, largest error", "unit": "sky sigma", "value": error})
    return rows


if __name__ == "__main__":
    main()
