import pickle

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from armillary.engine.data.building.build import build
from armillary.engine.data.building.splits import BySource
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.astroclip import AstroClipPairs, constant_ivar

FIRST_ID = 39627640566453260  # float64 cannot tell it from its neighbours
COUNTS = (10, 5)


def pairs(count, first, size=12):
    """Images [n, 3, H, W], fluxes [n, 7781], redshifts and TARGETIDs."""
    rng = np.random.default_rng(first)
    images = rng.normal(0, 0.01, (count, 3, size, size)).astype(np.float32)
    sigma = rng.uniform(0.3, 2, (count, 1))
    flux = (3 + sigma * rng.normal(size=(count, 7781))).astype(np.float32)
    return images, flux, rng.uniform(0, 0.6, count).astype(np.float32), FIRST_ID + first + np.arange(count)


def write(path, counts=COUNTS, size=12, **changes):
    """The published HDF5 layout: images are the transpose of band x height x width."""
    everything, first = [], 0
    with h5py.File(path, "w") as file:
        for number, count in enumerate(counts):
            images, flux, redshift, ids = pairs(count, first, size)
            everything.append((images, flux, redshift, ids))
            group = file.create_group(str(number))
            data = {"images": images.transpose(0, 3, 2, 1), "spectra": flux[..., None]}
            data |= {"redshifts": redshift, "targetids": ids}
            for name, values in (data | (changes if number == len(counts) - 1 else {})).items():
                if values is not None:
                    group[name] = values
            first += count
    return [np.concatenate(columns) for columns in zip(*everything, strict=True)]


def write_shard(path, first, count, row_group_size=3, **changes):
    images, flux, redshift, ids = pairs(count, first)
    cube, grid = pa.list_(pa.list_(pa.list_(pa.float32()))), pa.list_(pa.list_(pa.float32()))
    data = {
        "image": pa.array(images.transpose(0, 3, 2, 1).tolist(), cube),
        "spectrum": pa.array(flux[..., None].tolist(), grid),
        "redshift": pa.array(redshift),
        "targetid": pa.array(ids),
    } | changes
    pq.write_table(pa.table({k: v for k, v in data.items() if v is not None}), path, row_group_size=row_group_size)
    return images, flux, redshift, ids


def test_rows_and_splits_of_the_hdf5_file(tmp_path):
    images, flux, redshift, ids = write(tmp_path / "astroclip_desi.1.1.5.h5")
    source = pickle.loads(pickle.dumps(AstroClipPairs(tmp_path / "astroclip_desi.1.1.5.h5")))
    assert len(source) == 15 and source.bands == ("g", "r", "z") and source.unit == "nanomaggy"
    assert source.spectrum.grid.angstrom()[[0, -1]] == pytest.approx([3600, 9824])
    for i in (14, 0, 7, 8, 10):
        sample = source.read(i)
        np.testing.assert_array_equal(sample.image, images[i])
        np.testing.assert_array_equal(sample.spectrum.flux, flux[i])
        assert sample.key == sample.labels["targetid"] == str(ids[i])
        assert sample.labels["redshift"] == redshift[i] and np.isnan(sample.ra)
    assert source.describe(0, 15).splits == ["train"] * 8 + ["test"] * 2 + ["train"] * 4 + ["test"]
    assert source.read(8).split == "test" and source.read(8).source == "astroclip_desi.1.1.5.h5[0]:8"
    rows = source.describe(7, 13)
    assert rows.keys == [str(v) for v in ids[7:13]] and not rows.bad
    np.testing.assert_array_equal(rows.columns["redshift"], redshift[7:13])
    with pytest.raises(IndexError, match="row 15: this source has 15"):
        source.read(15)


def test_parquet_shards_hold_the_same(tmp_path):
    write_shard(tmp_path / "train-00000-of-00002.parquet", 0, 7)
    write_shard(tmp_path / "train-00001-of-00002.parquet", 7, 2)
    images, flux, redshift, ids = write_shard(tmp_path / "test-00000-of-00001.parquet", 30, 4)
    source = pickle.loads(pickle.dumps(AstroClipPairs(tmp_path)))
    assert len(source) == 13  # test sorts before train
    for i in (3, 0, 2):
        sample = source.read(i)
        np.testing.assert_array_equal(sample.image, images[i])
        np.testing.assert_array_equal(sample.spectrum.flux, flux[i])
        assert sample.key == str(ids[i]) and sample.labels["redshift"] == redshift[i] and sample.split == "test"
    images, flux, redshift, ids = pairs(7, 0)
    for i in (0, 5, 6):
        np.testing.assert_array_equal(source.read(4 + i).image, images[i])
    assert source.describe(2, 12).splits == ["test"] * 2 + ["train"] * 8
    assert source.describe(4, 11).keys == [str(v) for v in ids]


def test_build_and_read_back(tmp_path):
    images, flux, _, ids = write(tmp_path / "pairs.h5", size=24)
    source = AstroClipPairs(tmp_path / "pairs.h5")
    survey = build(source, tmp_path / "packed", name="pairs", split=BySource(), progress=False)
    assert survey.modalities == ("image", "spectrum") and survey.count("train") == 12 and survey.count("test") == 3
    packed = PackedSurvey(tmp_path / "packed")
    assert sorted(packed.read(i).key for i in range(15)) == sorted(str(v) for v in ids)
    for i in range(15):
        sample = packed.read(i)
        row = int(sample.key) - FIRST_ID
        np.testing.assert_allclose(sample.image, images[row], atol=max(survey.step) * 0.51)
        original = source.read(row)
        sigma = original.spectrum.ivar[0] ** -0.5
        np.testing.assert_allclose(sample.spectrum.flux, flux[row], atol=sigma / 15)
        assert sample.labels == original.labels and sample.split == original.split


def test_missing_pixels_and_crop(tmp_path):
    images, flux, _, ids = pairs(4, 0, 13)
    images[2, 1] = 0
    images[2, 0, 5, 6] = np.nan
    flux[2, :100] = 0
    flux[2, 200] = np.nan
    changes = {"images": images.transpose(0, 3, 2, 1), "spectra": flux[..., None]}
    write(tmp_path / "a.h5", (4,), 13, **changes)
    sample = AstroClipPairs(tmp_path / "a.h5", size=6).read(2)
    assert sample.image.shape == (3, 6, 6)
    assert not sample.valid[1].any() and sample.valid[2].all() and not sample.valid[0, 2, 3]
    np.testing.assert_array_equal(sample.image[2], images[2, 2, 3:9, 3:9])
    ivar = sample.spectrum.ivar
    assert (ivar[:100] == 0).all() and ivar[200] == 0 and sample.spectrum.flux[200] == 0
    assert (ivar[100:200] == ivar[100]).all() and ivar[100] > 0
    whole = AstroClipPairs(tmp_path / "a.h5", zero_is_missing=False).read(2)
    assert whole.valid[1].all() and not whole.valid[0, 5, 6]


def test_estimated_noise():
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 50, 7781)
    for sigma in (0.1, 3.0):
        flux = slope + rng.normal(0, sigma, 7781)
        flux[::50] += 40  # lines do not move the median
        ivar = constant_ivar(flux, np.ones(7781, bool))
        assert ivar.dtype == np.float32 and ivar[0] ** -0.5 == pytest.approx(sigma, rel=0.08)
    assert (constant_ivar(slope * 0 + 2, np.ones(7781, bool)) == 1).all()
    few = np.zeros(7781, bool)
    few[:3] = True
    assert constant_ivar(flux, few).sum() == 3


def test_a_targetid_occurs_once(tmp_path):
    ids = FIRST_ID + np.array([10, 11, 3, 13, 14])
    write(tmp_path / "a.h5", targetids=ids)
    source = AstroClipPairs(tmp_path / "a.h5")
    message = rf"a\.h5: group '1': row 2: column 'targetids': {FIRST_ID + 3} is repeated, row 3 of the source"
    with pytest.raises(BadSample, match=message):
        source.read(12)
    assert list(source.describe(0, 15).bad) == list(source.describe(11, 13).bad) == [12]
    with pytest.raises(BadSample, match=message):
        build(source, tmp_path / "packed", name="pairs", progress=False)
    survey = build(source, tmp_path / "packed", name="pairs", progress=False, on_bad="skip")
    assert survey.count() == 14


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images": None}, "column 'images' is missing; there is redshifts"),
        ({"images": np.zeros((5, 3, 12, 12), np.float32)}, r"column 'images' is \(5, 3, 12, 12\), must be rows x any"),
        ({"images": np.zeros((5, 12, 12, 4), np.float32)}, r"column 'images' is .* must be rows x any x any x 3"),
        ({"images": np.zeros((5, 12, 12, 3), np.uint8)}, "column 'images' is of type uint8, must be floating-point"),
        ({"spectra": np.zeros((5, 7780, 1), np.float32)}, r"column 'spectra' is \(5, 7780, 1\), must be rows x 7781"),
        ({"redshifts": np.zeros(4)}, "column 'redshifts' has 4 rows, the others have 5"),
        ({"targetids": np.zeros(5)}, "column 'targetids' is of type float64, must be whole"),
    ],
    ids=["no images", "bands first", "four bands", "bytes", "7780 pixels", "short column", "float identifiers"],
)
def test_wrong_layouts(tmp_path, changes, match):
    write(tmp_path / "a.h5", **changes)
    with pytest.raises(ValueError, match=rf"a\.h5: group '1': {match}"):
        AstroClipPairs(tmp_path / "a.h5")


def test_unreadable_files(tmp_path):
    path = tmp_path / "a.h5"
    with pytest.raises(FileNotFoundError, match=r"a\.h5: no such HDF5 or Parquet file"):
        AstroClipPairs(path)
    with pytest.raises(ValueError, match="no HDF5 or Parquet files in it"):
        AstroClipPairs(tmp_path)
    write(path)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(ValueError, match=r"a\.h5: not a readable HDF5 file: .*truncated"):
        AstroClipPairs(path)
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"a\.h5: no groups '0', '1', ...; it has images"):
        AstroClipPairs(path)
    write(path, (2, 2, 2))
    with h5py.File(path, "r+") as file:
        del file["1"]
    with pytest.raises(ValueError, match=r"a\.h5: group '1' is missing; it has 0, 2"):
        AstroClipPairs(path)
    write(path, (0,))
    with pytest.raises(ValueError, match=r"a\.h5: no rows in it"):
        AstroClipPairs(path)
    write(path)
    with pytest.raises(ValueError, match="size: must be within 1 and 12"):
        AstroClipPairs(path, size=13)
    write_shard(tmp_path / "train-0.parquet", 0, 2)
    with pytest.raises(ValueError, match=r"train-0\.parquet: a folder must hold either HDF5 or Parquet"):
        AstroClipPairs(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("data.parquet", {}, "the name of a shard must begin with train- or test-"),
        ("train-0.parquet", {"spectrum": None}, "column 'spectrum' is missing; there is image, redshift"),
        ("train-0.parquet", {"targetid": pa.array(["a", "b"])}, "column 'targetid' is of type string"),
        ("train-0.parquet", {"image": pa.array([[[[1.0] * 4]]] * 2)}, r"column 'image' is \(1, 1, 4\)"),
        (
            "train-0.parquet",
            {"image": pa.array([[[[1.0] * 3], [[1.0] * 2]]] * 2)},
            "row 0: column 'image': lists of len",
        ),
        ("train-0.parquet", {"spectrum": pa.array([[[1.0]] * 9] * 2)}, r"column 'spectrum' is \(9, 1\)"),
    ],
    ids=["no split", "no spectrum", "text identifiers", "four bands", "ragged", "nine pixels"],
)
def test_wrong_shards(tmp_path, name, changes, match):
    write_shard(tmp_path / name, 0, 2, **changes)
    with pytest.raises(ValueError, match=rf"{name}: {match}"):
        AstroClipPairs(tmp_path)


def test_truncated_shard(tmp_path):
    path = tmp_path / "test-0.parquet"
    write_shard(path, 0, 2)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"test-0\.parquet: not a readable Parquet file"):
        AstroClipPairs(path)


def test_a_bad_row_names_file_group_row_and_column(tmp_path):
    _, flux, _, _ = pairs(5, 10)
    flux[3] = np.nan
    write(tmp_path / "a.h5", spectra=flux[..., None])
    source = AstroClipPairs(tmp_path / "a.h5")
    with pytest.raises(BadSample, match=r"a\.h5: group '1': row 3: column 'spectra': no pixel carries data"):
        source.read(13)
    images, _, _, _ = pairs(3, 0)
    ragged = images.transpose(0, 3, 2, 1).tolist()
    ragged[1][0] = ragged[1][0][:-1]
    write_shard(tmp_path / "test-0.parquet", 0, 3, image=pa.array(ragged))
    source = AstroClipPairs(tmp_path / "test-0.parquet")
    source.read(0)
    with pytest.raises(BadSample, match=r"test-0\.parquet: row 1: column 'image': lists of lengths"):
        source.read(1)
