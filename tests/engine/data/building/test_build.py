import numpy as np
import pyarrow.parquet as pq
import pytest
from noise_sky import SIGMA, Sky, contents, refuse, run

from armillary.engine.data.building.build import build
from armillary.engine.data.building.splits import ByRange, BySource
from armillary.engine.data.format import codec
from armillary.engine.data.format.shards import read_members
from armillary.engine.data.format.survey import CATALOG_COLUMNS, Survey
from armillary.engine.data.inspect.check import check_survey
from armillary.engine.data.sources.source import BadSample, describe
from armillary.engine.data.sources.surveys.images import Pictures


def test_what_is_stored(tmp_path):
    source = Sky()
    survey = run(source, tmp_path / "out", test_fraction=0.3)
    assert survey == Survey.load(tmp_path / "out")
    assert check_survey(tmp_path / "out") == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["survey.json", "catalog.parquet", *(f"{s.name[:-4]}.{e}" for s in survey.shards for e in ("tar", "idx"))]
    )
    np.testing.assert_allclose(survey.sky_sigma, SIGMA, rtol=0.15)
    np.testing.assert_allclose(survey.step, np.array(survey.sky_sigma) / 8, rtol=1e-12)
    rows = pq.read_table(tmp_path / "out" / "catalog.parquet").to_pylist()
    assert list(rows[0]) == [*CATALOG_COLUMNS, "z", "type"]
    assert len(rows) == 30 and {r["split"] for r in rows} == {"train", "test"}
    assert [s.split for s in survey.shards] == sorted((s.split for s in survey.shards), reverse=True)  # train first
    for row in rows:
        index = int(row["key"][1:])
        sample = source.read(index)
        raw = (tmp_path / "out" / survey.shards[row["shard"]].name).read_bytes()
        image, valid = codec.decode(raw[row["offset"] : row["offset"] + row["size"]])
        assert np.abs(image - sample.image).max(axis=(1, 2)) == pytest.approx(np.zeros(2), abs=max(survey.step) / 1.99)
        assert (np.abs(image - sample.image) <= np.array(survey.step)[:, None, None] / 1.99).all()
        np.testing.assert_equal(valid, sample.valid)
        assert (row["ra"], row["dec"], row["z"], row["type"]) == (
            sample.ra,
            -1.5,
            sample.labels["z"],
            sample.labels["type"],
        )
        assert row["source"] == f"row {index}"
    train = [source.read(int(r["key"][1:])) for r in rows if r["split"] == "train"]
    assert survey.statistics.samples == len(train) == survey.count("train")
    pixels = np.concatenate([s.image[1][s.valid[1] if s.valid is not None else slice(None)].ravel() for s in train])
    assert survey.statistics.mean[1] == pytest.approx(pixels.mean(dtype=np.float64), rel=1e-6)
    assert survey.provenance["build"]["inputs"] == {"source": "Sky(30)"}
    assert survey.provenance["skipped"] == {"count": 0, "examples": []}


def test_order_depends_on_the_seed_and_nothing_else(tmp_path):
    def order(folder, **options):
        run(Sky(), tmp_path / folder, test_fraction=0, **options)
        return pq.read_table(tmp_path / folder / "catalog.parquet")["key"].to_pylist()

    first = order("a")
    assert first == order("b", samples_per_shard=3) != order("c", seed=1)
    assert sorted(first) == sorted(f"g{i}" for i in range(30)) != first


def test_samples_are_read_in_the_order_of_the_source(tmp_path):
    source = Sky()
    run(source, tmp_path, test_fraction=0, samples_per_shard=100)
    assert source.reads[-30:] == list(range(30))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(ByRange("ra", 350, 30), {0, 1, 2}), (ByRange("z", 0.1, 0.12), {10, 11}), (BySource(), {0, 5, 10, 15, 20, 25})],
)
def test_split_rules(tmp_path, rule, expected):
    survey = run(Sky(), tmp_path, split=rule)
    other = "valid" if isinstance(rule, BySource) else "test"
    table = pq.read_table(tmp_path / "catalog.parquet").to_pylist()
    assert {int(r["key"][1:]) for r in table if r["split"] == other} == expected
    assert survey.count(other) == len(expected) and survey.count() == 30


def test_statistics_without_a_train_split_are_those_of_all(tmp_path):
    survey = run(Sky(), tmp_path, split=ByRange("ra", -1, 400))
    assert survey.count("test") == survey.statistics.samples == 30


def test_float16_and_given_noise(tmp_path):
    survey = run(Sky(), tmp_path, codec="float16", sky_sigma=[0.5, 1])
    assert survey.codec == "float16" and survey.step == () and survey.sky_sigma == (0.5, 1.0)
    assert check_survey(tmp_path) == []


@pytest.mark.parametrize(("unit", "sigma"), [("count", 1.0), ("nanomaggy", None)])
def test_images_without_noise(tmp_path, unit, sigma):
    source = Sky(4, dict.fromkeys(range(4), lambda f: f.update(image=np.full((2, 12, 12), 5, np.float32), valid=None)))
    source.unit = unit
    if sigma is None:
        with pytest.raises(ValueError, match=r"band 'g' has no measurable noise in 4 samples.*--sky-sigma"):
            run(source, tmp_path / "out", test_fraction=0)
        assert not (tmp_path / "out").exists()
        assert run(source, tmp_path / "out", test_fraction=0, sky_sigma=(1, 1)).step == (0.125, 0.125)
    else:
        assert run(source, tmp_path / "out", test_fraction=0).sky_sigma == (1.0, 1.0)


def test_a_band_that_nobody_observed(tmp_path):
    def blind(fields):
        fields["valid"] = np.ones((2, 12, 12), bool)
        fields["valid"][0] = False

    with pytest.raises(ValueError, match="band 'g' has no valid pixel"):
        run(Sky(4, dict.fromkeys(range(4), blind)), tmp_path, test_fraction=0)


def poke(band, value):
    def change(fields):
        fields["image"][band, 3, 4] = value

    return change


def bad_valid(fields):
    fields["valid"] = np.zeros((2, 12, 12), bool)


BAD = {
    "nan": (poke(1, np.nan), r"key 'g7' \(row 7\): band 1: 1 pixels are not finite"),
    "inf": (poke(0, -np.inf), r"key 'g7' \(row 7\): band 0: 1 pixels are not finite"),
    "masked": (bad_valid, "key 'g7'.*no pixel carries data"),
    "shape": (lambda f: f.update(image=f["image"][:, 1:], valid=None), r"key 'g7'.*image of \(2, 11, 12\), the survey has \(2, 12, 12\)"),
    "bands": (lambda f: f.update(image=f["image"][:1], valid=None), r"key 'g7'.*image of \(1, 12, 12\)"),
    "mask": (lambda f: f.update(valid=np.ones((12, 12), bool)), r"key 'g7'.*mask of \(12, 12\)"),
    "dec": (lambda f: f.update(dec=91.0), "key 'g7'.*dec: 91.0 is outside"),
    "ra": (lambda f: f.update(ra=-1.0), "key 'g7'.*ra: -1.0 is outside"),
    "huge": (poke(0, 3e38), r"key 'g7'.*band 0"),
    "label": (lambda f: f["labels"].pop("z"), "key 'g7'.*label 'z': None is not of type float64"),
    "text": (lambda f: f["labels"].update(type=3.0), "key 'g7'.*label 'type': 3.0 is not of type string"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_unusable_samples_stop_the_build_or_are_skipped(tmp_path, name, caplog):
    change, match = BAD[name]
    with pytest.raises(BadSample, match=f"{match}.*--on-bad skip"):
        run(Sky(30, {7: change}), tmp_path / "out")
    assert not (tmp_path / "out" / "survey.json").exists()
    survey = run(Sky(30, {7: change}), tmp_path / "out", on_bad="skip")  # continues what the error stopped
    keys = pq.read_table(tmp_path / "out" / "catalog.parquet")["key"].to_pylist()
    assert sorted(keys) == sorted(f"g{i}" for i in range(30) if i != 7)
    assert survey.provenance["skipped"]["count"] == 1 and "g7" in survey.provenance["skipped"]["examples"][0]
    assert "skipped: key 'g7'" in caplog.text
    assert check_survey(tmp_path / "out") == []


def test_unreadable_samples_are_known_before_packing(tmp_path):
    change = dict.fromkeys((3, 4), refuse)
    with pytest.raises(BadSample, match=r"file row 3 is damaged; file row 4 is damaged\. Repair"):
        run(Sky(30, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadSample, match=r"\(and others\)"):
        run(Sky(30, dict.fromkeys(range(9), refuse)), tmp_path / "out")
    survey = run(Sky(30, change), tmp_path / "out", on_bad="skip")
    assert survey.count() == 28 and survey.provenance["skipped"]["count"] == 2


def test_nothing_usable(tmp_path):
    for source, match in [
        (Sky(0), "the survey is empty: none of the source's 0"),
        (Sky(5, dict.fromkeys(range(5), refuse)), "the survey is empty: none of the source's 5"),
        (Sky(5, dict.fromkeys(range(5), bad_valid)), "none of 5 samples that were tried is usable"),
    ]:
        with pytest.raises(ValueError, match=match):
            run(source, tmp_path / "out", on_bad="skip", test_fraction=0)
        assert not (tmp_path / "out").exists()


def test_a_shard_of_unusable_samples_is_left_out(tmp_path):
    whole = run(Sky(30), tmp_path / "whole", test_fraction=0)
    keys = [m.key for m in read_members(tmp_path / "whole" / whole.shards[1].name)]
    survey = run(Sky(30, {int(k[1:]): bad_valid for k in keys}), tmp_path / "out", test_fraction=0, on_bad="skip")
    assert [s.name for s in survey.shards] == ["train-000000.tar", "train-000002.tar", "train-000003.tar"]
    assert survey.count() == 22 and check_survey(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.update(key="g2"), "key 'g2': rows 2 and 7 of the source both have it"),
        (lambda f: f.update(key="a.b"), r"row 7 of the source: key 'a\.b': must be 1 to 96"),
    ],
)
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_wrong_keys_always_stop(tmp_path, change, match, on_bad):
    with pytest.raises(ValueError, match=match):
        run(Sky(30, {7: change}), tmp_path, on_bad=on_bad)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard: must be at least 1"),
        ({"codec": "zip"}, "codec: must be one of bitplane, float16, got 'zip'"),
        ({"on_bad": "ignore"}, "on_bad: must be one of error, skip"),
        ({"seed": -1}, "seed: must be in"),
        ({"step_fraction": 0}, "step_fraction: must be positive"),
        ({"step_fraction": 0.1, "codec": "float16"}, "step_fraction: .*no effect with float16"),
        ({"test_fraction": 0.1, "split": BySource()}, "test_fraction: has no effect beside a split rule"),
        ({"test_fraction": 1.5}, "test_fraction: must be at least 0 and below 1"),
        ({"sky_sigma": (1.0,)}, "sky_sigma: must be 2 positive numbers"),
        ({"sky_sigma": (1.0, 0.0)}, "sky_sigma: must be 2 positive numbers"),
        ({"processes": 0}, "processes: must be at least 1"),
    ],
)
def test_wrong_options(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        run(Sky(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_labels_must_be_the_declared_ones(tmp_path):
    source = Sky()
    source.labels = {"z": "redshift", "mass": "log solar masses"}
    with pytest.raises(ValueError, match=r"the source declares \['mass', 'z'\], its samples have \['type', 'z'\]"):
        run(source, tmp_path)


def test_a_finished_survey_is_returned_and_another_refused(tmp_path):
    first = run(Sky(), tmp_path)
    before = contents(tmp_path)
    source = Sky()
    assert run(source, tmp_path, on_bad="skip") == first and contents(tmp_path) == before
    for options, match in [
        ({"codec": "float16"}, "holds another survey .*codec 'bitplane', now 'float16'"),
        ({"seed": 3}, "seed 0, now 3"),
        ({"name": "b"}, "name 'sky', now 'b'"),
    ]:
        with pytest.raises(FileExistsError, match=match):
            run(Sky(), tmp_path, **options)
    with pytest.raises(FileExistsError, match="samples 30, now 29"):
        run(Sky(29), tmp_path)
    assert contents(tmp_path) == before


def test_folders_that_hold_something_else(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="not a folder; choose another one"):
            run(Sky(), folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.tar").write_text("")
    with pytest.raises(FileExistsError, match=r"holds x\.tar, but no survey"):
        run(Sky(), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.tar"]


def test_sources_that_do_not_describe_themselves_are_read():
    rows = describe(Sky(6, {2: refuse}), 1, 4)
    assert rows.keys == ["g1", "", "g3"] and rows.bad == {2: "file row 2 is damaged"}
    np.testing.assert_array_equal(rows.columns["z"], [0.01, np.nan, 0.03])
    assert rows.columns["type"] == ["Sa", "", "Sa"] and rows.splits == ["train", None, "train"]


def test_pictures_lose_nothing(pictures, tmp_path):
    source = Pictures(pictures)
    survey = run(source, tmp_path)
    assert survey.step == (1.0, 1.0, 1.0) and survey.unit == "count"
    rows = pq.read_table(tmp_path / "catalog.parquet").to_pylist()
    for row in rows[::7]:
        raw = (tmp_path / survey.shards[row["shard"]].name).read_bytes()
        image, _ = codec.decode(raw[row["offset"] : row["offset"] + row["size"]])
        np.testing.assert_array_equal(image, source.read(int(row["key"][1:])).image)
    assert run(source, tmp_path / "coarse", step_fraction=0.5).step[0] == pytest.approx(survey.sky_sigma[0] / 2)


def test_real_spirals_by_the_sky(real_data, tmp_path):
    class Few(Pictures):
        def __len__(self):
            return 200

    survey = build(
        Few(real_data / "sdss_spirals" / "images.zip"),
        tmp_path,
        name="spirals",
        split=ByRange("ra", 115, 120),
        samples_per_shard=64,
        progress=False,
    )
    table = pq.read_table(tmp_path / "catalog.parquet")
    ra, split = table["ra"].to_numpy(), np.array(table["split"].to_pylist())
    assert ((split == "test") == ((ra >= 115) & (ra < 120))).all() and survey.count("test") > 0
    assert check_survey(tmp_path) == []
