import numpy as np
import pytest

from armillary.engine.data.building.splits import (
    ByHealpix,
    ByKey,
    ByRandom,
    ByRange,
    BySky,
    BySkyOrKey,
    BySource,
    hash_keys,
    parse_split,
)
from armillary.engine.data.sources.source import Rows


def rows(keys, splits=None, **columns):
    arrays = {k: v if isinstance(v[0], str) else np.asarray(v, float) for k, v in columns.items()}
    return Rows(list(keys), arrays, splits)


def assign(rule, table):
    return rule.assign(table, hash_keys(table.keys))


def test_hashes_are_fixed_forever():
    # BLAKE2b of the key, 16 bytes, as two little-endian numbers: a change would move samples between splits
    assert hash_keys(["galaxy"]).tolist() == [[11556313109997847613, 11401028331586898166]]
    assert hash_keys([]).shape == (0, 2)


def test_by_key_takes_the_fraction_and_grows_monotonically():
    table = rows([f"k{i}" for i in range(4000)])
    small, large = assign(ByKey(0.1), table), assign(ByKey(0.3), table)
    assert small.count("test") == pytest.approx(400, abs=60)
    assert all(b == "test" for a, b in zip(small, large, strict=True) if a == "test")
    assert set(assign(ByKey(0), table)) == {"train"}
    assert assign(ByKey(0.1), rows(table.keys[::-1]))[::-1] == small


def test_by_sky_keeps_neighbours_together():
    rng = np.random.default_rng(0)
    ra, dec = rng.uniform(0, 360, 3000), np.rad2deg(np.arcsin(rng.uniform(-1, 1, 3000)))
    strip, around = np.clip(np.floor(dec), -1, 0), 359  # the two strips at the equator have 359 cells
    cells = (np.floor(ra / 360 * around) + 0.5) * 360 / around, strip + 0.5
    centre = rows([f"a{i}" for i in range(3000)], ra=cells[0], dec=cells[1])
    near = rows([f"b{i}" for i in range(3000)], ra=cells[0] + 0.3, dec=cells[1] - 0.3)
    assert assign(BySky(0.2), centre) == assign(BySky(0.2), near)
    everywhere = Rows([str(i) for i in range(3000)], {"ra": ra, "dec": dec})
    assert assign(BySky(0.2, cell_deg=5), everywhere).count("test") == pytest.approx(600, abs=150)


@pytest.mark.parametrize(("ra", "dec"), [(0.0, 90.0), (360.0, -90.0), (0.0, 0.0)])
def test_by_sky_reaches_poles_and_wraps(ra, dec):
    assert assign(BySky(), rows(["a"], ra=[ra], dec=[dec])) == assign(BySky(), rows(["b"], ra=[ra % 360], dec=[dec]))


def test_by_healpix_numbers_tiles_in_nested_order():
    """At nside 2 tiles 0 to 3 in nested order are the quarters of base tile 0 (Gorski et al. 2005, figure 4)."""
    centres = [(45.0, 19.471), (67.5, 41.810), (22.5, 41.810), (45.0, 66.444)]  # degrees: south, east, west, north
    ra, dec = zip(*centres, strict=True)
    keys = [f"healpix/2/{tile}" for tile in range(4)]
    wanted = np.argsort(np.argsort(hash_keys(keys)[:, 0]))  # order in which a growing test split takes the tiles
    table = rows("abcd", ra=ra, dec=dec)
    counts = np.array(
        [[s == "test" for s in assign(ByHealpix(f, nside=2), table)] for f in np.linspace(0, 0.999, 1000)]
    )
    assert (np.argsort(np.argsort(-counts.sum(0), kind="stable"), kind="stable") == wanted).all()
    assert np.abs(1 - counts.mean(0) - hash_keys(keys)[:, 0] / 2.0**64).max() < 0.003  # the step is 0.001


def test_by_range():
    table = rows("abcd", ra=[0, 10, 20, 350], z=[0.1, 0.2, 0.3, 0.4])
    assert assign(ByRange("ra", 10, 20), table) == ["train", "test", "train", "train"]
    assert assign(ByRange("ra", 350, 10), table) == ["test", "train", "train", "test"]
    assert assign(ByRange("z", 0.25, 9), table) == ["train", "train", "test", "test"]


def test_by_source():
    assert assign(BySource(), rows("ab", ["train", "valid_2"])) == ["train", "valid_2"]
    with pytest.raises(ValueError, match="key 'b': the source assigns it no split"):
        assign(BySource(), rows("ab", ["train", None]))
    with pytest.raises(ValueError, match="key 'a': the source assigns it no split"):
        assign(BySource(), rows("ab"))
    with pytest.raises(ValueError, match="split '../x': use letters"):
        assign(BySource(), rows("ab", ["train", "../x"]))


@pytest.mark.parametrize(
    ("rule", "columns", "match"),
    [
        (ByRange("z", 0, 1), {"ra": [1]}, "split by 'z': no such column; there are ra"),
        (ByRange("type", 0, 1), {"type": ["Sa"]}, "split by 'type': the column holds text"),
        (BySky(), {"ra": [np.nan], "dec": [0]}, "split by 'ra': unknown for 1 samples, first 'a'"),
    ],
)
def test_rules_that_do_not_fit(rule, columns, match):
    with pytest.raises(ValueError, match=match):
        assign(rule, rows("a", **columns))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ByKey(1.0), "test_fraction: must be at least 0 and below 1"),
        (lambda: BySky(-0.1), "test_fraction"),
        (
            lambda: ByKey(0.3, validation_fraction=0.7),
            "validation_fraction: must be at least 0 and leave samples to train on",
        ),
        (lambda: ByHealpix(validation_fraction=-0.1), "validation_fraction"),
        (lambda: BySky(0.1, cell_deg=0), "cell_deg: must be above 0"),
        (lambda: ByRange("z", 1, 1), "1 is not below 1"),
        (lambda: ByRange("ra", float("nan"), 1), "needs two finite numbers"),
    ],
)
def test_rules_check_their_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_rules_from_text():
    assert parse_split("key", None) == ByKey(0.1) and parse_split("key", 0.3) == ByKey(0.3)
    assert parse_split("sky", 0.2) == BySky(0.2) and parse_split("source", None) == BySource()
    assert parse_split("ra:350:10", None) == ByRange("ra", 350, 10)
    for text, fraction, match in [
        ("half", None, "must be auto, key, random:SEED, sky, healpix.*source or COLUMN:LOW:HIGH"),
        ("z:a:b", None, "split 'z:a:b': could not convert"),
        ("z:2:1", None, "2.0 is not below 1.0"),
        ("source", 0.1, "test_fraction: has no effect with split 'source'"),
    ]:
        with pytest.raises(ValueError, match=match):
            parse_split(text, fraction)
    assert parse_split("healpix:8", 0.2, 0.1) == ByHealpix(0.2, 8, validation_fraction=0.1)
    with pytest.raises(ValueError, match="validation_fraction: has no effect with split 'source'"):
        parse_split("source", None, 0.1)


@pytest.mark.parametrize("rule", [ByKey, ByRandom, BySky, ByHealpix, BySkyOrKey], ids=lambda r: r.__name__)
def test_a_validation_split_takes_from_the_training_split_alone(rule):
    rng = np.random.default_rng(0)
    table = rows([f"k{i}" for i in range(6000)], ra=rng.uniform(0, 360, 6000), dec=rng.uniform(-80, 80, 6000))
    without, with_it = assign(rule(0.2), table), assign(rule(0.2, validation_fraction=0.15), table)
    assert [s == "test" for s in without] == [s == "test" for s in with_it]
    # Cells of the sky are as many as galaxies or more here, so that shares scatter as those of galaxies do: .005.
    assert with_it.count("validation") / 6000 == pytest.approx(0.15, abs=0.02)
    assert {s for s, t in zip(with_it, without, strict=True) if t == "train"} == {"train", "validation"}


def test_by_sky_or_key_uses_the_position_where_there_is_one():
    keys = [f"k{i}" for i in range(400)]
    ra = np.linspace(0, 40, 400)
    ra[1::2] = np.nan
    table = Rows(keys, {"ra": ra, "dec": np.zeros(400)})
    hashes = hash_keys(keys)
    got = BySkyOrKey(0.3).assign(table, hashes)
    placed = list(range(0, 400, 2))
    assert [got[i] for i in placed] == BySky(0.3).assign(table.take(placed), hashes[placed])
    assert got[1::2] == ByKey(0.3).assign(table, hashes)[1::2]
    assert parse_split("auto", None) == BySkyOrKey()


def test_random_splits_differ_by_seed_and_not_by_order():
    keys = [f"g{i}" for i in range(4000)]
    rows = Rows(keys, {})
    first, second = (ByRandom(0.25, seed).assign(rows, np.zeros((4000, 2), np.uint64)) for seed in (0, 1))
    share = np.mean([s == "test" for s in first])
    both = np.mean([a == b == "test" for a, b in zip(first, second, strict=True)])
    assert abs(share - 0.25) < 0.03 and abs(both - 0.0625) < 0.02
    turned = Rows(keys[::-1], {})
    assert ByRandom(0.25, 0).assign(turned, np.zeros((4000, 2), np.uint64)) == first[::-1]
    assert parse_split("random:7", 0.3) == ByRandom(0.3, 7)
    with pytest.raises(ValueError, match="split: must be auto"):
        parse_split("random", None)
