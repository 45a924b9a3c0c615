"""Neighbours by trees against all distances in float64."""

import numpy as np
import pytest
from toy_sky import sky

from armillary.engine.data.sky_graph import neighbours
from armillary.engine.data.sky_graph.neighbours import nearest, within
from armillary.engine.data.sky_graph.spaces import check_positions, comoving_mpc, points


def all_distances(ra, dec, space):
    if space == "euclidean":
        return np.hypot(ra[:, None] - ra, dec[:, None] - dec)
    a, d = np.deg2rad(ra), np.deg2rad(dec)
    if space == "spherical":  # haversine
        h = np.sin((d[:, None] - d) / 2) ** 2 + np.cos(d[:, None]) * np.cos(d) * np.sin((a[:, None] - a) / 2) ** 2
        return 2 * np.arcsin(np.sqrt(h))
    # Geodesic polar coordinates about the origin: radius 2 |u|, and the hyperbolic law of cosines.
    r, angle = 2 * np.hypot(a, d), np.arctan2(d, a)
    s = (
        np.sinh((r[:, None] - r) / 2) ** 2
        + np.sinh(r[:, None]) * np.sinh(r) * np.sin((angle[:, None] - angle) / 2) ** 2
    )
    return 2 * np.arcsinh(np.sqrt(s))


@pytest.mark.parametrize("space", ["euclidean", "spherical", "hyperbolic"])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_nearest_are_the_nearest(space, k, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 97)
    ra, dec = sky(600)
    distances = all_distances(ra, dec, space)
    np.fill_diagonal(distances, np.inf)
    where = points(ra, dec, space)
    got = nearest(where, where, np.arange(600), k, space)
    assert got.dtype == np.int32 and (got != np.arange(600)[:, None]).all()
    # The ball's points near its rim are 1e-5 from it, so that their distances keep 1e-9 of 1; the others keep 1e-12.
    np.testing.assert_allclose(
        np.take_along_axis(distances, got.astype(int), 1), np.sort(distances, 1)[:, :k], rtol=1e-7, atol=1e-12
    )


def test_the_tree_s_own_order_would_be_wrong_in_the_ball():
    ra, dec = sky(600)
    where = points(ra, dec, "hyperbolic")
    wrong = nearest(where, where, np.arange(600), 5, "euclidean")
    assert (np.sort(wrong, 1) != np.sort(nearest(where, where, np.arange(600), 5, "hyperbolic"), 1)).any(1).sum() > 5


@pytest.mark.parametrize("space", ["euclidean", "spherical", "hyperbolic"])
def test_rows_at_one_position(space):
    ra, dec = np.full(40, 120.0), np.full(40, -30.0)
    ra[-1] = 121.0
    where = points(ra, dec, space)
    got = nearest(where, where, np.arange(40), 5, space)
    assert (got[:-1] < 39).all() and (got != np.arange(40)[:, None]).all()
    assert all(len(set(few)) == 5 for few in got.tolist())


def test_queries_that_are_no_points():
    ra, dec = sky(300)
    distances = all_distances(ra, dec, "spherical")[200:, :200]
    where = points(ra, dec, "spherical")
    got = nearest(where[200:], where[:200], np.full(100, -1), 200 - 1, "spherical")
    assert (got[:, :3] == np.argsort(distances, 1)[:, :3]).all()


def test_within_a_length(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 61)
    where = np.random.default_rng(0).uniform(0, 10, (300, 3))
    close = np.linalg.norm(where[:, None] - where, axis=2) <= 1.2
    np.fill_diagonal(close, False)
    blocks = list(within(where, where, np.arange(300), 1.2))
    counts = np.concatenate([counts for counts, _ in blocks])
    rows = np.concatenate([rows for _, rows in blocks])
    assert (counts == close.sum(1)).all() and (counts == 0).any()
    for i, few in enumerate(np.split(rows, np.cumsum(counts)[:-1])):
        assert sorted(few.tolist()) == np.flatnonzero(close[i]).tolist()


def test_points():
    assert points(np.array([0.0, 90.0]), np.array([0.0, 0.0]), "hyperbolic") == pytest.approx(
        np.array([[0, 0], [np.tanh(np.pi / 2), 0]])
    )
    # Flat, H0 67.66 km/s/Mpc, matter .30966 (Planck 2018); radiation and neutrino masses, left out here, are a permille.
    z = np.linspace(0, 1, 10_001)
    wanted = 299_792.458 / 67.66 * np.trapezoid((0.30966 * (1 + z) ** 3 + 1 - 0.30966) ** -0.5, z)
    where = comoving_mpc(np.array([80.0]), np.array([-60.0]), np.array([1.0]))
    assert np.linalg.norm(where) == pytest.approx(wanted, rel=0.002)
    assert where[0, 2] == pytest.approx(-np.linalg.norm(where) * np.sin(np.pi / 3))


@pytest.mark.parametrize(
    ("ra", "dec", "message"),
    [
        (
            [1.0, 360.0],
            [0.0, 0.0],
            r"ra: must be in \[0, 360\) degrees for a graph, got 1 rows that are not: 360 in row 1",
        ),
        ([-1e-9, np.nan], [0.0, 0.0], "ra: .* got 2 rows that are not: -1e-09 in row 0, nan in row 1"),
        ([0.0] * 9, [90.1] * 9, r"dec: must be in \[-90, 90\].* 90.1 in row 4, \.\.\.$"),
    ],
)
def test_positions_that_are_none(ra, dec, message):
    with pytest.raises(ValueError, match=message):
        check_positions(np.array(ra), np.array(dec))


@pytest.mark.parametrize("redshift", [np.nan, 0.0, -0.1, np.inf])
def test_redshifts_that_are_none(redshift):
    with pytest.raises(ValueError, match=r"redshift: must be known and positive for a graph, got 1 rows .* in row 1$"):
        comoving_mpc(np.zeros(2), np.zeros(2), np.array([0.1, redshift]))
