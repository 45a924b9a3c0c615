"""Edges of both modes against plain loops, the control, the file, the command."""

import numpy as np
import pytest
from toy_sky import sky, sky_survey

from armillary.engine import cli
from armillary.engine.data.building.sky_graph import build_graph
from armillary.engine.data.building.splits import ByHealpix
from armillary.engine.data.sky_graph.build import connect
from armillary.engine.data.sky_graph.graph import GraphOptions, SkyGraph
from armillary.engine.data.sky_graph.spaces import comoving_mpc
from armillary.engine.data.sources.match import unit_vectors
from armillary.engine.data.sources.source import Rows

N = 300


def angles(ra, dec):
    v = unit_vectors(ra, dec)
    return 2 * np.arcsin(np.linalg.norm(v[:, None] - v, axis=2) / 2)


def as_sets(arrays):
    indptr, indices, _ = arrays
    assert indptr.dtype == np.int64 and indices.dtype == np.int32
    rows = np.split(indices, indptr[1:-1])
    assert all((np.diff(row) > 0).all() for row in rows)  # ascending, none twice
    return [set(row.tolist()) for row in rows]


def wanted(distance, seen, k, symmetrise):
    """Neighbours of every row, by a loop: the k nearest rows that may be seen, the way back, itself."""
    n = len(distance)
    out = [{i} for i in range(n)]
    for i in range(n):
        others = [j for j in np.argsort(distance[i]).tolist() if j != i and seen[j]]
        for j in others[:k]:
            out[i].add(j)
            if symmetrise and seen[i]:
                out[j].add(i)
    return out


@pytest.mark.parametrize("symmetrise", [True, False])
@pytest.mark.parametrize("mode", ["published", "leak-free"])
def test_edges(mode, symmetrise):
    ra, dec = sky(N)
    split = np.array(["train", "train", "test", "val"])[np.arange(N) % 4]
    options = GraphOptions(mode=mode, symmetrise=symmetrise)
    seen = (split == "train") | (mode == "published")
    assert as_sets(connect(ra, dec, options, split=split)) == wanted(angles(ra, dec), seen, 5, symmetrise)


@pytest.mark.parametrize("symmetrise", [True, False])
def test_inductive_edges_stay_within_a_split(symmetrise):
    ra, dec = sky(N)
    split = np.array(["train", "train", "test", "val"])[np.arange(N) % 4]
    options = GraphOptions(mode="inductive", symmetrise=symmetrise)
    rows, apart = as_sets(connect(ra, dec, options, split=split)), angles(ra, dec)
    for name in ("train", "test", "val"):
        mine = np.flatnonzero(split == name)
        alone = wanted(apart[np.ix_(mine, mine)], np.ones(len(mine), bool), 5, symmetrise)
        assert [rows[i] for i in mine] == [{int(mine[j]) for j in row} for row in alone]
    few = np.where(np.arange(N) < 4, "test", "train")
    with pytest.raises(
        ValueError, match="k: must be below the number of rows of the split test that may be seen, 4, got 5"
    ):
        connect(ra, dec, options, split=few)


def test_a_leak_free_graph_shows_training_rows_only():
    ra, dec = sky(N)
    split = np.where(np.arange(N) % 3, "train", "test")
    rows = as_sets(connect(ra, dec, GraphOptions(mode="leak-free"), split=split))
    for i, row in enumerate(rows):
        assert {split[j] for j in row - {i}} == {"train"} and len(row) >= 6
    # Training rows see what they would see if the others were not there.
    train = np.flatnonzero(split == "train")
    alone = as_sets(connect(ra[train], dec[train], GraphOptions()))
    assert [rows[i] for i in train] == [set(train[sorted(row)].tolist()) for row in alone]


def test_tiles_with_a_buffer():
    rng = np.random.default_rng(0)
    ra, dec = rng.uniform(150, 170, 2000), rng.uniform(0, 20, 2000)
    keys = [str(i) for i in range(2000)]
    rows = Rows(keys, {"ra": ra, "dec": dec}, [None] * 2000)
    split = np.array(ByHealpix(0.3, 16).assign(rows, np.zeros((2000, 2), np.uint64)))
    assert 200 < (split == "test").sum() < 1800
    arrays = connect(ra, dec, GraphOptions(mode="leak-free", buffer_arcmin=30), split=split)
    train = split == "train"
    distance = np.rad2deg(angles(ra, dec)) * 60
    assert (arrays[2] == (train & (distance[:, ~train] <= 30).any(1))).all() and arrays[2].any()
    for i, row in enumerate(as_sets(arrays)):
        assert row == {i} or not arrays[2][list(row)].any()
        assert not arrays[2][i] or row == {i}
        assert train[i] or min(distance[i, j] for j in row - {i}) > 30


def test_shuffled_neighbours_keep_their_number_and_splits():
    ra, dec = sky(N)
    split = np.where(np.arange(N) % 3, "train", "test")
    true = as_sets(connect(ra, dec, GraphOptions(), split=split))
    moved = as_sets(connect(ra, dec, GraphOptions(shuffle_seed=7), split=split))
    assert moved == as_sets(connect(ra, dec, GraphOptions(shuffle_seed=7), split=split))
    assert moved != as_sets(connect(ra, dec, GraphOptions(shuffle_seed=8), split=split))
    fewer = 0  # a row that is drawn as its own neighbour is that already
    for i, (before, after) in enumerate(zip(true, moved, strict=True)):
        assert i in after and 0 <= len(before) - len(after) <= 1
        fewer += len(before) - len(after)
        if len(before) == len(after):
            assert sorted(split[list(before)]) == sorted(split[list(after)])
    assert fewer <= 20  # N rows of 6 of N: 6 expected
    assert (
        sum(len(before & after) - 1 for before, after in zip(true, moved, strict=True)) < 120
    )  # of 1,800; by chance some 60
    rows = as_sets(connect(ra, dec, GraphOptions(mode="leak-free", shuffle_seed=7), split=split))
    assert all({split[j] for j in row - {i}} == {"train"} for i, row in enumerate(rows))


def test_comoving_environments():
    ra, dec = sky(N)
    z = np.random.default_rng(0).uniform(0.01, 0.03, N)
    options = GraphOptions(space="comoving", redshift="z", linking_length_mpc=20.0)
    where = comoving_mpc(ra, dec, z)
    close = np.linalg.norm(where[:, None] - where, axis=2) <= 20
    rows = as_sets(connect(ra, dec, options, redshift=z))
    assert rows == [set(np.flatnonzero(row).tolist()) for row in close]
    assert sum(len(row) == 1 for row in rows) > 5 and max(map(len, rows)) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "flat"}, "space: must be one of euclidean, spherical, hyperbolic, comoving, got 'flat'"),
        ({"mode": "shuffled"}, "mode: must be one of published, leak-free, inductive, got 'shuffled'"),
        ({"k": 0}, "k: must be at least 1, got 0"),
        ({"redshift": "z"}, "redshift: is for the comoving space; the space is spherical"),
        ({"space": "comoving", "redshift": "z"}, "linking_length_mpc: must be given in the comoving space"),
        ({"space": "comoving", "linking_length_mpc": 1.0}, "redshift: must be given in the comoving space"),
        ({"space": "comoving", "redshift": "z", "linking_length_mpc": 0.0}, "linking_length_mpc: must be positive"),
        ({"buffer_arcmin": 1.0}, "buffer_arcmin: is for the modes leak-free and inductive"),
        ({"mode": "leak-free", "buffer_arcmin": float("nan")}, "buffer_arcmin: must be at least 0"),
        ({"shuffle_seed": -1}, "seed: must be in 0"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        GraphOptions(**options)


def test_too_few_rows():
    ra, dec = sky(6)
    assert connect(ra, dec, GraphOptions(k=5))[0][-1] == 36
    with pytest.raises(ValueError, match="k: must be below the number of rows, 6, got 6"):
        connect(ra, dec, GraphOptions(k=6))
    split = np.array(["train"] * 4 + ["test"] * 2)
    with pytest.raises(ValueError, match="rows of the split train that may be seen, 4, got 5"):
        connect(ra, dec, GraphOptions(mode="leak-free"), split=split)
    with pytest.raises(ValueError, match="needs rows of the split train that may be seen, there are none"):
        connect(ra, dec, GraphOptions(mode="leak-free"), split=np.full(6, "test"))


def test_the_file(tmp_path):
    folder = sky_survey(tmp_path / "a")
    options = GraphOptions(mode="leak-free", buffer_arcmin=0.5, shuffle_seed=3)
    made, path = build_graph(folder, options)
    assert path == folder / "graph-spherical-k5-leak-free-buffer0.5-shuffled3.safetensors"
    again = SkyGraph.open(path, folder)
    assert again.record == made.record and again.record.options == options and again.record.rows == 400
    assert {"commit", "command", "versions", "survey"} <= set(again.record.provenance)
    for name in ("indptr", "indices", "left_out"):
        assert (getattr(again, name) == getattr(made, name)).all()
    assert again.left_out.any() and again.isolated == again.left_out.sum()
    assert again.neighbours(5).tolist() == made.indices[made.indptr[5] : made.indptr[6]].tolist()

    other = sky_survey(tmp_path / "b", count=300)
    with pytest.raises(
        ValueError, match=r"was made for the survey 'a' \(catalogue .* 400 rows\), not for 'b' in .* 300"
    ):
        SkyGraph.open(path, other)
    with pytest.raises(FileNotFoundError, match="no survey here"):
        SkyGraph.open(path, tmp_path)
    with pytest.raises(FileNotFoundError):
        SkyGraph.open(folder / "graph-x.safetensors", folder)
    raw = path.read_bytes()
    path.write_bytes(raw[:-10])
    with pytest.raises(ValueError, match="not a readable sky graph"):
        SkyGraph.open(path, folder)
    for changed in (raw[:-1] + bytes([raw[-1] ^ 1]), raw.replace(b'\\"k\\": 5', b'\\"k\\": 4')):
        assert changed != raw
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="it is damaged: its SHA-256 differs"):
            SkyGraph.open(path, folder)
    SkyGraph(made.indptr[:-1], made.indices, made.left_out, made.record).save(path)
    with pytest.raises(ValueError, match="its arrays are not those of a graph over its rows"):
        SkyGraph.open(path, folder)


def test_the_command(tmp_path, capsys):
    folder = sky_survey(tmp_path / "a")
    words = ["data", "graph", str(folder), "--space", "comoving", "--redshift", "z", "--linking-length-mpc", "4"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "isolated nodes" in said and "400" in said and "tell 'z'" in said
    assert SkyGraph.open(folder / "graph-comoving-4mpc-published.safetensors", folder).record.options.redshift == "z"
    for bad, message in (
        (("--redshift", "mass"), "redshift: no label 'mass'; the survey has z, type"),
        (("--redshift", "type"), "redshift: the label 'type' holds text"),
    ):
        assert cli.main([*words[:5], *bad, *words[7:]]) == 2
        assert message in capsys.readouterr().err
    lost = sky_survey(tmp_path / "lost", ra=np.full(400, np.nan))
    assert cli.main(["data", "graph", str(lost)]) == 2
    assert (
        "ra: must be in [0, 360) degrees for a graph, got 400 rows that are not: nan in row 0"
        in capsys.readouterr().err
    )
    assert not list(lost.glob("graph-*"))


@pytest.mark.parametrize(("space", "edges"), [("euclidean", 7.228), ("spherical", 7.230), ("hyperbolic", 7.152)])
def test_edges_a_node_of_real_galaxies(real_data, space, edges):
    """Galaxy-Walker has 6.85, 6.87 and 6.65 at 105,172 other galaxies; here too the ball has fewer than the others.

    Nothing is drawn: only positions that are equal to the last bit could move an edge.
    """
    from astropy.table import Table

    path = real_data / "catalogs" / "vollim_dr7_cbp_102709.fits.gz"
    if not path.is_file():
        pytest.skip(f"no {path.name} in ARMILLARY_REAL_DATA")
    table = Table.read(path)
    names = {name.lower(): name for name in table.colnames}
    ra, dec = (np.asarray(table[names[name]], np.float64) for name in ("ra", "dec"))
    indptr, _, _ = connect(ra, dec, GraphOptions(space=space))
    assert len(ra) == 120_606 and indptr[-1] / len(ra) == pytest.approx(edges, abs=0.001)
