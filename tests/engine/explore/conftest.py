"""Fifty galaxies, most with an image and a spectrum, and their embeddings; a page that shows them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from line_galaxies import GRID, line_galaxy

from armillary.engine.config.provenance import survey_fingerprint
from armillary.engine.data.building.build import build
from armillary.engine.data.format.embedding_files import EmbeddingFiles
from armillary.engine.data.format.survey import SpectrumRecord, Survey
from armillary.engine.data.sources.source import Sample
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.explore.api import Pages
from armillary.engine.explore.embedding_map import open_map
from armillary.engine.explore.objects import Objects, find_labels
from armillary.engine.explore.similar import Similar

COUNT = 50


@dataclass(frozen=True)
class Galaxies:
    """Galaxies in a row on the equator; the third has no image, the fourth no spectrum."""

    count: int = COUNT
    bands: tuple[str, ...] = ("g", "r", "z")
    unit: str = "nanomaggy"
    pixel_scale_arcsec: float | None = 0.262
    labels = {"redshift": "cosmological", "kind": "as seen by eye", "name": "a name each", "serial": "identifier"}
    spectrum = SpectrumRecord(GRID, "1e-17 erg/s/cm2/angstrom")

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        made = line_galaxy(index)
        labels = {
            "redshift": made.label,
            "kind": ("spiral", "elliptical", "")[index % 3],
            "name": f"Galaxy {index}" * (1 + index),
            "serial": float(index),
        }
        return Sample(
            f"g-{index:03d}",
            None if index == 3 else made.image,
            None,
            150.0 + 0.01 * index,
            2.0,
            labels,
            f"galaxy {index}",
            spectrum=None if index == 4 else made.spectrum,
        )


@pytest.fixture(scope="session")
def survey_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explore") / "survey"
    build(Galaxies(), folder, name="fifty", progress=False, samples_per_shard=8, test_fraction=0.4)
    return folder


@pytest.fixture(scope="session")
def embeddings(survey_dir, tmp_path_factory) -> Path:
    """Embeddings of all but one, in an order of their own, in three groups."""
    table = pq.read_table(survey_dir / "catalog.parquet")
    chosen = np.random.default_rng(5).permutation(len(table))[1:]
    keys, splits = (np.array(table[n].to_pylist(), object)[chosen] for n in ("key", "split"))
    rng = np.random.default_rng(6)
    centres = 4 * rng.normal(size=(3, 8))
    vectors = centres[np.arange(len(chosen)) % 3] + rng.normal(size=(len(chosen), 8))
    about = {
        "survey": "fifty",
        "fingerprint": survey_fingerprint(Survey.load(survey_dir)),
        "encoder": "e",
        "run": "toy",
    }
    path = tmp_path_factory.mktemp("embeddings") / "e.parquet"
    Embeddings(keys, splits, vectors.astype(np.float32), about).save(path)
    return path


@pytest.fixture(scope="session")
def objects(survey_dir, embeddings) -> Objects:
    survey, files = Survey.load(survey_dir), EmbeddingFiles.open(embeddings)
    return Objects(survey, files, open_map(files, "pca"), find_labels(survey))


@pytest.fixture(scope="session")
def similar(objects, embeddings) -> Similar:
    found = Similar(EmbeddingFiles.open(embeddings), objects.keys, None, None, "cpu")
    found.wait()
    return found


@pytest.fixture(scope="session")
def pages(objects, similar) -> Pages:
    return Pages(objects, similar, {"map": "PCA", "run": "toy", "readout": ""}, "redshift")
