"""A tiny packed survey whose colour tells the redshift, and a toy run that goes with it."""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from line_galaxies import GRID, line_galaxy

from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import SpectrumRecord, Statistics, Survey
from armillary.engine.data.sources.source import Sample
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.study.study import FeatureSet, Study


@dataclass(frozen=True)
class Blobs:
    """Round blobs of known colour; every fifth has no redshift."""

    count: int = 80
    unit: str = "nanomaggy"
    bands: tuple[str, ...] = ("g", "r", "z")
    labelled: bool = True
    pixel_scale_arcsec: float | None = 0.262

    @property
    def labels(self) -> dict[str, str]:
        return {"redshift": "true", "kind": "text"} if self.labelled else {}

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        rng = np.random.default_rng([7, index])
        z = rng.uniform(0.05, 0.5)
        y, x = np.indices((16, 16)) - 7.5
        blob = np.exp(-(x**2 + y**2) / (2 * rng.uniform(1.5, 2.5) ** 2))
        flux = rng.uniform(1, 2) * np.exp(-z * np.linspace(6, 0, len(self.bands)))
        image = flux[:, None, None] * blob + 0.02 * rng.standard_normal((len(self.bands), 16, 16))
        if self.unit == "count":
            image = np.clip(np.round(120 * image + 20), 0, 255)
        labels = {"redshift": float("nan") if index % 5 == 0 else float(z), "kind": "blob"} if self.labelled else {}
        return Sample(f"blob-{index:04d}", image.astype(np.float32), None, 180.0, 0.0, labels, f"blob {index}")


@pytest.fixture(scope="session")
def make_survey(tmp_path_factory):
    def make(**properties):
        folder = tmp_path_factory.mktemp("blobs") / "survey"
        build(Blobs(**properties), folder, name="blobs", progress=False, samples_per_shard=32, test_fraction=0.4)
        return folder

    return make


@pytest.fixture(scope="session")
def survey_dir(make_survey):
    return make_survey()


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    record = {
        "run": {
            "$type": "armillary.engine.config.run:Run",
            "name": "toy <run>",
            "device": "cpu",
            "out": {"$path": "runs"},
            "method": {"$type": "a:B", "head": {"$type": "a:H", "prototypes": 64}},
        },
        "commit": "0123456789abcdef+changes",
        "command": ["recipes/toy.py", "--name", "toy <run>"],
        "versions": {"armillary": "0.1", "torch": torch.__version__},
    }
    (folder / "run.json").write_text(json.dumps(record))
    lines = []
    for step in range(1, 31):
        entry = {"step": step, "loss": 3 / step, "dino": 2 / step, "koleo": 1 / step, "learning_rate": 0.1, "mfu": None}
        entry |= {"images_per_s": 100.0 + step, "grad_norm/all": 1.0 / step}
        if step % 10 == 0:
            entry |= {"monitor/prototypes_in_use": 60.0, "monitor/effective_rank": 7.0 + step / 10}
        lines.append(json.dumps(entry))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 31, "lo')
    return folder


@pytest.fixture(scope="session")
def make_study(tmp_path_factory):
    """Studies without shards: labels by name, and by name (modality, [N, D] vectors, space, targets).

    The first `train` rows are the training split; a row of NaN has no vector.
    """

    def make(labels, features, *, train, seed=0):
        folder = tmp_path_factory.mktemp("study")
        count = len(next(iter(labels.values())))
        key = np.array([f"g{i:05d}" for i in range(count)], dtype=object)
        split = np.array(["train"] * train + ["test"] * (count - train), dtype=object)
        nothing = Statistics((0.0,), (1.0,), (0.0,), ((1.0,),), train)
        Survey(
            name="toy sky",
            bands=("r",),
            height=8,
            width=8,
            pixel_scale_arcsec=0.262,
            unit="nanomaggy",
            codec="float16",
            sky_sigma=(1.0,),
            step=(),
            shards=(),
            statistics=nothing,
            labels=dict.fromkeys(labels, "a label"),
        ).save(folder)
        columns = {"key": pa.array(key, pa.string()), "split": pa.array(split, pa.string())}
        columns |= {name: pa.array(values) for name, values in labels.items()}
        pq.write_table(pa.table(columns), folder / "catalog.parquet")
        sets = []
        for name, (modality, vectors, space, targets) in features.items():
            have = ~np.isnan(vectors).all(1)
            embeddings = Embeddings(key[have], split[have], np.asarray(vectors[have], np.float32))
            sets.append(FeatureSet(name, modality, embeddings, space, targets))
        return Study.open(folder, sets, seed=seed)

    return make


@dataclass(frozen=True)
class Pairs:
    """Blobs of a colour that tells the redshift, with a line that moves with it."""

    count: int = 60
    bands: tuple[str, ...] = ("g", "r", "z")
    unit: str = "nanomaggy"
    pixel_scale_arcsec: float | None = 0.262
    labels = {"redshift": "true", "kind": "text"}
    spectrum = SpectrumRecord(GRID, "1e-17 erg/s/cm2/angstrom")

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        made = line_galaxy(index)
        return Sample(
            f"pair-{index:03d}",
            made.image,
            None,
            180.0,
            0.0,
            {"redshift": made.label, "kind": "blob"},
            f"pair {index}",
            spectrum=made.spectrum,
        )


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory):
    """Sixty objects with an image and a spectrum each."""
    folder = tmp_path_factory.mktemp("pairs") / "survey"
    build(Pairs(), folder, name="pairs", progress=False, samples_per_shard=16, test_fraction=0.5)
    return folder
