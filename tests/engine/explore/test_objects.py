import numpy as np
import pyarrow.parquet as pq
import pytest

from armillary.engine.data.format.embedding_files import EmbeddingFiles
from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.explore.embedding_map import EmbeddingMap
from armillary.engine.explore.objects import MISSING, Objects, check_origin, find_labels


@pytest.fixture(scope="module")
def catalogue(survey_dir):
    return {row["key"]: row for row in pq.read_table(survey_dir / "catalog.parquet").to_pylist()}


def test_every_numbering_leads_to_the_same_object(objects, embeddings, catalogue):
    loaded = Embeddings.load(embeddings)
    assert len(objects) == len(loaded) == len(catalogue) - 1
    rows = pq.read_table(objects.survey.folder / "catalog.parquet")["key"].to_pylist()
    for number in range(len(objects)):
        key = objects.key(number)
        assert key == loaded.key[objects.order[number]] == rows[objects.catalog_row[number]]
        assert objects.number[objects.order[number]] == number == objects.find(key)
    assert objects.find("nobody") is None


def test_the_order_is_shuffled(objects):
    assert (np.diff(objects.order) != 1).mean() > 0.8


def test_values_of_labels(objects, catalogue):
    redshift, kind = objects.values("redshift"), objects.values("kind")
    assert redshift.dtype == np.float32 and kind.dtype == np.uint8
    for number in range(len(objects)):
        row = catalogue[objects.key(number)]
        np.testing.assert_equal(redshift[number], np.float32(row["redshift"]))
        words = objects.labels["kind"].categories
        assert (words[kind[number]] if kind[number] != MISSING else "") == row["kind"]
    for name in ("absent", "key"):
        with pytest.raises(KeyError):
            objects.values(name)


def test_labels(objects, survey_dir, monkeypatch):
    kinds = {label.name: label.kind for label in objects.labels.values()}
    assert kinds == {
        "split": "category",
        "redshift": "number",
        "kind": "category",
        "name": "category",
        "serial": "number",
    }
    assert objects.labels["kind"].categories == ("elliptical", "spiral")
    monkeypatch.setattr("armillary.engine.explore.objects.CATEGORIES", 10)
    assert find_labels(Survey.load(survey_dir))["name"].kind == "text"


def test_points_fill_a_square_grid(objects):
    grid = objects.grid_points()
    assert grid.dtype == np.uint16 and grid.max() == 65_535 and grid.min() == 0
    scale = 65_535 / np.ptp(objects.point, axis=0).max()  # one for both axes
    np.testing.assert_allclose(np.diff(grid.astype(float), axis=0), np.diff(objects.point, axis=0) * scale, atol=1.1)


def test_one_place_for_all(objects, embeddings):
    files = EmbeddingFiles.open(embeddings)
    same = Objects(objects.survey, files, EmbeddingMap(np.ones((len(objects), 2), np.float32), {}), objects.labels)
    assert (same.grid_points() == 32_768).all()


def test_description(objects, catalogue):
    for number in range(len(objects)):
        row = catalogue[objects.key(number)]
        found = objects.describe(number)
        assert found["key"] == row["key"] and found["ra"] == row["ra"]
        assert found["redshift"] == (None if np.isnan(row["redshift"]) else row["redshift"])
        assert found["kind"] == (row["kind"] or None)


@pytest.mark.parametrize("offset", [(0.0, 0.0), (1.0, 0.0), (0.0, 2.0), (-360.0 * 3600, 0.0)])
def test_nearest_on_the_sky(objects, catalogue, offset):
    row = catalogue[objects.key(7)]
    number, arcsec = objects.nearest(row["ra"] + offset[0] / 3600, row["dec"] + offset[1] / 3600)
    assert number == 7
    across = 0 if abs(offset[0]) > 1e6 else offset[0] * np.cos(np.radians(row["dec"]))
    assert arcsec == pytest.approx(np.hypot(across, offset[1]), abs=1e-3)


def test_another_survey_is_refused(survey_dir, embeddings, tmp_path):
    survey, loaded = Survey.load(survey_dir), Embeddings.load(embeddings)
    strange = tmp_path / "strange.parquet"
    Embeddings(loaded.key, loaded.split, loaded.vector, {"fingerprint": "0", "survey": "other"}).save(strange)
    with pytest.raises(ValueError, match="embeddings of the survey 'other', but .* is 'fifty' with other samples"):
        check_origin(EmbeddingFiles.open(strange), survey)
    keys = loaded.key.copy()
    keys[3] = "stranger"
    Embeddings(keys, loaded.split, loaded.vector).save(strange)
    files = EmbeddingFiles.open(strange)
    check_origin(files, survey)  # says nothing of its survey
    with pytest.raises(ValueError, match="survey 'fifty' lacks 1 of 49 embedded objects, such as 'stranger'"):
        Objects(survey, files, EmbeddingMap(np.zeros((49, 2), np.float32), {}), {})
