import pickle

import numpy as np
import pytest
from astropy.io import fits

from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.fits import FitsCutouts

SCALE = 0.262 / 3600


def cutout(path, image, *, bands="grz", scale=SCALE, ra=150.0, dec=2.0, compressed=False, **cards):
    """Write a cutout as the Legacy Survey's service does."""
    header = fits.Header()
    if bands:
        header["BANDS"] = bands
        for k, band in enumerate(bands):
            header[f"BAND{k}"] = band
    if scale:
        header["CTYPE1"], header["CTYPE2"] = "RA---TAN", "DEC--TAN"
        header["CRVAL1"], header["CRVAL2"] = ra, dec
        header["CRPIX1"], header["CRPIX2"] = (image.shape[-1] + 1) / 2, (image.shape[-2] + 1) / 2
        header["CD1_1"], header["CD1_2"], header["CD2_1"], header["CD2_2"] = -scale, 0.0, 0.0, scale
    header.update(cards)
    if compressed:
        hdus = [fits.PrimaryHDU(), fits.CompImageHDU(image, header, compression_type="GZIP_1", quantize_level=0)]
    else:
        hdus = [fits.PrimaryHDU(image, header)]
    fits.HDUList(hdus).writeto(path)


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(0, 0.01, shape).astype(np.float32)


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz", ".fits.fz"])
def test_pixels_position_and_scale(tmp_path, suffix):
    image = noise(0, 3, 8, 6)
    cutout(tmp_path / f"a.b{suffix}", image, compressed=suffix.endswith("fz"))
    source = pickle.loads(pickle.dumps(FitsCutouts(tmp_path)))
    assert (source.bands, source.unit) == (("g", "r", "z"), "nanomaggy")
    assert source.pixel_scale_arcsec == pytest.approx(0.262, rel=1e-6)
    sample = source.read(0)
    assert sample.key == "a_b" and sample.valid is None and sample.source == f"a.b{suffix}"
    assert sample.image.dtype == np.dtype("=f4") and sample.image.flags.c_contiguous
    np.testing.assert_array_equal(sample.image, image)
    assert (sample.ra, sample.dec) == (pytest.approx(150.0), pytest.approx(2.0))


def test_position_is_that_of_the_centre(tmp_path):
    cutout(tmp_path / "a.fits", noise(0, 3, 8, 8), ra=0.0, dec=0.0, CRPIX1=1.0, CRPIX2=1.0)
    sample = FitsCutouts(tmp_path).read(0)
    assert sample.ra == pytest.approx(360 - 3.5 * SCALE) and sample.dec == pytest.approx(3.5 * SCALE)


@pytest.mark.parametrize("zero_is_missing", [True, False])
def test_pixels_without_data_are_masked(tmp_path, zero_is_missing):
    image = noise(0, 3, 8, 8)
    image[0, 0, 0], image[1, 2, 3], image[2, 4] = np.nan, -np.inf, 0
    cutout(tmp_path / "a.fits", image)
    sample = FitsCutouts(tmp_path, zero_is_missing=zero_is_missing).read(0)
    expected = np.isfinite(image) & ((image != 0) | (not zero_is_missing))
    np.testing.assert_array_equal(sample.valid, expected)
    assert (sample.image[~sample.valid] == 0).all()
    np.testing.assert_array_equal(sample.image[expected], image[expected])


def test_odd_files_are_unusable_by_name(tmp_path):
    for i in range(3):
        cutout(tmp_path / f"ok{i}.fits", noise(i, 3, 8, 8))
    cutout(tmp_path / "bands.fits", noise(4, 3, 8, 8), bands="gri")
    cutout(tmp_path / "scale.fits", noise(5, 3, 8, 8), scale=SCALE * 1.02)
    cutout(tmp_path / "shape.fits", noise(6, 3, 8, 9))
    cutout(tmp_path / "near.fits", noise(6, 3, 8, 8), scale=SCALE * 1.005)
    cutout(tmp_path / "noscale.fits", noise(6, 3, 8, 8), scale=None)
    (tmp_path / "text.fits").write_text("not FITS")
    fits.PrimaryHDU().writeto(tmp_path / "empty.fits")
    fits.PrimaryHDU(np.zeros((2, 3, 4, 4), np.float32)).writeto(tmp_path / "cube.fits")
    source = FitsCutouts(tmp_path)
    bad = {source.files[i]: reason for i, reason in source.describe(0, len(source)).bad.items()}
    expected = {
        "bands.fits": "bands g r i, the survey has g r z",
        "scale.fits": r"pixel scale 0.2672 arcsec, the survey has 0.262",
        "noscale.fits": "pixel scale nan arcsec, the survey has 0.262",
        "shape.fits": "9x8 pixels, the survey has 8x8 (4 of 11 FITS files)",
        "text.fits": "not a readable FITS file",
        "empty.fits": "it has no image",
        "cube.fits": "4 axes",
    }
    assert set(bad) == set(expected)
    for name, reason in expected.items():
        assert f"{name}: " in bad[name] and reason in bad[name]
    with pytest.raises(BadSample, match="bands g r i"):
        source.read(source.files.index("bands.fits"))


def test_size_cuts_the_centre(tmp_path):
    image = noise(0, 3, 9, 8)
    cutout(tmp_path / "a.fits", image)
    cutout(tmp_path / "b.fits", noise(1, 3, 4, 4))
    source = FitsCutouts(tmp_path, size=5)
    np.testing.assert_array_equal(source.read(0).image, image[:, 2:7, 1:6])
    with pytest.raises(BadSample, match=r"b\.fits: 4x4 pixels, smaller than the size 5"):
        source.read(1)


def test_files_without_header_cards_take_the_options(tmp_path):
    cutout(tmp_path / "a.fits", noise(0, 1, 8, 8)[0], bands="", scale=None, RA=10.0, DEC=-5.0)
    with pytest.raises(ValueError, match=r"none of its 1 FITS files is usable.*give the bands"):
        FitsCutouts(tmp_path)
    with pytest.raises(ValueError, match=r"its header has no unit \(BUNIT\); give it: unit"):
        FitsCutouts(tmp_path, bands=("i",))
    source = FitsCutouts(tmp_path, bands=("i",), pixel_scale_arcsec=0.168, unit="nJy")
    assert source.bands == ("i",) and source.pixel_scale_arcsec == 0.168 and source.unit == "nJy"
    sample = source.read(0)
    assert sample.image.shape == (1, 8, 8) and (sample.ra, sample.dec) == (10.0, -5.0)
    assert FitsCutouts(tmp_path, bands=("i",), unit="nJy").pixel_scale_arcsec is None


def test_labels_replace_positions(tmp_path):
    cutout(tmp_path / "a.fits.gz", noise(0, 3, 8, 8))
    cutout(tmp_path / "b.fits", noise(1, 3, 8, 8))
    (tmp_path / "labels.csv").write_text("file,ra,z,split\na,12.5,0.3,test\n")
    source = FitsCutouts(tmp_path)
    first, second = source.read(0), source.read(1)
    assert (first.ra, first.labels, first.split) == (12.5, {"z": 0.3}, "test")
    assert second.ra == pytest.approx(150.0) and np.isnan(second.labels["z"]) and second.split is None
    np.testing.assert_allclose(source.describe(0, 2).columns["ra"], [12.5, 150.0])
    assert set(source.inputs()) == {tmp_path.name, "labels.csv"}


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        FitsCutouts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no FITS files in it"):
        FitsCutouts(tmp_path)
    cutout(tmp_path / "a.fits", noise(0, 3, 8, 8))
    with pytest.raises(ValueError, match="size: must be at least 1, got -1"):
        FitsCutouts(tmp_path, size=-1)


def test_truncated_file_is_a_bad_sample(tmp_path):
    cutout(tmp_path / "a.fits", noise(0, 3, 64, 64))
    cutout(tmp_path / "b.fits", noise(1, 3, 64, 64))
    source = FitsCutouts(tmp_path)
    whole = (tmp_path / "b.fits").read_bytes()
    (tmp_path / "b.fits").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSample, match=r"b\.fits: not a readable FITS file"):
        source.read(1)


def test_one_file(tmp_path):
    cutout(tmp_path / "a.fits", noise(0, 3, 8, 8))
    cutout(tmp_path / "b.fits", noise(1, 3, 8, 8))
    assert FitsCutouts(tmp_path / "b.fits").files == ["b.fits"]


def test_real_cutouts(real_data):
    folder = real_data / "legacysurvey_fits"
    source = FitsCutouts(folder, size=160)
    assert source.bands == ("g", "r", "z") and source.pixel_scale_arcsec == pytest.approx(0.262, rel=1e-3)
    assert len(source) == 4 and len(source.describe(0, 4).bad) == 2  # two have other pixel scales
    bad_pixels = FitsCutouts(folder / "willettk_example_bad_pix.fits.gz").read(0)
    missing = [int((~band).sum()) for band in bad_pixels.valid]
    assert missing == [136104, 130806, 0]
    assert bad_pixels.ra == pytest.approx(147.4567, abs=1e-3)
