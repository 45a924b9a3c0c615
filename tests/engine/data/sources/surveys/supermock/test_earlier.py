import pickle

import h5py
import numpy as np
import pytest

from armillary.engine.data.building.build import build
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.supermock.earlier import EarlierSuperMock
from armillary.engine.data.sources.surveys.supermock.grids import resample_sed, sed_grid

FIRST_ID = 5600000000000000123  # float64 cannot tell it from its neighbours
AGES = np.linspace(0.199, 13.80, 117)
WAVE = np.geomspace(91, 1e8, 700)  # angstrom; the published files have 11,149
WISE = ("W1", "W2", "z_DEcam", "y_DEcam", "r_DEcam", "g_DEcam", "i_DEcam")


def galaxies(count, first=0):
    rng = np.random.default_rng(first)
    data = {
        "galaxy_id": FIRST_ID + first + np.arange(count),
        "halo_id": FIRST_ID - first - np.arange(count),
        "ra_true": rng.uniform(0, 360, count),
        "dec_true": rng.uniform(-90, 90, count),
        "redshift_true": rng.uniform(0, 3, count),
        "stellar_mass": 10 ** rng.uniform(8, 11.5, count),
        "halo_mass": 10 ** rng.uniform(11, 14, count),
        "is_central": rng.random(count) < 0.7,
        "SFH": rng.uniform(0, 20, (count, 117)).astype(np.float32),
        "time_bins_SFH": AGES,
        "SED": rng.uniform(1e-6, 1e-5, (count, len(WAVE))).astype(np.float32),
        "SED_wavelength": WAVE,
    }
    bands = [f"{b}_sdss" for b in "ugrizY"] + [f"{k}_spherex" for k in range(102)]
    bands += [f"{k}_cosmos" for k in range(31)] + [f"{b}_wise" for b in WISE]
    return data | {f"mag_{band}": rng.uniform(18, 27, count).astype(np.float32) for band in bands}


def put(path, data):
    with h5py.File(path, "w") as file:
        for name, values in data.items():
            if values is not None:
                file[name] = values


def test_vectors_and_labels(tmp_path):
    data = galaxies(5)
    data["mag_2_spherex"][3] = np.inf
    put(tmp_path / "mock.hdf5", data)
    source = pickle.loads(pickle.dumps(EarlierSuperMock(tmp_path / "mock.hdf5")))
    records = {record.name: record for record in source.vectors}
    sizes = {"lsst": 6, "spherex": 102, "cosmos": 31, "wise": 7, "sfh": 117, "sed": 700}
    assert {name: record.size for name, record in records.items()} == sizes
    assert records["lsst"].components == ("u", "g", "r", "i", "z", "Y") and records["lsst"].unit == "AB mag"
    assert records["spherex"].components[:3] == ("0", "1", "2") and records["spherex"].components[-1] == "101"
    assert records["sfh"].components[0] == "0.199 Gyr" and records["sed"].components[0] == "0.0091 um"
    assert source.bands == () and len(source) == 5
    sample = source.read(3)
    assert sample.image is None and sample.spectrum is None
    for k, band in enumerate("ugrizY"):
        assert sample.vectors["lsst"][k] == data[f"mag_{band}_sdss"][3]
    spherex = np.array([data[f"mag_{k}_spherex"][3] for k in range(102)])
    spherex[2] = np.nan
    np.testing.assert_array_equal(sample.vectors["spherex"], spherex)
    np.testing.assert_array_equal(sample.vectors["sfh"], data["SFH"][3])
    np.testing.assert_array_equal(sample.vectors["sed"], data["SED"][3])
    wise = {f"mag_{b}_wise": v for b, v in zip(records["wise"].components, sample.vectors["wise"], strict=True)}
    assert wise == {column: data[column][3] for column in wise}
    assert sample.key == sample.labels["galaxy_id"] == str(FIRST_ID + 3)
    assert sample.labels["halo_id"] == str(FIRST_ID - 3) and sample.labels["is_central"] == data["is_central"][3]
    assert sample.labels["redshift"] == data["redshift_true"][3]
    assert sample.labels["stellar_mass"] == data["stellar_mass"][3]
    assert (sample.ra, sample.dec) == (data["ra_true"][3], data["dec_true"][3])
    assert set(sample.labels) == set(source.labels) == {
        "redshift", "stellar_mass", "halo_mass", "is_central", "galaxy_id", "halo_id"
    }  # fmt: skip


def test_build_and_read_back(tmp_path):
    put(tmp_path / "a.h5", galaxies(6))
    put(tmp_path / "b.h5", galaxies(4, 6))
    source = EarlierSuperMock(tmp_path, resample_sed=True, leave_out=("cosmos",))
    survey = build(source, tmp_path / "packed", name="mock", progress=False)
    assert survey.modalities == ("vectors",) and survey.count() == 10
    assert [v.name for v in survey.vectors] == ["lsst", "spherex", "wise", "sfh", "sed"]
    originals = {source.read(i).key: source.read(i) for i in range(10)}
    packed = PackedSurvey(tmp_path / "packed")
    for i in range(10):
        sample = packed.read(i)
        original = originals[sample.key]
        assert sample.labels == original.labels and sample.ra == original.ra
        assert list(sample.vectors) == list(original.vectors)
        for name, values in original.vectors.items():
            np.testing.assert_array_equal(sample.vectors[name], values)


def test_rows_beyond_one_block_and_file(tmp_path):
    small = {k: v for k, v in galaxies(2500).items() if k not in ("SED", "SED_wavelength", "SFH", "time_bins_SFH")}
    put(tmp_path / "a.h5", small)
    put(tmp_path / "b.h5", {k: v[:7] if k != "galaxy_id" else v[:7] + 9000 for k, v in small.items()})
    source = EarlierSuperMock(tmp_path)
    for i in (0, 511, 512, 1023, 1024, 2499, 2500, 2506, 5):
        row = i if i < 2500 else i - 2500
        sample = source.read(i)
        assert sample.vectors["lsst"][1] == small["mag_g_sdss"][row]
        assert sample.labels["redshift"] == small["redshift_true"][row]
        assert source.describe(i, i + 1).keys == [sample.key]


def test_resampled_sed_keeps_the_light():
    wave = np.geomspace(0.01, 1000, 11149)
    centres, edges = sed_grid()
    assert centres[[0, -1]] == pytest.approx([0.09, 35]) and len(centres) == 500 and len(edges) == 501
    np.testing.assert_allclose(resample_sed(wave**0.5, wave), centres**0.5, rtol=2e-4)
    line = np.exp(-0.5 * (np.log(wave / 0.6563) / 2e-3) ** 2)  # narrower than a bin
    found = resample_sed(line, wave)
    assert np.diff(edges)[0] > 0 and (found * np.diff(np.log(edges))).sum() == pytest.approx(
        2e-3 * np.sqrt(2 * np.pi), rel=1e-4
    )
    line[5000] = np.nan
    holes = np.isnan(resample_sed(line, wave))
    assert 1 <= holes.sum() <= 2 and abs(centres[holes] / wave[5000] - 1).max() < 0.02
    beyond = np.isnan(resample_sed(np.ones(100), np.geomspace(0.2, 5, 100)))
    np.testing.assert_array_equal(beyond, (edges[:-1] < 0.2) | (edges[1:] > 5))


def test_sed_in_micrometres(tmp_path):
    data = galaxies(2)
    put(tmp_path / "a.h5", data)
    put(tmp_path / "b.h5", data | {"SED_wavelength": WAVE * 1e-4})
    one, other = (EarlierSuperMock(tmp_path / f"{name}.h5", resample_sed=True) for name in "ab")
    np.testing.assert_array_equal(one.read(1).vectors["sed"], other.read(1).vectors["sed"])
    assert one.vectors == other.vectors and one.vectors[-1].size == 500
    assert np.isfinite(one.read(1).vectors["sed"]).all()


def reordered(values, row, value):
    values = values.copy()
    values[row] = value
    return values


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"redshift_true": None}, "column 'redshift_true' is missing"),
        ({"stellar_mass": np.ones(4)}, "column 'stellar_mass' has 4 rows, the others have 3"),
        ({"mag_7_spherex": None}, "101 columns of magnitudes of 'spherex', must be 102"),
        ({"mag_Y_sdss": None, "mag_K_sdss": np.ones(3)}, "column 'mag_K_sdss': LSST has no band 'K'"),
        ({"mag_u_sdss": np.array([b"a"] * 3)}, "column 'mag_u_sdss' is of type .S1, must be floating-point"),
        ({"SFH": np.ones((3, 116))}, r"column 'SFH' is \(3, 116\), must be rows x 117"),
        ({"time_bins_SFH": None}, "column 'time_bins_SFH' is missing"),
        ({"SED_wavelength": reordered(WAVE, 9, np.nan)}, "row 9: column 'SED_wavelength' is not finite"),
        ({"SED_wavelength": reordered(WAVE, 9, 1e9)}, "row 10: column 'SED_wavelength': must be positive and increase"),
        ({"galaxy_id": np.ones(3)}, "column 'galaxy_id' is of type float64, must be text or whole"),
    ],
    ids=[
        "no redshift",
        "long column",
        "one channel less",
        "unknown band",
        "text magnitudes",
        "short history",
        "no ages",
        "NaN wavelength",
        "falling wavelength",
        "float identifiers",
    ],
)
def test_wrong_layouts(tmp_path, changes, match):
    put(tmp_path / "a.h5", galaxies(3) | changes)
    with pytest.raises(ValueError, match=rf"a\.h5: {match}"):
        EarlierSuperMock(tmp_path)


def test_wrong_files_and_options(tmp_path):
    put(tmp_path / "a.h5", galaxies(3))
    put(tmp_path / "b.h5", galaxies(3, 3) | {"halo_mass": None})
    with pytest.raises(ValueError, match=r"b\.h5: column 'halo_mass' is missing or differs from that of .*a\.h5"):
        EarlierSuperMock(tmp_path)
    put(tmp_path / "b.h5", galaxies(3, 3) | {"time_bins_SFH": AGES * 2})
    with pytest.raises(ValueError, match=r"b\.h5: vector 'sfh' is missing or differs"):
        EarlierSuperMock(tmp_path)
    with pytest.raises(ValueError, match=r"leave_out: no vector 'roman'; there is cosmos, lsst"):
        EarlierSuperMock(tmp_path / "a.h5", leave_out=("roman",))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        for name in ("galaxy_id", "ra_true", "dec_true", "redshift_true"):
            file[name] = galaxies(3)[name]
    with pytest.raises(ValueError, match=r"b\.h5: it holds no vectors"):
        EarlierSuperMock(tmp_path / "b.h5")
    put(tmp_path / "b.h5", {k: v[:0] if len(v) == 3 else v for k, v in galaxies(3).items()})
    with pytest.raises(ValueError, match=r"b\.h5: column 'galaxy_id' has no rows"):
        EarlierSuperMock(tmp_path / "b.h5")
    (tmp_path / "b.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"b\.h5: not a readable HDF5 file: .*truncated"):
        EarlierSuperMock(tmp_path)


def test_unusable_rows(tmp_path):
    data = {k: v for k, v in galaxies(3).items() if k[:3] not in ("SED", "SFH", "tim")}
    data["ra_true"][1] = 360.5
    for name, values in data.items():
        if name.startswith("mag_"):
            values[2] = np.nan
    put(tmp_path / "a.h5", data)
    source = EarlierSuperMock(tmp_path)
    with pytest.raises(BadSample, match=r"a\.h5: row 1: column 'ra': 360\.5 is outside"):
        source.read(1)
    with pytest.raises(BadSample, match=r"a\.h5: row 2: columns cosmos, lsst, spherex, wise: no component is known"):
        source.read(2)
    data["galaxy_id"][0] = data["galaxy_id"][2]
    put(tmp_path / "b.h5", data)
    with pytest.raises(ValueError, match=f"key '{FIRST_ID + 2}': rows 0 and 2 of the source both have it"):
        build(EarlierSuperMock(tmp_path / "b.h5"), tmp_path / "packed", name="mock", progress=False, on_bad="skip")
