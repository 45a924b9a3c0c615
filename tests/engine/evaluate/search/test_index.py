import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from plain import flip

from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.search.index import Index
from armillary.engine.evaluate.search.index_settings import IndexSettings
from armillary.engine.evaluate.search.retrieval import found_again
from armillary.engine.evaluate.search.vectors import unit
from armillary.engine.sealed_json import sealed, unsealed

COUNT, WIDTH = 10_240, 6
ABOUT = {"survey": "sky", "encoder": "0123", "readout": "image", "run": "toy"}


def clusters(count=COUNT, width=WIDTH, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(60, width))
    return (centres[rng.integers(0, 60, count)] + 0.25 * rng.normal(size=(count, width))).astype(np.float32)


def brute(vectors, queries, k):
    """Exact neighbours in float64, and their cosines."""
    left, right = (
        v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries.astype(np.float64), vectors.astype(np.float64))
    )
    similarity = left @ right.T
    row = np.argsort(-similarity, 1)[:, :k]
    return row, np.take_along_axis(similarity, row, 1)


def keys_of(count):
    return np.array([f"obj-{i:05d}" for i in range(count)], object)


@pytest.fixture
def small():
    vectors = clusters(300)
    return vectors, Index.build(vectors, keys_of(300), metadata=ABOUT)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """An IVF-PQ index with vectors kept, read from files in two parts; the folder also without the kept vectors."""
    folder, vectors, keys = tmp_path_factory.mktemp("coded"), clusters(), keys_of(COUNT)
    files = []
    for i, part in enumerate((slice(0, 7000), slice(7000, COUNT))):
        files.append(folder / f"{i}.parquet")
        split = np.full(len(keys[part]), "train", object)
        Embeddings(keys[part], split, vectors[part], ABOUT).save(files[-1])
    plan = IndexSettings.choose(COUNT, WIDTH, "ivfpq", code_bytes=3)
    index = Index.read_files(files, plan=plan, keep=folder / "kept.npy")
    index.save(folder / "ranked")
    shutil.copytree(folder / "ranked", folder / "codes")
    (folder / "codes" / "vectors.npy").unlink()
    return vectors, index, folder


def test_exact_answers_are_those_of_brute_force(small):
    vectors, index = small
    queries = clusters(40, seed=1) * 17
    row, similarity = brute(vectors, queries, 12)
    answers = index.search(queries, 12)
    np.testing.assert_array_equal(answers.row, row)
    np.testing.assert_allclose(answers.similarity, similarity, atol=1e-6)
    np.testing.assert_array_equal(answers.key, keys_of(300)[row])
    assert index.plan.kind == "exact" and len(index) == 300 and index.dimensions == WIDTH


def test_a_vector_finds_itself_unless_it_is_left_out(small):
    vectors, index = small
    rows = np.array([5, 0, 299])
    assert (index.search(vectors[rows], 3).row[:, 0] == rows).all()
    without = index.search(vectors[rows], 299, leave_out=rows)
    for row, others in zip(rows, without.row, strict=True):
        assert sorted(others) == [i for i in range(300) if i != row]
    expected = index.search(vectors[rows], 4).row[:, 1:]
    np.testing.assert_array_equal(index.search(vectors[rows], 3, leave_out=rows).row, expected)
    elsewhere = index.search(vectors[rows], 3, leave_out=np.array([200, 201, 202]))
    assert elsewhere.row.shape == (3, 3) and (elsewhere.row[:, 0] == rows).all()


def test_keys_lead_to_vectors(small):
    vectors, index = small
    row = index.find("obj-00123")
    assert row == 123
    np.testing.assert_allclose(index.vectors([row, 7]), unit(vectors[[row, 7]]), atol=1e-6)
    assert index.search(index.vectors([row]), 1).key[0, 0] == "obj-00123"


def test_order_of_what_is_indexed_does_not_matter(small):
    vectors, index = small
    order = np.random.default_rng(3).permutation(300)
    turned = Index.build(vectors[order], keys_of(300)[order])
    queries = clusters(20, seed=2)
    np.testing.assert_array_equal(turned.search(queries, 9).key, index.search(queries, 9).key)


@pytest.mark.parametrize("width", [3, 200])
def test_equal_vectors_are_equally_similar_and_come_in_order(width):
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(4, width)).astype(np.float32)
    which = rng.integers(0, 4, 400)
    queries = kinds + 0.1 * rng.normal(size=(4, width)).astype(np.float32)
    answers = Index.build(kinds[which]).search(queries, 150)
    for query, (row, similarity) in enumerate(zip(answers.row, answers.similarity, strict=True)):
        mine = np.flatnonzero(which == query)
        np.testing.assert_array_equal(row[: len(mine)], mine)
        assert len(mine) < 150 and len(np.unique(similarity)) <= 4
        assert all((np.diff(row[similarity == s]) > 0).all() for s in similarity)
        np.testing.assert_array_equal(row, Index.build(kinds[which]).search(queries[query : query + 1], 150).row[0])
    few = Index.build(kinds[which]).search(queries, 5).row  # fewer than are tied
    np.testing.assert_array_equal(few, answers.row[:, :5])


def test_candidates_that_rounding_may_have_put_too_low_are_fetched():
    index = Index.build(np.eye(40, 3, dtype=np.float32) + [0, 0, 1])  # 38 equal vectors, of which FAISS fetches 10
    engine, asked = index._engine, []

    class Backwards:
        d, get_xb = engine.d, engine.get_xb

        def search(self, queries, count):
            asked.append(count)
            similarity, row = engine.search(queries, 40)
            order = np.lexsort((-row, -np.round(similarity, 5)))[:, :count]  # of equal ones the last rows first
            return np.take_along_axis(similarity, order, 1), np.take_along_axis(row, order, 1)

    index._engine = Backwards()
    assert index.search(np.array([[0.0, 0.0, 1.0]]), 2).row.tolist() == [[2, 3]]
    assert asked == [10, 40]


def test_unit_vectors_of_any_length():
    vectors = np.array([[3e30, 4e30], [3e-30, -4e-30], [0, -7]])
    np.testing.assert_allclose(unit(vectors), [[0.6, 0.8], [0.6, -0.8], [0, -1]], atol=1e-6)


def test_codes_find_most_neighbours_and_kept_vectors_nearly_all(coded):
    vectors, index, folder = coded
    queries = clusters(200, seed=4)
    truth, _ = brute(vectors, queries, 10)
    codes = Index.load(folder / "codes")
    # Over twelve seeds .809 with a spread of .012; .997 to .9935; .51 with a spread of .03. Five spreads are left.
    assert found_again(codes.search(queries, 10, probes=64).row, truth).mean() > 0.75
    ranked = index.search(queries, 10, probes=64)
    assert found_again(ranked.row, truth).mean() > 0.98
    cosine = np.einsum("md,mkd->mk", unit(queries), unit(vectors)[ranked.row])
    np.testing.assert_allclose(ranked.similarity, cosine, atol=1e-3)  # of half-precision components
    assert (np.diff(ranked.similarity) <= 0).all()
    assert found_again(codes.search(queries, 10, probes=1).row, truth).mean() < 0.65


def test_short_lists_are_filled_up_from_all(coded):
    vectors, _, folder = coded
    codes = Index.load(folder / "codes")
    answers = codes.search(vectors[:5], 2000, probes=1)
    assert (answers.row >= 0).all()
    assert all(len(set(row)) == 2000 for row in answers.row)


def test_index_comes_back_from_its_folder(coded, small, tmp_path):
    vectors, index, folder = coded
    queries = clusters(30, seed=5)
    loaded = Index.load(folder / "ranked", ABOUT)
    for one, other in zip(loaded.search(queries, 5), index.search(queries, 5), strict=True):
        np.testing.assert_array_equal(one, other)
    assert loaded.metadata == ABOUT and loaded.plan == index.plan
    assert sorted(p.name for p in (folder / "ranked").iterdir()) == [
        "index.faiss",
        "index.json",
        "keys.parquet",
        "vectors.crc32.npy",
        "vectors.npy",
    ]
    np.testing.assert_allclose(loaded.vectors([7, 9000]), unit(vectors[[7, 9000]]), atol=1e-3)
    small[1].save(tmp_path / "deep" / "exact")
    again = Index.load(tmp_path / "deep" / "exact")
    np.testing.assert_array_equal(again.search(queries, 5).key, small[1].search(queries, 5).key)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["exact"]


def test_bytes_are_as_the_formula_says(coded):
    _, index, folder = coded
    size = (folder / "codes" / "index.faiss").stat().st_size
    assert size == pytest.approx(index.plan.memory_bytes(COUNT), rel=0.1)
    exact = IndexSettings.choose(1000, 64)
    assert exact.kind == "exact" and exact.memory_bytes(1000) == 256_000


def test_plan_of_the_full_survey():
    plan = IndexSettings.choose(76_446_849, 1024)
    assert (plan.kind, plan.lists, plan.code_bytes, plan.probes) == ("ivfpq", 32_768, 64, 128)
    assert plan.training == 64 * 32_768
    assert plan.memory_bytes(76_446_849) < 6 * 2**30
    assert IndexSettings.choose(2**20, 1024).kind == "exact" and IndexSettings.choose(2**20 + 1, 1024).kind == "ivfpq"


@pytest.mark.parametrize(("width", "code"), [(1024, 64), (96, 48), (100, 50), (67, None), (31, 31), (2 * 1021, None)])
def test_bytes_of_a_code_divide_the_dimensions(width, code):
    if code is None:
        with pytest.raises(ValueError, match="have no divisor from"):
            IndexSettings.choose(10**6, width, "ivfpq")
    else:
        assert IndexSettings.choose(10**6, width, "ivfpq").code_bytes == code


def test_a_bad_vector_far_down_is_named():
    vectors = np.ones((70_000, 2), np.float32)
    vectors[69_999] = 0
    with pytest.raises(ValueError, match=r"1 of 4464 are all zero and have no direction, first 69999"):
        Index.build(vectors)


def test_files_are_read_in_order(tmp_path, small):
    vectors, index = small
    for i, part in enumerate((slice(0, 100), slice(100, 300))):
        Embeddings(keys_of(300)[part], np.full(300, "x", object)[part], vectors[part], ABOUT).save(
            tmp_path / f"{i}.parquet"
        )
    read = Index.read_files([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    queries = clusters(10, seed=6)
    np.testing.assert_array_equal(read.search(queries, 4).key, index.search(queries, 4).key)
    assert read.metadata == ABOUT


def test_bad_files(tmp_path, small):
    vectors, _ = small
    split = np.full(300, "x", object)

    def saved(name, vector, about=ABOUT, start=0):
        keys = keys_of(1000)[start : start + len(vector)]
        Embeddings(keys, split[: len(vector)], vector, about).save(tmp_path / name)
        return tmp_path / name

    first = saved("a.parquet", vectors[:10])
    for name, other in (("survey", "sea"), ("encoder", "9"), ("readout", "spectrum"), ("fingerprint", "f")):
        if name == "fingerprint":
            first = saved("a.parquet", vectors[:10], ABOUT | {"fingerprint": "e"})
        with pytest.raises(ValueError, match=f"embeddings from another {name}"):
            Index.read_files([first, saved("b.parquet", vectors[:10], ABOUT | {name: other}, 20)])
    with pytest.raises(ValueError, match=r"same dimensions, got \[3, 6\]"):
        Index.read_files([saved("c.parquet", vectors[:10]), saved("d.parquet", vectors[:10, :3], start=20)])
    with pytest.raises(ValueError, match="10 of 20 repeat"):
        Index.read_files([first, first])
    with pytest.raises(FileNotFoundError, match="armillary embed"):
        Index.read_files([tmp_path / "none.parquet"])
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match="not a file of embeddings"):
        Index.read_files([tmp_path / "text.parquet"])
    pq.write_table(pq.read_table(first).drop(["vector"]), tmp_path / "keys.parquet")
    with pytest.raises(ValueError, match="not a file of embeddings"):
        Index.read_files([tmp_path / "keys.parquet"])
    with pytest.raises(ValueError, match="at least one file"):
        Index.read_files([])


def nan_row(vectors):
    vectors = vectors.copy()
    vectors[3, 1] = np.nan
    return vectors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, i: Index.build(v[:0]), "N and D of at least 1"),
        (lambda v, i: Index.build(v[0]), "N and D of at least 1"),
        (lambda v, i: Index.build(v, ["a"]), "one for each of 300 vectors, got 1"),
        (lambda v, i: Index.build(v[:2], ["a", "a"]), "1 of 2 repeat"),
        (lambda v, i: Index.build(nan_row(v)), "1 of 300 are not finite, first 3"),
        (lambda v, i: Index.build(v * 0), "300 of 300 are all zero and have no direction, first 0"),
        (lambda v, i: Index.build(v, kind="hnsw"), "must be exact, ivfpq or auto, got 'hnsw'"),
        (lambda v, i: Index.build(v, kind="ivfpq"), r"needs 9,984 vectors or more to train .* got 300; use an exact index"),
        (lambda v, i: i.search(v[:, :3], 3), r"need \[M, 6\] as this index has, got \(300, 3\)"),
        (lambda v, i: i.search(v[0], 3), r"need \[M, 6\]"),
        (lambda v, i: i.search(v[:1], 301), "between 1 and the 300 vectors of this index, got 301"),
        (lambda v, i: i.search(v[:1], 300, leave_out=np.array([0])), "299 vectors of this index besides the query, got 300"),
        (lambda v, i: i.search(v[:1], 0), "between 1 and the 300"),
        (lambda v, i: i.search(nan_row(v), 2), "not finite"),
        (lambda v, i: i.search(v, 2, leave_out=np.arange(3)), r"a row for each of 300 queries, got \(3,\)"),
        (lambda v, i: Index.build(v, plan=IndexSettings("exact", 5)), "plan: is for 5 dimensions, the vectors have 6"),
        (lambda v, i: Index.build(v, plan=IndexSettings("ivfpq", 6, 8, 3, 4, 9984)), "plan: trains on 9,984 vectors, but there are 300"),
        (lambda v, i: i.find("nobody"), "key 'nobody': none of the 300 here; they look like 'obj-00000'"),
        (lambda v, i: i.check({"survey": "sea"}), "another survey: the index holds those of 'sky', these are of 'sea'"),
        (lambda v, i: i.check({"encoder": "9"}), "another encoder"),
        (lambda v, i: IndexSettings("ivfpq", 8, 256, 3, 4, 20_000), "code_bytes: must divide the 8 dimensions, got 3"),
        (lambda v, i: IndexSettings("ivfpq", 8, 256, 4, 300, 20_000), "between 1 and the 256 lists, got 300"),
        (lambda v, i: IndexSettings("exact", 0), "dimensions: must be at least 1"),
        (lambda v, i: IndexSettings("ivfpq", 8, 256, 4, 4, 20_000).parameters(0), "between 1 and the 256 lists, got 0"),
    ],
    ids=[
        "empty", "one_dimension", "too_few_keys", "repeated_keys", "not_finite", "no_direction", "no_such_kind",
        "too_few_to_train", "other_dimensions", "query_of_one_dimension", "k_too_large", "k_too_large_without_itself", "k_of_zero",
        "query_not_finite", "left_out_of_other_length", "plan_of_other_dimensions", "plan_of_a_larger_set", "unknown_key", "other_survey", "other_encoder", "code_does_not_divide", "too_many_probes",
        "no_dimensions", "no_probes",
    ],
)  # fmt: skip
def test_bad_input(call, message, small):
    with pytest.raises(ValueError, match=message):
        call(*small)


def test_codes_cannot_give_vectors_back(coded):
    with pytest.raises(ValueError, match="holds codes only"):
        Index.load(coded[2] / "codes").vectors([0])


def test_bad_folders(coded, small, tmp_path):
    _, _, folder = coded
    with pytest.raises(FileNotFoundError, match=r"index.json is missing"):
        Index.load(tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        small[1].save(folder / "codes")
    with pytest.raises(
        ValueError, match="embeddings from another encoder: the index holds those of '0123', these are of '45'"
    ):
        Index.load(folder / "codes", ABOUT | {"encoder": "45"})

    def damaged(name, change):
        place = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        small[1].save(place)
        change(place / name)
        with pytest.raises(ValueError, match="not a readable index"):
            Index.load(place)

    damaged("index.faiss", lambda p: p.write_bytes(p.read_bytes()[:-50]))
    damaged("index.faiss", lambda p: flip(p, len(p.read_bytes()) // 2))
    damaged("keys.parquet", lambda p: pq.write_table(pq.read_table(p).slice(1), p))
    damaged("index.json", lambda p: p.write_text("{"))
    about = json.loads((folder / "codes" / "index.json").read_text())
    damaged("index.json", lambda p: p.write_text(json.dumps(about | {"version": 2})))
    damaged("index.json", lambda p: p.write_text(json.dumps(about | {"plan": {"kind": "exact"}})))


def test_damage_in_kept_vectors_is_found_where_they_are_read(coded, tmp_path):
    vectors, _, folder = coded
    shutil.copytree(folder / "ranked", tmp_path / "ranked")
    kept = tmp_path / "ranked" / "vectors.npy"
    flip(kept, kept.stat().st_size - 3)  # in the last row
    index = Index.load(tmp_path / "ranked")
    untouched = index.vectors([0, COUNT - 2])
    np.testing.assert_allclose(untouched, unit(vectors[[0, COUNT - 2]]), atol=1e-3)
    damaged = rf"vectors.npy: the vector of row {COUNT - 1} is damaged.*build the index again"
    with pytest.raises(ValueError, match=damaged):
        index.vectors([0, COUNT - 1])
    with pytest.raises(ValueError, match=damaged):
        index.search(vectors[-1:], 5)
    flip(tmp_path / "ranked" / "vectors.crc32.npy", -1)
    with pytest.raises(ValueError, match="vectors.crc32.npy is damaged"):
        Index.load(tmp_path / "ranked")


@pytest.mark.parametrize("other", [np.zeros((COUNT, WIDTH), np.int16), np.zeros((WIDTH, COUNT), np.float16),
                                   np.zeros((COUNT - 1, WIDTH), np.float16)])  # fmt: skip
def test_kept_vectors_of_another_shape_are_refused(coded, tmp_path, other):
    shutil.copytree(coded[2] / "ranked", tmp_path / "ranked")
    np.save(tmp_path / "ranked" / "vectors.npy", other)
    with pytest.raises(ValueError, match=r"vectors.npy is damaged"):
        Index.load(tmp_path / "ranked")


def test_kept_vectors_of_an_earlier_version_are_read(coded, tmp_path):
    vectors, _, folder = coded
    shutil.copytree(folder / "ranked", tmp_path / "ranked")
    (tmp_path / "ranked" / "vectors.crc32.npy").unlink()
    about = unsealed(json.loads((tmp_path / "ranked" / "index.json").read_text()))
    del about["files"]["vectors.crc32.npy"]
    (tmp_path / "ranked" / "index.json").write_text(json.dumps(sealed(about)))
    np.testing.assert_allclose(Index.load(tmp_path / "ranked").vectors([3]), unit(vectors[[3]]), atol=1e-3)
