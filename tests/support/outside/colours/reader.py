"""A reader: a folder of .npz files with `image` [C, H, W] in nanomaggies and `redshift`."""

from pathlib import Path

import numpy as np

from armillary.engine.data.sources.source import BadSample, Sample, key_from_name


class Arrays:
    """A `Source`: one object a file.

    Args:
        path: The folder.
        scale: Arcseconds a pixel.
    """

    bands, unit = ("g", "r", "z"), "nanomaggy"
    labels = {"redshift": "spectroscopic redshift"}

    def __init__(self, path: Path, scale: float = 0.262):
        self.pixel_scale_arcsec = scale
        self.files = sorted(path.glob("*.npz"))
        if not self.files:
            raise ValueError(f"{path}: holds no .npz files")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Sample:
        file = self.files[index]
        with np.load(file) as content:
            image, redshift = content["image"], float(content["redshift"])
        if image.ndim != 3 or len(image) != len(self.bands):
            raise BadSample(f"{file}: image must be [{len(self.bands)}, H, W], got {image.shape}")
        valid = np.isfinite(image)
        image = np.where(valid, image, 0).astype(np.float32)
        nowhere = float("nan")
        return Sample(
            key_from_name(file.stem),
            image,
            None if valid.all() else valid,
            ra=nowhere,
            dec=nowhere,
            labels={"redshift": redshift},
            source=str(file),
        )
