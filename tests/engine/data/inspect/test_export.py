"""A packed survey written as FITS, HDF5 and Parquet, and read back."""

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from mixed import GRID, Mixed

from armillary.engine.data.building.build import build
from armillary.engine.data.inspect.export import unpack
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.fits import FitsCutouts


class Masked(Mixed):
    """The mixed source with pixels without data."""

    def read(self, index):
        sample = super().read(index)
        if sample.image is None or index % 2:
            return sample
        valid = np.ones(sample.image.shape, bool)
        valid[:, 3:6, 2:9] = False
        return type(sample)(**{**vars(sample), "valid": valid})


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpack") / "survey"
    build(Masked(20), folder, name="mixed", samples_per_shard=8, progress=False)
    return folder


@pytest.fixture(scope="module")
def samples(survey):
    source = PackedSurvey(survey)
    return {s.key: s for s in map(source.read, range(len(source)))}


def pixels(sample):
    return sample.image if sample.valid is None else np.where(sample.valid, sample.image, np.nan)


def test_fits(survey, samples, tmp_path):
    assert unpack(survey, tmp_path / "out", "fits") == 20
    for key, sample in samples.items():
        with fits.open(tmp_path / "out" / f"{key}.fits") as hdus:
            names = {hdu.name for hdu in hdus}
            assert ("SPECTRUM" in names, "SFH" in names) == (sample.spectrum is not None, bool(sample.vectors))
            if sample.image is not None:
                np.testing.assert_array_equal(hdus[0].data, pixels(sample))
                centre = WCS(hdus[0].header).celestial.pixel_to_world((24 - 1) / 2, (20 - 1) / 2)
                assert (centre.ra.deg, centre.dec.deg) == pytest.approx((sample.ra, sample.dec), abs=1e-9)
            if sample.spectrum is not None:
                np.testing.assert_array_equal(hdus["SPECTRUM"].data["FLUX"], sample.spectrum.flux)
                np.testing.assert_allclose(hdus["SPECTRUM"].data["WAVE"], GRID.angstrom())


def test_fits_are_a_source_again(samples, tmp_path):
    build(Masked(20, True, False, False), tmp_path / "s", name="s", progress=False, on_bad="skip")
    unpack(tmp_path / "s", tmp_path / "out", "fits")
    source = FitsCutouts(tmp_path / "out", zero_is_missing=False)
    assert source.bands == ("g", "r", "z") and source.pixel_scale_arcsec == pytest.approx(0.262)
    for i in range(len(source)):
        sample = source.read(i)
        np.testing.assert_array_equal(pixels(sample), pixels(samples[sample.key]))
        assert sample.labels["z"] == samples[sample.key].labels["z"] and sample.split in ("train", "test")


def test_hdf5(survey, samples, tmp_path):
    assert unpack(survey, tmp_path / "out.h5", "hdf5", split="train") < 20
    with h5py.File(tmp_path / "out.h5") as file:
        assert list(file.attrs["bands"]) == ["g", "r", "z"] and set(file["catalog/split"].asstr()[:]) == {"train"}
        np.testing.assert_allclose(file["wave"][:], GRID.angstrom())
        for row, key in enumerate(file["catalog/key"].asstr()[:]):
            sample = samples[key]
            expected = np.nan if sample.image is None else pixels(sample)
            np.testing.assert_array_equal(file["images"][row], np.broadcast_to(expected, (3, 20, 24)))
            expected = np.full(501, np.nan) if sample.spectrum is None else sample.spectrum.ivar
            np.testing.assert_array_equal(file["ivar"][row], expected)
            np.testing.assert_array_equal(file["vectors/sfh"][row], sample.vectors.get("sfh", np.full(7, np.nan)))
            assert file["catalog/z"][row] == sample.labels["z"]


def test_parquet(survey, samples, tmp_path):
    unpack(survey, tmp_path / "out.parquet", "parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.metadata[b"image_shape"] == b"3 20 24" and len(table) == 20
    for row in table.to_pylist():
        sample = samples[row["key"]]
        if sample.image is None:
            assert row["image"] is None
        else:
            np.testing.assert_array_equal(np.float32(row["image"]).reshape(3, 20, 24), pixels(sample))
        assert (row["flux"] is None) == (sample.spectrum is None)
        np.testing.assert_array_equal(np.float32(row["photometry"] or []), sample.vectors.get("photometry", []))


@pytest.mark.parametrize("form", ["fits", "hdf5", "parquet"])
def test_a_corrupt_sample_leaves_nothing(survey, tmp_path, form):
    folder = tmp_path / "s"
    folder.mkdir()
    for path in survey.iterdir():
        data = bytearray(path.read_bytes())
        if path.name == "train-000001.tar":
            data[600] ^= 1
        (folder / path.name).write_bytes(data)
    with pytest.raises(BadSample, match="corrupt blob"):
        unpack(folder, tmp_path / "out", form)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_what_is_refused(survey, tmp_path):
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError, match="there: exists already"):
        unpack(survey, tmp_path / "there", "fits")
    with pytest.raises(ValueError, match="format: must be one of fits, hdf5, parquet"):
        unpack(survey, tmp_path / "x", "csv")
    with pytest.raises(ValueError, match="no samples in split 'half'; the survey has train, test"):
        unpack(survey, tmp_path / "x", "hdf5", split="half")
