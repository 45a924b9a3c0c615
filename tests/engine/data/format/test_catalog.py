"""A catalogue that was changed after the build is refused by everything that reads it."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from plain_vectors import PlainVectors

from armillary.engine.data.building.build import build
from armillary.engine.data.building.sky_graph import build_graph
from armillary.engine.data.format.catalog import catalog_file, read_catalog
from armillary.engine.data.format.columns import Columns, known_columns
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.leakage import find_leaks
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.views.vector_files import read_vectors
from armillary.engine.evaluate.embedding.cutouts import having, read_cutouts
from armillary.engine.evaluate.embedding.embeddings import stack_splits
from armillary.engine.evaluate.search.answers import catalogue_rows
from armillary.engine.evaluate.study.study import Study


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed") / "survey"
    build(PlainVectors(20, images=True), folder, name="plain", test_fraction=0.25, progress=False)
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    table = pq.read_table(folder / "catalog.parquet")
    place = table.column_names.index("redshift")
    pq.write_table(table.set_column(place, "redshift", pc.add(table["redshift"], 1.0)), folder / "catalog.parquet")
    keys = table["key"]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2 * len(keys), np.float32)), 2)
    pq.write_table(pa.table({"key": keys, "vector": vectors}), folder.parent / "vectors.parquet")
    return folder


READERS = {
    "rows": read_catalog,
    "the file": catalog_file,
    "columns": lambda folder: Columns.read(Survey.load(folder), ("redshift",)),
    "known columns": lambda folder: known_columns(Survey.load(folder), ("redshift",), 1),
    "cutouts": lambda folder: read_cutouts(folder, [0]),
    "modalities": lambda folder: having(folder, [0], "image"),
    "embeddings": lambda folder: stack_splits(folder, {"train": (np.arange(2), np.zeros((2, 3)))}, {}),
    "vectors by key": lambda folder: read_vectors(folder.parent / "vectors.parquet", Survey.load(folder)),
    "answers of a search": lambda folder: catalogue_rows(folder, ["p0000"]),
    "studies": lambda folder: Study.open(folder, []),
    "leaks": find_leaks,
    "sky graphs": build_graph,
    "a survey packed again": PackedSurvey,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_changed_catalogue_is_refused(changed, read):
    with pytest.raises(ValueError, match="catalog.parquet: its SHA-256 is .*, survey.json says"):
        read(changed)


@pytest.mark.parametrize(
    "name", ["rows", "cutouts", "embeddings", "vectors by key", "answers of a search", "sky graphs"]
)
def test_and_the_one_of_the_build_is_read(changed, name):
    READERS[name](changed.with_name("whole"))
