"""Searching for what is in a file: real readers, and an encoder that looks at colours."""

import io
import json

import numpy as np
import pytest
import torch
from astropy.io import fits
from PIL import Image
from toy_colours import open_everywhere

from armillary.engine.config.provenance import survey_fingerprint
from armillary.engine.data.building.build import build
from armillary.engine.data.format.embedding_files import EmbeddingFiles
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.colour import galaxy_picture
from armillary.engine.data.inspect.export import unpack
from armillary.engine.data.sources.kinds import open_source
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.explore.api import Pages, Refused
from armillary.engine.explore.embedding_map import open_map
from armillary.engine.explore.objects import Objects, find_labels
from armillary.engine.explore.similar import Similar
from armillary.engine.weights.tensors import state_digest


@pytest.fixture
def page_of(tmp_path, monkeypatch):
    """Make a page whose embeddings are of a survey's images, by a run that is at hand."""

    def make(survey_dir):
        encoder = open_everywhere(monkeypatch, survey_dir)
        source = PackedSurvey(survey_dir)
        samples = [s for s in (source.read(i) for i in range(len(source))) if s.image is not None]
        vectors = encoder.encode({"crop": torch.from_numpy(np.stack([s.image for s in samples]))})["image"]
        survey = Survey.load(survey_dir)
        about = {"survey": survey.name, "fingerprint": survey_fingerprint(survey), "readout": "image"}
        about["encoder"] = state_digest(encoder.state_dict())
        keys, splits = (np.array([getattr(s, n) for s in samples], object) for n in ("key", "split"))
        Embeddings(keys, splits, vectors.detach().numpy(), about).save(tmp_path / "images.parquet")
        files = EmbeddingFiles.open(tmp_path / "images.parquet")
        objects = Objects(survey, files, open_map(files, "pca"), find_labels(survey))
        similar = Similar(files, objects.keys, None, tmp_path / "run", torch.device("cpu"))
        similar.wait()
        return Pages(objects, similar, {}, None)

    return make


@pytest.fixture
def coloured(page_of, survey_dir):
    return page_of(survey_dir)


@pytest.fixture(scope="module")
def cutouts(survey_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits") / "cutouts"
    unpack(survey_dir, folder, "fits")
    return folder


def test_a_dropped_cutout_finds_its_galaxy(coloured, cutouts):
    content = (cutouts / "g-011.fits").read_bytes()
    found = json.loads(coloured.answer("POST", "/api/similar?k=4", content, "../../g 011.fits").body)
    assert found["key"] == "g_011.fits" and len(found["answers"]) == 4
    (first, cosine), *_ = found["answers"]
    assert coloured.objects.key(first) == "g-011" and cosine == pytest.approx(1, abs=1e-3)
    assert found["picture"].startswith("data:image/png;base64,")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_dropped_picture_finds_its_galaxy(page_of, tmp_path, suffix):
    rng = np.random.default_rng(3)
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        picture = np.broadcast_to(rng.integers(40, 220, 3), (16, 16, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"p{number}.{suffix}", quality=95)
    survey = tmp_path / "survey"
    build(open_source(tmp_path / "pictures", "images"), survey, name="pictures", progress=False, test_fraction=0.5)
    pages = page_of(survey)
    content = (tmp_path / "pictures" / f"p5.{suffix}").read_bytes()
    found = json.loads(pages.answer("POST", "/api/similar?k=1", content, f"dropped.{suffix}").body)
    ((number, cosine),) = found["answers"]
    assert pages.objects.key(number) == "p5" and cosine == pytest.approx(1, abs=1e-3)
    assert found["picture"].startswith("data:image/png;base64,") and "spectrum" not in found


def broken():
    """Files that people drop: (name, content, what is said)."""
    header = fits.PrimaryHDU(np.zeros((3, 16, 16), np.float32)).header.tostring().encode()
    text = io.BytesIO()
    Image.new("RGB", (20, 10)).save(text, format="JPEG")
    yield "cut.fits", header[:1000], "cut.fits cannot be searched for"
    yield "header.fits", header, "header.fits cannot be searched for"
    yield "noise.fits", bytes(range(256)) * 40, "noise.fits cannot be searched for"
    yield "text.jpg", b"hello", "text.jpg cannot be searched for"
    yield "half.jpg", text.getvalue()[:300], "half.jpg cannot be searched for"
    yield "other.jpg", text.getvalue(), "other.jpg cannot be searched for"  # a picture of other bands
    yield "letter.docx", b"PK\x03\x04", "letter.docx cannot be searched for: .*; drop a FITS file, a JPEG or a PNG"
    yield "", b"x", "upload cannot be searched for"
    yield ".hidden", b"x", "hidden cannot be searched for"
    yield "a" * 300 + ".fits", b"x", "cannot be searched for"


BROKEN = tuple(broken())


@pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyWarning")
@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[name[:12] or "nameless" for name, *_ in BROKEN])
def test_what_cannot_be_read_is_said_in_a_sentence(coloured, name, content, message):
    with pytest.raises(Refused, match=message) as found:
        coloured.answer("POST", "/api/similar", content, name)
    assert found.value.status == 422
    said = str(found.value)
    assert "Traceback" not in said and "/tmp" not in said and "\n" not in said and len(said) < 600, said


def test_a_survey_is_no_query(coloured, cutouts, survey_dir):
    with pytest.raises(Refused, match="cannot be searched for"):
        coloured.answer("POST", "/api/similar", (survey_dir / "catalog.parquet").read_bytes(), "catalog.parquet")
    with pytest.raises(Refused, match="the file is empty"):
        coloured.answer("POST", "/api/similar", b"", "x.fits")
    with pytest.raises(Refused, match="^k: must be a number") as found:
        coloured.answer("POST", "/api/similar?k=0", b"x", "x.fits")
    assert found.value.status == 400


def test_a_picture_of_display_units(coloured, cutouts, survey_dir):
    """A JPEG has no fluxes: an encoder of fluxes does not take it, and the page says why."""
    sample = PackedSurvey(survey_dir).read(11)
    buffer = io.BytesIO()
    Image.fromarray(galaxy_picture(sample.image, None, Survey.load(survey_dir))).save(buffer, format="PNG")
    with pytest.raises(Refused, match="g.png cannot be searched for: .*(bands|unit)"):
        coloured.answer("POST", "/api/similar", buffer.getvalue(), "g.png")
