"""A study's bookkeeping: which rows, which vectors, which labels."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate import Embeddings, FeatureSet, Study
from armillary.engine.evaluate.runs.report import save_measures
from armillary.engine.evaluate.study.study import Measure, Outcome


def embeddings(folder, *, keep=slice(None), dimensions=3, seed=0):
    """Vectors whose first component is the catalogue row, in a shuffled order."""
    table = pq.read_table(folder / "catalog.parquet").to_pydict()
    rows = np.random.default_rng(seed).permutation(len(table["key"]))[keep]
    vector = np.zeros((len(rows), dimensions), np.float32)
    vector[:, 0] = rows
    key, split = (np.array(table[name], object)[rows] for name in ("key", "split"))
    return Embeddings(key, split, vector, {"run": "toy"})


@pytest.fixture
def study(survey_dir):
    sets = [
        FeatureSet("image", "image", embeddings(survey_dir), space="a"),
        FeatureSet("spectrum", "spectrum", embeddings(survey_dir, keep=slice(0, -9), seed=1), space="a"),
        FeatureSet("net", "image", embeddings(survey_dir, dimensions=1), targets=("redshift",)),
    ]
    return Study.open(survey_dir, sets)


def test_rows_are_those_that_all_sets_have(study):
    table = pq.read_table(study.folder / "catalog.parquet").to_pydict()
    of_test = np.flatnonzero(np.array(table["split"]) == "test")
    np.testing.assert_array_equal(study.rows("test", "image"), of_test)
    paired = study.rows("test")
    assert len(paired) < len(of_test) and set(paired) < set(of_test)
    np.testing.assert_array_equal(paired, study.rows("test", "spectrum"))


def test_vectors_follow_the_rows(study):
    rows = study.rows("train")[::-1]
    for name in study.features:
        np.testing.assert_array_equal(study.vectors(name, rows)[:, 0], rows)
    lacking = np.setdiff1d(study.rows("train", "image"), study.rows("train", "spectrum"))
    assert len(lacking)
    with pytest.raises(ValueError, match=f"spectrum: {len(lacking)} of {len(lacking)} rows have no vector, e.g. cat"):
        study.vectors("spectrum", lacking)


def test_labels(study):
    values = study.label("redshift")
    np.testing.assert_array_equal(study.label("redshift", np.array([4, 2])), values[[4, 2]])
    with pytest.raises(ValueError, match="label 'mass': must be one of the survey's labels .redshift"):
        study.label("mass")
    with pytest.raises(ValueError, match="features 'x': must be one of this study's .image, spectrum, net"):
        study.vectors("x", np.array([0]))
    assert study.of("image") == ["image"]  # without the predictions


def test_constant_and_unknown_labels_are_refused(survey_dir, tmp_path):
    table = pq.read_table(survey_dir / "catalog.parquet")
    replace(Survey.load(survey_dir), catalog_sha256="").save(tmp_path)
    column = table.column_names.index("redshift")
    for value, rule in ((0.25, "must vary, but all .* known values are 0.25"), (np.nan, "is known for none of")):
        pq.write_table(table.set_column(column, "redshift", [np.full(len(table), value)]), tmp_path / "catalog.parquet")
        study = Study.open(tmp_path, [FeatureSet("image", "image", embeddings(survey_dir))])
        with pytest.raises(ValueError, match=f"label 'redshift': {rule}"):
            study.varying("redshift", study.rows("test"))


def test_unpaired_sets_are_refused(survey_dir):
    e = embeddings(survey_dir)
    test, train = (np.flatnonzero(e.split == s) for s in ("test", "train"))
    halves = [np.r_[test[::2], train[::2]], np.r_[test[1::2], train[1::2]]]
    one, other = (Embeddings(e.key[h], e.split[h], e.vector[h]) for h in halves)
    study = Study.open(survey_dir, [FeatureSet("image", "image", one), FeatureSet("spectrum", "spectrum", other)])
    with pytest.raises(ValueError, match="image and spectrum have no sample of split 'test' in common"):
        study.rows("test")


def test_embeddings_of_another_survey_are_refused(survey_dir):
    e = embeddings(survey_dir)
    foreign = replace(e, key=np.array([f"x{i}" for i in range(len(e))], object))
    with pytest.raises(ValueError, match="other: .* embeddings are not of survey .*, e.g. key 'x0'; embed this survey"):
        Study.open(survey_dir, [FeatureSet("other", "image", foreign)])
    only = np.flatnonzero(e.split == "train")
    half = Embeddings(e.key[only], e.split[only], e.vector[only])
    study = Study.open(survey_dir, [FeatureSet("half", "image", half)])
    with pytest.raises(ValueError, match="half: has no embeddings of split 'test', only of train"):
        study.rows("test")
    assert study.shown("half")[0] == "train"
    with pytest.raises(ValueError, match="half: has no embeddings of splits 'a' and 'b', only of train"):
        Study.open(survey_dir, [FeatureSet("half", "image", half)], train_split="a", test_split="b")


def test_bad_sets(survey_dir):
    e = embeddings(survey_dir)
    with pytest.raises(ValueError, match="need at least one set"):
        Study.open(survey_dir, [])
    with pytest.raises(ValueError, match="names must differ, got a, a"):
        Study.open(survey_dir, [FeatureSet("a", "image", e), FeatureSet("a", "image", e)])
    with pytest.raises(ValueError, match="net: predictions of 2 targets must have as many columns, got 3"):
        FeatureSet("net", "image", e, targets=("redshift", "mass"))
    with pytest.raises(ValueError, match="must differ from train_split, got 'test'"):
        Study.open(survey_dir, [FeatureSet("a", "image", e)], train_split="test")


def test_every_number_is_in_both_files(study, tmp_path):
    measures = (
        Measure("t", "image", "redshift", "64-NN", "r2", 0.5, 0.1, 30),
        Measure("t", "net", "x", "", "y", np.nan),
    )
    save_measures(tmp_path, study, [Outcome("t", measures, ("A line.",))])
    table = pq.read_table(tmp_path / "metrics.parquet").to_pylist()
    assert [row["metric"] for row in table] == ["r2", "y"] and table[0]["value"] == 0.5 and np.isnan(table[1]["value"])
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["lines"] == ["A line."] and record["measures"][1]["value"] is None
    assert record["features"]["image"] == {"modality": "image", "dimensions": 3, "run": "toy"}
