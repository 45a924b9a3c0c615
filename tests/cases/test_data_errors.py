"""Bad input ends with exit code 2 and a sentence that says what, where and what to do; no traceback, nothing half-made."""

import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from case_files import cutout, cutouts, pictures, run

from armillary.engine.exclusive import exclusive

VECTORS = "vectors={'m':('g','r')}"


def png_header(width, height):
    """A PNG whose pixels are not there."""
    chunks = [b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]), b"IDAT", b"IEND"]
    parts = [(len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.case(kind="pictures", inputs="a PNG of 20000 x 10000 pixels among small ones", right="an unusable sample")
def test_a_huge_picture(tmp_path, build, refused):
    folder = pictures(tmp_path / "s")
    (folder / "mosaic.png").write_bytes(png_header(20000, 10000))
    assert "mosaic.png: not a readable picture: too large for a picture of a galaxy" in refused(folder)
    assert len(build(folder, "--on-bad", "skip").catalog["key"]) == 4


OPTIONS = {
    "a number for several": ("missing=-99", None),
    "text for several": ("labels=g", None),
    "text for numbers": ("missing=none", "option missing: must be one or more of a number"),
    "a number for a mapping": ("vectors=3", "option vectors: must be a mapping such as"),
    "another name": ("vector={}", "vector: sources of kind table have no such option"),
    "another word": ("duplicates=last", "option duplicates: must be 'error' or 'first', got 'last'"),
    "no value": ("missing", "must be NAME=VALUE"),
    "twice": ("key=g", "option 'key': given twice"),
}


@pytest.mark.case(
    kind="options",
    inputs="--option missing=-99, labels=g, vectors=3, duplicates=last, ...",
    right="fitted or refused by name",
)
@pytest.mark.parametrize(("option", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_wrong_type(tmp_path, build, refused, option, message):
    pq.write_table(pa.table({"g": [1.0, 2.0], "r": [1.0, -99.0]}), tmp_path / "t.parquet")
    words = ("--kind", "table", "--option", VECTORS) if not option.startswith("vectors") else ("--kind", "table")
    words += ("--option", option, *(("key=r",) if option.startswith("key") else ()))
    if message is None:
        assert build(tmp_path / "t.parquet", *words).code == 0
    else:
        assert message in refused(tmp_path / "t.parquet", *words)


@pytest.mark.case(kind="options", inputs="grid=linear,3600,0.8,7781 (no parentheses)", right="the same as the tuple")
def test_a_tuple_without_parentheses(tmp_path, refused):
    (tmp_path / "spec-1000-50000-0001.fits").write_bytes(b"")
    message = refused(tmp_path, "--kind", "sdss", "--option", "grid=linear,3600,0.8,7781")
    assert "spec-1000-50000-0001.fits: not readable" in message
    assert "option grid: must be" in refused(tmp_path, "--kind", "sdss", "--option", "grid=linear,3600")


@pytest.mark.case(
    kind="other formats", inputs="npz, npy", right="said that they are not read, and what to write instead"
)
def test_files_of_numpy(tmp_path, refused):
    (tmp_path / "s").mkdir()
    np.savez(tmp_path / "s" / "a.npz", images=np.zeros((2, 3, 8, 8)))
    assert "files of NumPy are not read: write FITS" in refused(tmp_path / "s", "--kind", "fits")
    assert "a file of NumPy (npz); write Parquet" in refused(tmp_path / "s" / "a.npz", "--kind", "table")


@pytest.mark.case(
    kind="tables", inputs="a table of labels only", right="refused before work, with an example of vectors"
)
def test_a_table_of_labels_only(tmp_path, refused):
    pq.write_table(pa.table({"z": [1.0, 2.0]}), tmp_path / "t.parquet")
    message = refused(tmp_path / "t.parquet", "--kind", "table")
    assert "labels only" in message and "--option \"vectors={'photometry': ('mag_g', 'mag_r', 'mag_z')}\"" in message


@pytest.mark.case(kind="files left out", inputs="--kind sdss with other FITS files beside", right="counted and named")
def test_files_of_other_names_are_named(tmp_path, build):
    for name in ("spec-1000-50000-0001.fits", "boss-1.fits", "boss-2.fits"):
        (tmp_path / name).write_bytes(b"")
    assert (
        "left out 2 files that are no spectrum files by their names (boss-1.fits, boss-2.fits)"
        in build(tmp_path, "--kind", "sdss").err
    )


@pytest.mark.case(
    kind="leaks", inputs="a survey without positions; one with a single split", right="nothing to compare, exit 2"
)
def test_leaks_where_nothing_can_be_compared(tmp_path, build, capsys):
    pq.write_table(pa.table({"g": np.arange(40.0), "r": np.arange(40.0)}), tmp_path / "t.parquet")
    folder = build(tmp_path / "t.parquet", "--kind", "table", "--option", VECTORS).folder
    assert run("data", "leaks", folder) == 2 and "no two of its splits have positions" in capsys.readouterr().err
    folder = build(cutouts(tmp_path / "s"), "--test-fraction", "0", name="one").folder
    assert run("data", "leaks", folder) == 2 and "its only split is 'train'" in capsys.readouterr().err


@pytest.mark.case(
    kind="exclusive use", inputs="a build in a folder that another process owns", right="exit 2, the owner named"
)
def test_a_folder_in_use(tmp_path, refused):
    (tmp_path / "surveys" / "refused").mkdir(parents=True)
    with exclusive(tmp_path / "surveys" / "refused"):
        assert "surveys/refused: in use by" in refused(cutouts(tmp_path / "s"))


WRONG = {
    "no such source": (lambda p: p / "nowhere", (), "no such file or folder"),
    "an empty folder": (lambda p: p, (), "what to read is not clear (no file of a known kind)"),
    "an empty range": (cutouts, ("--split", "ra:120:120"), "120.0 is not below 120.0"),
    "a split that the source lacks": (cutouts, ("--split", "source"), "the source assigns it no split"),
    "another kind": (cutouts, ("--kind", "galaxies"), "kind: must be auto"),
    "too large a size": (cutouts, ("--size", "64"), "smaller than the size 64"),
    "a size of nothing": (cutouts, ("--size", "0"), "size: must be at least 1"),
    "two few sky sigmas": (cutouts, ("--sky-sigma", "1"), "sky_sigma: must be 3 positive numbers"),
    "a word for a number": (cutouts, ("--seed", "one"), "invalid"),
    "a cut on nothing": (cutouts, ("--cut", "z < 1"), "no column 'z'"),
    "a cut that is none": (cutouts, ("--cut", "z"), "must be COLUMN OP VALUE"),
    "no labels file": (cutouts, ("--labels", "nowhere.csv"), "no such file of labels"),
}


@pytest.mark.case(kind="bad options", inputs=", ".join(WRONG), right="exit 2, option and value named")
@pytest.mark.parametrize(("source", "words", "message"), WRONG.values(), ids=WRONG)
def test_bad_options(tmp_path, refused, source, words, message):
    (tmp_path / "s").mkdir()
    assert message.lower() in refused(source(tmp_path / "s"), *words).lower()


@pytest.mark.case(
    kind="output", inputs="--out is a file; --out lies below a file", right="exit 2 before anything is read"
)
def test_an_output_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "survey"):
        words = [
            "data",
            "build",
            cutouts(tmp_path / f"s{len(str(out))}"),
            "-o",
            out,
            "--no-progress",
            "--processes",
            "1",
        ]
        assert run(*words) == 2 and "choose another one for the survey" in capsys.readouterr().err


FITS = {
    "text named .fits": (lambda p: p.write_text("hello"), "not a readable FITS file"),
    "an empty file": (lambda p: p.write_bytes(b""), "not a readable FITS file"),
    "a header without an end": (
        lambda p: p.write_bytes(b"SIMPLE  =                    T".ljust(2880)),
        "not a readable FITS",
    ),
    "a table": (
        lambda p: fits.BinTableHDU.from_columns([fits.Column("a", "D", array=[1.0])]).writeto(p),
        "it has no image",
    ),
    "text in a number": (lambda p: cutout(p, CRVAL1="east"), "its card CRVAL1 is 'east', and must be a number"),
    "a scale of nothing": (lambda p: cutout(p, CD1_1=0.0, CD2_2=0.0), "b.fits"),
    "pixels of NaN": (lambda p: cutout(p, image=np.full((3, 16, 16), np.nan, np.float32)), "no pixel carries data"),
    "five axes": (lambda p: cutout(p, image=np.zeros((2, 2, 3, 16, 16), np.float32)), "5 axes"),
    "complex bands": (lambda p: cutout(p, bands="gg", image=np.ones((3, 16, 16), np.float32)), "give the bands"),
}


@pytest.mark.case(kind="damaged FITS", inputs=", ".join(FITS), right="an unusable sample, named; skipped on request")
@pytest.mark.parametrize(("make", "message"), FITS.values(), ids=FITS)
def test_damaged_fits(tmp_path, build, refused, make, message):
    folder = cutouts(tmp_path / "s")
    make(folder / "b.fits")
    assert message in refused(folder)
    built = build(folder, "--on-bad", "skip")
    assert built.code == 0 and built.catalog["key"] == ["a0", "a1", "a2"] and "Traceback" not in built.err
