"""No training sample shares sky with a test sample, whatever rule by position made the splits."""

from pathlib import Path

import numpy as np
import pytest
from made_sources import Made

from armillary.engine.data.building.build import build
from armillary.engine.data.building.shard_assignment import between_splits, lay_out
from armillary.engine.data.building.splits import ByHealpix, ByKey, ByRange, BySky, BySkyOrKey
from armillary.engine.data.building.workers import Workers
from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.inspect.leakage import find_leaks
from armillary.engine.data.sources.match import overlap_arcsec, unit_vectors

REACH = overlap_arcsec(8, 8, Made.pixel_scale_arcsec)  # 2.96 arcsec: `Made` has images of 8 x 8 pixels
RULES = {
    "sky": BySky(0.3, cell_deg=0.005),
    "sky, three splits": BySky(0.2, validation_fraction=0.2, cell_deg=0.005),
    "healpix": ByHealpix(0.3, nside=2**13),
    "auto": BySkyOrKey(0.5),
    "a range of dec": ByRange("dec", 0.005, 0.01),
    "a range of ra through 0": ByRange("ra", 359.995, 0.003),
}


def field(count, where, seed=0):
    """Positions so dense that every third has a neighbour within reach, around the meridian or the north pole."""
    x, y = np.random.default_rng(seed).uniform(-0.02, 0.02, (2, count))
    if where == "pole":
        return np.rad2deg(np.arctan2(y, x)) % 360, 90 - np.hypot(x, y)
    return x % 360, y


def splits_of(source, rule):
    layout = lay_out(source, Workers(source, 1, Path()), rule, seed=0, samples_per_shard=10_000, on_bad="error")
    out = np.empty(len(source), object)
    for plan in layout.shards:
        out[plan.rows] = plan.split
    return out


def nearest(ra, dec, mine, theirs):
    """Arcseconds of the closest pair, by every pair."""
    a, b = (unit_vectors(ra[rows], dec[rows]) for rows in (mine, theirs))
    return np.rad2deg(2 * np.arcsin(np.linalg.norm(a[:, None] - b, axis=2).min() / 2)) * 3600


@pytest.mark.parametrize("where", ["meridian", "pole"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_two_splits_share_sky(rule, where):
    ra, dec = field(1500, where)
    if isinstance(rule, ByRange) and where == "pole":
        rule = ByRange("ra", 300.0, 60.0) if rule.column == "ra" else ByRange("dec", 89.99, 90.1)
    source = Made({"ra": ra, "dec": dec}, "images")
    splits = splits_of(source, rule)
    named = {str(name): np.flatnonzero(splits == name) for name in set(splits)}
    own = np.array(rule.assign(source.describe(0, len(ra)), np.zeros((len(ra), 2), np.uint64)))
    assert set(named["test"]) == set(np.flatnonzero(own == "test"))  # it stays as it is
    kept = [name for name in ("test", "validation", "train") if name in named]
    assert len(kept) == (3 if getattr(rule, "validation_fraction", 0) else 2) and len(named["border"])
    for i, more in enumerate(kept):
        for less in kept[i + 1 :]:
            assert nearest(ra, dec, named[more], named[less]) > REACH
    for row in named["border"][:50]:  # nothing is taken out that had no neighbour
        other = np.flatnonzero(own != own[row])
        assert nearest(ra, dec, [row], other) <= REACH


def test_a_survey_that_grows_moves_no_sample_but_to_the_border():
    ra, dec = field(1500, "meridian")
    rule = BySky(0.3, cell_deg=0.005)
    small = splits_of(Made({"ra": ra[:900], "dec": dec[:900]}, "images"), rule)
    large = splits_of(Made({"ra": ra, "dec": dec}, "images"), rule)[:900]
    assert set(large[small != large]) == {"border"} and set(small[small != large]) == {"train"}


def test_unknown_positions_and_other_splits_stay():
    ra, dec = np.array([1.0, 1.0, np.nan, 1.0]), np.zeros(4)
    rows = {name: np.array([i]) for i, name in enumerate(("test", "train", "validation", "holdout"))}
    assert between_splits(rows, ra, dec, 2.0).tolist() == [1]
    assert between_splits({"train": np.arange(4)}, ra, dec, 2.0).size == 0


@pytest.mark.parametrize(
    ("size", "scale", "arcsec"), [((30, 40), 1.0, 50.0), ((30, 40), None, 2.0), ((0, 0), 0.262, 2.0)]
)
def test_cutouts_overlap_within_their_diagonal(size, scale, arcsec):
    assert overlap_arcsec(*size, scale) == arcsec


def test_leaks_look_at_the_size_of_cutouts(tmp_path):
    ra, dec = field(600, "meridian")
    columns = {"ra": ra, "dec": dec}
    build(Made(columns, "images"), tmp_path / "sky", name="s", split=BySky(0.3, cell_deg=0.005), progress=False)
    counts = read_catalog(tmp_path / "sky", ["split"])["split"].value_counts().to_pylist()
    assert {c["values"] for c in counts} == {"train", "test", "border"}
    assert find_leaks(tmp_path / "sky") == []
    build(Made(columns, "images"), tmp_path / "key", name="s", split=ByKey(0.3), progress=False)
    one_object, overlap = find_leaks(tmp_path / "key")
    assert "share a position (within 2 arcsec)" in str(one_object)
    assert "share parts of cutouts (within 2.96 arcsec)" in str(overlap) and overlap.count > one_object.count
    assert [leak.count for leak in find_leaks(tmp_path / "key", radius_arcsec=2.0)] == [one_object.count]
