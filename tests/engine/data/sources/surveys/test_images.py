import io
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from armillary.engine.data.format.shards import key_problem
from armillary.engine.data.sources.files.labels import LabelFile, read_labels
from armillary.engine.data.sources.source import BadSample, key_from_name
from armillary.engine.data.sources.surveys.images import Pictures


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def png16(pixels):
    """A 16-bit PNG written by hand (Pillow writes no 16-bit RGB)."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def random_rgb(seed, height=9, width=7):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Five RGB pictures, one of them in a sub-folder, without labels."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for i in range(4):
        (root / f"p{i}.png").write_bytes(png(random_rgb(i)))
    (root / "more" / "p.4.PNG").write_bytes(png(random_rgb(4)))
    return root


def test_folder_gives_pixels_keys_and_sources(folder):
    source = Pictures(folder, pixel_scale_arcsec=0.5)
    assert len(source) == 5
    assert (source.bands, source.unit, source.pixel_scale_arcsec) == (("red", "green", "blue"), "count", 0.5)
    assert source.lossless_step == (1.0, 1.0, 1.0)
    samples = [source.read(i) for i in range(5)]
    assert [s.key for s in samples] == ["more_p_4", "p0", "p1", "p2", "p3"]
    assert samples[0].source == "pictures:more/p.4.PNG"
    np.testing.assert_array_equal(samples[1].image, np.moveaxis(random_rgb(0), -1, 0))
    assert samples[1].image.dtype == np.float32 and samples[1].valid is None
    assert np.isnan(samples[1].ra) and samples[1].labels == {}


def test_zip_equals_folder_and_survives_pickling(folder, tmp_path):
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for file in folder.rglob("*.*"):
            z.write(file, file.relative_to(folder))
        z.writestr("__MACOSX/._p0.png", b"resource fork")
        z.writestr("readme.txt", b"not a picture")
    packed, plain = Pictures(archive), Pictures(folder)
    packed.read(0)  # the archive is open now
    again = pickle.loads(pickle.dumps(packed))
    assert again.files == packed.files == plain.files
    for i in range(5):
        np.testing.assert_array_equal(again.read(i).image, plain.read(i).image)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_kept(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 65536, (6, 5, channels), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png16(pixels))
    source = Pictures(tmp_path)
    assert source.lossless_step is None
    assert source.bands == (("grey",) if channels == 1 else ("red", "green", "blue"))
    np.testing.assert_array_equal(source.read(0).image, np.moveaxis(pixels, -1, 0))


def test_grey_palette_and_opaque_alpha(tmp_path):
    grey = random_rgb(0)[..., 0]
    (tmp_path / "a.png").write_bytes(png(grey))
    np.testing.assert_array_equal(Pictures(tmp_path).read(0).image, grey[None])
    (tmp_path / "a.png").unlink()
    rgb = random_rgb(1)
    alpha = np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], axis=-1)
    (tmp_path / "b.png").write_bytes(png(alpha))
    Image.fromarray(np.full_like(rgb, 200)).quantize(4).save(tmp_path / "c.png")
    source = Pictures(tmp_path)
    np.testing.assert_array_equal(source.read(0).image, np.moveaxis(rgb, -1, 0))
    assert (source.read(1).image == 200).all()


@pytest.mark.parametrize("orientation", [*range(1, 9), 9, "damaged"])
@pytest.mark.parametrize("deep", [False, True], ids=["8 bits", "16 bits"])
def test_pictures_that_exif_turns_are_read_upright(tmp_path, orientation, deep):
    pixels = np.random.default_rng(0).integers(0, 65536 if deep else 256, (9, 7), np.uint16 if deep else np.uint8)
    exif = Image.Exif()
    exif[274] = 1 if orientation == "damaged" else orientation
    data = b"Exif\0\0II*\0\xff\xff\0\0" if orientation == "damaged" else exif.tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=data)
    source = Pictures(tmp_path)
    shown = ImageOps.exif_transpose(Image.fromarray(pixels)) if orientation == "damaged" else None
    if shown is None:
        with Image.open(tmp_path / "a.png") as stored:
            shown = ImageOps.exif_transpose(stored)
    np.testing.assert_array_equal(source.read(0).image[0], np.asarray(shown))
    assert not source.describe(0, 1).bad


def test_a_jpeg_that_exif_turns_has_the_size_of_the_others(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the top of the stored pixels is shown on the right
    grey = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (8, 1))
    Image.fromarray(grey).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(grey.T).save(tmp_path / "upright.jpg", quality=95)
    turned, upright = (Pictures(tmp_path).read(i).image[0] for i in range(2))
    assert turned.shape == upright.shape == (16, 8)
    assert np.abs(turned - upright).max() < 8 and turned[-1].mean() > 240  # JPEG's own error


def test_transparent_pixels_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.zeros((4, 4, 4), np.uint8)))
    with pytest.raises(BadSample, match=r"a\.png.*transparent"):
        Pictures(tmp_path).read(0)


def test_the_commonest_size_and_kind_win(folder):
    (folder / "big.png").write_bytes(png(random_rgb(9, 20, 30)))
    (folder / "grey.png").write_bytes(png(random_rgb(9)[..., 0]))
    source = Pictures(folder)
    bad = source.describe(0, len(source)).bad
    assert sorted(bad) == [0, 1]
    with pytest.raises(BadSample, match=r"big\.png: 30x20 pixels, the survey has 7x9 \(5 of 7 pictures\)"):
        source.read(0)
    assert "grey.png: 8-bit grey, the survey is 8-bit RGB" in bad[1]


def test_size_cuts_the_centre_and_refuses_smaller(folder):
    (folder / "small.png").write_bytes(png(random_rgb(9, 9, 3)))
    source = Pictures(folder, size=5)
    np.testing.assert_array_equal(source.read(1).image, np.moveaxis(random_rgb(0)[2:7, 1:6], -1, 0))
    with pytest.raises(BadSample, match=r"small\.png: 3x9 pixels, smaller than the size 5"):
        source.read(5)


def test_damaged_pictures_are_bad_samples(folder):
    (folder / "p0.png").write_bytes(png(random_rgb(0))[:60])
    (folder / "p1.png").write_bytes(b"")
    source = Pictures(folder)
    assert list(source.describe(0, 5).bad) == [2]  # the empty one shows when its header is read
    for i in (1, 2):
        with pytest.raises(BadSample, match=rf"p{i - 1}\.png: not a readable picture"):
            source.read(i)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or archive"):
        Pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no pictures in it"):
        Pictures(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match="none of its 1 pictures is usable"):
        Pictures(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"text")
    with pytest.raises(ValueError, match="neither a folder nor a readable zip"):
        Pictures(tmp_path / "a.zip")


def test_bad_options(folder):
    with pytest.raises(ValueError, match="size: must be at least 1"):
        Pictures(folder, size=0)
    with pytest.raises(ValueError, match="bands: 2 names"):
        Pictures(folder, bands=("a", "b"))
    assert Pictures(folder, bands=("i", "r", "g")).bands == ("i", "r", "g")


def test_inputs_change_with_content(folder):
    before = Pictures(folder).inputs()
    (folder / "p0.png").write_bytes(png(random_rgb(7, 9, 7)) + b" ")
    assert Pictures(folder).inputs() != before
    (folder / "labels.csv").write_text("file,z\np1.png,1\n")
    assert set(Pictures(folder).inputs()) == {"pictures", "labels.csv"}


def test_labels_beside_are_found(folder):
    (folder / "labels.csv").write_text(
        "file,ra,dec,z,type,split\np0.png, 10.5 ,-3,0.1,Sa,train\nmore/p.4,,,,,test\n\np2,359.9,89,,E,\n"
    )
    source = Pictures(folder)
    assert source.labels == {"z": "number, from labels.csv", "type": "text, from labels.csv"}
    samples = [source.read(i) for i in range(5)]
    assert (samples[1].ra, samples[1].dec, samples[1].labels) == (10.5, -3.0, {"z": 0.1, "type": "Sa"})
    assert np.isnan(samples[0].ra) and np.isnan(samples[0].labels["z"]) and samples[0].labels["type"] == ""
    assert [s.split for s in samples] == ["test", "train", None, None, None]
    rows = source.describe(1, 4)
    assert rows.keys == ["p0", "p1", "p2"] and rows.splits == ["train", None, None]
    assert rows.columns["type"] == ["Sa", "", "E"]
    np.testing.assert_array_equal(rows.columns["z"], [0.1, np.nan, np.nan])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty; the first line"),
        ("ra,dec\n1,2\n", r"no column 'file'.*the columns are ra, dec"),
        ("file,,z\np0,1,2\n", "column 2 has no name"),
        ("file,z,z\np0,1,2\n", "column 'z' occurs twice"),
        ("file,shard\np0,1\n", "column 'shard': the survey's catalogue uses this name"),
        ("file,z\np0\n", "line 2: 1 cells, the header has 2"),
        ("file,z\np0,1\nnope.png,2\n", r"line 3, column 'file': no file 'nope\.png' among the 5"),
        ("file,z\np0,1\np1,3\np0.png,2\n", r"line 4, column 'file': 'p0\.png' already has a row at line 2"),
        ("file,z\np0,1\np1,2\np2,abc\n", r"line 4, column 'z': 'abc' is not a number, as most"),
        ("file,ra\np0,abc\n", r"line 2, column 'ra': 'abc' is not a number, as a position must be"),
        ("file,ra\np0,-1\n", r"line 2, column 'ra': -1\.0 is outside \[0, 360\]"),
        ("file,dec\np0,1\np1,90.1\n", r"line 3, column 'dec': 90\.1 is outside \[-90, 90\]"),
        ('file,z\n"p0,1\n', "not readable as CSV"),
    ],
)
def test_wrong_labels_are_named(folder, text, match):
    (folder / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"labels\.csv.*{match}"):
        Pictures(folder)


def test_labels_file_problems(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of labels"):
        read_labels(LabelFile.open(tmp_path / "none.csv"), ["a.png"])
    (tmp_path / "l.csv").write_bytes(b"file,z\n\x00\xff,1\n")
    with pytest.raises(ValueError, match="not readable as text"):
        read_labels(LabelFile.open(tmp_path / "l.csv"), ["a.png"])
    (tmp_path / "l.csv").write_text("name,z\np.png,1\n")
    with pytest.raises(ValueError, match=r"'p\.png' could be a/p\.png or b/p\.png; give the whole path"):
        read_labels(LabelFile.open(tmp_path / "l.csv"), ["a/p.png", "b/p.png"])


def test_large_identifiers_stay_text_and_blank_columns_are_numbers(tmp_path):
    (tmp_path / "l.csv").write_text(
        "\ufefffile,objid,blank,mixed\na,1237648720693755918,,x\nb,12,,3\n", encoding="utf-8"
    )
    table = read_labels(LabelFile.open(tmp_path / "l.csv"), ["a.png", "b.png", "c.png"])
    assert table.columns["objid"] == ["1237648720693755918", "12", ""]
    assert np.isnan(table.columns["blank"]).all()
    assert table.row(1) == {"objid": "12", "blank": pytest.approx(np.nan, nan_ok=True), "mixed": "3"}


def test_keys_from_names():
    assert key_from_name("ra1.67_dec-8.7") == "ra1_67_dec-8_7"
    assert key_from_name("a/b c") == "a_b_c"
    odd, other = key_from_name("galaxie_é"), key_from_name("galaxie_è")
    assert odd != other and odd.startswith("galaxie__")
    long = key_from_name("x" * 300)
    assert len(long) == 96 and long != key_from_name("x" * 301)
    for key in (odd, long, key_from_name("")):
        assert key_problem(key) is None


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "é", "x" * 97, "a\n"])
def test_keys_that_cannot_name_members(key):
    assert "must be 1 to 96 letters" in key_problem(key)


def test_real_spirals(real_data):
    source = Pictures(real_data / "sdss_spirals" / "images.zip")
    rows = source.describe(0, len(source))
    assert len(source) == 6190 and not rows.bad
    assert len(set(rows.keys)) == 6190
    assert np.isfinite(rows.columns["z"]).sum() == 2066
    assert set(source.labels) == {"z", "hubble"}
    sample = source.read(6189)
    assert sample.image.shape == (3, 120, 120) and 0 <= sample.image.min() < sample.image.max() <= 255
