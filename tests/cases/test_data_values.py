"""Inputs that gave wrong values without a word."""

import gzip
import os
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from case_files import WCS, cutout, cutouts, noise, pictures

from armillary.engine.data.sources.listing import list_folder

VECTORS = "vectors={'m':('g','r')}"


def table(path, count=40, **columns):
    columns = {"g": np.linspace(18, 22, count), "r": np.linspace(17, 21, count)} | columns
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.case(
    kind="repeated flags", inputs="--cut A --cut B; --option A --option B C", right="all of them count, in any grouping"
)
def test_repeated_flags_add_up(tmp_path, build):
    path = table(tmp_path / "t.parquet", z=np.linspace(0, 1, 40), id=[f"o{i}" for i in range(40)])
    options = ("--option", VECTORS, "--option", "key=id", "ra=None", "--cut", "z < 0.6", "--cut", "z > 0.2", "g < 21")
    keys = build(path, "--kind", "table", *options).catalog
    assert sorted(keys["key"]) == sorted(f"o{i}" for i in range(40) if 0.2 < i / 39 < 0.6 and 18 + 4 * i / 39 < 21)


@pytest.mark.case(
    kind="repeated flags", inputs="--split a --split b; --bands g --bands r", right="refused: only the last would count"
)
@pytest.mark.parametrize("words", [("--split", "key", "--split", "sky"), ("--bands", "g", "--bands", "r")])
def test_repeated_flags_that_do_not_add_up_are_refused(tmp_path, refused, words):
    assert f"{words[0]} is given twice" in refused(cutouts(tmp_path / "s"), *words)


@pytest.mark.case(
    kind="links", inputs="a folder linked into the source, in a circle, twice", right="read once, counted"
)
def test_links_are_followed_once(tmp_path, build):
    cutouts(tmp_path / "elsewhere")
    cutout(tmp_path / "s" / "b.fits", seed=9)
    (tmp_path / "s" / "north").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "s" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "s")
    (tmp_path / "s" / "latest.fits").symlink_to(tmp_path / "s" / "b.fits")
    (tmp_path / "s" / "gone.fits").symlink_to(tmp_path / "nowhere.fits")
    built = build(tmp_path / "s")
    assert built.catalog["key"] == ["again_a0", "again_a1", "again_a2", "b"]
    for part in (
        "folders that are linked more than once",
        "1 second names of one file (latest.fits)",
        "1 links to nowhere",
    ):
        assert part in built.err


@pytest.mark.case(
    kind="files that are no data",
    inputs=".ipynb_checkpoints, ._a.fits, .hidden, __MACOSX",
    right="left out, counted and named by reason",
)
def test_hidden_files_are_left_out(tmp_path, build):
    folder = cutouts(tmp_path / "s")
    for name in (".ipynb_checkpoints/a0-checkpoint.fits", "._a1.fits", ".trash/a2.fits", "__MACOSX/a3.fits"):
        cutout(folder / name, seed=9)
    built = build(folder)
    assert built.catalog["key"] == ["a0", "a1", "a2"]
    assert "1 checkpoints of notebooks" in built.err and "2 AppleDouble files of macOS" in built.err
    assert "1 hidden files (.trash/a2.fits)" in built.err


@pytest.mark.case(
    kind="frames", inputs="WCS: Dec first, galactic, ecliptic, FK4; RA and DEC in hours", right="RA and Dec in ICRS"
)
def test_positions_are_in_icrs(tmp_path, build):
    point = SkyCoord(40.0, 2.0, unit="deg")
    b1950 = point.fk4
    cutout(tmp_path / "s" / "icrs.fits", ra=40.0, dec=2.0)
    cutout(tmp_path / "s" / "swapped.fits", ra=2.0, dec=40.0, CTYPE1="DEC--TAN", CTYPE2="RA---TAN")
    galactic = {"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN"}
    cutout(tmp_path / "s" / "galactic.fits", ra=point.galactic.l.deg, dec=point.galactic.b.deg, **galactic)
    cutout(tmp_path / "s" / "fk4.fits", ra=b1950.ra.deg, dec=b1950.dec.deg, RADESYS="FK4", EQUINOX=1950.0)
    blank = dict.fromkeys([*WCS, "CRVAL1", "CRVAL2", "CRPIX1", "CRPIX2"])
    cutout(tmp_path / "s" / "hours.fits", **blank, RA="02:40:00.0", DEC="+02:00:00", PIXSCALE=0.262)
    catalog = build(tmp_path / "s").catalog
    np.testing.assert_allclose(catalog["ra"], 40.0, atol=1e-6)
    np.testing.assert_allclose(catalog["dec"], 2.0, atol=1e-6)


@pytest.mark.case(kind="frames", inputs="a WCS that is not of the sky", right="the file is unusable, the frame named")
def test_a_frame_that_is_not_of_the_sky_is_refused(tmp_path, refused):
    cutouts(tmp_path / "s")
    cutout(tmp_path / "s" / "mars.fits", CTYPE1="MALN-TAN", CTYPE2="MALT-TAN")
    assert "mars.fits: not a readable FITS file" in refused(tmp_path / "s")


@pytest.mark.case(
    kind="units",
    inputs="BUNIT of MJy/sr, nJy beside nanomaggy, 'hsc zp27', none",
    right="kept, converted, named or refused",
)
def test_units_are_read(tmp_path, build, refused):
    assert build(cutouts(tmp_path / "mjy", BUNIT="MJy/sr")).source.unit == "MJy/sr"
    assert build(cutouts(tmp_path / "hsc", BUNIT="hsc zp27"), name="hsc").source.unit == "hsc zp27"
    cutouts(tmp_path / "mixed", BUNIT="nanomaggies")
    cutout(tmp_path / "mixed" / "njy.fits", seed=0, image=noise(0, 3, 16, 16) * 3631, BUNIT="nJy")
    built = build(tmp_path / "mixed", name="mixed")
    samples = built.samples()
    assert built.source.unit == "nanomaggy" and "1 files converted from nJy to nanomaggy" in built.err
    np.testing.assert_allclose(samples["njy"].image, samples["a0"].image, atol=built.source.survey.step[0])
    cutout(tmp_path / "mixed" / "odd.fits", seed=1, BUNIT="adu")
    assert "odd.fits: its unit is 'adu', which cannot be converted" in refused(tmp_path / "mixed")


@pytest.mark.case(kind="BLANK", inputs="an unsigned image (BZERO) with BLANK", right="masked, not 65537 counts")
def test_blank_of_unsigned_images_is_masked(tmp_path, build):
    for i in range(3):
        pixels = np.random.default_rng(i).integers(900, 1100, (1, 16, 16)).astype(np.uint16)
        pixels[0, 0, :4] = 65535
        cutout(tmp_path / "s" / f"a{i}.fits", image=pixels, bands="r", BLANK=32767)
    sample = build(tmp_path / "s").samples()["a0"]
    np.testing.assert_array_equal(np.flatnonzero(~sample.valid.ravel()), range(4))
    assert sample.image.max() < 1200


@pytest.mark.case(
    kind="identifiers",
    inputs="labels.csv: 1237648720693755918.0, 0001, 1_0; the same in tables",
    right="text, every digit and zero kept",
)
@pytest.mark.parametrize("cells", ["1237648720693755918.0,0001,1_0", "1237648720693755918,0001,1_0"])
def test_identifiers_are_text(tmp_path, build, cells):
    rows = [cells, cells.replace("0001", "0011").replace("1_0", "1_1")]
    pictures(tmp_path / "s", 2, "\n".join(["file,objid,brick,pos", *(f"g{i}.png,{row}" for i, row in enumerate(rows))]))
    found = build(tmp_path / "s", "--sky-sigma", "1", "1", "1").catalog
    expected = {"objid": ["1237648720693755918"] * 2, "brick": ["0001", "0011"], "pos": ["1_0", "1_1"]}
    assert {name: found[name] for name in expected} == expected
    (tmp_path / "t.csv").write_text("\n".join(["objid,brick,pos,g,r", *(f"{row},1,2" for row in rows)]))
    words = ("--kind", "table", "--option", VECTORS, "key=('brick','pos')")
    found = build(tmp_path / "t.csv", *words, name="t").catalog
    assert {name: found[name] for name in expected} == expected and found["key"] == ["0001_1_0", "0011_1_1"]


@pytest.mark.case(
    kind="identifiers", inputs="a column objid of 1.237648720693756e+18", right="refused: its digits are lost already"
)
def test_identifiers_without_their_digits_are_refused(tmp_path, refused):
    text = "file,objid\n" + "\n".join(f"g{i}.png,1.23764872069375{i}e+18" for i in range(4))
    assert "an identifier whose last digits are lost" in refused(pictures(tmp_path / "s", labels=text))


@pytest.mark.case(
    kind="format by content", inputs="gzipped FITS named .fits, Parquet named .csv, HDF5 named .parquet", right="read"
)
def test_first_bytes_tell_the_format(tmp_path, build):
    columns = {"g": [1.0, 2.0, 3.0], "r": [4.0, 5.0, 6.0], "id": [2**60 + i for i in range(3)]}
    Table(columns).write(tmp_path / "plain.fits")
    (tmp_path / "t.fits").write_bytes(gzip.compress((tmp_path / "plain.fits").read_bytes()))
    pq.write_table(pa.table(columns), tmp_path / "t.csv")
    for name in ("t.fits", "t.csv"):
        built = build(tmp_path / name, "--kind", "table", "--option", VECTORS, "key=id", name=name)
        assert built.catalog["id"] == [str(v) for v in columns["id"]], name
        assert built.catalog["g"] == columns["g"]


@pytest.mark.case(kind="positions", inputs="columns RA, Dec in labels.csv; a key of File", right="known in any case")
def test_columns_are_known_in_any_case(tmp_path, build):
    rows = "\n".join(f"g{i}.png,{150 + i},2.5,train" for i in range(4))
    found = build(pictures(tmp_path / "s", labels=f"File,RA,Dec,Split\n{rows}"), "--split", "source").catalog
    assert (
        found["ra"] == [150.0, 151.0, 152.0, 153.0] and found["dec"] == [2.5] * 4 and set(found["split"]) == {"train"}
    )


@pytest.mark.case(
    kind="sentinels",
    inputs="magnitudes of 99, redshifts of -99, -9999",
    right="unknown, counted and named; counts of 99 stay",
)
def test_sentinels_are_unknown(tmp_path, build):
    z, g, n = np.linspace(0.1, 1, 40), np.linspace(18, 25, 40), np.arange(80, 120)
    z[:2], z[2], g[:3] = -99, -9999, 99
    built = build(table(tmp_path / "t.parquet", z=z, g=g, n=n), "--kind", "table", "--option", VECTORS)
    found = built.catalog
    assert np.isnan(found["z"][:3]).all() and np.isnan(found["g"][:3]).all() and not np.isnan(found["n"]).any()
    assert np.isnan(built.samples()["t-0000000"].vectors["m"]).tolist() == [True, False]
    assert "column 'z': -99 in 2 rows, -9999 in 1 row taken for unknown" in built.err
    assert "99 in 3 rows taken for unknown" in built.source.labels["g"]
    kept = build(tmp_path / "t.parquet", "--kind", "table", "--option", VECTORS, "missing=()", name="kept")
    assert kept.catalog["z"][0] == -99


@pytest.mark.case(
    kind="encodings", inputs="a CSV in Latin-1, in UTF-16, with ; between cells", right="read, and said so"
)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_text_of_any_encoding(tmp_path, build, encoding):
    (tmp_path / "c.csv").write_bytes("objid;note;g;r\n1;café;2.5;3\n2;café;2.6;3\n".encode(encoding))
    found = build(tmp_path / "c.csv", "--kind", "table", "--option", VECTORS, "key=objid")
    assert found.catalog["note"] == ["café"] * 2 and found.catalog["g"] == [2.5, 2.6]
    assert ("was read as Latin-1" in found.err) == (encoding == "latin-1")


@pytest.mark.case(kind="labels", inputs="labels.csv inside the zip; a folder of one zip", right="the labels are used")
def test_labels_in_the_archive(tmp_path, build):
    pictures(tmp_path / "p", labels="file,z\n" + "\n".join(f"g{i}.png,0.{i}" for i in range(4)))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted((tmp_path / "p").iterdir()):
            archive.write(path, f"inside/{path.name}")
        archive.writestr("__MACOSX/inside/._labels.csv", b"\x00\x05")
    assert build(tmp_path / "a.zip").catalog["z"] == [0.0, 0.1, 0.2, 0.3]
    (tmp_path / "q").mkdir()
    os.rename(tmp_path / "a.zip", tmp_path / "q" / "images.zip")
    (tmp_path / "q" / "labels.csv").write_text("file,y\ninside/g0.png,7\n")
    assert build(tmp_path / "q", name="q").catalog["y"][0] == 7


@pytest.mark.case(
    kind="HATS", inputs="partition_info.csv, data_thumbnail.parquet beside Norder=0", right="each row once"
)
def test_hats_rows_are_read_once(tmp_path, build):
    leaf = tmp_path / "cat" / "dataset" / "Norder=0" / "Dir=0"
    leaf.mkdir(parents=True)
    table(leaf / "Npix=3.parquet", 5)
    table(tmp_path / "cat" / "dataset" / "data_thumbnail.parquet", 2)
    (tmp_path / "cat" / "partition_info.csv").write_text("Norder,Npix\n0,3\n")
    built = build(tmp_path / "cat", "--kind", "table", "--option", VECTORS)
    assert len(built.catalog["key"]) == 5 and "left out 2 files of metadata" in built.err


@pytest.mark.case(
    kind="HATS",
    inputs="a collection: primary table in folders Npix=N/, margin cache, index",
    right="the primary table, once",
)
@pytest.mark.parametrize("named", [True, False], ids=["by the collection", "by each table's own type"])
def test_a_hats_collection_is_its_primary_table(tmp_path, build, named):
    top = tmp_path / "collection"
    for name, kind, rows in (("objects", "object", 5), ("objects_10arcs", "margin", 3), ("objects_id", "index", 4)):
        leaf = top / name / "dataset" / "Norder=1" / "Dir=0" / "Npix=44"
        leaf.mkdir(parents=True)
        table(leaf / "part0.parquet", rows)
        (top / name / "hats.properties").write_text(
            f"#HATS catalog\nobs_collection={name}\ndataproduct_type = {kind}\n"
        )
    if named:
        (top / "collection.properties").write_text("obs_collection = c\nhats_primary_table_url = objects\n")
    built = build(top, "--kind", "table", "--option", VECTORS)
    assert len(built.catalog["key"]) == 5
    assert "files of a HATS collection beside its primary table" in built.err
    asked_for = list_folder(top / "objects_10arcs").files
    assert [file.name for file in asked_for if file.suffix == ".parquet"] == ["part0.parquet"]


@pytest.mark.case(
    kind="statistics", inputs="splits called training and test", right="statistics of training alone, and said so"
)
def test_statistics_leave_the_test_split_out(tmp_path, build):
    for i in range(8):
        cutout(tmp_path / "s" / f"a{i}.fits", image=noise(i, 3, 16, 16) + (5.0 if i % 2 else 0.0))
    rows = "\n".join(f"a{i},{'test' if i % 2 else 'training'}" for i in range(8))
    (tmp_path / "s" / "labels.csv").write_text(f"file,split\n{rows}\n")
    built = build(tmp_path / "s", "--split", "source")
    assert abs(built.source.survey.statistics.mean[0]) < 0.01 and "those of training" in built.err


@pytest.mark.case(
    kind="splits",
    inputs="a deep field of half a degree, --split auto",
    right="the missing test split is said, with advice",
)
@pytest.mark.parametrize("count", [400, 40])
def test_a_test_split_that_is_empty_is_said(tmp_path, build, count):
    ra = 150.3 + np.linspace(0, 0.4, count)
    built = build(table(tmp_path / "t.parquet", count, ra=ra, dec=ra * 0 + 2.5), "--kind", "table", "--option", VECTORS)
    assert f"0 of {count} samples are the test split, 10 % were asked for" in built.err
    assert "--split random:0" in built.err and "components," not in built.out


@pytest.mark.case(
    kind="masks", inputs="a WCS cutout with two HDUs, NaN and 0", right="NaN and 0 masked; exports keep 0"
)
def test_zeros_are_missing_unless_the_header_says_otherwise(tmp_path, build):
    image = noise(0, 3, 16, 16)
    image[0, 0, 0], image[1, 1, 1] = 0, np.nan
    cutouts(tmp_path / "a", image=image)
    cutouts(tmp_path / "b", image=image, ZEROMISS=False)
    assert (~build(tmp_path / "a", name="a").samples()["a0"].valid).sum() == 2
    assert (~build(tmp_path / "b", name="b").samples()["a0"].valid).sum() == 1
    assert fits.getheader(tmp_path / "b" / "a0.fits")["ZEROMISS"] is False
