"""A source of samples with any mix of modalities, for tests. A module, so that worker processes can import it."""

from dataclasses import dataclass

import numpy as np

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, VectorRecord, WaveGrid
from armillary.engine.data.sources.source import Sample

GRID = WaveGrid("linear", 3600.0, 0.8, 501)
VECTORS = (
    VectorRecord("photometry", ("g", "r", "z"), "mag", "model magnitudes"),
    VectorRecord("sfh", tuple(f"{age:.1f}" for age in range(7)), "Msun/yr"),
)


@dataclass
class Mixed:
    """Sample i lacks its image where i % 5 == 1, its spectrum where i % 5 == 2, the vectors where i % 5 == 3.

    Attributes:
        count: Samples.
        images: Whether any has an image; likewise the other two.
    """

    count: int = 20
    images: bool = True
    spectra: bool = True
    with_vectors: bool = True

    pixel_scale_arcsec = 0.262
    unit = "nanomaggy"

    @property
    def bands(self):
        return ("g", "r", "z") if self.images else ()

    @property
    def labels(self):
        return {"z": "redshift"}

    @property
    def spectrum(self):
        return SpectrumRecord(GRID, "1e-17 erg/s/cm2/angstrom") if self.spectra else None

    @property
    def vectors(self):
        return VECTORS if self.with_vectors else ()

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"Mixed({self.count}, {self.images}, {self.spectra}, {self.with_vectors})"

    def read(self, index):
        rng = np.random.default_rng(index)
        image = rng.normal(0, 0.01, (3, 20, 24)).astype(np.float32)
        flux = rng.normal(2, 1, GRID.count).astype(np.float32)
        ivar = rng.uniform(0.5, 2, GRID.count).astype(np.float32)
        ivar[10 + index : 30] = 0
        flux[ivar == 0] = 0
        vectors = {"photometry": rng.normal(20, 1, 3).astype(np.float32), "sfh": rng.random(7).astype(np.float32)}
        vectors["photometry"][index % 3] = np.nan
        lacking = index % 5
        return Sample(
            key=f"m{index:04d}",
            image=image if self.images and lacking != 1 else None,
            valid=None,
            ra=float(index),
            dec=0.0,
            labels={"z": index / 100},
            source=f"mixed:{index}",
            spectrum=Spectrum(flux, ivar) if self.spectra and lacking != 2 else None,
            vectors=vectors if self.with_vectors and lacking != 3 else {},
        )
