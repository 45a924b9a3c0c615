"""Sources joined and cut, split and searched for leaks."""

import numpy as np
import pytest
from made_sources import ARCSEC, GRID, Made, catalogue, images, spectra

from armillary.engine.data.building.build import build
from armillary.engine.data.building.splits import ByHealpix, BySource, parse_split
from armillary.engine.data.inspect.check import check_survey
from armillary.engine.data.inspect.leakage import find_leaks
from armillary.engine.data.sources.joined import Joined, Key, Match, Sky
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.selected import Condition, Selected
from armillary.engine.data.sources.source import BadSample, Rows, describe


def test_images_spectra_and_labels_become_one_survey(tmp_path):
    pairs = Joined(images(), Match(spectra([5, 3, 29, 7, 8, 9, 10, 11]), Sky(1.0)))
    whole = Joined(pairs, Match(catalogue([3, 5, 9, 29, 1]), Key("targetid"), required=False, name="provabgs"))
    assert len(whole) == 8 and whole.bands == ("g", "r") and whole.spectrum.grid == GRID
    assert set(whole.labels) == {"z", "targetid", "provabgs_targetid", "mass", "provabgs_z"}
    assert "8 of 30 objects matched, median separation 0.2 arcsec" in pairs.report()[0]
    build(whole, tmp_path / "s", name="pairs", progress=False, samples_per_shard=3, test_fraction=0.3)
    assert not check_survey(tmp_path / "s")
    packed = PackedSurvey(tmp_path / "s")
    found = {s.key: s for s in map(packed.read, range(len(packed)))}
    assert set(found) == {f"images{i}" for i in (3, 5, 7, 8, 9, 10, 11, 29)}
    place = {5: 0, 3: 1, 29: 2, 7: 3}
    for i in (3, 5, 29):
        sample = found[f"images{i}"]
        assert sample.image.mean() == pytest.approx(i, abs=0.01) and sample.labels["z"] == pytest.approx(i / 30)
        assert abs(sample.spectrum.flux.mean() - place[i]) < 0.5
        assert sample.labels["mass"] == 100 + i and sample.labels["provabgs_z"] == -i
        assert sample.labels["targetid"] == str(39627652591521181 + i) and "mags" in sample.vectors
    alone = found["images7"]
    assert np.isnan(alone.labels["mass"]) and alone.labels["provabgs_targetid"] == "" and not alone.vectors


def test_descriptions_agree_with_samples_and_read_no_pixels():
    source = Joined(Joined(images(), Match(spectra([9, 2, 4]), Sky(1.0))), Match(catalogue([4]), Key("targetid")))
    assert len(source) == 1
    rows, sample = describe(source, 0, 1), source.read(0)
    assert rows.keys == [sample.key] == ["images4"]
    for name in source.labels:
        assert rows.columns[name][0] == sample.labels[name], name


def test_bad_rows_stay_bad():
    first = images()
    first.bad = {4: "file: row 4: broken"}
    source = Joined(first, Match(spectra([3, 4, 5]), Sky(1.0)))
    assert describe(source, 0, 3).bad == {1: "file: row 4: broken"}
    with pytest.raises(BadSample, match="row 4: broken"):
        source.read(1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Joined(images()), "needs at least one source"),
        (lambda: Joined(images(), Match(images(), Sky(1.0))), "images come from Made and Made; only one"),
        (lambda: Joined(images(), Match(spectra([1, 2], 5.0), Sky(1.0))), r"none of 30 objects .*\(matches: 0\)"),
        (lambda: Joined(images(), Match(spectra([1]), Key("targetid"))), "Made has no such label; it has z"),
        (lambda: Joined(images(t=np.arange(30) + 4e16), Match(catalogue([1]), Key("t"))), "read the identifier as text|no such label"),
        (lambda: Joined(spectra([1]), Match(catalogue([1, 1]), Key("targetid"))), "targetid: 1 values .* more than once"),
        (lambda: Joined(catalogue([1]), Match(catalogue([1]), Key("targetid"))), "two sources have a vector of one name"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_numbers_that_lost_digits_are_no_identifiers():
    big = {"t": np.arange(30) + 4e16}
    with pytest.raises(ValueError, match="'t': numbers above 2\\^53 have lost their last digits; read .* as text"):
        Joined(images(**big), Match(Made({"ra": np.zeros(1), "dec": np.zeros(1), "t": np.array([4e16])}), Key("t")))


class TestCuts:
    def source(self):
        flux = np.array([1.0, 10.0, 100.0, -1.0, np.nan, 10.0])
        kind = ["PSF", "REX", "DEV", "REX", "EXP", "PSF"]
        ra = np.array([10.0, 10 + 0.5 * ARCSEC, 11.0, 12.0, np.nan, 10 + 1.2 * ARCSEC])
        return Made({"ra": ra, "dec": ra * 0, "flux_z": flux, "type": kind}, "images")

    @pytest.mark.parametrize(
        ("cuts", "left"),
        [
            (["flux_z > 1"], [1, 2, 5]),
            (["flux_z>=1", "flux_z != 10"], [0, 2]),
            (["mag(flux_z) <= 20"], [1, 2, 5]),
            (["mag( flux_z ) > 20"], [0]),
            (["type != PSF"], [1, 2, 3, 4]),
            (["type == 'REX'"], [1, 3]),
            (["ra < 11"], [0, 1, 5]),
        ],
    )
    def test_rows_that_are_left(self, cuts, left):
        source = Selected(self.source(), cuts)
        assert [source.read(i).key for i in range(len(source))] == [f"images{i}" for i in left]
        assert describe(source, 0, len(source)).keys == [f"images{i}" for i in left]
        assert describe(source, 0, 1).columns["flux_z"].shape == (1,)
        assert sum(source.removed.values()) == 6 - len(left)
        assert any("removed" in v for v in source.inputs().values())

    def test_of_close_objects_the_first_is_kept(self):
        source = Selected(self.source(), drop_duplicates_arcsec=1.0)
        assert [source.read(i).key for i in range(len(source))] == ["images0", "images2", "images3", "images4"]
        assert source.removed == {"within 1.0 arcsec of an earlier row": 2}

    @pytest.mark.parametrize(
        ("cuts", "match"),
        [
            (["flux_z"], "cut 'flux_z': must be COLUMN OP VALUE"),
            (["flux_z ~ 3"], "must be COLUMN OP VALUE"),
            (["flux_z < big"], "< needs a number, got 'big'"),
            (["mag(flux_z) == big"], "== needs a number"),
            (["mass > 3"], "no column 'mass'; there are ra, dec, flux_z, type"),
            (["type > 3"], "column 'type' holds text, 3.0 does not fit"),
            (["flux_z == PSF"], "column 'flux_z' holds numbers, 'PSF' does not fit"),
            (["flux_z > 1000"], r"none of 6 rows is left \(flux_z > 1000.0 removed 6\)"),
        ],
    )
    def test_cuts_that_do_not_fit(self, cuts, match):
        with pytest.raises(ValueError, match=match):
            Selected(self.source(), cuts)

    def test_conditions_read_as_written(self):
        assert str(Condition.parse(" mag(flux_r)<17.77")) == "mag(flux_r) < 17.77"


class TestSplits:
    def test_healpix_tiles_stay_together_and_shares_fit(self):
        from astropy_healpix import HEALPix

        rng = np.random.default_rng(0)
        ra, dec = rng.uniform(0, 360, 20000), np.rad2deg(np.arcsin(rng.uniform(-1, 1, 20000)))
        rows = Rows([str(i) for i in range(20000)], {"ra": ra, "dec": dec})
        splits = np.array(ByHealpix(0.2, 16).assign(rows, np.zeros((20000, 2), np.uint64)))
        tile = HEALPix(16, "nested").lonlat_to_healpix(np.deg2rad(ra) * _rad(), np.deg2rad(dec) * _rad())
        test = {t for t, s in zip(tile, splits, strict=True) if s == "test"}
        train = {t for t, s in zip(tile, splits, strict=True) if s == "train"}
        assert not test & train and abs((splits == "test").mean() - 0.2) < 0.03

    @pytest.mark.parametrize(
        ("text", "rule"), [("healpix", ByHealpix()), ("healpix:8", ByHealpix(nside=8)), ("source", BySource())]
    )
    def test_command_line_form(self, text, rule):
        assert parse_split(text, None) == rule

    @pytest.mark.parametrize("text", ["healpix:x", "healpix:12"])
    def test_bad_tiles(self, text):
        with pytest.raises(ValueError, match="healpix|nside"):
            parse_split(text, None)


def _rad():
    from astropy import units

    return units.rad


def test_leaks_are_found(tmp_path):
    ra = np.array([10.0, 10 + 1.0 * ARCSEC, 11.0, 12.0, 13.0, np.nan])
    name = ["a", "b", "c", "", "c", ""]
    splits = ["train", "test", "train", "train", "test", "test"]
    source = Made({"ra": ra, "dec": ra * 0, "name": name}, "images", splits)
    build(source, tmp_path / "s", name="leaky", progress=False, split=BySource())
    position, cutouts, label = find_leaks(tmp_path / "s", identifiers=("name",))
    assert cutouts.count == 1 and "parts of cutouts (within 2.96 arcsec)" in str(cutouts)
    assert (position.count, position.examples) == (1, (("images1", "images0"),)) and "2 arcsec" in str(position)
    assert (label.count, label.examples) == (1, (("images4", "images2"),))
    assert not find_leaks(tmp_path / "s", radius_arcsec=0.5)
    with pytest.raises(ValueError, match="no label 'targetid'; the survey has name"):
        find_leaks(tmp_path / "s", identifiers=("targetid",))
