"""Sources from columns: images, spectra, or labels alone."""

from dataclasses import dataclass, field

import numpy as np

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, VectorRecord, WaveGrid
from armillary.engine.data.sources.source import BadSample, Rows, Sample

GRID = WaveGrid("linear", 4000.0, 1.0, 64)


ARCSEC = 1 / 3600


@dataclass
class Made:
    """A source from columns: images, spectra or nothing but labels."""

    columns: dict
    kind: str = "labels"
    splits: list | None = None
    bad: dict = field(default_factory=dict)
    described: int = 0

    pixel_scale_arcsec = 0.262
    unit = "nanomaggy"

    def __post_init__(self):
        self.bands = ("g", "r") if self.kind == "images" else ()
        self.spectrum = SpectrumRecord(GRID, "flux") if self.kind == "spectra" else None
        self.vectors = (VectorRecord("mags", ("a",), "mag"),) if self.kind == "labels" else ()
        self.labels = {k: k for k in self.columns if k not in ("ra", "dec")}

    def __len__(self):
        return len(self.columns["ra"])

    def describe(self, start, stop):
        self.described += stop - start
        cut = {k: v[start:stop] for k, v in self.columns.items()}
        keys = [f"{self.kind}{i}" for i in range(start, stop)]
        splits = None if self.splits is None else self.splits[start:stop]
        return Rows(keys, cut, splits, {i: r for i, r in self.bad.items() if start <= i < stop})

    def read(self, i):
        if i in self.bad:
            raise BadSample(self.bad[i])
        rng = np.random.default_rng(i)
        image = rng.normal(i, 0.01, (2, 8, 8)).astype(np.float32) if self.kind == "images" else None
        spectrum = Spectrum(rng.normal(i, 1, 64).astype(np.float32), np.ones(64, np.float32))
        vectors = {"mags": np.array([i], np.float32)} if self.kind == "labels" else {}
        labels = {k: self.columns[k][i] for k in self.labels}
        return Sample(
            key=f"{self.kind}{i}",
            image=image,
            valid=None,
            ra=self.columns["ra"][i],
            dec=self.columns["dec"][i],
            labels={k: v if isinstance(v, str) else float(v) for k, v in labels.items()},
            source=f"{self.kind}:{i}",
            split=None if self.splits is None else self.splits[i],
            spectrum=spectrum if self.kind == "spectra" else None,
            vectors=vectors,
        )


def images(n=30, **columns):
    ra = np.linspace(10, 20, n)
    return Made({"ra": ra, "dec": ra * 0, "z": np.arange(n) / n, **columns}, "images")


def spectra(places, shift=0.2, **columns):
    ra = np.linspace(10, 20, 30)[places] + shift * ARCSEC
    text = [f"{39627652591521181 + i}" for i in places]  # beyond what float64 holds
    return Made({"ra": ra, "dec": ra * 0, "targetid": text, **columns}, "spectra")


def catalogue(places):
    some = np.array(places, float)
    text = [f"{39627652591521181 + i}" for i in places]
    return Made({"ra": some * np.nan, "dec": some * np.nan, "targetid": text, "mass": some + 100, "z": -some})
