"""Good files that were refused, and whole surveys that a single bad file stopped."""

import pickle

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from case_files import WCS, cutout, cutouts, noise, pictures
from desi_files import FIRST, write

VECTORS = "vectors={'m':('g','r')}"


@pytest.mark.case(kind="bricks", inputs="northern bricks: FILTER bokg, bokr, mosz", right="their bands g, r, z")
def test_northern_bricks(tmp_path, build, refused):
    for band, filtered in (("g", "bokg"), ("r", "bokr"), ("z", "mosz")):
        header = fits.Header(WCS | {"CRVAL1": 96.0, "CRVAL2": 80.5, "CRPIX1": 60.5, "CRPIX2": 60.5, "FILTER": filtered})
        hdus = [fits.PrimaryHDU(), fits.ImageHDU(noise(1, 120, 120), header)]
        fits.HDUList(hdus).writeto(tmp_path / f"legacysurvey-0959p805-image-{band}.fits.fz")
    (tmp_path / "pos.csv").write_text("id,ra,dec\na,96.0,80.5\nb,96.001,80.501\n")
    words = ("--kind", "bricks", "--size", "16", "--option", f"positions={tmp_path / 'pos.csv'}")
    built = build(tmp_path, *words)
    assert built.code == 0 and built.source.bands == ("g", "r", "z") and len(built.catalog["key"]) == 2
    with fits.open(tmp_path / "legacysurvey-0959p805-image-r.fits.fz", mode="update") as hdus:
        hdus[1].header["FILTER"] = "bokg"
    assert "its FILTER is 'bokg', its name says 'r'" in refused(tmp_path, *words)


@pytest.mark.case(kind="kinds", inputs="a DESI folder: coadd beside redrock, no --kind", right="spectra with redshifts")
def test_a_desi_folder_is_recognised(tmp_path, build):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "coadd-main-bright-1.fits", 3)
    built = build(tmp_path / "d")
    assert built.code == 0, built.err
    assert "redshift" in built.source.labels and built.source.spectrum is not None


@pytest.mark.case(
    kind="kinds", inputs="a Parquet or CSV table, a FITS table, without --kind", right="a table, as its content says"
)
@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.fits"])
def test_tables_are_recognised(tmp_path, build, name):
    columns = {"g": [1.0, 2.0, 3.0], "r": [4.0, 5.0, 6.0]}
    if name == "t.fits":
        fits.BinTableHDU.from_columns([fits.Column(k, "D", array=v) for k, v in columns.items()]).writeto(
            tmp_path / name
        )
    elif name == "t.csv":
        (tmp_path / name).write_text("g,r\n1,4\n2,5\n3,6\n")
    else:
        pq.write_table(pa.table(columns), tmp_path / name)
    assert build(tmp_path / name, "--option", VECTORS).catalog["g"] == columns["g"]


@pytest.mark.case(kind="Multimodal Universe", inputs="object_id as bytes, HATS statistics beside", right="read as text")
def test_mmu_identifiers_as_bytes(tmp_path, build):
    def cube(seed):
        bands = [{"band": f"des-{b}", "flux": noise(seed, 8, 8).tolist(), "scale": 0.262} for b in "gr"]
        return [band | {"ivar": np.ones((8, 8)).tolist()} for band in bands]

    leaf = tmp_path / "m" / "dataset" / "Norder=1" / "Dir=0"
    leaf.mkdir(parents=True)
    rows = {"object_id": [b"39627700000000000", b"39627700000000001"], "image": [cube(0), cube(1)]}
    rows |= {"ra": [1.0, 2.0], "dec": [3.0, 4.0], "Z": [0.1, 0.2], "ZWARN": [True, False]}
    pq.write_table(pa.table(rows), leaf / "Npix=44.parquet")
    pq.write_table(
        pa.table({"Norder": [1], "ra: min_value": [0.0]}), tmp_path / "m" / "per_partition_statistics.parquet"
    )
    built = build(tmp_path / "m")
    assert built.code == 0, built.err
    assert built.catalog["key"] == ["39627700000000000", "39627700000000001"]
    assert built.catalog["zwarn"] == [0.0, 1.0]  # true is "no warning" in these files


def pandas_fixed(path):
    """What `DataFrame.to_hdf` writes: columns of one type together."""
    with h5py.File(path, "w") as file:
        group = file.create_group("df")
        group.attrs.update({"pandas_type": np.bytes_(b"frame"), "nblocks": 2})
        group["axis0"], group["axis1"] = np.array([b"id", b"g", b"r"]), np.arange(4)
        group["block0_items"], group["block0_values"] = np.array([b"id"]), 2**60 + np.arange(4).reshape(4, 1)
        group["block1_items"] = np.array([b"g", b"r"])
        group["block1_values"] = np.arange(8.0).reshape(4, 2)


def pandas_table(path):
    """The same with format="table": records of blocks, whose names are pickled."""
    records = np.zeros(4, [("index", "i8"), ("values_block_0", "i8", (1,)), ("values_block_1", "f8", (2,))])
    records["values_block_0"], records["values_block_1"] = 2**60 + np.arange(4)[:, None], np.arange(8.0).reshape(4, 2)
    with h5py.File(path, "w") as file:
        group = file.create_group("df")
        group.attrs["pandas_type"] = np.bytes_(b"frame_table")
        group["table"] = records
        for name, columns in (("values_block_0", ["id"]), ("values_block_1", ["g", "r"])):
            group["table"].attrs[f"{name}_kind"] = np.bytes_(pickle.dumps(columns, 0))
        group.create_group("_i_table")


@pytest.mark.case(kind="pandas", inputs="HDF5 of pandas, fixed and table", right="its columns, identifiers whole")
@pytest.mark.parametrize("write", [pandas_fixed, pandas_table])
def test_frames_of_pandas(tmp_path, build, write):
    write(tmp_path / "f.h5")
    built = build(tmp_path / "f.h5", "--kind", "table", "--option", VECTORS, "key=id")
    assert built.code == 0, built.err
    assert built.catalog["id"] == [str(2**60 + i) for i in range(4)] and built.catalog["g"] == [0.0, 2.0, 4.0, 6.0]


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.case(
    kind="pandas", inputs="a frame whose names are a pickle that calls a function", right="nothing is called"
)
def test_pickles_of_pandas_call_nothing(tmp_path, refused, capsys):
    pandas_table(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as file:
        for name in ("values_block_0_kind", "values_block_1_kind"):
            file["df/table"].attrs[name] = np.bytes_(pickle.dumps(Evil(), 0))
    assert "no column holds numbers or text" in refused(tmp_path / "f.h5", "--kind", "table")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.case(kind="lists", inputs="a vector that is null or empty in the first row", right="unknown in that row")
@pytest.mark.parametrize("first", [None, []])
def test_vectors_that_are_unknown_in_the_first_row(tmp_path, build, first):
    pq.write_table(pa.table({"v": pa.array([first, [1.0, 2.0], [3.0, 4.0]])}), tmp_path / "t.parquet")
    samples = build(
        tmp_path / "t.parquet", "--kind", "table", "--option", "vectors={'v':'v'}", "--on-bad", "skip"
    ).samples()
    np.testing.assert_array_equal(samples["t-0000001"].vectors["v"], [1, 2])


@pytest.mark.case(kind="band names", inputs="BANDS = 'g,r,z'; --bands beside a header that does not fit", right="g r z")
def test_band_names_with_commas(tmp_path, build):
    cutouts(tmp_path / "a", image=noise(0, 3, 16, 16), bands="g,r,z")
    assert build(tmp_path / "a", name="a").source.bands == ("g", "r", "z")
    cutouts(tmp_path / "b", image=noise(0, 3, 16, 16), bands="grizy")
    assert build(tmp_path / "b", "--bands", "g", "r", "i", name="b").source.bands == ("g", "r", "i")


@pytest.mark.case(kind="comments", inputs="#Table1 of SkyServer; a header that begins with #", right="read")
@pytest.mark.parametrize("head", ["#Table1\nfile,z", "# made by me\n#file,z", "# one, two, three\n\nfile,z"])
def test_comments_before_the_header(tmp_path, build, head):
    rows = "\n".join(f"g{i}.png,0.{i}" for i in range(4))
    assert build(pictures(tmp_path / "s", labels=f"{head}\n{rows}\n")).catalog["z"] == [0.0, 0.1, 0.2, 0.3]


@pytest.mark.case(
    kind="--on-bad skip",
    inputs="a truncated FITS file, an empty PNG, a damaged table among whole ones, a label of no file",
    right="the others are packed; what was left out is counted and named",
)
def test_skip_leaves_out_whatever_is_bad(tmp_path, build, refused):
    folder = cutouts(tmp_path / "f")
    whole = (folder / "a0.fits").read_bytes()
    (folder / "half.fits").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.fits").write_bytes(b"")
    (folder / "labels.csv").write_text("file,z\na0,1\nnope,2\n")
    assert "no file 'nope' among" in refused(folder)
    built = build(folder, "--on-bad", "skip", name="f")
    skipped = built.source.survey.provenance["skipped"]
    assert built.catalog["key"] == ["a0", "a1", "a2"] and skipped["count"] == 2 and "2 unusable samples" in built.out
    assert all(any(name in reason for reason in skipped["examples"]) for name in ("half.fits", "empty.fits"))
    assert "left out 1 rows that name no file" in built.err

    (tmp_path / "t").mkdir()
    for name in ("a", "b", "c"):
        pq.write_table(pa.table({"g": [1.0, 2.0], "r": [3.0, 4.0]}), tmp_path / "t" / f"{name}.parquet")
    (tmp_path / "t" / "b.parquet").write_bytes(b"PAR1 and then nothing")
    words = ("--kind", "table", "--option", VECTORS)
    assert "b.parquet: not readable as a table" in refused(tmp_path / "t", *words)
    built = build(tmp_path / "t", *words, "--on-bad", "skip", name="t")
    assert built.catalog["key"] == ["a-0000000", "a-0000001", "c-0000000", "c-0000001"]
    assert "b.parquet" in built.source.survey.provenance["skipped"]["examples"][0]


@pytest.mark.case(kind="--on-bad skip", inputs="one coadd of three that is no FITS file", right="the two others")
def test_skip_leaves_out_a_bad_coadd(tmp_path, build):
    (tmp_path / "d").mkdir()
    for i in range(3):
        write(tmp_path / "d" / f"coadd-{i}.fits", 2, first=FIRST + 10 * i)
    (tmp_path / "d" / "coadd-1.fits").write_bytes(b"SIMPLE  =   nonsense")
    built = build(tmp_path / "d", "--kind", "desi", "--on-bad", "skip")
    assert built.code == 0, built.err
    assert len(built.catalog["key"]) == 4 and "coadd-1.fits" in built.source.survey.provenance["skipped"]["examples"][0]


@pytest.mark.case(kind="--on-bad skip", inputs="a row of a table at ra 400", right="left out, named")
def test_skip_leaves_out_rows_with_impossible_positions(tmp_path, build, refused):
    (tmp_path / "t.csv").write_text("ra,dec,g,r\n10,0,1,2\n400,0,1,2\n20,0,1,2\n")
    words = ("--kind", "table", "--option", VECTORS)
    assert "ra 400 is outside [0, 360]" in refused(tmp_path / "t.csv", *words)
    assert build(tmp_path / "t.csv", *words, "--on-bad", "skip").catalog["ra"] == [10.0, 20.0]


@pytest.mark.case(kind="default keys", inputs="m_11.0_11.5.csv and m_11.5_12.0.csv in one folder", right="keys differ")
def test_default_keys_of_names_with_dots(tmp_path, build):
    (tmp_path / "t").mkdir()
    for name in ("m_11.0_11.5.csv", "m_11.5_12.0.csv", "m_11.5_12.5.csv"):
        (tmp_path / "t" / name).write_text("g,r\n1,2\n3,4\n")
    assert len(set(build(tmp_path / "t", "--kind", "table", "--option", VECTORS).catalog["key"])) == 6


@pytest.mark.case(kind="cubes", inputs="a cutout of 1 x 1 x H x W; a 16-bit PNG", right="read")
def test_axes_of_length_one(tmp_path, build):
    for i in range(3):
        cutout(tmp_path / "s" / f"a{i}.fits", image=noise(i, 1, 1, 16, 16), bands="r")
    assert build(tmp_path / "s").samples()["a0"].image.shape == (1, 16, 16)
