import pickle

import numpy as np
import pytest
from provabgs_files import COUNT, columns, write

from armillary.engine.data.building.build import build
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.surveys.provabgs import THETA, Provabgs


@pytest.fixture(params=("BGS_ANY_full.provabgs.sv3.v0.hdf5", "columns.h5"))
def path(tmp_path, request):
    return write(tmp_path / request.param, columns())


def test_labels_and_theta(path):
    data, source = columns(), pickle.loads(pickle.dumps(Provabgs(path)))
    kept = [0, 2, 3, 5, 8, 9, 10, 11]
    assert len(source) == 8 and source.bands == ()
    assert source.removed == {
        f"{c} > 0": n for c, n in (("PROVABGS_LOGMSTAR_BF", 2), ("MAG_G", 1), ("MAG_R", 0), ("MAG_Z", 1))
    }
    assert source.inputs()["cut: MAG_Z > 0"] == "removed 1 rows"
    rows = source.describe(0, 8)
    assert rows.keys == rows.columns["targetid"] == [str(i) for i in data["TARGETID"][kept]]
    np.testing.assert_array_equal(rows.columns["redshift"], data["Z_HP"][kept])
    np.testing.assert_array_equal(rows.columns["log_mstar"], data["PROVABGS_LOGMSTAR_BF"][kept])
    np.testing.assert_array_equal(rows.columns["mag_z"], data["MAG_Z"][kept])
    np.testing.assert_array_equal(rows.columns["is_bgs_bright"], data["IS_BGS_BRIGHT"][kept])
    assert "z_mw" not in source.labels and "log_ssfr" not in source.labels
    assert source.vectors[0].name == "theta" and source.vectors[0].components == THETA
    for i, row in enumerate(kept):
        sample = source.read(i)
        np.testing.assert_array_equal(sample.vectors["theta"], data["PROVABGS_THETA_BF"][row])
        assert (sample.ra, sample.dec) == (data["RA"][row], data["DEC"][row])
        assert set(sample.labels) == set(source.labels) and sample.source == f"{path.name}:{row}"


def test_without_cuts(path):
    source = Provabgs(path, cuts=False)
    assert len(source) == COUNT and source.removed == {} and source.read(1).labels["log_mstar"] == -1


def test_derived_properties(tmp_path):
    rate = np.where(np.arange(COUNT) == 2, 0, 1.5)
    added = {"Z_MW": np.full(COUNT, 0.02), "TAGE_MW": np.full(COUNT, 8.0), "AVG_SFR": rate}
    data = columns(**added, PROVABGS_THETA_BF=columns()["PROVABGS_THETA_BF"][:, :12])
    source = Provabgs(write(tmp_path / "a.h5", data))
    labels = source.read(0).labels
    assert labels["ln_z_mw"] == pytest.approx(np.log(0.02)) and labels["tage_mw"] == 8
    assert labels["log_ssfr"] == pytest.approx(np.log10(1.5) - labels["log_mstar"])
    assert np.isnan(source.read(1).labels["log_ssfr"]) and source.read(1).labels["avg_sfr"] == 0
    assert source.vectors[0].size == 12 and set(labels) == set(source.labels)


def test_packed_and_read_back(tmp_path, path):
    source = Provabgs(path)
    build(source, tmp_path / "survey", name="provabgs", progress=False)
    own = {s.key: s for s in map(source.read, range(len(source)))}
    back = PackedSurvey(tmp_path / "survey")
    assert len(back) == len(own)
    for sample in map(back.read, range(len(back))):
        assert sample.labels == own[sample.key].labels
        np.testing.assert_array_equal(sample.vectors["theta"], own[sample.key].vectors["theta"])


@pytest.mark.parametrize(
    "changes, match",
    [
        pytest.param({"Z_HP": None}, r"no column 'Z_HP' \(part of PROVABGS\)", id="missing column"),
        pytest.param(
            {"PROVABGS_THETA_BF": np.zeros((COUNT, 9))}, "'PROVABGS_THETA_BF' has rows of length 9", id="short theta"
        ),
        pytest.param(
            {"PROVABGS_THETA_BF": np.zeros(COUNT)}, "'PROVABGS_THETA_BF' has rows of length 1", id="flat theta"
        ),
        pytest.param({"TARGETID": np.arange(COUNT) // 2}, "row 1, column 'TARGETID': 0 is also that of", id="repeated"),
        pytest.param({"TARGETID": np.arange(COUNT) * 1.5}, "'TARGETID': an identifier must be whole", id="float id"),
        pytest.param({"RA": np.full(COUNT, 361.0)}, "row 0, column 'RA': ra 361 is outside", id="RA"),
        pytest.param({"MAG_R": np.full(COUNT, b"x")}, "column 'MAG_R': text, must be numbers", id="text magnitude"),
        pytest.param({"PROVABGS_LOGMSTAR_BF": np.full(COUNT, 3e10)}, "row 0, column .*must be the log10", id="mass"),
        pytest.param(
            {"MAG_R": np.zeros(COUNT)}, r"no row is left of 12 \(PROVABGS_LOGMSTAR_BF > 0: 2; ", id="none left"
        ),
        pytest.param({k: v[:0] for k, v in columns().items()}, "the table has no rows", id="empty"),
    ],
)
@pytest.mark.parametrize("name", ("a.hdf5", "b.h5"))
def test_malformed(tmp_path, name, changes, match):
    path = write(tmp_path / name, columns(**changes))
    with pytest.raises(ValueError, match=rf"{name}: .*{match}|{name}: {match}"):
        Provabgs(path)


def test_first_of_duplicates(tmp_path):
    source = Provabgs(write(tmp_path / "a.h5", columns(TARGETID=np.arange(COUNT) // 2)), cuts=False, duplicates="first")
    assert source.describe(0, 6).keys == list("012345") and source.removed == {"TARGETID of an earlier row": 6}


def test_truncated(path):
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match="not readable as a table"):
        Provabgs(path)
