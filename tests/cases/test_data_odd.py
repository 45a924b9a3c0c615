"""Inputs that nobody had listed, tried one after the other: read rightly, or refused by name."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table
from case_files import cutout, cutouts, noise, pictures

VECTORS = "vectors={'m':('g','r')}"
LABELS = {
    "commas at the end of each row": ("file,z\n" + "".join(f"sub/g{i}.png,{i},,\n" for i in range(4)), [0, 1, 2, 3]),
    "backslashes of Windows": ("file,z\n" + "".join(f"sub\\g{i}.png,{i}\n" for i in range(4)), [0, 1, 2, 3]),
    "infinities": ("file,z\n" + "".join(f"g{i},{'inf' if i == 0 else i}\n" for i in range(4)), [np.nan, 1, 2, 3]),
    "NA, null and N/A": ("file,z\ng0,NA\ng1,null\ng2,N/A\ng3,3\n", [np.nan, np.nan, np.nan, 3]),
    "tabs": ("file\tz\n" + "".join(f"g{i}\t{i}\n" for i in range(4)), [0, 1, 2, 3]),
}


@pytest.mark.case(kind="labels", inputs=", ".join(LABELS), right="read; infinite and marked values are unknown")
@pytest.mark.parametrize(("text", "values"), LABELS.values(), ids=LABELS)
def test_odd_labels(tmp_path, build, text, values):
    pictures(tmp_path / "s" / "sub")
    (tmp_path / "s" / "labels.csv").write_text(text)
    np.testing.assert_array_equal(build(tmp_path / "s").catalog["z"], values)


@pytest.mark.case(kind="labels", inputs="ra without dec; labels.csv is a folder", right="said; refused")
def test_half_a_position_and_a_folder(tmp_path, build, refused):
    assert "it has a column 'ra' and no 'dec'" in build(pictures(tmp_path / "s", labels="file,ra\ng0,1\n")).err
    pictures(tmp_path / "d")
    (tmp_path / "d" / "labels.csv").mkdir()
    assert "labels.csv: no such file of labels" in refused(tmp_path / "d")


@pytest.mark.case(kind="headers", inputs="a WCS without CRVAL", right="position unknown, not 0, 0")
def test_a_projection_without_a_place(tmp_path, build):
    cutouts(tmp_path / "s", CRVAL1=None, CRVAL2=None)
    assert np.isnan(build(tmp_path / "s").catalog["ra"]).all()


@pytest.mark.case(kind="headers", inputs="bands g g r", right="refused: two of one name")
def test_bands_of_one_name(tmp_path, refused):
    assert "bands g g r: two of one name" in refused(cutouts(tmp_path / "s", image=noise(1, 3, 16, 16), bands="ggr"))


@pytest.mark.case(kind="headers", inputs="fluxes of 3e38; no rows of pixels", right="unusable samples, named")
def test_pixels_beyond_the_codec(tmp_path, build):
    folder = cutouts(tmp_path / "s")
    cutout(folder / "bright.fits", image=np.full((3, 16, 16), 3e38, np.float32))
    cutout(folder / "flat.fits", image=np.zeros((3, 0, 16), np.float32))
    built = build(folder, "--on-bad", "skip")
    assert built.catalog["key"] == ["a0", "a1", "a2"]
    assert all(f"{name}.fits" in built.err for name in ("bright", "flat"))


@pytest.mark.case(kind="units", inputs="a table whose ra and dec are in radians (unit rad)", right="refused by name")
def test_positions_in_radians(tmp_path, refused):
    fields = [
        pa.field(n, pa.float64(), metadata={"unit": u})
        for n, u in {"g": "", "r": "", "ra": "rad", "dec": "rad"}.items()
    ]
    pq.write_table(pa.table([[1.0, 2.0]] * 4, schema=pa.schema(fields)), tmp_path / "t.parquet")
    message = refused(tmp_path / "t.parquet", "--kind", "table", "--option", VECTORS)
    assert "column 'ra': its unit is rad; convert it to degrees" in message


@pytest.mark.case(kind="columns", inputs="a column of structs beside the others", right="left out, named with its type")
def test_columns_that_cannot_be_read_are_named(tmp_path, build):
    pq.write_table(pa.table({"g": [1.0, 2.0], "r": [1.0, 2.0], "s": [{"a": 1}, {"a": 2}]}), tmp_path / "t.parquet")
    assert "left out 1 columns" in build(tmp_path / "t.parquet", "--kind", "table", "--option", VECTORS).err


@pytest.mark.case(
    kind="folders", inputs="a survey built inside the folder of its source, twice", right="never read as input"
)
def test_a_survey_inside_its_source(tmp_path, build):
    folder = tmp_path / "surveys"
    folder.mkdir()
    pq.write_table(pa.table({"g": [1.0, 2.0, 3.0], "r": [1.0, 2.0, 3.0]}), folder / "t.parquet")
    for _ in range(2):
        built = build(folder, "--kind", "table", "--option", VECTORS)
        assert built.code == 0 and len(built.catalog["key"]) == 3, built.err


@pytest.mark.case(
    kind="damaged plans", inputs=".build/plan.json cut short, or of another shape", right="exit 2, what to delete"
)
@pytest.mark.parametrize("text", ['{"identity": {"na', json.dumps({"identity": {}}), "[]"])
def test_a_plan_that_is_damaged(tmp_path, refused, text):
    plan = tmp_path / "surveys" / "refused" / ".build" / "plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text(text)
    assert "plan.json: the plan of an unfinished build is damaged" in refused(cutouts(tmp_path / "s"))


@pytest.mark.case(
    kind="archives", inputs="a zip with an encrypted picture, one with wrong bytes", right="unusable samples"
)
def test_zips_with_pictures_that_cannot_be_read(tmp_path, build):
    import zipfile

    for name in ("encrypted", "damaged"):
        pictures(tmp_path / "p")
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for path in sorted((tmp_path / "p").iterdir()):
                archive.write(path, path.name)
        data = bytearray((tmp_path / f"{name}.zip").read_bytes())
        if name == "encrypted":
            data[data.index(b"PK\x01\x02") + 8] |= 1
            data[data.index(b"PK\x03\x04") + 6] |= 1
        else:
            data[200] ^= 255
        (tmp_path / f"{name}.zip").write_bytes(data)
        built = build(tmp_path / f"{name}.zip", "--on-bad", "skip", name=name)
        assert built.code == 0 and built.catalog["key"] == ["g1", "g2", "g3"] and "g0.png" in built.err, built.err


@pytest.mark.case(
    kind="headers", inputs="a FITS image or table with an axis of -16", right="refused; astropy reads it for ever"
)
@pytest.mark.parametrize("name", ["image.fits", "table.fits"])
def test_an_axis_of_a_negative_length(tmp_path, refused, name):
    path = tmp_path / name
    if name == "image.fits":
        cutout(path)
    else:
        Table({"g": np.arange(4.0)}).write(path)
    raw = path.read_bytes()
    place = raw.index(b"NAXIS2  =") + 29  # the last digit of the card, whose number ends in column 30
    path.write_bytes(raw[: place - 2] + b"-16" + raw[place + 1 :])
    assert "NAXIS2 of HDU" in refused(path) and "is negative" in refused(path)


@pytest.mark.case(kind="files", inputs="a pipe, a device", right="refused by name, before anything is read")
def test_what_is_no_file(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert f"{path}: must be a file or a folder, got a device, pipe or socket" in refused(path)


@pytest.mark.case(kind="files", inputs="a picture whose name is not UTF-8", right="left out, and said")
def test_a_name_that_is_no_text(tmp_path, build):
    folder = pictures(tmp_path / "s", 2)
    shutil.copy(folder / "g0.png", os.fsencode(folder) + b"/\xe9.png")
    built = build(folder)
    assert built.catalog["key"] == ["g0", "g1"]
    assert r"left out 1 files whose names are not UTF-8 (\udce9.png)" in built.err


@pytest.mark.case(
    kind="options", inputs="--labels FILE for a table; --name of two lines", right="refused; the labels were lost"
)
def test_options_that_mean_nothing(tmp_path, refused):
    (tmp_path / "t.csv").write_text("id,g,r,z\n" + "".join(f"{i},{i},{i},0.{i}\n" for i in range(9)))
    words = ("--kind", "table", "--option", VECTORS, "key=id")
    assert "option labels: must be one or more of a text" in refused(
        tmp_path / "t.csv", *words, "--labels", tmp_path / "t.csv"
    )
    assert "name: must be one line of text" in refused(tmp_path / "t.csv", *words, "--name", "a\nb")
