"""A tiny survey of images and spectra with lines at their redshift, and encoders of both MMAE methods, a few steps trained."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from armillary.engine.config.run import Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Schedules
from armillary.engine.data.building.build import build
from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, Survey, WaveGrid
from armillary.engine.data.loading.loader import SequentialLoader
from armillary.engine.data.sources.source import Sample
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.stretch import AsinhWhiten
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.study.study import FeatureSet, Study
from armillary.engine.zero.optim import AdamW, build_groups
from armillary.models.method import BatchKey
from armillary.models.mmae.mmae import MMAE
from armillary.models.mmae.token_drop import TokenDropMMAE

POINT = MMAE(patch_size=8, bin_pixels=15, token_bins=8, dim=16, depth=1, fusion_depth=1, heads=2, dropout=0.0)
DENSITY = TokenDropMMAE(
    patch_size=8, bin_pixels=5, token_bins=24, dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2,
    rest_points=1500, rest_hidden=64, highest_redshift=0.6, redshift_bins=24,
)  # fmt: skip
LINES = {6564.614: 60.0, 6585.27: 20.0, 6549.86: 20.0 / 2.96, 4862.683: 25.0, 5008.24: 12.0, 4960.295: 12.0 / 2.98}
VIEWS = ObjectViews(
    image=MultiCrop(
        global_size=16, n_global=1, placement="centre", hflip=0.0, vflip=0.0, stretch=AsinhWhiten(ridge=0.03)
    ),
    spectrum=True,
    targets=("redshift",),
)


@dataclass(frozen=True)
class LinePairs:
    """Galaxies whose colour tells the redshift; every eleventh has none, every thirteenth has no spectrum."""

    count: int = 90
    pixel_scale_arcsec: float = 0.262
    unit: str = "nanomaggy"
    bands: tuple[str, ...] = ("g", "r", "z")
    spectrum = SpectrumRecord(WaveGrid("linear", 4000.0, 2.0, 2900), "1e-17 erg/s/cm2/angstrom")
    labels = {"redshift": "spectroscopic"}

    def __len__(self):
        return self.count

    def read(self, index):
        rng = np.random.default_rng([5, index])
        z = rng.uniform(0.02, 0.42)
        y, x = np.indices((16, 16)) - 7.5
        colour = 4 * np.exp(-z * np.array([8.0, 4.0, 0.0]))
        image = colour[:, None, None] * np.exp(-(x**2 + y**2) / 12) + rng.normal(0, 0.05, (3, 16, 16))
        wave = self.spectrum.grid.angstrom()
        flux = 3 + 2 * (wave > 4000 * (1 + z))
        for at, strength in LINES.items():
            offset = (wave - at * (1 + z)) / 4.0
            flux = flux + strength * np.exp(-0.5 * offset**2) / (4.0 * np.sqrt(2 * np.pi))
        flux = flux + rng.normal(0, 0.2, len(wave))
        return Sample(
            key=f"p{index:04d}",
            image=image.astype(np.float32),
            valid=None,
            ra=float(index),
            dec=0.0,
            labels={"redshift": float("nan") if index % 11 == 0 else z},
            source=f"toy:{index}",
            spectrum=None if index % 13 == 0 else Spectrum(flux.astype(np.float32), np.full(2900, 25.0, np.float32)),
        )


def pair_survey(folder):
    """Build the survey; returns its folder."""
    build(LinePairs(), folder, name="lines", samples_per_shard=45, test_fraction=0.5, progress=False)
    return folder


def pair_encoder(folder, config, name, steps=0):
    """The encoder of a method, trained for some steps on the first 32 training pairs."""
    survey = Survey.load(folder)
    views = replace(VIEWS, spectrum_optional=True)
    torch.manual_seed(1)
    method = config.build(views.input_spec(survey))
    view = views.build(survey, "cpu")
    batch = next(
        iter(SequentialLoader(folder, split="train", batch=32, device="cpu", modalities=("image", "spectrum")))
    )
    batch["position"] = torch.arange(len(batch["row"]))
    optimizer = AdamW(build_groups(method))
    for step in range(steps):
        key = BatchKey(0, step, 0, len(batch["row"]))
        optimizer.set_step(step, {"learning_rate": 4e-3, "weight_decay": 0.0})
        method(method.prepare(view(batch, key), key), {}).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    run = Run(
        name=name,
        method=config,
        views=views,
        data=Data(path=folder),
        optim=Optim(lr=1e-3),
        schedule=Schedules(learning_rate=Constant(), weight_decay=Constant(0.0)),
        train=Training(steps=1, global_batch=1, micro_batch=1, precision="fp32"),
    )
    return Encoder(method.eval(), views.eval_view(survey, "cpu"), {"run": name}, run)


def pair_study(folder, *sets, seed=0):
    """A study of it: by name, redshifts [N, 1] that a supervised network would have said of all rows."""
    table = Study.open(folder, [FeatureSet("any", "image", _embeddings(folder, np.zeros((90, 1), np.float32), "any"))])
    said = [
        FeatureSet(name, "image", _embeddings(folder, make(table.label("redshift")), name), targets=("redshift",))
        for name, make in sets
    ]
    return Study.open(folder, said or list(table.features.values()), seed=seed)


def _embeddings(folder, vectors, name):
    import pyarrow.parquet as pq

    catalogue = pq.read_table(folder / "catalog.parquet")
    key, split = (np.array(catalogue[c].to_pylist()) for c in ("key", "split"))
    return Embeddings(key, split, vectors.astype(np.float32), {"run": name})
