import pickle

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table

from armillary.engine.data.building.build import build
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.surveys.galaxyzoo import DECALS_QUESTIONS, GalaxyZoo2, GalaxyZooDecals

COUNT = 8


def decals(**changes):
    """Columns of GZD-5: nobody was asked about edge-on bulges in rows 2 and 5, which are blank there."""
    rng = np.random.default_rng(5)
    data = {
        "iauname": np.array([f"J1034{i:02d}.28-0051{i:02d}.6" for i in range(COUNT)]),
        "ra": rng.uniform(0, 360, COUNT),
        "dec": rng.uniform(-20, 80, COUNT),
        "redshift": np.where(np.arange(COUNT) == 3, np.nan, 0.05),
    }
    for question, answers in DECALS_QUESTIONS.items():
        votes = rng.integers(1, 9, (len(answers), COUNT))
        if question == "edge-on-bulge":
            votes[:, [2, 5]] = 0
        total = votes.sum(axis=0)
        data[f"{question}_total-votes"] = total
        for answer, count in zip(answers, votes, strict=True):
            with np.errstate(invalid="ignore"):
                fraction = count / total
            data[f"{question}_{answer}"] = count
            data[f"{question}_{answer}_fraction"] = fraction
            data[f"{question}_{answer}_debiased"] = np.minimum(1.0, fraction**1.1)
    return {k: v for k, v in (data | changes).items() if v is not None}


def write(path, data):
    arrays = {k: pa.array(v, from_pandas=True) for k, v in data.items()}  # NaN as blank or null
    if path.suffix == ".csv":
        pc_csv.write_csv(pa.table(arrays), path)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table(arrays), path)
    else:
        Table(data).write(path)
    return path


@pytest.mark.parametrize("name", ("gz_decals_volunteers_5.csv", "gz_decals_volunteers_5.parquet", "gz5.fits"))
def test_decals(tmp_path, name):
    data = decals()
    source = pickle.loads(pickle.dumps(GalaxyZooDecals(write(tmp_path / name, data))))
    assert len(source) == COUNT and source.bands == ()
    rows = source.describe(0, COUNT)
    assert rows.keys[1] == "J103401_28-005101_6" and rows.columns["iauname"][1] == "J103401.28-005101.6"
    assert [v.name for v in source.vectors] == [q.replace("-", "_") for q in DECALS_QUESTIONS]
    for question, answers in DECALS_QUESTIONS.items():
        np.testing.assert_array_equal(rows.columns[f"{question}_votes"], data[f"{question}_total-votes"])
        vectors = np.array([source.read(i).vectors[question.replace("-", "_")] for i in range(COUNT)])
        for place, answer in enumerate(answers):
            expected = data[f"{question}_{answer}_debiased"]
            np.testing.assert_array_equal(rows.columns[f"{question}_{answer}"], expected)
            np.testing.assert_array_equal(vectors[:, place], np.float32(expected))
    assert np.isnan(rows.columns["edge-on-bulge_boxy"][[2, 5]]).all() and np.isnan(rows.columns["redshift"][3])
    assert not any(odd.size for odd in source.unsummed.values())
    assert set(source.read(0).labels) == set(source.labels) and "bar_strong" in source.labels


def test_other_fractions_and_cut(tmp_path):
    data = decals()
    path = write(tmp_path / "a.csv", data)
    source = GalaxyZooDecals(path, fractions="fraction")
    np.testing.assert_array_equal(source.describe(0, 8).columns["bar_weak"], data["bar_weak_fraction"])
    least = int(np.median(data["smooth-or-featured_total-votes"]))
    cut = GalaxyZooDecals(path, min_votes=least)
    kept = np.flatnonzero(data["smooth-or-featured_total-votes"] >= least)
    assert 0 < len(cut) < COUNT and cut.removed == {f"smooth-or-featured_votes >= {least}": COUNT - len(cut)}
    np.testing.assert_array_equal(cut.describe(0, len(cut)).columns["bar_votes"], data["bar_total-votes"][kept])
    assert cut.read(len(cut) - 1).ra == data["ra"][kept[-1]]


def test_fractions_that_do_not_sum(tmp_path, caplog):
    """They are reported; where all are 0 in spite of votes, they are unknown."""
    data = decals()
    for answer in DECALS_QUESTIONS["bar"]:
        data[f"bar_{answer}_fraction"][4] = data[f"bar_{answer}_debiased"][4] = 0
    data["merging_none_fraction"][6] *= 0.5
    source = GalaxyZooDecals(write(tmp_path / "a.csv", data))
    assert source.unsummed["bar"].tolist() == [4] and source.unsummed["merging"].tolist() == [6]
    assert np.isnan(source.read(4).vectors["bar"]).all() and not np.isnan(source.read(6).vectors["merging"]).any()
    assert source.read(4).labels["bar_votes"] > 0
    assert (
        "question 'bar': the fractions of 1 of 8 rows with votes do not sum to 1 (first: row 4, sum 0)" in caplog.text
    )


def test_packed_and_read_back(tmp_path):
    source = GalaxyZooDecals(write(tmp_path / "a.csv", decals()))
    build(source, tmp_path / "survey", name="zoo", progress=False)
    own = {s.key: s for s in map(source.read, range(len(source)))}
    back = PackedSurvey(tmp_path / "survey")
    assert len(back) == COUNT
    for sample in map(back.read, range(COUNT)):
        np.testing.assert_equal(sample.labels, own[sample.key].labels)
        for name, vector in own[sample.key].vectors.items():
            np.testing.assert_array_equal(sample.vectors.get(name, np.full(len(vector), np.nan)), vector)


@pytest.mark.parametrize(
    "changes, match",
    [
        pytest.param({"bar_total-votes": None}, r"no column 'bar_total-votes' \(question 'bar'\)", id="no votes"),
        pytest.param({"merging_merger_debiased": None}, "no column 'merging_merger_debiased'", id="no answer"),
        pytest.param({"iauname": None}, "no column 'iauname' .label 'iauname'|no column 'iauname'", id="no key"),
        pytest.param({"bar_no_fraction": np.array(["x"] * COUNT)}, "'bar_no_fraction': must hold a number", id="text"),
        pytest.param(
            {"bar_no_debiased": np.linspace(0, 1.05, COUNT)},
            "row 7, column 'bar_no_debiased': 1.05: a fraction must be within 0 and 1",
            id="fraction above 1",
        ),
        pytest.param(
            {"bar_total-votes": np.arange(COUNT) - 1},
            "row 0, column 'bar_total-votes': -1: a number of votes must not be negative",
            id="negative votes",
        ),
        pytest.param({"ra": np.linspace(-9, 9, COUNT)}, "row 0, column 'ra': ra -9 is outside", id="RA"),
        pytest.param({"iauname": np.array(["J1.2"] * COUNT)}, "row 1, column 'iauname': J1_2 is also", id="repeated"),
    ],
)
@pytest.mark.parametrize("name", ("a.csv", "a.fits"))
def test_malformed(tmp_path, name, changes, match):
    path = write(tmp_path / name, decals(**changes))
    with pytest.raises(ValueError, match=match) as error:
        GalaxyZooDecals(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("reader", (GalaxyZooDecals, GalaxyZoo2))
def test_wrong_options(tmp_path, reader):
    path = write(tmp_path / "a.csv", decals())
    with pytest.raises(ValueError, match="fractions: must be one of debiased"):
        reader(path, fractions="votes")
    if reader is GalaxyZooDecals:
        with pytest.raises(ValueError, match="min_votes: must not be negative"):
            reader(path, min_votes=-1)


def zoo2(count=4, **changes):
    """A table of Galaxy Zoo 2 with two questions; nobody was asked the second in row 1."""
    votes = {"t01_shape_a01_smooth": [3, 5, 0, 1], "t01_shape_a02_disk": [1, 5, 4, 0]}
    votes |= {"t03_bar_a06_bar": [1, 0, 3, 2], "t03_bar_a07_no_bar": [1, 0, 1, 2]}
    data = {
        "specobjid": 1802674929645152256 + np.arange(count),
        "dr7objid": 587722981741363294 + np.arange(count),
        "ra": np.linspace(10, 20, count, dtype=np.float32),
        "dec": np.zeros(count, np.float32),
    }
    for question in ("t01_shape", "t03_bar"):
        named = {k: np.array(v[:count], np.int16) for k, v in votes.items() if k.startswith(question)}
        total = np.maximum(1, sum(named.values()))
        for name, counted in named.items():
            data[f"{name}_count"] = counted
            for what, power in (("fraction", 1), ("weighted_fraction", 1), ("debiased", 2)):
                data[f"{name}_{what}"] = ((counted / total) ** power).astype(np.float32)
    return {k: v for k, v in (data | changes).items() if v is not None}


def test_zoo2(tmp_path):
    source = GalaxyZoo2(write(tmp_path / "a.fits", zoo2()))
    rows = source.describe(0, 4)
    assert rows.keys == rows.columns["dr7objid"] == [str(587722981741363294 + i) for i in range(4)]
    assert rows.columns["specobjid"][1] == "1802674929645152257"
    np.testing.assert_array_equal(rows.columns["t03_bar_votes"], [2, 0, 4, 4])
    np.testing.assert_array_equal(rows.columns["t03_bar_a06_bar"], [0.25, np.nan, 0.5625, 0.25])
    np.testing.assert_array_equal(source.read(2).vectors["t03_bar"], np.float32([0.5625, 0.0625]))
    weighted = GalaxyZoo2(tmp_path / "a.fits", fractions="weighted_fraction", min_votes=4)
    assert weighted.describe(0, 3).columns["t01_shape_a01_smooth"].tolist() == [0.75, 0.5, 0]


@pytest.mark.parametrize(
    "changes, match",
    [
        pytest.param(
            {"dr7objid": None, "specobjid": None},
            "it must have an identifier, one of the columns dr7objid",
            id="no key",
        ),
        pytest.param({"t03_bar_a06_bar_fraction": None}, "no column 't03_bar_a06_bar_fraction'", id="no fraction"),
        pytest.param({k: None for k in zoo2() if k.endswith("count")}, "no column like 't01_smooth", id="no counts"),
        pytest.param(
            {"dr7objid": np.ones(4)}, "column 'dr7objid': an identifier must be whole numbers", id="float key"
        ),
    ],
)
def test_malformed_zoo2(tmp_path, changes, match):
    with pytest.raises(ValueError, match=rf"a\.fits: .*{match}|a\.fits: {match}"):
        GalaxyZoo2(write(tmp_path / "a.fits", zoo2(**changes)))


def test_real_zoo2(real_data):
    path = real_data / "catalogs/gz2_stripe82_votes.fits.gz"
    source = GalaxyZoo2(path)
    assert len(source) == 19761 and len(source.vectors) == 11
    rows = source.describe(0, len(source))
    assert len(set(rows.keys)) == len(source) and rows.keys[0] == "8647474690312307154"
    table = fits.getdata(path, 1)
    bar = "t03_bar_a06_bar"
    votes = table[f"{bar}_count"] + table["t03_bar_a07_no_bar_count"]
    np.testing.assert_array_equal(rows.columns["t03_bar_votes"], votes)
    answered = votes > 0
    answered[source.unsummed["t03_bar"]] = False
    assert source.unsummed["t03_bar"].size == 118 and source.unsummed["t01_smooth_or_features"].size == 0
    expected = np.where(answered, table[f"{bar}_debiased"], np.nan)
    np.testing.assert_array_equal(np.float32(rows.columns[bar]), np.float32(expected))
    for i in (0, 5000, 19760):
        np.testing.assert_array_equal(source.read(i).vectors["t03_bar"][0], np.float32(expected[i]))
