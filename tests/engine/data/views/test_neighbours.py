"""Neighbours in a batch: features by hand, hidden labels, ranks, left-out rows, wrong graphs."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toy_sky import sky_survey

from armillary.engine.data.building.sky_graph import build_graph
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sky_graph.graph import GraphOptions, SkyGraph, graph_file
from armillary.engine.data.views.neighbours import NeighbourInput, Neighbours
from armillary.engine.data.views.objects import ObjectViews
from armillary.models.method import Batch, BatchKey

N = 300
NAMES = ("euclidean-k5-published", "spherical-k5-published")
TILES = "spherical-k5-leak-free-buffer600"
NEAR = Neighbours(graphs=NAMES, columns=("mass",), shown=("z",), fan_outs=(4, 3))
KEY = BatchKey(seed=5, epoch=2, first_position=0, global_batch=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    mass = np.random.default_rng(3).normal(10, 1, N)
    mass[::7] = np.nan
    z = np.random.default_rng(4).uniform(0.01, 0.1, N)
    z[::11] = np.nan
    keys = [f"g{i}" for i in range(N)]
    made = sky_survey(tmp_path_factory.mktemp("sky") / "survey", N, mass=mass, z=z, key=keys)
    survey = Survey.load(made)
    replace(survey, labels=survey.labels | {"mass": "dex"}).save(made)
    for space in ("euclidean", "spherical"):
        build_graph(made, GraphOptions(space=space))
    build_graph(made, GraphOptions(mode="leak-free", buffer_arcmin=600))
    return made


def batch_of(rows):
    return Batch(row=torch.tensor(rows), position=torch.tensor(rows) + 1000)


def rows_of(batch):
    """Sampled rows [B, S, f1, 1 + f2], -1 where there is none."""
    places = batch["neighbours"]
    return torch.where(places < 0, -1, batch["node_row"][places.clamp(min=0)])


def test_features_are_those_of_the_rows(folder):
    survey = Survey.load(folder)
    views = ObjectViews(neighbours=NEAR, targets=("z",))
    spec = views.input_spec(survey)
    assert (spec.graphs, spec.node_features) == (2, 3) and len(spec.node_mean) == 2
    rows = [5, 0, 33, 260]
    out = views.build(survey, "cpu")(batch_of(rows), KEY)
    assert out["neighbours"].shape == (4, 2, 4, 4) and out["node_row"][:4].tolist() == rows
    seen = out["node_row"][4:].tolist()
    assert seen == sorted(set(seen)) and out["node_features"].shape == (4 + len(seen), 3)
    table = pq.read_table(folder / "catalog.parquet")
    train = table["split"].to_numpy(zero_copy_only=False) == "train"
    for column, place in (("mass", 0), ("z", 1)):
        values = table[column].to_numpy()
        scaled = (values - np.nanmean(values[train])) / np.nanstd(values[train])
        wanted = np.nan_to_num(scaled[out["node_row"].numpy()])
        wanted[:4] = wanted[:4] if column == "mass" else 0  # its own label is hidden
        np.testing.assert_allclose(out["node_features"][:, place], wanted, atol=1e-5)
    known = np.isfinite(table["z"].to_numpy()[seen])
    assert out["node_features"][:4, 2].eq(0).all() and out["node_features"][4:, 2].tolist() == known.tolist()
    graph = SkyGraph.open(graph_file(folder, NAMES[1]), folder)
    for row, near in zip(rows, rows_of(out)[:, 1], strict=True):
        for node, *far in near.tolist():
            assert node == -1 or node in graph.neighbours(row)
            assert node != row and row not in far  # or its label would come back
            assert all(n == -1 or (node >= 0 and n in graph.neighbours(node)) for n in far)


def test_without_shown_labels_a_row_is_its_own_neighbour(folder):
    near = NeighbourInput.of(replace(NEAR, shown=(), fan_outs=(50, 1)), Survey.load(folder))
    out = near.of_batch(batch_of([3, 8]))
    assert all(row in seen for row, seen in zip((3, 8), rows_of(out)[:, 1, :, 0].tolist(), strict=True))


def test_draws_belong_to_the_position(folder):
    survey = Survey.load(folder)
    view = ObjectViews(neighbours=NEAR).build(survey, "cpu")
    whole = rows_of(view(batch_of([5, 9, 40, 41]), KEY))
    part = rows_of(view(batch_of([40, 5]), KEY))
    assert torch.equal(part, whole[[2, 0]])
    assert not torch.equal(whole, rows_of(view(batch_of([5, 9, 40, 41]), replace(KEY, epoch=3))))
    fixed = ObjectViews(neighbours=NEAR).eval_view(survey, "cpu")
    assert torch.equal(rows_of(fixed(batch_of([5, 9]))), rows_of(fixed(Batch(row=torch.tensor([5, 9])))))


def test_walks_take_the_place_of_even_draws(folder):
    survey = Survey.load(folder)
    walking = ObjectViews(neighbours=replace(NEAR, walks=6, walk_length=3)).build(survey, "cpu")
    whole = rows_of(walking(batch_of([5, 9, 40, 41]), KEY))
    assert torch.equal(rows_of(walking(batch_of([40, 5]), KEY)), whole[[2, 0]])
    assert not torch.equal(
        whole, rows_of(ObjectViews(neighbours=NEAR).build(survey, "cpu")(batch_of([5, 9, 40, 41]), KEY))
    )
    graph = SkyGraph.open(graph_file(folder, NAMES[0]), folder)
    near = [(row, n) for row, some in zip((5, 9, 40, 41), whole[:, 0, :, 0].tolist(), strict=True) for n in some]
    assert any(n not in graph.neighbours(row) for row, n in near) and all(n != row for row, n in near)


def test_the_galaxy_alone(folder):
    survey = Survey.load(folder)
    alone = ObjectViews(neighbours=replace(NEAR, fan_outs=(0, 0)))
    out = alone.build(survey, "cpu")(batch_of([5, 9]), KEY)
    assert out["neighbours"].shape == (2, 2, 0, 1) and out["node_row"].tolist() == [5, 9]
    assert not alone.augmented and ObjectViews(neighbours=NEAR).augmented


def test_rows_in_the_buffer_are_not_trained_on(folder):
    survey = Survey.load(folder)
    near = Neighbours(graphs=(TILES,), columns=("mass",))
    out_of = NeighbourInput.of(near, survey).left_out
    assert 10 < out_of.sum() < N - 10
    views = ObjectViews(neighbours=near, targets=("z",)).build(survey, "cpu")
    plain = ObjectViews(columns=("mass",), targets=("z",)).build(survey, "cpu")
    batch = views(batch_of(list(range(N))), KEY)
    assert batch["left_out"].tolist() == out_of.tolist()
    expected = plain(batch_of(list(range(N))), KEY)["targets"][:, 0].numpy()
    expected[out_of] = np.nan
    np.testing.assert_array_equal(batch["targets"][:, 0], expected)
    seen = set(rows_of(batch).unique().tolist()) - {-1}
    split = pq.read_table(folder / "catalog.parquet")["split"].to_numpy(zero_copy_only=False)
    train = {i for i in range(N) if split[i] == "train" and not out_of[i]}
    # A row that sees none but itself is its own neighbour; nobody else sees it.
    assert all(row in train or (rows_of(batch) == row).any((1, 2, 3)).nonzero().tolist() == [[row]] for row in seen)


def test_embeddings_by_key(folder, tmp_path):
    survey, path = Survey.load(folder), tmp_path / "vectors.parquet"
    vectors = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
    order = np.random.default_rng(1).permutation(N)

    def write(rows):
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors[rows].ravel()), 6)
        pq.write_table(pa.table({"key": [f"g{i}" for i in rows], "vector": values}), path)

    write(order)
    near = NeighbourInput.of(Neighbours(graphs=NAMES[:1], embeddings=path), survey)
    out = near.of_batch(batch_of([7, 8]))
    np.testing.assert_array_equal(out["node_features"], vectors[out["node_row"]])
    write(order[:-3])
    problems = Neighbours(graphs=NAMES[:1], embeddings=path).problems(survey)
    assert len(problems) == 1 and "3 of 300 galaxies have no vector" in problems[0]
    pq.write_table(pa.table({"key": ["g0"]}), path)
    assert "not a file of embeddings" in Neighbours(embeddings=path, graphs=NAMES).problems(survey)[0]
    assert "nothing.parquet" in Neighbours(embeddings=tmp_path / "nothing.parquet", graphs=NAMES).problems(survey)[0]


@pytest.mark.parametrize(
    ("near", "message"),
    [
        (Neighbours(graphs=NAMES), "views.neighbours: need columns, embeddings or shown labels as features"),
        (replace(NEAR, graphs=()), "views.neighbours.graphs: must name at least one graph, got none"),
        (replace(NEAR, graphs=("flat",)), "has no graph 'flat', only euclidean-k5-published, spherical"),
        (
            replace(NEAR, fan_outs=(3, 0)),
            r"views.neighbours.fan_outs: must both be at least 1, or both 0, got \(3, 0\)",
        ),
        (replace(NEAR, walks=-1), "views.neighbours.walks: must be at least 0, of at least 1 step, .* got -1 of 5"),
        (replace(NEAR, walks=20_000), "views.neighbours.walks: .* at most 65,536 for a galaxy and its 4 neighbours"),
        (replace(NEAR, columns=("z",)), "views.neighbours.shown: must be no features of the galaxy itself, got 'z'"),
        (replace(NEAR, columns=("age",)), "views.neighbours.columns: must be labels of the survey"),
        (replace(NEAR, shown=("type",)), "views.neighbours.shown: column 'type' must hold numbers"),
        (replace(NEAR, columns=("z",), shown=()), "views.neighbours.columns: must be none of the targets, got 'z'"),
    ],
    ids=[
        "no features",
        "no graph",
        "unknown graph",
        "fan-outs",
        "walks",
        "too many walks",
        "shown twice",
        "no column",
        "text",
        "target",
    ],
)
def test_broken_rules(folder, near, message):
    with pytest.raises(ValueError, match=message):
        ObjectViews(neighbours=near, targets=("z",)).build(Survey.load(folder), "cpu")


def test_a_graph_of_another_survey_is_refused_by_name_and_hash(folder, tmp_path):
    other = sky_survey(tmp_path / "other", N, mass=np.arange(N, dtype=float), key=[f"g{i}" for i in range(N)])
    survey = Survey.load(other)
    replace(survey, labels=survey.labels | {"mass": "dex"}).save(other)
    for name in NAMES:
        shutil.copy(graph_file(folder, name), other)
    (problem,) = NEAR.problems(Survey.load(other))
    assert "was made for the survey 'survey' (catalogue " in problem and "not for 'other'" in problem
