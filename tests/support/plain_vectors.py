"""A source of galaxies with photometry, its errors, magnitudes and redshifts, for tests. Some of it is unknown."""

import numpy as np

from armillary.engine.data.format.survey import VectorRecord
from armillary.engine.data.sources.source import Sample

ERROR = 0.5  # uJy


class PlainVectors:
    """Sample i lacks its i band where i % 4 == 1, its r magnitude where i % 5 == 1, and its image where i % 2 == 1.

    Args:
        count: Samples.
        unit: Of the photometry, uJy or nJy.
        bands: Its bands; a band's flux depends on its name only.
        images: Whether there are images.
    """

    pixel_scale_arcsec, unit = 0.2, "nanomaggy"
    labels = {
        "redshift": "spectroscopic", "mag_g": "mag", "mag_r": "mag", "err_g": "mag", "err_r": "mag",
        "never": "", "same": "", "negative": "", "bad_err": "",
    }  # fmt: skip

    def __init__(self, count=60, unit="uJy", bands=("g", "r", "i", "z"), images=False):
        self.count, self.unit_of_photometry, self.bands_of_photometry, self.images = count, unit, bands, images

    @property
    def bands(self):
        return ("r",) if self.images else ()

    @property
    def vectors(self):
        names = ("photometry", "photometry_err")
        return tuple(VectorRecord(name, self.bands_of_photometry, self.unit_of_photometry) for name in names)

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"PlainVectors({self.count}, {self.unit_of_photometry}, {self.bands_of_photometry}, {self.images})"

    def read(self, index):
        rng = np.random.default_rng(index)
        z, brightness = rng.uniform(0.1, 1.0), rng.normal(2, 0.5)
        scale = 1.0 if self.unit_of_photometry == "uJy" else 1e3
        colour = np.array([ord(band) % 7 for band in self.bands_of_photometry]) / 7
        flux = (np.exp(brightness + z * colour) - 3) * scale
        if index % 4 == 1 and "i" in self.bands_of_photometry:
            flux[self.bands_of_photometry.index("i")] = np.nan
        known = np.nan if index % 5 == 1 else 1.0
        image = np.full((1, 8, 8), 1 + index, np.float32) + rng.normal(0, 0.1, (1, 8, 8)).astype(np.float32)
        return Sample(
            key=f"p{index:04d}",
            image=image if self.images and index % 2 == 0 else None,
            valid=None,
            ra=float(index),
            dec=0.0,
            labels={
                "redshift": z, "mag_g": 22 - brightness, "mag_r": (21 - brightness - z) * known,
                "err_g": 0.01, "err_r": 0.02, "never": np.nan, "same": 1.0,
                "negative": -1.0 if index % 5 else 1.0 + z, "bad_err": -1.0,
            },
            source=f"plain:{index}",
            vectors={
                "photometry": flux.astype(np.float32),
                "photometry_err": np.full(len(flux), ERROR * scale, np.float32),
            },
        )  # fmt: skip
