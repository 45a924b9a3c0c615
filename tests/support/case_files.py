"""Small inputs that the cases write themselves, and the command that reads them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from astropy.io import fits
from PIL import Image

from armillary.engine import cli
from armillary.engine.data.sources.packed import PackedSurvey

SCALE = 0.262 / 3600
WCS = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CD1_1": -SCALE, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": SCALE}


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(0, 0.01, shape).astype(np.float32)


def cutout(path, *, seed=0, image=None, bands="grz", ra=150.0, dec=2.0, size=16, **cards):
    """A FITS cutout as the Legacy Survey's service writes it; cards of None are left out."""
    image = noise(seed, len(bands), size, size) if image is None else image
    header = {"BANDS": bands, **WCS, "CRVAL1": ra, "CRVAL2": dec, "CRPIX1": (size + 1) / 2, "CRPIX2": (size + 1) / 2}
    path.parent.mkdir(parents=True, exist_ok=True)
    hdu = fits.PrimaryHDU(image)
    hdu.header.update({k: v for k, v in (header | cards).items() if v is not None})
    hdu.writeto(path)
    return path


def cutouts(folder, count=3, **options):
    for i in range(count):
        cutout(folder / f"a{i}.fits", seed=i, **options)
    return folder


def pictures(folder, count=4, labels=None):
    """RGB pictures, and labels.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"g{i}.png")
    if labels is not None:
        (folder / "labels.csv").write_text(labels)
    return folder


@dataclass
class Built:
    """What a command did."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def catalog(self):
        """Columns of the catalogue by name, rows in the order of keys."""
        table = pq.read_table(self.folder / "catalog.parquet").sort_by("key")
        return {name: table[name].to_pylist() for name in table.column_names}

    @property
    def source(self):
        return PackedSurvey(self.folder)

    def samples(self):
        return {s.key: s for s in map(self.source.read, range(len(self.source)))}


def run(*words):
    """Exit code of `armillary WORDS`, in this process."""
    return cli.main([str(word) for word in words])


def build_words(source, out, *words):
    return ["data", "build", source, "-o", out, "--no-progress", "--processes", "1", *words]
