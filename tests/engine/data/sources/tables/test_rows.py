import pickle

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import MaskedColumn, Table
from table_files import COLUMNS, FLUX, FORMATS, IDS, write

from armillary.engine.data.building.build import build
from armillary.engine.data.format.shards import key_problem
from armillary.engine.data.sources.joined import Joined, Key, Match
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.tables.catalogue import Catalogue
from armillary.engine.data.sources.tables.rows import TableRows

OPTIONS = {
    "key": "TARGETID",
    "labels": {"TARGETID": "targetid", "Z": "redshift", "nobs": "nobs", "bright": "bright", "SPECTYPE": "spectype"},
    "vectors": {"photometry": ("mag_g", "mag_r")},
    "missing": (-99.0, 99.0),
    "units": {"photometry": "mag", "redshift": "heliocentric redshift"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_same_rows_from_every_format(tmp_path, name):
    source = pickle.loads(pickle.dumps(TableRows(write(tmp_path / name), **OPTIONS)))
    assert len(source) == 6 and source.bands == () and source.unit == ""
    rows = source.describe(0, 6)
    assert rows.keys == [str(i) for i in IDS] and rows.columns["targetid"] == rows.keys and not rows.bad
    np.testing.assert_array_equal(rows.columns["ra"], COLUMNS["RA"])
    np.testing.assert_array_equal(rows.columns["dec"], COLUMNS["Dec"])
    expected = np.array([0.1, np.nan, 0.3, 0.4, np.nan, 0.6], np.float32)
    np.testing.assert_array_equal(np.float32(rows.columns["redshift"]), expected)
    np.testing.assert_array_equal(rows.columns["bright"], COLUMNS["bright"])
    assert rows.columns["spectype"] == COLUMNS["SPECTYPE"].tolist()
    assert source.labels["redshift"] == "heliocentric redshift"
    assert [(v.name, v.components, v.unit) for v in source.vectors] == [("photometry", ("mag_g", "mag_r"), "mag")]
    photometry = np.stack([[20.5, 21.5, np.nan, 23.5, np.nan, 25.5], COLUMNS["mag_r"]], axis=1)
    for i in (5, 0, 2, 4):
        sample = source.read(i)
        assert (sample.key, sample.ra, sample.dec) == (str(IDS[i]), COLUMNS["RA"][i], COLUMNS["Dec"][i])
        assert sample.image is None and sample.spectrum is None and sample.source == f"{name}:{i}"
        assert sample.vectors["photometry"].dtype == np.float32
        np.testing.assert_array_equal(sample.vectors["photometry"], np.float32(photometry[i]))
        np.testing.assert_equal(sample.labels, {n: rows.columns[n][i] for n in source.labels})
    with pytest.raises(IndexError, match="row 6: this source has 6"):
        source.read(6)


@pytest.mark.parametrize("name", ("a.parquet", "a.fits", "a.hdf5", "records.h5", "compressed.h5"))
def test_columns_of_several_numbers(tmp_path, name):
    path = write(tmp_path / name, flux=FLUX)
    source = TableRows(path, vectors={"flux": "flux"}, components={"flux": ("g", "r", "z")}, labels=())
    assert source.vectors[0].components == ("g", "r", "z") and source.labels == {}
    np.testing.assert_array_equal(source.read(4).vectors["flux"], FLUX[4])
    assert TableRows(path, vectors={"flux": "flux"}).vectors[0].components == ("0", "1", "2")
    assert "flux" not in TableRows(path).labels
    with pytest.raises(ValueError, match="column 'flux': 3 numbers a row cannot be a label; make it a vector"):
        TableRows(path, labels=("flux",))


def test_lists_of_parquet(tmp_path):
    pq.write_table(pa.table({"flux": pa.array([[1.0, 2.0], None, [3.0, np.nan]])}), tmp_path / "a.parquet")
    source = TableRows(tmp_path / "a.parquet", vectors={"flux": "flux"})
    np.testing.assert_array_equal(source.read(1).vectors["flux"], [np.nan, np.nan])
    np.testing.assert_array_equal(source.read(2).vectors["flux"], [3, np.nan])
    pq.write_table(pa.table({"flux": pa.array([[1.0, 2.0], None, [3.0]])}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: column 'flux': not readable: row 2 has 1 numbers, the first"):
        TableRows(tmp_path / "b.parquet", vectors={"flux": "flux"}).read(0)


def test_defaults(tmp_path):
    columns = {"ra": COLUMNS["RA"], "DEC": COLUMNS["Dec"], "Source": COLUMNS["SPECTYPE"], "big": IDS}
    source = TableRows(write(tmp_path / "my table.v2.csv", columns))
    assert TableRows(write(tmp_path / "c.csv"), text=("nobs",)).read(1).labels["nobs"] == "2"
    assert list(source.labels) == ["source_", "big"] and source.read(2).ra == 180.25
    assert source.describe(1, 3).keys == ["my_table_v2-0000001", "my_table_v2-0000002"]
    nowhere = TableRows(write(tmp_path / "b.csv", {"x": COLUMNS["RA"]}))
    assert np.isnan(nowhere.read(0).ra) and nowhere.describe(2, 2).keys == []


def test_keys_of_several_columns_and_of_text(tmp_path):
    columns = {"release": np.full(3, 9010), "brickid": np.array([1, 1, 2]), "name": np.array(["J10.5+1", "", "b c"])}
    path = write(tmp_path / "a.parquet", columns)
    assert TableRows(path, key=("release", "name")).describe(0, 3).keys == ["9010_J10_5+1", "", "9010_b_c"]
    source = TableRows(path, key="name")
    assert source.describe(1, 3).bad == {1: f"{path}: row 1: no value in name, so it has no key"}
    with pytest.raises(BadSample, match="row 1: no value in name"):
        source.read(1)
    with pytest.raises(
        ValueError, match=r"row 1, column 'release' and 'brickid': 9010_1 is also that of .*row 0 \(1 rep"
    ):
        TableRows(path, key=("release", "brickid"))
    first = TableRows(path, key=("release", "brickid"), duplicates="first")
    assert first.describe(0, 2).keys == ["9010_1", "9010_2"] and first.read(1).source == "a.parquet:2"
    assert "cut: release_brickid of an earlier row" in first.inputs()


def test_several_files_as_one(tmp_path):
    parts = [{k: v[s] for k, v in COLUMNS.items()} for s in (slice(0, 2), slice(2, 6))]
    parts[0]["Z"] = np.array([1, 2])  # whole numbers in one file, fractions in the other
    (tmp_path / "north").mkdir()
    (tmp_path / "south").mkdir()
    write(tmp_path / "north" / "a.csv", parts[0])
    write(tmp_path / "south" / "a.csv", parts[1])
    source = TableRows(tmp_path, key="TARGETID")
    assert source.describe(1, 4).keys == [str(i) for i in IDS[1:4]]
    np.testing.assert_allclose(source.describe(0, 3).columns["z"], [1, 2, 0.3], rtol=1e-6)
    assert source.read(3).source == "south/a.csv:1" and set(source.inputs()) == {"north/a.csv", "south/a.csv"}
    write(tmp_path / "south" / "a.csv", parts[1], SPECTYPE=np.arange(4))
    with pytest.raises(ValueError, match=r"south/a\.csv: column 'SPECTYPE' is int, in .*north/a\.csv it is text"):
        TableRows(tmp_path)
    write(tmp_path / "south" / "a.csv", parts[1], nobs=None)
    with pytest.raises(ValueError, match=r"south/a\.csv: column 'nobs' is not in both"):
        TableRows(tmp_path)
    write(tmp_path / "south" / "a.csv", parts[1], TARGETID=IDS[:4])
    with pytest.raises(
        ValueError, match=r"south/a\.csv: row 0, column 'TARGETID': .* is also that of .*north/a\.csv: row 0"
    ):
        TableRows(tmp_path, key="TARGETID")


def test_fits_quirks(tmp_path):
    """TNULL, unsigned and scaled columns, logical nulls, padded text, a table that is not the first."""
    columns = [
        fits.Column("a", "J", null=-1, array=np.array([5, -1, 7])),
        fits.Column("u", "K", bzero=2**63, array=np.array([1, 2**63 + 1, 2**64 - 1], np.uint64)),
        fits.Column("s", "I", null=-1, array=np.array([0, 1, -1])),
        fits.Column("l", "L", array=np.array([True, False, True])),
        fits.Column("t", "6A", array=np.array(["ab", "cd  ", ""])),
        fits.Column("v", "PE()", array=np.array([[1.0], [1.0, 2.0], []], dtype=object)),
        fits.Column("c", "4D", dim="(2,2)", array=np.zeros((3, 2, 2))),
    ]
    first = fits.BinTableHDU.from_columns([fits.Column("x", "E", array=np.zeros(1))])
    second = fits.BinTableHDU.from_columns(columns, name="DATA")
    fits.HDUList([fits.PrimaryHDU(), first, second]).writeto(tmp_path / "a.fits")
    fits.setval(tmp_path / "a.fits", "TSCAL3", value=0.5, ext=2)
    fits.setval(tmp_path / "a.fits", "TZERO3", value=10, ext=2)
    source = TableRows(tmp_path / "a.fits", table="DATA")
    rows = source.describe(0, 3).columns
    np.testing.assert_array_equal(rows["a"], [5, np.nan, 7])
    assert rows["u"] == ["1", str(2**63 + 1), str(2**64 - 1)] and rows["t"] == ["ab", "cd", ""]
    np.testing.assert_array_equal(rows["s"], [10, 10.5, np.nan])
    np.testing.assert_array_equal(rows["l"], [1, 0, 1])
    assert set(source.labels) == {"a", "u", "s", "l", "t"}
    assert list(TableRows(tmp_path / "a.fits").labels) == ["x"]
    masked = Table({"z": MaskedColumn([1, 2], mask=[False, True]), "f": MaskedColumn([1.0, 2.0], mask=[True, False])})
    masked.write(tmp_path / "b.fits")
    rows = TableRows(tmp_path / "b.fits").describe(0, 2).columns
    np.testing.assert_array_equal(rows["z"], [1, np.nan])
    np.testing.assert_array_equal(rows["f"], [np.nan, 2])


def test_nulls_of_csv_and_parquet(tmp_path):
    (tmp_path / "a.csv").write_text("id, n ,t\n9007199254740993,1,x\n,,\n9007199254740995,3.5,NA\n")
    rows = TableRows(tmp_path / "a.csv").describe(0, 3).columns
    assert rows["id"] == ["9007199254740993", "", "9007199254740995"] and rows["t"] == ["x", "", "NA"]
    np.testing.assert_array_equal(rows["n"], [1, np.nan, 3.5])
    (tmp_path / "u.csv").write_text("u,f\n18446744073709551615,1e30\n,2\n9223372036854775809,3\n")
    rows = TableRows(tmp_path / "u.csv", labels=("u", "f")).describe(0, 3).columns
    assert rows["u"] == ["18446744073709551615", "", "9223372036854775809"] and rows["f"].tolist() == [1e30, 2, 3]
    table = pa.table({"b": pa.array([True, None]), "d": pa.array(["x", None]).dictionary_encode(), "e": pa.nulls(2)})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = TableRows(tmp_path / "a.parquet").describe(0, 2).columns
    np.testing.assert_array_equal(rows["b"], [1, np.nan])
    assert rows["d"] == ["x", ""] and np.isnan(rows["e"]).all()


def test_hours(tmp_path):
    hours = np.linspace(0.01, 23.99, 200)
    path = write(tmp_path / "a.csv", {"ra": hours, "dec": np.zeros(200)})
    with pytest.raises(ValueError, match=r"column 'ra': right ascensions from 0\.01 to 24 look like hours"):
        TableRows(path)
    assert TableRows(path, ra_unit="hour").read(1).ra == pytest.approx(15 * hours[1])
    assert TableRows(path, ra_unit="hour").describe(0, 200).columns["ra"].max() == pytest.approx(359.85)
    assert TableRows(path, ra_unit="degree").read(1).ra == pytest.approx(hours[1])
    fits.BinTableHDU.from_columns([fits.Column("RA", "D", unit="h", array=[1.0])]).writeto(tmp_path / "b.fits")
    with pytest.raises(ValueError, match="column 'RA': its unit is hours"):
        TableRows(tmp_path / "b.fits")


def test_missing_by_column(tmp_path):
    path = write(tmp_path / "a.fits", e=np.array([-99.9, 1, 2, 3, 4, 5], np.float32))
    source = TableRows(path, missing={"e": (-99.9,), "nobs": (3,)})
    rows = source.describe(0, 6).columns
    assert np.isnan(rows["e"][0]) and np.isnan(rows["nobs"][2]) and rows["z"][1] == -99


def image_only(path):
    fits.PrimaryHDU(np.zeros((2, 2))).writeto(path)


def structs_only(path):
    pq.write_table(pa.table({"x": pa.array([{"a": 1}])}), path)


MALFORMED = {  # file; its text, the columns that differ, or what writes it; options; message
    "empty file": ("a.csv", "", {}, r"a\.csv: not readable as a table: Empty CSV file"),
    "no rows": ("a.csv", "x,y\n", {}, r"a\.csv: the table has no rows"),
    "ragged row": ("a.csv", "x,y\n1,2\n3\n", {}, r"a\.csv: not readable as a table: .*Row #3: Expected 2 columns, got 1"),
    "column twice": ("a.csv", "x,x\n1,2\n", {}, "column 'x' occurs twice"),
    "not Parquet": ("a.parquet", "text", {}, r"a\.parquet: not readable as a table"),
    "not HDF5": ("a.h5", "text", {}, r"a\.h5: not readable as a table"),
    "not FITS": ("a.fits", "text", {}, r"a\.fits: not readable as a table"),
    "no table": ("a.fits", image_only, {}, "no binary table"),
    "other ending": ("a.txt", "x", {}, r"a\.txt: .*not readable as a table"),
    "no numbers": ("a.parquet", structs_only, {}, "no column holds numbers or text"),
    "no such column": ("a.fits", {}, {"key": "targetid"}, r"no column 'targetid' \(key\).*are TARGETID"),
    "no such label": ("a.fits", {}, {"labels": ("q",)}, "no column 'q' .label 'q'.*TARGETID, RA"),
    "text as ra": ("a.fits", {}, {"ra": "SPECTYPE"}, "column 'SPECTYPE': text, but ra must be decimal"),
    "text in a vector": ("a.fits", {}, {"vectors": {"v": ("mag_g", "SPECTYPE")}}, "column 'SPECTYPE': text, but the other parts of vector 'v' must be numbers"),
    "array in a vector": ("a.fits", {"flux": FLUX}, {"vectors": {"v": ("mag_g", "flux")}}, "column 'flux': 3 numbers a row, beside other columns of vector 'v'"),
    "fractions as keys": ("a.fits", {}, {"key": "mag_r"}, "column 'mag_r': .*cannot be keys"),
    "fractions as identifiers": ("a.fits", {}, {"text": ("mag_r",)}, "column 'mag_r': an identifier must be whole numbers or text"),
    "ra above 360": ("a.fits", {"RA": COLUMNS["RA"] + 1}, {}, r"a\.fits: row 3, column 'RA': ra 360\.9 is outside \[0, 360\] degrees$"),
    "ra to 180": ("a.csv", {"RA": COLUMNS["RA"] - 180}, {}, "row 0, column 'RA': ra -180 is outside .*must become 0 to 360: add 360"),
    "dec below -90": ("a.hdf5", {"Dec": COLUMNS["Dec"] - 2}, {}, r"row 0, column 'Dec': dec -91 is outside \[-90, 90\]"),
    "key twice": ("a.fits", {"TARGETID": IDS[[0, 1, 2, 1, 4, 5]]}, {"key": "TARGETID"}, rf"a\.fits: row 3, column 'TARGETID': {IDS[1]} is also that of .*row 1 \(1 repetitions"),
    "a column of another length": ("a.hdf5", {"nobs": np.arange(5)}, {"labels": ("nobs",)}, "no column 'nobs' .label 'nobs'"),
    "labels alike": ("a.csv", {"z": COLUMNS["Z"]}, {}, "column 'z': label 'z' is also that of column 'Z'"),
    "label of the catalogue": ("a.csv", {}, {"labels": {"Z": "key"}}, "column 'Z': label 'key' is a name of the survey's own"),
    "labels as text": ("a.csv", {}, {"labels": "Z"}, "labels: must be a sequence"),
    "unit of nothing": ("a.csv", {}, {"units": {"q": "m"}}, "units: no label or vector is called 'q'"),
    "components": ("a.fits", {"flux": FLUX}, {"vectors": {"v": "flux"}, "components": {"v": ("a", "b")}}, "vector 'v' needs 3 different names"),
    "missing of nothing": ("a.csv", {}, {"missing": {"q": (1,)}}, "no column 'q' .missing values"),
    "no such group": ("a.hdf5", {}, {"table": "q"}, "no group or data set 'q'; it has photometry"),
    "ra_unit": ("a.csv", {}, {"ra_unit": "rad"}, "ra_unit: must be one of degree, hour"),
}  # fmt: skip


@pytest.mark.parametrize("name, content, options, match", MALFORMED.values(), ids=MALFORMED)
def test_malformed(tmp_path, name, content, options, match):
    path = tmp_path / name
    if isinstance(content, dict):
        write(path, **content)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        content(path)
    with pytest.raises(ValueError, match=match):
        TableRows(path, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_columns_are_read_from_end_to_end(tmp_path, name):
    """A run of rows at a time, over the borders of files and of groups of rows, and identifiers to the last digit."""
    table = Catalogue([write(tmp_path / f"{n}{name}", Z=COLUMNS["Z"] + n) for n in range(2)])
    for start, stop in ((0, 12), (1, 5), (5, 7), (11, 12)):
        for column in ("Z", "nobs", "mag_g"):
            np.testing.assert_array_equal(
                table.numbers_between(column, start, stop), table.numbers(column, np.arange(start, stop))
            )
        twice = [*IDS.tolist(), *IDS.tolist()][start:stop]
        assert table.identifiers("TARGETID", start, stop).to_pylist() == twice
        texts = [str(t) or None for t in [*COLUMNS["SPECTYPE"], *COLUMNS["SPECTYPE"]][start:stop]]
        assert table.identifiers("SPECTYPE", start, stop).to_pylist() == texts
    assert table.identifiers("TARGETID", 0, 3).type == table.identifier_type("TARGETID") == pa.int64()


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_files(tmp_path, name):
    path = write(tmp_path / name, {k: np.tile(v, 200) for k, v in COLUMNS.items()})
    whole = path.read_bytes()
    cut = whole[: whole.rfind(b"\n", 0, len(whole) // 2) + 4] if name == "a.csv" else whole[: len(whole) // 2]
    path.write_bytes(cut)
    with pytest.raises(ValueError, match=rf"{name}: "):
        TableRows(path, labels=("nobs",)).describe(0, 1200)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such table"):
        TableRows(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="no tables in it"):
        TableRows(tmp_path)


def test_hdf5_with_several_tables(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["one/x"], file["two/x"] = np.arange(2), np.arange(3)
        file["two/name"] = ["a", "b", "é"]
        file["two/x"].attrs["unit"] = "mag"
        file["two/cube"] = np.zeros((3, 2, 2))
    with pytest.raises(ValueError, match="has no single table; name one of one, two"):
        TableRows(tmp_path / "a.h5")
    source = TableRows(tmp_path / "a.h5", table="two")
    assert source.describe(0, 3).columns["name"] == ["a", "b", "é"] and source.labels["x"] == "mag"
    with pytest.raises(ValueError, match="not a column of records"):
        TableRows(tmp_path / "a.h5", table="two/x")


def test_hdf5_with_odd_data_sets(tmp_path, caplog):
    """What is no column of the table is left out and named; columns that disagree one to one are refused."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["ra"], file["dec"], file["z"] = np.arange(3.0), np.zeros(3), np.full(3, 0.5)
        file["edges"], file["none"], file["scalar"] = np.arange(4.0), np.zeros((0,)), 2.5
        file["inner/x"] = np.arange(3)
        file["cube"] = np.zeros((3, 2, 2))
        file.create_dataset("ragged", (3,), h5py.vlen_dtype(np.float32))
        file.create_dataset("links", (3,), h5py.ref_dtype)
        file.create_dataset("complex", data=np.ones(3, complex))
        file["empty"] = h5py.Empty("f4")
    source = TableRows(tmp_path / "a.h5")
    assert source.describe(0, 3).columns["z"].tolist() == [0.5] * 3 and set(source.labels) == {"z"}
    assert "left out 9 columns that are no columns of numbers or text (empty: a single value" in caplog.text
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["z"], file["edges"] = np.arange(3.0), np.arange(4.0)
    with pytest.raises(ValueError, match="'z' has 3 rows, 'edges' has 4: which of them are the table's"):
        TableRows(tmp_path / "b.h5")


def test_packed_and_read_back(tmp_path):
    source = TableRows(write(tmp_path / "a.fits"), **OPTIONS)
    build(source, tmp_path / "survey", name="rows", progress=False)
    back = PackedSurvey(tmp_path / "survey")
    assert len(back) == 6
    for i in range(6):
        sample = back.read(i)
        own = source.read(int(sample.key) - int(IDS[0]))
        assert (sample.ra, sample.dec) == (own.ra, own.dec)
        np.testing.assert_equal(sample.labels, own.labels)
        np.testing.assert_array_equal(sample.vectors["photometry"], own.vectors["photometry"])


def test_joined_by_identifier(tmp_path):
    left = TableRows(write(tmp_path / "a.fits"), **OPTIONS)
    right = TableRows(write(tmp_path / "b.csv", {"TARGETID": IDS[::-2], "mass": np.array([9.0, 10.0, 11.0])}))
    rows = Joined(left, Match(right, on=Key("targetid"), name="b_")).describe(0, 3)
    assert rows.keys == [str(i) for i in IDS[1::2]] and rows.columns["mass"].tolist() == [11, 10, 9]


REAL = {
    "catalogs/combined_catalog.fits.gz": (15878, {"missing": (-99.0,), "vectors": {"photometry": tuple("ugrizy")}}),
    "catalogs/gst_tests_small.fits.gz": (10000, {"vectors": {"flux": "MODELFLUX"}, "components": {"flux": "ugriz"}}),
    "catalogs/gz2_stripe82_votes.fits.gz": (19761, {"key": "objid", "vectors": {"bar": ("t03_bar_a06_bar_fraction",)}}),
    "catalogs/vollim_dr7_cbp_102709.fits.gz": (120606, {"labels": {"z": "redshift"}, "vectors": {"w": ("weight",)}}),
    "catalogs/hubble_42914.csv.gz": (42914, {"key": "objid"}),
    "simulated/test_dc2_training_9816.hdf5": (
        10225,
        {
            "key": "id",
            "vectors": {p: tuple(f"{p}_{b}_lsst" for b in "ugrizy") for p in ("mag", "mag_err")},
            "units": {"mag": "mag", "mag_err": "mag"},
        },
    ),
}


@pytest.mark.parametrize("name, count, options", [(n, c, o) for n, (c, o) in REAL.items()], ids=REAL)
def test_real_catalogues(real_data, name, count, options):
    source = TableRows(real_data / name, **options)
    assert len(source) == count
    rows = source.describe(0, count)
    assert len(set(rows.keys)) == count and not any(map(key_problem, rows.keys)) and not rows.bad
    for i in (0, count // 2, count - 1):
        sample = source.read(i)
        np.testing.assert_equal(sample.labels, {n: rows.columns[n][i] for n in source.labels})
        assert all(np.isfinite(v).any() for v in sample.vectors.values())
    if name.endswith("hdf5"):
        with h5py.File(real_data / name) as file:
            np.testing.assert_array_equal(source.read(7).vectors["mag"][2], file["photometry/mag_r_lsst"][7])
            np.testing.assert_array_equal(rows.columns["redshift"], file["photometry/redshift"][:])
    if "gz2" in name:
        assert rows.columns["objid"][0] == "8647474690312307154"
    if "combined" in name:
        assert set(rows.columns["source_"]) >= {"DEEP2/3"} and np.nanmin(rows.columns["i2"]) > 0
