import importlib.util
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA

from armillary.engine.data.format.embedding_files import EmbeddingFiles
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.explore.embedding_map import choice_problem, make_map, map_file, open_map, read_map

GROUPS = 3


def groups(count, dimensions=12, seed=0):
    """Vectors in well separated groups, and their groups."""
    rng = np.random.default_rng(seed)
    of = np.arange(count) % GROUPS
    centres = np.eye(GROUPS, dimensions)
    return (centres[of] + 0.05 * rng.normal(size=(count, dimensions))).astype(np.float32), of


@pytest.fixture
def written(tmp_path):
    def write(vectors, name="e", **about):
        keys = np.array([f"k{i}" for i in range(len(vectors))], object)
        path = tmp_path / f"{name}.parquet"
        Embeddings(keys, np.full(len(keys), "train", object), vectors, about).save(path)
        return EmbeddingFiles.open(path)

    return write


def purity(point, of):
    """Share of points whose nearest other point is of the same group."""
    square = ((point[:, None] - point[None]) ** 2).sum(-1)
    np.fill_diagonal(square, np.inf)
    return (of[square.argmin(1)] == of).mean()


def test_pca_agrees_with_scikit_learn(written):
    vectors, _ = groups(200)
    made = make_map(written(vectors), "pca")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    other = PCA(2).fit(unit)
    found = other.transform(unit)
    found *= np.sign((found * made.point).sum(0))
    np.testing.assert_allclose(made.point, found, atol=1e-5)
    assert made.recipe["variance"] == pytest.approx(other.explained_variance_ratio_.sum(), rel=1e-4)


@pytest.fixture(params=["tsne", "umap"])
def method(request):
    if request.param == "umap":
        pytest.importorskip("umap", reason="needs the extra umap")
    return request.param


SAID = {"tsne": "t-SNE of 120 embeddings, perplexity 30, seed 0", "umap": "UMAP of 120 embeddings, 15 neighbours"}


def test_groups_stay_together_and_a_map_is_repeated(written, method):
    vectors, of = groups(120)
    files = written(vectors)
    made = make_map(files, method)
    assert purity(made.point, of) == 1
    np.testing.assert_array_equal(make_map(files, method).point, made.point)
    assert made.sentence.startswith(SAID[method])


def test_others_are_put_among_a_sample(written, method):
    vectors, of = groups(400)
    made = make_map(written(vectors), method, whole=90)
    assert purity(made.point, of) == 1 and np.isfinite(made.point).all()
    assert made.recipe["sample"] == 90 and "of a sample of 90" in made.sentence


@pytest.mark.parametrize(("count", "dimensions"), [(1, 8), (3, 8), (5, 1), (6, 2)])
def test_the_smallest(written, count, dimensions, method):
    vectors = np.abs(np.random.default_rng(0).normal(size=(count, dimensions))).astype(np.float32)
    for wanted in (method, "pca"):
        made = make_map(written(vectors), wanted)
        assert made.point.shape == (count, 2) and np.isfinite(made.point).all()


def test_a_map_is_made_once(written, method):
    vectors, _ = groups(60)
    files, said = written(vectors, survey="s", encoder="e"), []
    choice = "auto" if method == "tsne" else method
    first = open_map(files, choice, say=said.append)
    kept = map_file(files.path, method)
    assert kept.name == f"e.{method}.parquet" and kept.parent == files.path.parent
    written_at = kept.stat().st_mtime_ns
    again = open_map(files, choice, say=said.append)
    np.testing.assert_array_equal(again.point, first.point)
    assert kept.stat().st_mtime_ns == written_at and len(said) == 1
    assert again.recipe["origin"] == {"survey": "s", "encoder": "e"} and again.sentence == first.sentence


def test_without_umap_learn_the_extra_is_named_unless_the_map_is_there(written, monkeypatch):
    files = written(groups(10)[0])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choice_problem(files, "umap") == (
        "map: umap needs umap-learn, `pip install 'armillary[umap]'`, which is not installed"
    )
    map_file(files.path, "umap").touch()
    assert choice_problem(files, "umap") == ""


def test_a_map_of_other_embeddings_is_refused(written, tmp_path):
    vectors, _ = groups(30)
    open_map(written(vectors, encoder="old"), "pca")
    with pytest.raises(
        ValueError, match="e.pca.parquet: is the map of other embeddings: .*encoder.*delete it or move it"
    ):
        open_map(written(vectors, encoder="new"), "pca")


def test_a_map_from_elsewhere_in_any_order(written, tmp_path):
    files = written(groups(10)[0])
    order = np.random.default_rng(0).permutation(12)  # of more objects than are embedded
    table = {"key": [f"k{i}" for i in order], "x": order.astype(float), "y": -order.astype(float)}
    pq.write_table(pa.table(table), tmp_path / "umap.parquet")
    found = open_map(files, tmp_path / "umap.parquet")
    np.testing.assert_array_equal(found.point[:, 0], np.arange(10))
    assert found.sentence == "map of umap.parquet"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"key": ["k0"], "x": [1.0]}, "not a map"),
        ({"key": ["k0"], "x": ["a"], "y": [1.0]}, "not a map"),
        ({"key": ["k0"], "x": [1.0], "y": [1.0]}, "has no place for 9 of 10 embeddings"),
        ({"key": [f"k{i}" for i in range(10)], "x": [np.nan] * 10, "y": [1.0] * 10}, "x and y must be finite"),
    ],
)
def test_what_is_no_map(written, tmp_path, table, message):
    files = written(groups(10)[0])
    pq.write_table(pa.table(table), tmp_path / "map.parquet")
    with pytest.raises(ValueError, match=message):
        read_map(tmp_path / "map.parquet", files)


def test_a_file_that_is_no_parquet(written, tmp_path):
    files = written(groups(10)[0])
    (tmp_path / "map.parquet").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="not a map"):
        read_map(tmp_path / "map.parquet", files)
    with pytest.raises(FileNotFoundError, match="no such map"):
        read_map(tmp_path / "nothing.parquet", files)
