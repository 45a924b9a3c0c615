import pickle

import h5py
import numpy as np
import pytest
from stein_files import write

from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.stein import SteinSurvey


@pytest.fixture
def survey(tmp_path):
    north, north_rows = write(tmp_path / "north" / "images_npix152_000000000_000000005.h5", 5)
    south, south_rows = write(
        tmp_path / "south" / "images_npix152_000000000_000000004.h5", 4, first=5, chunks=(2, 3, 8, 8)
    )
    return tmp_path, np.concatenate([north, south]), [north_rows, south_rows]


def test_rows_of_all_files(survey):
    folder, images, columns = survey
    source = pickle.loads(pickle.dumps(SteinSurvey(folder)))
    assert len(source) == 9 and source.bands == ("g", "r", "z") and source.unit == "nanomaggy"
    for i in (8, 0, 4, 5):
        sample = source.read(i)
        np.testing.assert_array_equal(sample.image, images[i])
        assert sample.valid is None
        rows, row = (columns[0], i) if i < 5 else (columns[1], i - 5)
        assert sample.key == f"9010_{300000 + i}_{i % 7}"
        assert (sample.ra, sample.dec) == (rows["ra"][row], rows["dec"][row])
        assert sample.labels["flux_r"] == pytest.approx(rows["flux"][row, 1])
        assert sample.labels["apflux_1"] == pytest.approx(rows["apflux"][row, 1])
        assert sample.labels["source_type"] == ("DEV", "SER", "EXP")[i % 3]
        assert sample.labels["z_training"] == i % 2
        assert set(sample.labels) == set(source.labels)
    assert source.read(4).source == "north/images_npix152_000000000_000000005.h5:4"
    assert source.read(4).labels["z_spec"] == 0.04 and np.isnan(source.read(5).labels["z_spec"])
    with pytest.raises(IndexError, match="row 9: this source has 9"):
        source.read(9)


def test_description_agrees_with_reading_across_files(survey):
    source = SteinSurvey(survey[0], rows=(2, 8))
    assert len(source) == 6
    rows = source.describe(1, 6)
    for i, key in enumerate(rows.keys):
        sample = source.read(i + 1)
        assert key == sample.key and rows.columns["ra"][i] == sample.ra
        assert rows.columns["source_type"][i] == sample.labels["source_type"]
        np.testing.assert_equal(rows.columns["z_spec"][i], sample.labels["z_spec"])
    assert source.describe(3, 3).keys == []


def test_missing_pixels_and_crop(tmp_path):
    write(tmp_path / "a.h5", 2, size=9)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["images"][1, 2] = 0
        file["images"][1, 0, 4, 4] = np.nan
        image = file["images"][1]
    sample = SteinSurvey(tmp_path / "a.h5", size=4).read(1)
    assert sample.image.shape == (3, 4, 4)
    assert not sample.valid[2].any() and sample.valid[1].all() and (~sample.valid[0]).sum() == 1
    np.testing.assert_array_equal(sample.image[1], image[1, 2:6, 2:6])
    assert SteinSurvey(tmp_path / "a.h5", zero_is_missing=False).read(1).valid[2].all()


def test_key_without_identity_columns(survey, tmp_path):
    write(tmp_path / "x" / "a.b.h5", 2, objid=None)
    source = SteinSurvey(tmp_path / "x" / "a.b.h5")
    assert source.describe(0, 2).keys == ["a_b-0000000", "a_b-0000001"]
    assert source.read(1).key == "a_b-0000001"


def test_list_of_files_keeps_its_order(survey):
    files = sorted(survey[0].rglob("*.h5"))[::-1]
    source = SteinSurvey(files)
    assert source.read(0).key == "9010_300005_5"
    assert source.inputs() != SteinSurvey(files[::-1]).inputs()
    assert SteinSurvey(files, rows=(0, 3)).inputs() != source.inputs()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ra": None}, "no column 'ra' with one value a row"),
        ({"ebv": np.zeros(3)}, r"column 'ebv' is \(3,\), the images have 2 rows"),
        ({"cube": np.zeros((2, 2, 2))}, r"column 'cube' is \(2, 2, 2\)"),
    ],
)
def test_wrong_layouts(tmp_path, changes, match):
    write(tmp_path / "a.h5", 2, **changes)
    with pytest.raises(ValueError, match=rf"a\.h5: {match}"):
        SteinSurvey(tmp_path)


def test_files_must_agree(survey, tmp_path):
    folder = survey[0]
    write(folder / "south" / "z.h5", 2, first=20, size=9)
    with pytest.raises(ValueError, match=r"z\.h5: images of \(3, 9, 9\)"):
        SteinSurvey(folder)
    (folder / "south" / "z.h5").unlink()
    write(folder / "south" / "z.h5", 2, first=20, z_spec=None)
    with pytest.raises(ValueError, match=r"z\.h5: column 'z_spec' is missing or differs"):
        SteinSurvey(folder)


def test_unreadable_and_missing(tmp_path):
    with pytest.raises(ValueError, match="no HDF5 files in it"):
        SteinSurvey(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.h5: no such HDF5 file"):
        SteinSurvey(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(ValueError, match=r"text\.h5: not a readable HDF5 file"):
        SteinSurvey(tmp_path / "text.h5")
    with h5py.File(tmp_path / "text.h5", "w") as file:
        file["pictures"] = np.zeros(3)
    with pytest.raises(ValueError, match="no data set 'images'; it has pictures"):
        SteinSurvey(tmp_path / "text.h5")
    with h5py.File(tmp_path / "text.h5", "w") as file:
        file["images"] = np.zeros((2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"'images' is \(2, 8, 8, 3\), not rows x 3 bands"):
        SteinSurvey(tmp_path / "text.h5")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rows": (3, 3)}, "rows: must be within 0 and 9"),
        ({"rows": (0, 10)}, "rows: must be within 0 and 9"),
        ({"size": 9}, "size: must be within 1 and 8"),
        ({"size": 0}, "size: must be within 1 and 8"),
    ],
)
def test_wrong_options(survey, options, match):
    with pytest.raises(ValueError, match=match):
        SteinSurvey(survey[0], **options)


def test_damaged_chunk_is_a_bad_sample(tmp_path):
    write(tmp_path / "a.h5", 4)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        images = file["images"][:]
        del file["images"]
        file.create_dataset("images", data=images, chunks=(1, 3, 8, 8), fletcher32=True)
        place = file["images"].id.get_chunk_info(2).byte_offset
    raw = bytearray((tmp_path / "a.h5").read_bytes())
    raw[place + 5] ^= 255
    (tmp_path / "a.h5").write_bytes(raw)
    source = SteinSurvey(tmp_path)
    source.read(1)
    with pytest.raises(BadSample, match=r"a\.h5: row 2: not readable"):
        source.read(2)
    np.testing.assert_array_equal(source.read(3).image, images[3])
