import pickle
import shutil

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from armillary.engine.data.building.build import build
from armillary.engine.data.sources.kinds import open_source
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.bricks import BrickCutouts
from armillary.engine.data.sources.tables.rows import TableRows

SCALE = 0.262
SIDE = 60
CENTRES = {"0001m002": (0.0, -0.25), "0001p000": (0.0, -0.25 + 50 * SCALE / 3600)}  # ten pixels overlap


def wcs(ra, dec, side=SIDE, scale=SCALE):
    made = WCS(naxis=2)
    made.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    made.wcs.crval = [ra, dec]
    made.wcs.crpix = [(side + 1) / 2, (side + 1) / 2]
    made.wcs.cdelt = [-scale / 3600, scale / 3600]
    return made


def write(folder, brick, what, data, ending=".fits.fz", projection=None, **cards):
    """One image of a brick, compressed without loss as fpack lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    header = (projection or wcs(*CENTRES[brick])).to_header()
    header.update({"BRICK": brick, **{k: v for k, v in cards.items() if v is not None}})
    for card in [k for k, v in cards.items() if v is None]:
        header.remove(card, ignore_missing=True)
    path = folder / f"legacysurvey-{brick}-{what}{ending}"
    if ending == ".fits.fz":
        options = {"compression_type": "GZIP_2", "quantize_level": 0} if data.dtype.kind == "f" else {}
        fits.CompImageHDU(data, header, **options).writeto(path, overwrite=True)
    else:
        fits.PrimaryHDU(data, header).writeto(path, overwrite=True)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two bricks in g and z, the lower one also in r, invvar in all but the lower z, maskbits everywhere."""
    tmp_path, images = tmp_path_factory.mktemp("bricks"), {}
    rng = np.random.default_rng(2)
    for brick in CENTRES:
        folder = tmp_path / "coadd" / brick[:3] / brick
        for band in "grz" if brick == "0001m002" else "gz":
            images[brick, band] = rng.normal(0, 1, (SIDE, SIDE)).astype(np.float32)
            images[brick, band][10, 20:22] = 0
            write(folder, brick, f"image-{band}", images[brick, band], FILTER=band, BUNIT="nanomaggy")
            if (brick, band) != ("0001m002", "z"):
                ivar = np.ones((SIDE, SIDE), np.float32)
                ivar[30, 31] = 0
                write(folder, brick, f"invvar-{band}", ivar)
        bits = np.zeros((SIDE, SIDE), np.int16)
        bits[33, 29] = 2 + 4
        write(folder, brick, "maskbits", bits)
    return tmp_path / "coadd", images


@pytest.fixture
def bricks(written, tmp_path):
    """A copy of them, and the pixels by brick and band."""
    return shutil.copytree(written[0], tmp_path / "coadd"), written[1]


def sky(brick, x, y):
    ra, dec = wcs(*CENTRES[brick]).wcs_pix2world(np.atleast_1d(np.float64(x)), np.atleast_1d(np.float64(y)), 0)
    return ra % 360, dec


def test_pixels_offsets_and_masks(bricks):
    folder, images = bricks
    ra, dec = sky("0001m002", [30.0, 20.3, 25.6], [31.0, 12.4, 9.4])
    source = pickle.loads(pickle.dumps(BrickCutouts(folder, (["a", "b", "c"], ra, dec), size=9, bands=("z", "g"))))
    assert source.bands == ("z", "g") and source.unit == "nanomaggy" and len(source) == 3
    assert source.pixel_scale_arcsec == pytest.approx(SCALE)
    for i, (x, y) in enumerate([(26, 27), (16, 8), (22, 5)]):
        sample = source.read(i)
        part = (slice(y, y + 9), slice(x, x + 9))
        for channel, band in enumerate("zg"):
            expected = images["0001m002", band][part].copy()
            valid = np.ones((9, 9), bool)
            if band == "g" and i == 0:
                valid[30 - y, 31 - x] = False  # invvar 0
            if band == "z" and i > 0:
                valid = expected != 0  # there is no invvar
            np.testing.assert_array_equal(sample.image[channel], np.where(valid, expected, 0))
            np.testing.assert_array_equal(
                valid, sample.valid[channel] if sample.valid is not None else np.ones_like(valid)
            )
        assert sample.key == "abc"[i] and sample.labels["cutout_brick"] == "0001m002"
        assert sample.labels["cutout_coverage"] == 1
        assert sample.labels == {n: c[i] for n, c in source.describe(0, 3).columns.items() if n in source.labels}
    offsets = source.describe(0, 3).columns
    np.testing.assert_allclose(offsets["cutout_offset_x"], [0, 0.3, -0.4], atol=1e-5)
    np.testing.assert_allclose(offsets["cutout_offset_y"], [0, 0.4, 0.4], atol=1e-5)
    assert source.read(0).source == "position 0; 0001m002 x 26 y 27"


def test_even_sizes_are_centred_to_half_a_pixel(bricks):
    folder, images = bricks
    source = BrickCutouts(folder, sky("0001m002", [20.4, 20.6], [30.5, 30.5]), size=4, bands="g")
    np.testing.assert_allclose(source.describe(0, 2).columns["cutout_offset_x"], [-0.1, 0.1], atol=1e-5)
    for i in (0, 1):
        np.testing.assert_array_equal(source.read(i).image[0], images["0001m002", "g"][29:33, 19:23])


def test_the_brick_with_most_of_the_cutout(bricks):
    """In the overlap each goes to the brick that has all of it; where both do, to the nearer centre."""
    folder, images = bricks
    y = np.array([51.0, 54.0, 54.9, 56.0])  # of the lower brick; 50 less in the upper one
    wide = BrickCutouts(folder, sky("0001m002", 30, 51.0), size=9, bands="g")
    assert wide.describe(0, 1).columns["cutout_brick"] == ["0001m002"]
    source = BrickCutouts(folder, sky("0001m002", np.full(4, 30.0), y), size=11, bands="g")
    rows = source.describe(0, 4).columns
    assert rows["cutout_brick"] == ["0001m002", "0001m002", "0001p000", "0001p000"]
    assert rows["cutout_coverage"].tolist() == [1, 1, 1, 1]
    both = BrickCutouts(folder, sky("0001m002", [30.0, 30.0], [54.0, 55.0]), size=3, bands="g")
    assert both.describe(0, 2).columns["cutout_brick"] == ["0001m002", "0001p000"]
    np.testing.assert_array_equal(both.read(1).image[0], images["0001p000", "g"][4:7, 29:32])


def test_off_the_brick_and_without_a_band(bricks):
    folder, images = bricks
    ra, dec = sky("0001m002", [1.0, 58.0], [2.0, 20.0])
    above = sky("0001p000", 30, 40)
    source = BrickCutouts(folder, (np.append(ra, above[0]), np.append(dec, above[1])), size=7, bands=("g", "r", "z"))
    corner = source.read(0)
    assert corner.labels["cutout_coverage"] == pytest.approx(30 / 49)
    assert corner.valid[0].sum() == 30 and not corner.valid[0, 0].any() and not corner.valid[0, :, :2].any()
    np.testing.assert_array_equal(corner.image[0, 1:, 2:], images["0001m002", "g"][:6, :5])
    assert not source.read(1).valid[0, :, 5:].any()
    lacking = source.read(2)
    assert not lacking.valid[1].any() and not lacking.image[1].any() and lacking.valid[0].all()


def test_mask_bits(bricks):
    ra, dec = sky("0001m002", 29, 33)
    valid = BrickCutouts(bricks[0], (ra, dec), size=3, bands="g", mask_bits=2).read(0).valid
    assert not valid[0, 1, 1] and valid.sum() == 8
    assert BrickCutouts(bricks[0], (ra, dec), size=3, bands="g", mask_bits=8).read(0).valid is None


def test_positions_on_no_brick(bricks):
    (ra, dec), nan = sky("0001m002", 30, 30), np.array([np.nan])
    far = (np.concatenate([ra, (ra + 1) % 360, nan, (ra + 180) % 360]), np.concatenate([dec, dec, dec, -dec]))
    source = BrickCutouts(bricks[0], (list("abcd"), *far), size=3, bands="g")
    assert sorted(source.describe(1, 4).bad) == [1, 2, 3]
    with pytest.raises(BadSample, match=r"position 1 \(b\): ra 0\.99\d+, dec -0\.2\d+ is on no brick of 2"):
        source.read(1)
    with pytest.raises(BadSample, match=r"position 2 \(c\): it has no position"):
        source.read(2)
    with pytest.raises(IndexError, match="position 4: this source has 4"):
        source.read(4)
    with pytest.raises(ValueError, match="none of 1 is on any of the 2 bricks"):
        BrickCutouts(bricks[0], ((ra + 1) % 360, dec), size=3, bands="g")


def test_around_a_catalogue_packed_and_read_back(bricks, tmp_path):
    ra, dec = sky("0001m002", np.linspace(8, 50, 12), np.linspace(50, 9, 12))
    lines = [
        f"g{i},{r!r},{d!r},{i / 10},{20 + i}" for i, (r, d) in enumerate(zip(ra.tolist(), dec.tolist(), strict=True))
    ]
    (tmp_path / "a.csv").write_text("\n".join(["name,ra,dec,z,mag", *lines, "far,10,10,1,9"]) + "\n")
    table = TableRows(tmp_path / "a.csv", key="name", labels={"z": "redshift"}, vectors={"photometry": ("mag",)})
    source = BrickCutouts(bricks[0], table, size=16, bands=("g", "z"))
    assert set(source.inputs()) > set(table.inputs()) and source.vectors == table.vectors
    build(source, tmp_path / "survey", name="cut", codec="float16", progress=False, on_bad="skip")
    back = PackedSurvey(tmp_path / "survey")
    assert len(back) == 12
    for sample in map(back.read, range(12)):
        own = source.read(int(sample.key[1:]))
        np.testing.assert_allclose(sample.image, own.image, rtol=1e-3, atol=1e-3)
        assert sample.labels == own.labels and sample.labels["redshift"] == int(sample.key[1:]) / 10
        np.testing.assert_array_equal(sample.vectors["photometry"], own.vectors["photometry"])


def test_from_files_alone(bricks, tmp_path):
    ra, dec = sky("0001m002", [30.0], [31.0])
    (tmp_path / "a.csv").write_text(f"ra,dec,z\n{float(ra[0])!r},{float(dec[0])!r},0.25\n")
    options = {"positions": tmp_path / "a.csv", "size": 9, "bands": ("z", "g")}
    sample = open_source(bricks[0], "bricks", **options).read(0)
    own = BrickCutouts(bricks[0], (ra, dec), size=9, bands=("z", "g")).read(0)
    np.testing.assert_array_equal(sample.image, own.image)
    assert sample.labels["z"] == 0.25


def test_many_bricks_share_few_open_files(bricks, monkeypatch):
    monkeypatch.setattr("armillary.engine.data.sources.surveys.bricks.OPEN_BRICKS", 1)
    lower, upper = sky("0001m002", 30, 20), sky("0001p000", 30, 40)
    source = BrickCutouts(bricks[0], (np.append(lower[0], upper[0]), np.append(lower[1], upper[1])), size=5, bands="g")
    for i in (0, 1, 0):
        source.read(i)
        assert len(source._open) == 1


def noise(side=SIDE):
    return np.ones((side, side), np.float32)


def image(name, pixels=None, brick="0001m002", **changes):
    return lambda f: write(f, brick, name, noise() if pixels is None else pixels, **changes)


MALFORMED = {
    "no projection": (image("image-g", CTYPE1=None, CTYPE2=None), r"image-g\.fits\.fz: not a readable brick image: it has no tangential projection"),
    "another projection": (image("image-g", CTYPE1="RA---SIN", CTYPE2="DEC--SIN"), "no tangential projection .CTYPE 'RA---SIN'"),
    "bands of different shape": (image("image-z", noise(50)), r"image-z\.fits\.fz: 50x50 pixels, the brick's other images have 60x60"),
    "bands of different place": (image("image-z", CRVAL2=-0.26), r"image-z\.fits\.fz: its projection \(WCS\) is not that"),
    "invvar of different shape": (image("invvar-g", noise(50)), r"invvar-g\.fits\.fz: 50x50 pixels"),
    "another scale": (image("image-g", brick="0002m002", projection=wcs(1, 0, scale=0.4)), r"0002m002-image-g\.fits\.fz: 0\.4 arcsec a pixel, other bricks have 0\.262"),
    "another band in the header": (image("image-g", FILTER="r"), "its FILTER is 'r', its name says 'g'"),
    "another unit": (image("image-g", BUNIT="adu"), "its unit is 'adu', not nanomaggy"),
    "not FITS": (lambda f: (f / "legacysurvey-0001m002-image-g.fits.fz").write_text("text"), "image-g.fits.fz: not a readable brick image"),
    "a cube": (image("image-g", np.ones((2, 9, 9), np.float32), ending=".fits.gz"), "twice, also as|it has no image of two axes"),
    "image twice": (image("image-g", ending=".fits"), "brick 0001m002 has this image twice, also as legacysurvey-0001m002-image-g.fits"),
}  # fmt: skip


@pytest.mark.parametrize("make, match", MALFORMED.values(), ids=MALFORMED)
def test_malformed(bricks, make, match):
    make(bricks[0] / "000" / "0001m002")
    with pytest.raises(ValueError, match=match):
        BrickCutouts(bricks[0], sky("0001m002", 30, 30), size=5, bands=("g", "z"))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"size": 0}, "size: must be at least 1"),
        ({"bands": ("g", "g")}, "bands: must be one or more different names"),
        ({"bands": ("g", "i")}, "none of 11 files is a legacysurvey-<brick>-image-i.fits.fz"),
        ({"positions": (np.zeros(2), np.zeros(3))}, "positions: 2 keys, 2 ra and 3 dec"),
        ({"positions": (np.zeros(2),)}, r"positions: must be \(ra, dec\) or \(keys, ra, dec\)"),
        ({"positions": (np.array([0, -1.0]), np.zeros(2))}, r"row 1: ra -1.0 is outside \[0, 360\] degrees"),
    ],
)
def test_wrong_options(bricks, options, match):
    given = {"positions": sky("0001m002", 30, 30), "size": 5, "bands": ("g", "z")} | options
    with pytest.raises(ValueError, match=match):
        BrickCutouts(bricks[0], given.pop("positions"), **given)


def test_other_sources_do_not_fit(bricks, tmp_path):
    inner = BrickCutouts(bricks[0], sky("0001m002", 30, 30), size=5, bands="g")
    with pytest.raises(ValueError, match="positions: this source has images of its own"):
        BrickCutouts(bricks[0], inner, size=5, bands="g")
    (tmp_path / "a.csv").write_text("ra,dec,cutout_brick\n0,-0.25,x\n")
    with pytest.raises(ValueError, match="label 'cutout_brick' is one of the cutouts' own"):
        BrickCutouts(bricks[0], TableRows(tmp_path / "a.csv"), size=5, bands="g")
    with pytest.raises(FileNotFoundError, match="no such folder or file of bricks"):
        BrickCutouts(tmp_path / "none", sky("0001m002", 30, 30), size=5)
    for path in bricks[0].rglob("*maskbits*"):
        path.unlink()
    with pytest.raises(ValueError, match="mask_bits needs legacysurvey-0001m002-maskbits"):
        BrickCutouts(bricks[0], sky("0001m002", 30, 30), size=5, bands="g", mask_bits=1)


def test_truncated_image(bricks):
    path = next(bricks[0].rglob("*0001m002-image-g*"))
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(
        ValueError, match=r"image-g\.fits\.fz: not a readable brick image: File may have been truncated"
    ):
        BrickCutouts(bricks[0], sky("0001m002", 30, 50), size=5, bands="g")


def test_damaged_pixels_are_a_bad_sample(bricks):
    path = next(bricks[0].rglob("*0001m002-image-g*"))
    raw = bytearray(path.read_bytes())
    raw[9000:20000] = bytes(11000)
    path.write_bytes(raw)
    source = BrickCutouts(bricks[0], sky("0001m002", 30, 30), size=5, bands="g")
    with pytest.raises(BadSample, match=r"image-g\.fits\.fz: rows 28 to 33: not readable"):
        source.read(0)


def test_across_the_meridian_and_near_the_pole(tmp_path):
    for brick, (ra, dec) in {"0001p000": (0.0, 0.0), "0001p897": (40.0, 89.998)}.items():
        write(
            tmp_path, brick, "image-g", np.arange(3600, dtype=np.float32).reshape(60, 60) + 1, projection=wcs(ra, dec)
        )
    for ra, dec in ((0.0, 0.0), (40.0, 89.998)):
        x, y = np.array([25.0, 35.0, 12.0]), np.array([20.0, 30.0, 44.0])
        lon, lat = wcs(ra, dec).wcs_pix2world(x, y, 0)
        source = BrickCutouts(tmp_path, (lon % 360, lat), size=1, bands="g")
        assert [float(source.read(i).image[0, 0, 0]) for i in range(3)] == (60 * y + x + 1).tolist()
