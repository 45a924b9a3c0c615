import pickle

import h5py
import numpy as np
import pytest
import torch

from armillary.engine.data.building.build import build
from armillary.engine.data.building.splits import BySource
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample, centre_crop
from armillary.engine.data.sources.surveys.galaxiesml import (
    GalaxiesML,
    GalaxiesMLSpectra,
    authors_split,
    bin_spectrum,
)

FIRST_ID = 36407041002914811  # float64 cannot tell it from its neighbours
PIXELS = 7783
WAVE = 3600 + 0.8 * np.arange(PIXELS)
STRUCTURE = ("ellipticity", "half_light_radius", "sersic_index")


def put(path, data):
    with h5py.File(path, "w") as file:
        for name, values in data.items():
            if values is not None:
                file[name] = values


def galaxies(count, first=0, size=16):
    rng = np.random.default_rng(first)
    data = {
        "image": rng.normal(0, 0.1, (count, 5, size, size)).astype(np.float32),
        "object_id": FIRST_ID + first + np.arange(count),
        "specz_redshift": rng.uniform(0.01, 4, count),
        "specz_redshift_err": rng.uniform(0, 1e-3, count),
        "specz_flag_homogeneous": np.ones(count, bool),
        "ra": rng.uniform(0, 360, count),
        "dec": rng.uniform(-7, 50, count),
    }
    for band in "grizy":
        data[f"{band}_cmodel_mag"] = rng.uniform(18, 25, count)
        data |= {f"{band}_{name}": rng.uniform(0, 9, count).astype(np.float32) for name in STRUCTURE}
    return data


def spectra(count, first=0):
    rng = np.random.default_rng(first)
    ivar = rng.uniform(0.5, 4, (count, PIXELS)).astype(np.float32)
    ivar[:, 1000:1100] = 0
    return {
        "image": rng.normal(0, 0.1, (count, 5, 16, 16)).astype(np.float32),
        "spectrum/flux": (2 + rng.normal(size=(count, PIXELS)) / np.sqrt(np.maximum(ivar, 0.5))).astype(np.float32),
        "spectrum/ivar": ivar,
        "spectrum/wave": np.tile(WAVE, (count, 1)),
        "targetid": np.array([str(39627640566453260 + first + i).encode() for i in range(count)]),
        "object_id": FIRST_ID + first + np.arange(count),
        "DESI_fibermap/DESI_redshift": rng.uniform(0, 3, count),
        "DESI_fibermap/DESI_redshift_err": rng.uniform(0, 1e-4, count),
        "DESI_fibermap/MORPHTYPE": np.array([b"PSF", b"SER", b"DEV"])[np.arange(count) % 3],
        "DESI_fibermap/FLUX_R": rng.uniform(1, 9, count).astype(np.float32),
        "DESI_fibermap/TARGET_RA": rng.uniform(0, 360, count),
        "DESI_fibermap/TARGET_DEC": rng.uniform(-5, 30, count),
        "HSC_metadata/g_cmodel_mag": rng.uniform(18, 25, count),
        "HSC_metadata/object_id": FIRST_ID + first + np.arange(count),
    }


@pytest.fixture
def folder(tmp_path):
    put(tmp_path / "5x64x64_training_with_morphology.hdf5", galaxies(5))
    put(tmp_path / "5x64x64_validation_with_morphology.hdf5", galaxies(2, 5))
    put(tmp_path / "5x64x64_testing_with_morphology.hdf5", galaxies(3, 7))
    return tmp_path


def test_all_files_of_galaxiesml(folder):
    source = pickle.loads(pickle.dumps(GalaxiesML(folder)))
    assert len(source) == 10 and source.bands == ("g", "r", "i", "z", "y")
    rows = source.describe(0, 10)
    assert rows.splits == ["test"] * 3 + ["train"] * 5 + ["validation"] * 2
    test, train = galaxies(3, 7), galaxies(5)
    for i, (data, row) in {7: (train, 4), 0: (test, 0), 3: (train, 0)}.items():
        sample = source.read(i)
        np.testing.assert_array_equal(sample.image, data["image"][row])
        assert sample.key == rows.keys[i] == str(data["object_id"][row]) == sample.labels["object_id"]
        assert (sample.ra, sample.dec) == (data["ra"][row], data["dec"][row])
        assert sample.labels["redshift"] == data["specz_redshift"][row] == rows.columns["redshift"][i]
        assert sample.labels["y_sersic_index"] == data["y_sersic_index"][row]
        assert sample.labels["specz_flag_homogeneous"] == 1 and "specz_redshift" not in sample.labels
        assert set(sample.labels) == set(source.labels)
    assert source.labels["g_cmodel_mag"] == "cmodel magnitude, AB, band g"


def test_build_and_read_back(folder):
    source = GalaxiesML(folder, size=12)
    survey = build(source, folder / "packed", name="galaxiesml", split=BySource(), progress=False)
    assert [survey.count(s) for s in ("train", "validation", "test")] == [5, 2, 3]
    originals = {source.read(i).key: source.read(i) for i in range(10)}
    packed = PackedSurvey(folder / "packed")
    for i in range(10):
        sample = packed.read(i)
        original = originals[sample.key]
        np.testing.assert_allclose(sample.image, original.image, atol=max(survey.step) * 0.51)
        assert sample.labels == original.labels and sample.split == original.split and sample.ra == original.ra


def test_spectra_and_their_metadata(tmp_path):
    data = spectra(4)
    data["image"][2, 3] = 0
    put(tmp_path / "DESI_HSC_64x64_v2.hdf5", data)
    source = pickle.loads(pickle.dumps(GalaxiesMLSpectra(tmp_path / "DESI_HSC_64x64_v2.hdf5")))
    grid = source.spectrum.grid
    assert (grid.kind, grid.count) == ("linear", PIXELS)
    np.testing.assert_allclose(grid.angstrom(), WAVE, atol=1e-3)
    sample = source.read(2)
    seen = data["spectrum/ivar"][2] > 0
    np.testing.assert_array_equal(sample.spectrum.ivar, data["spectrum/ivar"][2])
    np.testing.assert_array_equal(sample.spectrum.flux, np.where(seen, data["spectrum/flux"][2], 0))
    assert not sample.valid[3].any() and sample.valid[2].all()
    assert sample.key == "39627640566453262" == sample.labels["targetid"]
    assert sample.labels["redshift"] == data["DESI_fibermap/DESI_redshift"][2]
    assert sample.labels["morphtype"] == "DEV" and sample.labels["object_id"] == str(FIRST_ID + 2)
    assert sample.labels["g_cmodel_mag"] == data["HSC_metadata/g_cmodel_mag"][2]
    assert (sample.ra, sample.dec) == (data["DESI_fibermap/TARGET_RA"][2], data["DESI_fibermap/TARGET_DEC"][2])
    assert set(sample.labels) == set(source.labels)
    survey = build(source, tmp_path / "packed", name="s", progress=False)
    assert survey.modalities == ("image", "spectrum")
    back = {s.key: s for s in (PackedSurvey(tmp_path / "packed").read(i) for i in range(4))}[sample.key]
    assert back.labels == sample.labels
    np.testing.assert_array_equal(back.spectrum.ivar > 0, seen)
    np.testing.assert_allclose(back.spectrum.ivar[seen], sample.spectrum.ivar[seen], rtol=0.011)
    sharpest = np.percentile(sample.spectrum.ivar[seen] ** -0.5, 10)
    np.testing.assert_allclose(back.spectrum.flux, sample.spectrum.flux, atol=sharpest / 15)


def test_the_split_is_the_authors(tmp_path):
    """Against what `torch.utils.data.random_split` gives with their seed, and the published numbers."""
    published = np.bincount(authors_split(134_533))
    assert published.tolist() == [94_173, 20_179, 20_181]
    parts = torch.utils.data.random_split(range(40), [28, 6, 6], generator=torch.Generator().manual_seed(0))
    put(tmp_path / "a.hdf5", spectra(40))
    source = GalaxiesMLSpectra(tmp_path / "a.hdf5")
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        assert {source.read(i).split for i in part.indices} == {name}
    assert source.describe(10, 20).splits == source.describe(0, 40).splits[10:20]
    survey = build(source, tmp_path / "packed", name="s", split=BySource(), progress=False)
    assert {name: survey.count(name) for name in ("train", "validation", "test")} == {
        "train": 28, "validation": 6, "test": 6,
    }  # fmt: skip


def test_bins_as_published(tmp_path):
    data = spectra(3)
    data["spectrum/flux"][1, 35] = np.nan
    data["spectrum/ivar"][1, 60:90] = 0
    put(tmp_path / "a.hdf5", data)
    source = GalaxiesMLSpectra(tmp_path / "a.hdf5", bin_pixels=30)
    assert source.spectrum.grid.count == 259
    assert source.spectrum.grid.angstrom()[[0, 1]] == pytest.approx([WAVE[:30].mean(), WAVE[30:60].mean()])
    spectrum = source.read(1).spectrum
    flux, ivar = data["spectrum/flux"][1], data["spectrum/ivar"][1]
    assert spectrum.flux[0] == pytest.approx(np.average(flux[:30], weights=ivar[:30]), rel=1e-5)
    assert spectrum.ivar[0] == pytest.approx(ivar[:30].sum(), rel=1e-5)
    without = np.delete(np.arange(30, 60), 5)
    assert spectrum.flux[1] == pytest.approx(np.average(flux[without], weights=ivar[without]), rel=1e-5)
    assert spectrum.flux[2] == 0 and spectrum.ivar[2] == 0
    binned, weight = bin_spectrum(np.full(7, 2.0, np.float32), np.array([1, 0, 3, 0, 0, 0, 9.0]), 3)
    np.testing.assert_array_equal([binned, weight], [[2, 0], [4, 0]])
    for wrong in (0, 4000):
        with pytest.raises(ValueError, match="bin_pixels: must be within 1 and 3891"):
            GalaxiesMLSpectra(tmp_path / "a.hdf5", bin_pixels=wrong)


def changed(column, row, value):
    data = spectra(3)
    data[column][row] = value
    return {column: data[column]}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (changed("spectrum/wave", (0, 7), np.nan), "row 0: column 'spectrum/wave': .* finite"),
        (changed("spectrum/wave", (0, 7), 3600), "row 0: column 'spectrum/wave': .* increasing"),
        (changed("spectrum/wave", (1, 7), np.nan), "row 1: column 'spectrum/wave': pixel 7 is at nan angstrom"),
        (changed("spectrum/wave", 2, WAVE + 0.8), r"row 2: column 'spectrum/wave': pixel 0 is at 3600.8 .* at 3600"),
        ({"spectrum/wave": None}, "column 'spectrum/wave' is missing"),
        ({"spectrum/wave": np.tile(WAVE[1:], (3, 1))}, r"column 'spectrum/wave' is \(3, 7782\), must be rows x 7783"),
        ({"spectrum/ivar": np.zeros((2, PIXELS))}, "column 'spectrum/ivar' has 2 rows, the others have 3"),
        ({"image": np.zeros((3, 4, 16, 16), np.float32)}, r"column 'image' is \(3, 4, 16, 16\), must be rows x 5"),
        ({"DESI_fibermap/FLUX_R": np.zeros(4)}, "column 'DESI_fibermap/FLUX_R' has 4 rows, the others have 3"),
        ({"HSC_metadata/g_cmodel_mag": None, "HSC_metadata/object_id": None}, "group 'HSC_metadata' is missing"),
        ({"targetid": np.zeros(3)}, "column 'targetid' is of type float64, must be text or whole"),
    ],
    ids=[
        "NaN wavelength",
        "falling wavelength",
        "NaN in another row",
        "another grid",
        "no wavelengths",
        "short wavelengths",
        "short ivar",
        "four bands",
        "long column",
        "no group",
        "float identifiers",
    ],
)
def test_wrong_spectra(tmp_path, changes, match):
    put(tmp_path / "a.hdf5", spectra(3) | changes)
    with pytest.raises(ValueError, match=rf"a\.hdf5: {match}"):
        GalaxiesMLSpectra(tmp_path)


@pytest.mark.parametrize(
    ("column", "row", "value", "match"),
    [
        ("spectrum/ivar", (1, 5), -1, "row 1: column 'spectrum/ivar': pixel 5 is negative"),
        ("spectrum/ivar", 1, 0, "row 1: column 'spectrum/ivar': no pixel carries data"),
        ("targetid", 1, b"39627640566453260", "row 1: column 'targetid': 39627640566453260 is repeated, row 0"),
        ("targetid", 1, b"396.1", r"row 1: key '396\.1': must be"),
        ("DESI_fibermap/TARGET_RA", 1, -1, r"row 1: column 'ra': -1.0 is outside \[0, 360\]"),
    ],
    ids=["negative ivar", "no data", "repeated TARGETID", "dotted TARGETID", "RA"],
)
def test_unusable_rows(tmp_path, column, row, value, match):
    put(tmp_path / "a.hdf5", spectra(3) | changed(column, row, value))
    source = GalaxiesMLSpectra(tmp_path)
    source.read(0)
    with pytest.raises(BadSample, match=rf"a\.hdf5: {match}"):
        source.read(1)
    source.read(2)


def test_wavelengths_of_every_row_are_compared(tmp_path):
    count = 130
    data = spectra(2)
    data = {name: np.repeat(values[:1], count, axis=0) for name, values in data.items()}
    data["targetid"] = np.arange(count)
    data["spectrum/wave"][1] += 0.4  # not among the rows that are looked at first
    data["image"] = data["image"][:, :, :4, :4]
    put(tmp_path / "a.hdf5", data)
    source = GalaxiesMLSpectra(tmp_path)
    with pytest.raises(BadSample, match=r"a\.hdf5: row 1: column 'spectrum/wave': pixel 0 is at 3600\.4"):
        source.read(1)


def test_wrong_files_of_galaxiesml(folder):
    train = folder / "5x64x64_training_with_morphology.hdf5"
    put(train, galaxies(5) | {"specz_redshift": None})
    with pytest.raises(ValueError, match=r"training_with_morphology\.hdf5: column 'specz_redshift' is missing"):
        GalaxiesML(folder)
    put(train, galaxies(5) | {"z_sersic_index": None})
    with pytest.raises(ValueError, match=r"training_.*: column 'z_sersic_index' is missing or differs"):
        GalaxiesML(folder)
    put(train, galaxies(5, size=18))
    with pytest.raises(ValueError, match=r"training_.*: column 'image' is of \(18, 18\) pixels"):
        GalaxiesML(folder)
    put(train, galaxies(5, 6))
    with pytest.raises(BadSample, match=rf"training_.*: row 1: column 'object_id': {FIRST_ID + 7} is repeated"):
        GalaxiesML(folder).read(4)
    train.write_bytes(train.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"training_.*: not a readable HDF5 file"):
        GalaxiesML(folder)
    put(train, {name: values[:0] for name, values in galaxies(1).items()})
    with pytest.raises(ValueError, match="column 'image' has no rows"):
        GalaxiesML(train)
    with pytest.raises(ValueError, match="size: must be within 1 and 16"):
        GalaxiesML(folder / "5x64x64_testing_with_morphology.hdf5", size=17)


def test_real_hsc_stamps(real_data, tmp_path):
    stamps = [np.load(path)["images"] for path in sorted((real_data / "hsc_grizy_stamps").glob("*.npz"))]
    images = np.stack([centre_crop(stamp, 48, 48) for stamp in stamps if min(stamp.shape[1:]) >= 48])
    put(tmp_path / "5x64x64_training.hdf5", galaxies(len(images)) | {"image": images})
    source = GalaxiesML(tmp_path)
    survey = build(source, tmp_path / "packed", name="stamps", progress=False)
    assert survey.count() == len(images) > 10
    packed = PackedSurvey(tmp_path / "packed")
    for i in range(len(images)):
        sample = packed.read(i)
        original = images[int(sample.key) - FIRST_ID]
        seen = original != 0
        for k, step in enumerate(survey.step):
            np.testing.assert_allclose(sample.image[k][seen[k]], original[k][seen[k]], atol=step * 0.51, rtol=1e-6)
