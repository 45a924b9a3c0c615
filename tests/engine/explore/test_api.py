"""Every address of the page's server, in process."""

import csv
import io
import json
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from PIL import Image

from armillary.engine.data.format.embedding_files import EmbeddingFiles
from armillary.engine.data.inspect.colour import galaxy_picture
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.search.index import Index
from armillary.engine.explore.api import Pages, Refused, sky_position
from armillary.engine.explore.similar import NotReady, Similar


def asked(pages, target, body=None, name=""):
    reply = pages.answer("GET" if body is None else "POST", target, body or b"", name)
    assert reply.status == 200
    return json.loads(reply.body) if reply.kind == "application/json" else reply.body


def refused(pages, status, message, target, body=None, method=None):
    with pytest.raises(Refused, match=message) as found:
        pages.answer(method or ("GET" if body is None else "POST"), target, body or b"")
    assert found.value.status == status


@pytest.fixture(scope="module")
def samples(survey_dir):
    source = PackedSurvey(survey_dir)
    return {sample.key: sample for sample in (source.read(i) for i in range(len(source)))}


def number_of(objects, key):
    return objects.find(key)


def test_the_page_and_its_files(pages):
    for target in ("/", "/index.html", "/style.css", "/main.js", "/vendor/libraries.js", "/icon.svg"):
        assert len(asked(pages, target)) > 100
    page = asked(pages, "/").decode()
    for place in ("://", "cdn", "fonts."):
        assert place not in page + asked(pages, "/style.css").decode()  # nothing from elsewhere
    for target in ("/../cli.py", "/cli.py", "/vendor/package.json", "/vendor/../../cli.py", "/api", "/api/nothing"):
        refused(pages, 404, "there is nothing at", target)


def test_about(pages, objects):
    about = asked(pages, "/api/about")
    assert about["survey"] == "fifty" and about["count"] == 49 and about["modalities"] == ["image", "spectrum"]
    assert [label["name"] for label in about["labels"]] == ["split", "redshift", "kind", "name", "serial"]
    assert about["colour"] == "redshift" and "Hα" in about["lines"] and not about["takesFiles"]


def test_arrays(pages, objects):
    np.testing.assert_array_equal(
        np.frombuffer(asked(pages, "/api/points"), "<u2").reshape(-1, 2), objects.grid_points()
    )
    values = np.frombuffer(asked(pages, "/api/labels/redshift"), "<f4")
    np.testing.assert_array_equal(values, objects.values("redshift"))
    assert len(asked(pages, "/api/labels/kind")) == 49
    refused(pages, 404, "no label 'nothing' can be shown", "/api/labels/nothing")


def test_pictures_are_those_of_the_survey(pages, objects, samples):
    for number in range(len(objects)):
        sample = samples[objects.key(number)]
        if sample.image is None:
            refused(pages, 404, "this object has no image", f"/api/images/{number}")
            continue
        for _ in range(2):  # decoded, then remembered
            picture = np.asarray(Image.open(io.BytesIO(asked(pages, f"/api/images/{number}"))))
            np.testing.assert_array_equal(picture, galaxy_picture(sample.image, sample.valid, objects.survey))


def test_pictures_are_forgotten_when_they_are_too_many(objects, similar, monkeypatch):
    monkeypatch.setattr("armillary.engine.explore.pictures.KEPT_BYTES", 3000)
    pages = Pages(objects, similar, {}, None)
    for number in [n for n in range(20) if objects.key(n) not in ("g-003",)]:
        pages.pictures.image(number)
    assert 0 < pages.pictures._bytes <= 3000
    assert pages.pictures._bytes == sum(map(len, pages.pictures._kept.values()))


def test_spectra(pages, objects, samples):
    wave = objects.survey.spectrum.grid.angstrom()
    for number in range(len(objects)):
        sample = samples[objects.key(number)]
        if sample.spectrum is None:
            refused(pages, 404, "this object has no spectrum", f"/api/spectra/{number}")
            continue
        curve = asked(pages, f"/api/spectra/{number}")
        seen = sample.spectrum.ivar > 0  # as many bins as pixels: each bin is a pixel
        np.testing.assert_allclose(curve["flux"], sample.spectrum.flux[seen], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(curve["wavelength"], wave[seen], atol=10)
        assert curve["unit"] == "1e-17 erg/s/cm2/angstrom"


def test_objects(pages, objects):
    found = asked(pages, "/api/objects/0")
    assert found["key"] == objects.key(0) and set(found) >= {"split", "ra", "dec", "redshift", "kind"}
    refused(pages, 404, "there is no object 49; the last of 49 is 48", "/api/objects/49")
    refused(pages, 404, "there is no object", "/api/images/999999999999")
    refused(pages, 404, "there is nothing at", "/api/objects/-1")
    refused(pages, 405, "takes GET", "/api/objects/1", b"x")


def test_find(pages, objects):
    key = objects.key(5)
    assert asked(pages, f"/api/find?q=%20{key}%20") == {"number": 5, "key": key}
    about = asked(pages, "/api/objects/5")
    found = asked(pages, f"/api/find?q={about['ra']}%20{about['dec'] + 1 / 3600}")
    assert found == {"number": 5, "key": key, "arcsec": pytest.approx(1, abs=1e-2)}
    refused(pages, 404, "'nobody' is no key here", "/api/find?q=nobody")
    refused(pages, 400, "must be a key or a position", "/api/find?q=%20")


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("150.1 2.2", (150.1, 2.2)),
        ("150.1,-2.2", (150.1, -2.2)),
        ("-10 +90", (350, 90)),
        ("10:00:24 +02:12:00", (150.1, 2.2)),
        ("10h00m24s -2d12m", (150.1, -2.2)),
        ("150.1", None),
        ("150.1 2.2 3", None),
        ("150.1 91", None),
        ("nan 1", None),
        ("a b", None),
        ("10:99:00 1:1:1", None),
    ],
)
def test_positions(text, position):
    found = sky_position(text)
    assert found == (position if position is None else pytest.approx(position))


def test_similar_are_those_of_the_index(pages, objects, embeddings):
    loaded = Embeddings.load(embeddings)
    unit = loaded.vector / np.linalg.norm(loaded.vector, axis=1, keepdims=True)
    for number in (0, 17):
        own = objects.order[number]
        cosines = unit @ unit[own]
        order = [i for i in np.argsort(-cosines) if i != own][:5]
        found = asked(pages, f"/api/similar/{number}?k=5")
        assert [objects.key(n) for n, _ in found["answers"]] == list(loaded.key[order])
        np.testing.assert_allclose([c for _, c in found["answers"]], cosines[order], atol=1e-4)
    assert len(asked(pages, "/api/similar/3?k=500")["answers"]) == 48  # all but itself
    for k in ("0", "501", "x", "-1"):
        refused(pages, 400, "k: must be a number from 1 to 500", f"/api/similar/3?k={k}")


def test_a_saved_index_in_another_order(objects, embeddings, survey_dir, tmp_path, pages):
    loaded = Embeddings.load(embeddings)
    turned = np.arange(len(loaded))[::-1]
    Index.build(loaded.vector[turned], loaded.key[turned], kind="exact").save(tmp_path / "index")
    similar = Similar(EmbeddingFiles.open(embeddings), objects.keys, tmp_path / "index", None, "cpu")
    similar.wait()
    other = Pages(objects, similar, {}, None)
    assert asked(other, "/api/similar/7?k=6")["answers"] == asked(pages, "/api/similar/7?k=6")["answers"]


def test_an_index_that_is_not_there_yet(objects, embeddings, tmp_path, monkeypatch):
    go = threading.Event()
    read = Index.read_files
    monkeypatch.setattr(Index, "read_files", lambda paths: go.wait(60) and read(paths))
    similar = Similar(EmbeddingFiles.open(embeddings), objects.keys, None, None, "cpu")
    with pytest.raises(NotReady, match="the index is being made, since 0 s; ask again"):
        similar.of_row(0, 3)
    go.set()
    similar.wait()
    assert len(similar.of_row(0, 3)[0]) == 3
    Index.build(np.eye(3), ["x", "y", "z"], kind="exact").save(tmp_path / "strange")
    strange = Similar(EmbeddingFiles.open(embeddings), objects.keys, tmp_path / "strange", None, "cpu")
    strange.wait()
    with pytest.raises(NotReady, match="there is no index to search: index: holds 3 objects that"):
        strange.of_row(0, 3)


@pytest.mark.parametrize("numbers", [[4, 2, 40], range(49)])
def test_export(pages, objects, survey_dir, numbers):
    chosen = np.array(list(numbers), "<u4")
    catalogue = {row["key"]: row for row in pq.read_table(survey_dir / "catalog.parquet").to_pylist()}
    rows = list(csv.DictReader(io.StringIO(asked(pages, "/api/export?format=csv", chosen.tobytes()).decode())))
    table = fits.getdata(io.BytesIO(asked(pages, "/api/export?format=fits", chosen.tobytes())), 1)
    assert len(rows) == len(table) == len(chosen)
    for number, row, record in zip(chosen, rows, table, strict=True):
        known = catalogue[objects.key(number)]
        assert row["key"] == record["key"] == known["key"]
        assert row["redshift"] == "" if np.isnan(known["redshift"]) else float(row["redshift"]) == known["redshift"]
        np.testing.assert_equal(record["redshift"], known["redshift"])
        assert row["kind"] == record["kind"] == known["kind"] and float(row["ra"]) == record["ra"] == known["ra"]
        np.testing.assert_allclose([float(row["map_x"]), record["map_y"]], objects.point[number], rtol=1e-6)


def test_bad_exports(pages):
    refused(pages, 400, "four bytes each", "/api/export?format=csv", b"abc")
    refused(pages, 400, "there is no object 49", "/api/export", np.array([1, 49], "<u4").tobytes())
    refused(pages, 400, "format: must be one of csv, fits, got 'xls'", "/api/export?format=xls", bytes(4))
    refused(pages, 400, "four bytes each", "/api/export", method="POST")


def test_a_damaged_shard_is_named(objects, similar, monkeypatch):
    pages = Pages(objects, similar, {}, None)
    files, shard = pages.pictures._place[pages.pictures._shard[0]]
    monkeypatch.setattr(files, "read", lambda *_: {"image": b"ARMB" + bytes(40)})
    with pytest.raises(ValueError, match="corrupt blob"):
        pages.answer("GET", "/api/images/0")
