import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toy_colours import open_everywhere

from armillary.engine.cli import main as command
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.export import unpack
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.evaluate.embedding.cutouts import read_cutouts
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.search.index import Index
from armillary.engine.weights.tensors import state_digest
from armillary.models.method import InputSpec


@pytest.fixture
def encoder(monkeypatch, pairs_dir):
    """A run whose trained encoder is `Colours`."""
    return open_everywhere(monkeypatch, pairs_dir)


@pytest.fixture
def files(tmp_path, pairs_dir, encoder):
    """Embeddings of images and of spectra, as a run would leave them."""
    table = pq.read_table(pairs_dir / "catalog.parquet")
    keys, splits = (np.array(table[n].to_pylist(), object) for n in ("key", "split"))
    source = PackedSurvey(pairs_dir)
    samples = [source.read(i) for i in range(len(source))]
    batch = {
        "crop": torch.from_numpy(np.stack([s.image for s in samples])),
        "spectrum": torch.from_numpy(np.stack([s.spectrum.flux for s in samples])),
    }
    written = {}
    for name, vectors in encoder.encode(batch).items():
        about = {"survey": "pairs", "encoder": state_digest(encoder.state_dict()), "readout": name}
        written[name] = tmp_path / f"{name}.parquet"
        Embeddings(keys, splits, vectors.detach().numpy(), about).save(written[name])
    return written


@pytest.fixture(scope="module")
def fits_dir(pairs_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits") / "cutouts"
    unpack(pairs_dir, folder, "fits")
    return folder


def search(*words):
    return command(["search", *map(str, words)])


def printed(text):
    """(rank, key, similarity, redshift) of each line that was printed."""
    return re.findall(r"^ *(\d+) (pair-\d+) +(-?[\d.]+)(?: +(nan|[\d.]+))?$", text, re.MULTILINE)


def test_neighbours_of_a_key(files, capsys):
    assert search(files["image"], "--query", "pair-007", "-k", "5") == 0
    found = printed(capsys.readouterr().out)
    e = Embeddings.load(files["image"])
    unit = e.vector.astype(np.float64) / np.linalg.norm(e.vector, axis=1, keepdims=True)
    own = list(e.key).index("pair-007")
    order = [i for i in np.argsort(-unit @ unit[own]) if i != own][:5]
    assert [key for _, key, *_ in found] == list(e.key[order])
    np.testing.assert_allclose([float(s) for _, _, s, _ in found], unit[order] @ unit[own], atol=1e-4)


def test_redshifts_and_a_table(files, pairs_dir, tmp_path, capsys):
    out = tmp_path / "deep" / "answers.parquet"
    assert search(files["image"], "--query", "pair-010", "--data", pairs_dir, "--out", out) == 0
    table = pq.read_table(out)
    assert table.column_names == ["query", "rank", "key", "similarity", "redshift", "kind"]
    assert len(table) == 8 and set(table["query"].to_pylist()) == {"pair-010"}
    catalogue = {r["key"]: r for r in pq.read_table(pairs_dir / "catalog.parquet").to_pylist()}
    lines = printed(capsys.readouterr().out)
    for row, (rank, key, _, redshift) in zip(table.to_pylist(), lines, strict=True):
        assert (str(row["rank"]), row["key"]) == (rank, key)
        assert float(redshift) == pytest.approx(catalogue[key]["redshift"], abs=1e-4, nan_ok=True)


def test_across_modalities_the_partner_is_an_answer(files, encoder, capsys):
    arguments = (files["spectrum"], "--query", "pair-012", "--query-embeddings", files["image"], "-k", 60)
    assert search(*arguments) == 0
    assert sorted(key for _, key, *_ in printed(capsys.readouterr().out)) == [f"pair-{i:03d}" for i in range(60)]
    assert search(files["image"], "--query", "pair-012", "--query-embeddings", files["image"], "-k", 59) == 0
    assert "pair-012" not in [key for _, key, *_ in printed(capsys.readouterr().out)]


def test_a_cutout_finds_itself(files, fits_dir, pairs_dir, tmp_path, capsys):
    page = tmp_path / "answers.html"
    run = ("--run", tmp_path, "--data", pairs_dir, "--out", page)
    assert search(files["image"], "--query", fits_dir / "pair-021.fits", *run, "-k", "4") == 0
    first = printed(capsys.readouterr().out)[0]
    assert first[1] == "pair-021" and float(first[2]) == 1
    text = page.read_text()
    assert "Most similar to pair-021.fits" in text and "<h2>Images</h2>" in text and "<h2>Spectra</h2>" in text
    assert text.count("data:image/png") == 5  # the query's own among them
    assert text.count("<polyline") == 4 and text.count("Not observed") == 1  # the file has no spectrum
    assert not re.search(r"https?://", text)


def test_a_cutout_among_spectra(files, fits_dir, tmp_path, capsys):
    cutout = fits_dir / "pair-021.fits"
    assert search(files["spectrum"], "--query", cutout, "--run", tmp_path) == 0
    by_key = (files["spectrum"], "--query", "pair-021", "--query-embeddings", files["image"])
    from_file = printed(capsys.readouterr().out)
    assert search(*by_key) == 0
    assert printed(capsys.readouterr().out) == from_file
    assert search(files["pixels"], "--query", cutout, "--run", tmp_path, "--readout", "image") == 2
    assert "'image' of the query and 'pixels' of the index do not lie in one space" in capsys.readouterr().err
    assert search(files["pixels"], "--query", cutout, "--run", tmp_path) == 0
    assert printed(capsys.readouterr().out)[0][1] == "pair-021"


def test_a_page_for_a_key_shows_both_modalities(files, pairs_dir, tmp_path):
    page = tmp_path / "a.html"
    assert search(files["image"], "--query", "pair-003", "--data", pairs_dir, "--out", page, "-k", "11") == 0
    text = page.read_text()
    assert text.count("data:image/png") == text.count("<polyline") == 12
    assert text.count('class="row neighbours"') == 4  # two rows of nine and three a modality


def test_an_index_is_kept_and_searched(files, tmp_path, capsys):
    assert search(files["image"], "--query", "pair-001", "--save-index", tmp_path / "index") == 0
    told = printed(capsys.readouterr().out)
    assert search(tmp_path / "index", "--query", "pair-001") == 0
    assert printed(capsys.readouterr().out) == told
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_codes_look_their_queries_up_in_the_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(10_000, 2)).astype(np.float32)
    keys = np.array([f"pair-{i}" for i in range(10_000)], object)
    Embeddings(keys, np.full(10_000, "x", object), vectors, {}).save(tmp_path / "e.parquet")
    assert search(tmp_path / "e.parquet", "--query", "pair-77", "--index", "ivfpq", "--save-index", tmp_path / "i") == 0
    saved = printed(capsys.readouterr().out)
    exact = Index.build(vectors, keys).search(vectors[[77]], 8, leave_out=np.array([77]))
    assert float(saved[0][2]) == pytest.approx(float(exact.similarity[0, 0]), abs=1e-3)
    (tmp_path / "i" / "vectors.npy").unlink()
    assert search(tmp_path / "i", "--query", "pair-77") == 2
    assert "holds codes only" in capsys.readouterr().err
    assert search(tmp_path / "i", "--query", "pair-77", "--query-embeddings", tmp_path / "e.parquet") == 0
    assert "pair-77" not in [key for _, key, *_ in printed(capsys.readouterr().out)]


def test_pictures_are_embedded_too(make_survey, encoder, tmp_path, capsys):
    folder = make_survey(unit="count", bands=("red", "green", "blue"), pixel_scale_arcsec=None)
    encoder.opened.pixels = Survey.load(folder).pixels()
    table = pq.read_table(folder / "catalog.parquet")
    keys, splits = (np.array(table[n].to_pylist(), object) for n in ("key", "split"))
    images = np.stack([image for image, _ in read_cutouts(folder, np.arange(len(keys)))])
    vectors = encoder.encode({"crop": torch.from_numpy(images)})["image"].detach().numpy()
    about = {"encoder": state_digest(encoder.state_dict()), "readout": "default"}
    Embeddings(keys, splits, vectors, about).save(tmp_path / "e.parquet")
    row = list(keys).index("blob-0012")
    Image.fromarray(images[row].transpose(1, 2, 0).astype(np.uint8)).save(tmp_path / "some.png")
    (tmp_path / "labels.csv").write_text("file,redshift\nother.png,0.1\n")  # not about this file
    assert search(tmp_path / "e.parquet", "--query", tmp_path / "some.png", "--run", tmp_path, "-k", "2") == 0
    assert re.search(r"^ +1 blob-0012 +1.0000$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--query", "nobody"], "key 'nobody': none of the 60 here"),
        (["--query", "pair-001", "-k", "60"], "k: must lie between 1 and the 59 vectors of this index besides the query"),
        (["--query", "pair-001", "--run", "r"], "there is no file 'pair-001', and a key takes no --run"),
        (["--query", "pair-001", "--kind", "fits"], "there is no file 'pair-001', and a key takes no --run"),
        (["--query", "pair-001", "--option", "a=1"], "there is no file 'pair-001', and a key takes no --run"),
        (["--query", "FITS"], "has to be embedded; give the run that made"),
        (["--query", "FITS", "--run", "r", "--query-embeddings", "x"], "query_embeddings: are for a query by key"),
        (["--query", "FITS", "--run", "r", "--readout", "cls"], "readout: 'cls' is none of this encoder's embeddings"),
        (["--query", "pair-001", "--out", "a.html"], "give the survey with --data"),
        (["--query", "pair-001", "--out", "a.png"], "must end in .parquet or .html, got a.png"),
        (["--query", "pair-001", "--query-embeddings", "none.parquet"], "none.parquet: no embeddings here"),
        (["--query", "nobody", "--query-embeddings", "SAME"], "key 'nobody': has no embedding in"),
        (["--query", "pair-001", "--index", "ivfpq"], "needs 9,984 vectors or more to train"),
        (["--query", "pair-001", "--save-index", "FOLDER"], "exists already"),
        (["--query", "pair-001", "--data", "OTHER"], "survey 'blobs' has no object"),
    ],
    ids=[
        "unknown_key", "k_too_large", "run_without_file", "kind_without_file", "option_without_file", "file_without_run",
        "file_and_embeddings", "unknown_readout", "page_without_survey", "other_format", "no_such_embeddings",
        "key_in_neither", "too_few_for_codes", "index_in_the_way", "another_survey",
    ],
)  # fmt: skip
def test_bad_arguments(words, message, files, fits_dir, survey_dir, tmp_path, capsys):
    named = {"FITS": fits_dir / "pair-002.fits", "SAME": files["spectrum"], "FOLDER": tmp_path, "OTHER": survey_dir}
    assert search(files["image"], *(named.get(word, word) for word in words)) == 2
    assert message in capsys.readouterr().err


def test_strangers_are_refused(files, fits_dir, encoder, tmp_path, capsys):
    def refused(message, *words):
        assert search(*words) == 2
        assert message in capsys.readouterr().err

    e = Embeddings.load(files["image"])
    cutout = ("--query", fits_dir / "pair-002.fits", "--run", tmp_path)
    for name, value in (("encoder", "9"), ("survey", "sea")):
        other = tmp_path / f"{name}.parquet"
        Embeddings(e.key, e.split, e.vector, e.metadata | {name: value}).save(other)
        refused(f"another {name}", files["image"], "--query", "pair-001", "--query-embeddings", other)
    refused("another encoder", tmp_path / "encoder.parquet", *cutout)
    Image.new("RGB", (16, 16)).save(tmp_path / "p.png")
    refused(
        "bands: the encoder was trained on ('g', 'r', 'z')", files["image"], "--query", tmp_path / "p.png", *cutout[2:]
    )
    (tmp_path / "notes.txt").write_text("hello")
    refused("what to read is not clear", files["image"], "--query", tmp_path / "notes.txt", *cutout[2:])
    (tmp_path / "bad.png").write_text("hello")
    refused(f"{tmp_path}: none of its 1 pictures", files["image"], "--query", tmp_path / "bad.png", *cutout[2:])
    encoder.opened.inputs = InputSpec(columns=("mag_g",))
    refused("reads the catalogue's mag_g, which a file does not have", files["image"], *cutout)
