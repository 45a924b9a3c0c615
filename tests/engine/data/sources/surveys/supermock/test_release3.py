"""SuperMock's release 3: four files a patch in one order of rows, bands in order of wavelength, histories up to t(z)."""

import json
import pickle

import h5py
import numpy as np
import pytest
from astropy.cosmology import FlatLambdaCDM

from armillary.engine.data.building.build import build
from armillary.engine.data.sources.kinds import guess_kind, open_source
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.supermock.bands import PUBLISHED
from armillary.engine.data.sources.surveys.supermock.grids import history_on_relative_times
from armillary.engine.data.sources.surveys.supermock.release3 import SuperMockRelease3

SFH_AGE = np.linspace(0.1987, 13.798, 117)
MAH_AGE = np.linspace(0.471, 13.805, 101)
WAVE = np.geomspace(91, 1e6, 300)
GROUPS = {0: 3, 1: 2, 2: 4, 10: 5}  # as text: core_0, core_1, core_10, core_2
ORDER = (0, 1, 10, 2)
TOTAL = 14
FIRST_TAG = 5600000000000000123  # float64 cannot tell it from its neighbours
COSMOLOGY = FlatLambdaCDM(H0=67.77, Om0=0.307115)


def group(n, first):
    rng = np.random.default_rng(first)
    return {
        "core_tag": FIRST_TAG + first + np.arange(n),
        "fof_halo_tag": FIRST_TAG - first - np.arange(n),
        "ra": rng.uniform(0, 360, n).astype(np.float32),
        "dec": rng.uniform(-90, 90, n).astype(np.float32),
        "redshift": rng.uniform(0.1, 3, n),
        "stellar_mass": 10 ** rng.uniform(9, 12, n),
        "stellar_mass_zobs": 10 ** rng.uniform(8, 11, n),
        "central": (rng.random(n) < 0.7).astype(np.int8),
        "mah": np.outer(10 ** rng.uniform(11, 13, n), MAH_AGE / MAH_AGE[-1]),
        "mah_host": np.outer(10 ** rng.uniform(13, 14, n), MAH_AGE / MAH_AGE[-1]),
        "sfh": rng.uniform(0, 20, (n, 117)).astype(np.float32),
        "core_state": rng.integers(0, 9, n),
    }


def patch(root, number=3, changes=None):
    """Write a patch; return its galaxies in the order of the flat files."""
    rng = np.random.default_rng(number)
    catalogue = {f"core_{k}": group(n, 1000 * number + 100 * k) for k, n in GROUPS.items()}
    galaxies = {c: np.concatenate([catalogue[f"core_{k}"][c] for k in ORDER]) for c in catalogue["core_0"]}
    flat = {
        "photometry": {
            "LSST": rng.uniform(18, 27, (TOTAL, 6)).astype(np.float32),
            "SPHEREx": rng.uniform(18, 22, (TOTAL, 102)).astype(np.float32),
        },
        "luminosities": {"L_BOL_LSUN": rng.uniform(1, 9, TOTAL), "redshift": galaxies["redshift"]},
        "seds": {"SED": rng.uniform(1e-6, 1e-5, (TOTAL, 300)).astype(np.float32), "wave_rest": WAVE}
        | {"core_tag": galaxies["core_tag"]},
    }
    for kind, new in (changes or {}).items():
        flat[kind] = {k: v for k, v in (flat[kind] | new).items() if v is not None}
    places = {"lightcone_catalogs": "lightcone_galaxies", "photometry": "photometry"}
    places |= {"luminosities": "luminosities", "seds": "seds"}
    for kind, stem in places.items():
        (root / kind).mkdir(parents=True, exist_ok=True)
        with h5py.File(root / kind / f"{stem}_skypatch_{number}.h5", "w") as file:
            for name, values in catalogue.items() if kind == "lightcone_catalogs" else flat[kind].items():
                if isinstance(values, dict):
                    for column, column_values in values.items():
                        file[f"{name}/{column}"] = column_values
                else:
                    file[name] = values
    np.savez(root / "time_grids.npz", sfh_age_gyr=SFH_AGE, mah_age_gyr=MAH_AGE)
    return galaxies, flat


def flux(magnitude):
    return 10 ** (-0.4 * (magnitude.astype(np.float64) - 23.9))


def test_rows_of_all_files_belong_to_one_galaxy_though_groups_are_in_order_of_text(tmp_path):
    galaxies, flat = patch(tmp_path)
    assert guess_kind(tmp_path) == "supermock"
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    records = {r.name: r for r in source.vectors}
    assert {n: r.size for n, r in records.items()} == {
        "photometry_lsst": 6,
        "photometry_spherex": 102,
        "sfh": 36,
        "sed": 300,
    }
    assert records["photometry_lsst"].components == tuple("ugrizy")
    assert records["photometry_spherex"].components[:2] == ("band1_ch1", "band1_ch2")
    assert records["photometry_spherex"].components[-1] == "band6_ch17"
    assert {r.unit for r in source.vectors} == {"uJy", "Msun/yr"}
    for i in range(TOTAL):
        sample = source.read(i)
        assert sample.labels["core_tag"] == str(galaxies["core_tag"][i])
        assert sample.labels["redshift"] == galaxies["redshift"][i]
        assert sample.labels["stellar_mass"] == galaxies["stellar_mass_zobs"][i]
        assert sample.labels["stellar_mass_a1"] == galaxies["stellar_mass"][i]
        assert sample.labels["l_bol_lsun"] == flat["luminosities"]["L_BOL_LSUN"][i]
        for survey in ("LSST", "SPHEREx"):
            names = records[f"photometry_{survey.lower()}"].components
            columns = [PUBLISHED[survey].index(f"{survey}_{name}") for name in names]
            expected = flux(flat["photometry"][survey][i, columns])
            np.testing.assert_allclose(sample.vectors[f"photometry_{survey.lower()}"], expected, rtol=1e-5)
        np.testing.assert_allclose(sample.vectors["sed"], flat["seds"]["SED"][i] * 1e6, rtol=1e-5)
    assert set(source.labels) == set(source.read(0).labels)


def test_histories_end_at_the_observation_and_haloes_are_those_of_that_time(tmp_path):
    galaxies, _ = patch(tmp_path)
    source = SuperMockRelease3(tmp_path, sfh_bins=12)
    for i in (0, 5, 13):
        now = COSMOLOGY.age(galaxies["redshift"][i]).value
        sample = source.read(i)
        assert sample.vectors["sfh"].shape == (12,)
        fine = np.linspace(0, now, 120_001)
        rate = np.interp(fine, np.r_[0, SFH_AGE], np.r_[0, galaxies["sfh"][i]])
        total = np.trapezoid(rate, fine)
        np.testing.assert_allclose(sample.vectors["sfh"].sum() * now / 12, total, rtol=1e-4)
        for label, column in (("halo_mass", "mah"), ("host_halo_mass", "mah_host")):
            expected = np.interp(now, MAH_AGE, galaxies[column][i]) / 0.6777
            assert sample.labels[label] == pytest.approx(expected, rel=1e-2)


def test_history_on_relative_times_by_hand():
    rate = np.array([2.0, 2.0, 6.0, np.nan])
    age = np.array([1.0, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(history_on_relative_times(rate, age, 4.0, 4), [1.0, 2.0, 2.0, 3.0])
    assert np.isnan(history_on_relative_times(rate, age, 6.0, 6)).tolist() == [False] * 5 + [True]


def test_compact_seds_are_in_millijansky(tmp_path):
    _, flat = patch(tmp_path, changes={"seds": {"SED": np.full((TOTAL, 300), 0.5, np.float16)}})
    np.testing.assert_allclose(SuperMockRelease3(tmp_path).read(3).vectors["sed"], 500.0)
    assert SuperMockRelease3(tmp_path, resample_sed=True).read(3).vectors["sed"].shape == (500,)


def test_no_flux_is_zero_and_unknown_is_nan(tmp_path):
    lsst = np.full((TOTAL, 6), 20.0, np.float32)
    lsst[2] = [np.inf, np.nan, 20, 20, 20, 20]  # z, g
    patch(tmp_path, changes={"photometry": {"LSST": lsst}})
    u, g, r, i, z, y = SuperMockRelease3(tmp_path).read(2).vectors["photometry_lsst"]
    assert z == 0 and np.isnan(g) and u == pytest.approx(flux(np.float32(20)), rel=1e-5)


def test_every_third_of_two_patches_packed_and_read_back(tmp_path):
    patch(tmp_path / "mocks")
    patch(tmp_path / "mocks", number=12)
    whole, some = (SuperMockRelease3(tmp_path / "mocks", every=e, leave_out=("sed",)) for e in (1, 3))
    assert len(whole) == 2 * TOTAL and len(some) == 2 * (1 + 1 + 2 + 2)
    by_key = {whole.read(i).key: whole.read(i) for i in range(len(whole))}
    assert len(by_key) == 2 * TOTAL
    survey = build(some, tmp_path / "packed", name="mock", progress=False)
    assert survey.count() == len(some) and survey.modalities == ("vectors",)
    packed = PackedSurvey(tmp_path / "packed")
    for i in range(len(some)):
        sample = packed.read(i)
        original = by_key[sample.key]
        assert sample.labels == original.labels
        for name, values in original.vectors.items():
            np.testing.assert_array_equal(sample.vectors[name], values)


def test_other_names_of_bands_come_first(tmp_path):
    _, flat = patch(tmp_path, changes={"photometry": {"WISE": np.full((TOTAL, 2), 20, np.float32)}})
    assert "photometry_wise" not in [r.name for r in SuperMockRelease3(tmp_path).vectors]
    names = {"LSST": [f"LSST_{b}" for b in "yzirgu"], "WISE": ["WISE_W1", "WISE_z_DEcam"]}
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "band_names.json").write_text(json.dumps(names))
    (tmp_path / "time_grids.npz").rename(tmp_path / "names" / "time_grids.npz")
    source = SuperMockRelease3(tmp_path, details=tmp_path / "names")
    assert [r.name for r in source.vectors] == ["photometry_lsst", "photometry_wise", "sfh", "sed"]
    assert source.vectors[1].components == ("W1", "z_DEcam")
    np.testing.assert_allclose(
        source.read(1).vectors["photometry_lsst"], flux(flat["photometry"]["LSST"][1, ::-1]), rtol=1e-5
    )


def test_opencosmo_form(tmp_path):
    columns = group(6, 4)
    magnitudes = {f"mag_{name}": np.full(6, 20.0 + k, np.float32) for k, name in enumerate(PUBLISHED["LSST"])}
    with h5py.File(tmp_path / "SuperMock_v3_z_0.1_0.4.hdf5", "w") as file:
        for name, values in (columns | magnitudes | {"skypatch": np.zeros(6, np.int32)}).items():
            file[f"data/{name}"] = values
        file.create_group("header/supermock")
    np.savez(tmp_path / "time_grids.npz", sfh_age_gyr=SFH_AGE, mah_age_gyr=MAH_AGE)
    source = open_source(tmp_path)
    assert [r.name for r in source.vectors] == ["photometry_lsst", "sfh"]
    sample = source.read(2)
    expected = [magnitudes[f"mag_LSST_{band}"][2] for band in "ugrizy"]
    np.testing.assert_allclose(sample.vectors["photometry_lsst"], flux(np.array(expected)), rtol=1e-5)
    assert sample.labels["stellar_mass"] == columns["stellar_mass_zobs"][2] and sample.labels["skypatch"] == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"photometry": {"LSST": np.ones((TOTAL, 5), np.float32)}}, "column 'LSST' is .14, 5., must be rows x 6"),
        ({"photometry": {"LSST": np.ones((9, 6), np.float32)}}, "column 'LSST' has 9 rows, the others have 14"),
        ({"seds": {"wave_rest": WAVE[::-1].copy()}}, "column 'wave_rest' must be positive, finite and increase"),
        ({"seds": {"core_tag": None}}, "column 'core_tag' is missing"),
        ({"luminosities": {"L_BOL_LSUN": np.ones(3)}}, "column 'L_BOL_LSUN' has 3 rows"),
    ],
)
def test_wrong_files(tmp_path, changes, says):
    patch(tmp_path, changes=changes)
    with pytest.raises(ValueError, match=says):
        SuperMockRelease3(tmp_path)


def test_seds_in_another_order_are_found_out(tmp_path):
    galaxies, _ = patch(tmp_path)
    numeric = np.concatenate([np.flatnonzero(np.repeat(ORDER, [GROUPS[k] for k in ORDER]) == k) for k in GROUPS])
    patch(tmp_path, changes={"seds": {"core_tag": galaxies["core_tag"][numeric]}})
    with pytest.raises(BadSample, match="the file of SEDs has"):
        SuperMockRelease3(tmp_path).read(6)


def test_wrong_options(tmp_path):
    patch(tmp_path)
    (tmp_path / "time_grids.npz").unlink()
    with pytest.raises(ValueError, match=r"there is no time_grids.npz"):
        SuperMockRelease3(tmp_path)
    without = SuperMockRelease3(tmp_path, leave_out=("sfh",))
    assert "halo_mass" not in without.labels and "sfh" not in without.read(0).vectors
    (tmp_path / "time_grids.npz").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"time_grids.npz: not a table"):
        SuperMockRelease3(tmp_path)
    np.savez(tmp_path / "time_grids.npz", sfh_age_gyr=SFH_AGE, mah_age_gyr=MAH_AGE)
    for options, says in (
        ({"leave_out": ("image",)}, "no vector 'image'"),
        ({"every": 0}, "every: must be at least 1"),
        ({"details": tmp_path / "none"}, "there is no time_grids.npz"),
    ):
        with pytest.raises(ValueError, match=says):
            SuperMockRelease3(tmp_path, **options)
    (tmp_path / "band_names.json").write_text('{"LSST": ["LSST_u", "LSST_K", "a", "b", "c", "d"]}')
    with pytest.raises(ValueError, match="band 'K' of LSST"):
        SuperMockRelease3(tmp_path)
