"""Stacks of images in HDF5: either order of axes, any bands, columns as labels."""

import h5py
import numpy as np
import pytest

from armillary.engine.data.building.build import build
from armillary.engine.data.sources.kinds import guess_kind, open_source
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample

BANDS = tuple("grizy")
COUNT = 6


def write(path, images, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in {"images": images, **columns}.items():
            file[name] = values
    return path


@pytest.fixture
def fluxes():
    return np.random.default_rng(2).normal(size=(COUNT, 5, 8, 6)).astype(np.float32)


@pytest.mark.parametrize("last", [False, True])
def test_either_order_of_axes(tmp_path, fluxes, last):
    fluxes[1, 2, 3, 4] = np.nan
    stored = np.moveaxis(fluxes, 1, -1) if last else fluxes
    path = write(tmp_path / "all of it.h5", stored, RA=np.arange(6.0), Dec=np.full(6, -5.0), z=np.linspace(0, 1, 6))
    assert guess_kind(path) == "stack"
    source = open_source(path, bands=BANDS, unit="nanomaggy", pixel_scale_arcsec=0.17)
    assert (len(source), source.bands, source.unit, source.labels) == (
        6,
        BANDS,
        "nanomaggy",
        {"z": f"z of {path.name}"},
    )
    sample = source.read(1)
    assert (sample.key, sample.ra, sample.dec, sample.labels) == ("all_of_it-0000001", 1.0, -5.0, {"z": 0.2})
    np.testing.assert_array_equal(sample.valid, np.isfinite(fluxes[1]))
    np.testing.assert_array_equal(sample.image, np.nan_to_num(fluxes[1]))


def test_it_is_packed(tmp_path, fluxes):
    for name, part in (("a", fluxes[:4]), ("b", fluxes[4:])):
        write(tmp_path / f"files/{name}.hdf5", part, objid=1237648720693755918 + np.arange(len(part)))
    source = open_source(tmp_path / "files", "stack", bands=BANDS, unit="Jy", size=4)
    build(source, tmp_path / "survey", name="s", progress=False, codec="float16", processes=1)
    packed = PackedSurvey(tmp_path / "survey")
    found = {sample.key: sample for sample in map(packed.read, range(len(packed)))}
    assert set(found) == {*(f"a-{i:07d}" for i in range(4)), "b-0000000", "b-0000001"}
    np.testing.assert_allclose(found["b-0000001"].image, fluxes[5, :, 2:6, 1:5], rtol=1e-3)
    assert found["b-0000001"].labels == {"objid": "1237648720693755919"} and np.isnan(found["a-0000000"].ra)


def test_display_pictures_need_no_more(tmp_path):
    pictures = np.random.default_rng(1).integers(0, 255, (COUNT, 9, 9, 3), np.uint8)
    names = np.array([f"G {i}".encode() for i in range(COUNT)])
    path = write(
        tmp_path / "g10.h5", pictures, name=names, ra=np.zeros(6), dec=np.zeros(6), ans=np.arange(6, dtype=np.uint8)
    )
    source = open_source(path, key="name")  # not taken for cutouts of Stein et al., which have three bands first
    assert (source.bands, source.unit, set(source.labels)) == (("red", "green", "blue"), "count", {"ans"})
    sample = source.read(4)
    assert sample.key == "G_4" and sample.labels == {"ans": 4.0} and sample.valid is None
    np.testing.assert_array_equal(sample.image, pictures[4].transpose(2, 0, 1))
    grey = open_source(write(tmp_path / "grey.h5", pictures[..., 0]))
    assert grey.bands == ("grey",) and grey.read(0).image.shape == (1, 9, 9)


def test_an_array_in_a_group(tmp_path, fluxes):
    path = write(tmp_path / "x.h5", np.zeros((2, 3, 4, 4)), **{"data/cutouts": fluxes, "data/mass": np.arange(6)})
    source = open_source(path, "stack", images="data/cutouts", bands=BANDS, unit="Jy")
    assert len(source) == 6 and source.read(3).labels == {"mass": 3.0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"'images' is \(6, 5, 8, 6\), and its bands are not known; name them, such as --bands g r z"),
        ({"bands": BANDS}, "the unit of 'images' is not known; give it, such as --option unit=nanomaggy"),
        ({"bands": ("g", "r")}, r"bands: must be as many as 'images' of .* has, \(6, 5, 8, 6\), got g r"),
        ({"images": "cubes"}, "no array 'cubes'; it has images, mass, short; name it by --option images=NAME"),
        ({"bands": BANDS, "unit": "Jy", "key": "id"}, r"key: must be a column of .* \(mass\), got 'id'"),
        ({"bands": BANDS, "unit": "Jy", "size": 7}, "size: must be within 1 and 6"),
        ({"images": "mass"}, r"'mass' must be numbers of images, got \(6,\) int64"),
    ],
)
def test_bad_input(tmp_path, fluxes, options, said):
    path = write(tmp_path / "x.h5", fluxes, mass=np.arange(6), short=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=said):
        open_source(path, "stack", **options)


def test_files_that_differ_and_a_damaged_one(tmp_path, fluxes):
    write(tmp_path / "a.h5", fluxes)
    other = write(tmp_path / "b.h5", fluxes[:, :, :4])
    with pytest.raises(ValueError, match="b.h5: column 'images' is missing or differs from that of"):
        open_source(tmp_path, "stack", bands=BANDS, unit="Jy")
    other.write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="b.h5: not a readable HDF5 file"):
        open_source(tmp_path, "stack", bands=BANDS, unit="Jy")
    other.unlink()
    source = open_source(tmp_path, "stack", bands=BANDS, unit="Jy")
    (tmp_path / "a.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:2000])
    with pytest.raises(BadSample, match="a.h5: row 0: not readable"):
        source.read(0)
