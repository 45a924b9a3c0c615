import numpy as np
import pytest
from astropy import units
from astropy.coordinates import SkyCoord

from armillary.engine.data.sources.match import match_keys, match_sky

ARCSEC = 1 / 3600


def sky(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 360, n), np.rad2deg(np.arcsin(rng.uniform(-1, 1, n)))


def test_positions_agree_with_astropy():
    ra, dec = sky(2000)
    rng = np.random.default_rng(1)
    order = rng.permutation(2000)
    other_ra = (ra[order] + rng.normal(0, 0.3, 2000) * ARCSEC / np.cos(np.deg2rad(dec[order]))) % 360
    other_dec = np.clip(dec[order] + rng.normal(0, 0.3, 2000) * ARCSEC, -90, 90)
    found = match_sky(ra, dec, other_ra, other_dec, 1.0, "nearest")
    mine, theirs = (SkyCoord(a * units.deg, d * units.deg) for a, d in ((ra, dec), (other_ra, other_dec)))
    index, angle, _ = mine.match_to_catalog_sky(theirs)
    near = angle.arcsec <= 1.0
    np.testing.assert_array_equal(found.left, np.flatnonzero(near))
    np.testing.assert_array_equal(found.right, index[near])
    np.testing.assert_allclose(found.separation_arcsec, angle.arcsec[near], rtol=1e-6, atol=1e-9)
    assert (order[found.right] == found.left).all() and found.shared == found.candidates == 0


@pytest.mark.parametrize(("ra", "dec"), [(0.0, 0.0), (359.99999, 0.0), (12.0, 90.0), (200.0, -90.0), (0.0, 89.9999)])
def test_poles_and_meridian(ra, dec):
    turned = (ra + 1e-5) % 360 if abs(dec) < 89 else (ra + 180) % 360
    found = match_sky(np.array([ra]), np.array([dec]), np.array([turned]), np.array([dec]), 1.0)
    expected = SkyCoord(ra, dec, unit="deg").separation(SkyCoord(turned, dec, unit="deg")).arcsec
    assert len(found.left) == (expected <= 1)
    np.testing.assert_allclose(found.separation_arcsec, expected if expected <= 1 else [], atol=1e-9)


def test_one_to_one_gives_the_nearer_claim_the_row_and_the_other_its_next():
    left = np.array([1.0, 1.4]) * ARCSEC  # both are nearest to the first right row
    right = np.array([1.3, 0.5]) * ARCSEC
    found = match_sky(left, left * 0, right, right * 0, 1.0)
    assert found.left.tolist() == [0, 1] and found.right.tolist() == [1, 0]
    assert found.candidates == 2 and found.shared == 1
    found = match_sky(left, left * 0, right, right * 0, 1.0, "nearest")
    assert found.right.tolist() == [0, 0]
    found = match_sky(left, left * 0, right, right * 0, 0.45)
    assert found.left.tolist() == [1] and found.right.tolist() == [0]


def test_a_row_is_in_one_pair_only():
    one, two = np.array([5.0]), np.array([5.0, 5.0]) + [0.2 * ARCSEC, 0.1 * ARCSEC]
    found = match_sky(one, one * 0, two, two * 0, 1.0)
    assert found.left.tolist() == [0] and found.right.tolist() == [1] and found.candidates == 1
    found = match_sky(two, two * 0, one, one * 0, 1.0)
    assert found.left.tolist() == [1] and found.right.tolist() == [0] and found.shared == 1


@pytest.mark.parametrize("mode", ["one_to_one", "nearest"])
@pytest.mark.parametrize("dec", [0.0, 33.3, -71.0])
def test_equal_separations_go_to_the_lower_rows(mode, dec):
    around = dec + np.array([-0.3, 0.3, 0.3, -0.3]) * ARCSEC  # equal but for the rounding of sines and cosines
    for ra in np.linspace(0, 359, 40):
        many, one = np.full(4, ra), np.array([ra])
        found = match_sky(one, one * 0 + dec, many, around, 1.0, mode)
        assert found.left.tolist() == [0] and found.right.tolist() == [0]
        if mode == "one_to_one":
            assert match_sky(many, around, one, one * 0 + dec, 1.0).left.tolist() == [0]
            found = match_sky(many, around, many, around, 0.1)
            assert found.left.tolist() == [0, 1, 2, 3] and found.right.tolist() == [0, 1, 2, 3]


def test_rows_without_a_position_stay_alone_and_nothing_matches_nothing():
    nan, some = np.array([np.nan, 5.0]), np.array([5.0, 5.0])
    assert match_sky(nan, some, some[:1], some[:1], 1.0).left.tolist() == [1]
    for a, b in ((some, nan[:0]), (nan[:0], some), (nan[:1], some)):
        assert match_sky(a, a, b, b, 1.0).left.size == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ra": np.array([361.0])}, r"left catalogue, row 0: ra 361.0 is outside \[0, 360\]"),
        ({"other_dec": np.array([-91.0])}, r"right catalogue, row 0: dec -91.0 is outside"),
        ({"ra": np.array([np.inf])}, "left catalogue, row 0: ra inf"),
        ({"radius_arcsec": 0.0}, "radius_arcsec: must be above 0"),
        ({"radius_arcsec": 4000.0}, "radius_arcsec: must be above 0 and at most 3600"),
        ({"mode": "all"}, "mode: must be one of one_to_one, nearest"),
    ],
)
def test_bad_input(change, match):
    one = np.array([1.0])
    given = {"ra": one, "dec": one, "other_ra": one, "other_dec": one, "radius_arcsec": 1.0} | change
    with pytest.raises(ValueError, match=match):
        match_sky(**given)


def test_identifiers():
    found = match_keys(["a", "", "c", "c", None], ["c", "b", "", "a"])
    assert found.left.tolist() == [0, 2, 3] and found.right.tolist() == [3, 0, 0] and found.shared == 1
    assert match_keys([1.0, float("nan")], [float("nan"), 1.0]).right.tolist() == [1]
    with pytest.raises(ValueError, match="targetid: 2 values .* occur more than once, first 7, 8"):
        match_keys([7], [7, 7, 8, 8], what="targetid")


def test_shared_counts_right_rows_in_both_ways_of_matching():
    by_key = match_keys(["a", "a", "a", "b"], ["a", "b"])
    by_sky = match_sky(np.zeros(3), np.zeros(3), np.zeros(1), np.zeros(1), 1.0, "nearest")
    assert (by_key.shared, by_sky.shared) == (1, 1)
