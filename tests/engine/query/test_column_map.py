"""Which columns of a table are taken for a quantity, and which tables are refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from armillary.engine.data.sources.tables.catalogue import Catalogue
from armillary.engine.query.column_map import find_columns
from armillary.engine.query.units import unit_conversion
from armillary.models.quantities import Quantity, Scaling

MAGNITUDES = Quantity("photometry.lsst", "mag(AB)", ("u", "g", "r"), scaling=Scaling("linear", (0.0,) * 3, (1.0,) * 3))
FLUXES = Quantity("flux", "nJy", ("u", "g", "r"), scaling=Scaling("linear", (0.0,) * 3, (1.0,) * 3))
SED = Quantity("sed", "Jy", ("a", "b", "c"), (4000.0, 5000.0, 6000.0), Scaling("linear", (0.0,) * 3, (1.0,) * 3))
MASS = Quantity("stellar_mass", "solMass")


@pytest.fixture
def table(tmp_path):
    """Makes a table of two rows of columns, lists for vectors; units by column."""

    def make(units=(), **columns):
        fields = []
        for name, values in columns.items():
            array = pa.array(values)
            fields.append((pa.field(name, array.type, metadata={"unit": dict(units).get(name, "")}), array))
        path = tmp_path / f"t{len(list(tmp_path.iterdir()))}.parquet"
        pq.write_table(pa.table([a for _, a in fields], pa.schema([f for f, _ in fields])), path)
        return Catalogue(path)

    return make


ONE = [1.0, 2.0]
THREE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize(
    ("quantity", "names", "values", "errors"),
    [
        (MASS, ("Stellar_Mass", "stellar_mass_err"), ("Stellar_Mass",), ("stellar_mass_err",)),
        (MASS, ("stellar_mass", "STELLAR_MASS"), ("stellar_mass",), (None,)),
        (MAGNITUDES, ("photometry_lsst_u", "photometry_lsst_g", "photometry_lsst_r"), "same", (None,) * 3),
        (MAGNITUDES, ("photometry.lsst.u", "photometry.lsst.g", "photometry.lsst.r"), "same", (None,) * 3),
        (MAGNITUDES, ("u", "g", "r", "g_err"), ("u", "g", "r"), (None, "g_err", None)),
        (MAGNITUDES, ("g", "r"), (None, "g", "r"), (None,) * 3),
        (MAGNITUDES, ("u", "g", "r", "uerr", "e_g", "Err_r"), ("u", "g", "r"), ("uerr", "e_g", "Err_r")),
    ],
    ids=["case", "exact", "name_component", "dots", "components", "a band is missing", "errors of other names"],
)
def test_found_by_name(table, quantity, names, values, errors):
    found = find_columns(quantity, table(**{n: ONE for n in names}), {}, {})
    assert found.values == (names if values == "same" else values) and found.errors == errors


def test_a_vector_in_one_column(table):
    found = find_columns(FLUXES, table(flux=THREE, flux_err=[[0.1, -0.2, np.nan], [1.0] * 3]), {}, {})
    assert (found.values, found.errors, found.unstated) == (("flux",), ("flux_err",), ("flux",))
    values, errors = found.read(table(flux=THREE, flux_err=[[0.1, -0.2, np.nan], [1.0] * 3]), 0, 2)
    np.testing.assert_array_equal(values, THREE)
    np.testing.assert_array_equal(errors, [[0.1, np.nan, np.nan], [1.0] * 3])


def test_a_missing_band_is_unknown(table):
    cat = table(g=ONE, r=ONE)
    values, errors = find_columns(FLUXES, cat, {}, {}).read(cat, 0, 2)
    assert np.isnan(values[:, 0]).all() and (values[:, 1:] == np.array(ONE)[:, None]).all() and np.isnan(errors).all()


def test_numbers_that_mean_no_value(table):
    cat = table(u=[99.0, 20.0], g=pa.array([-99.9, 21.0], pa.float32()), r=[0.5, 99.5], u_err=[99.0, 0.1])
    values, errors = find_columns(FLUXES, cat, {}, {}, (99.0, -99.9)).read(cat, 0, 2)
    np.testing.assert_array_equal(np.isnan(values), [[True, True, False], [False] * 3])
    assert np.isnan(errors[0, 0]) and errors[1, 0] == 0.1
    found = find_columns(FLUXES, cat, {}, {})  # by themselves: 99 far off the others
    assert found.missing == {"u": (99.0,), "g": (), "r": (), "u_err": (99.0,)}
    values, errors = found.read(cat, 0, 2)
    np.testing.assert_array_equal(np.isnan(values), [[True, False, False], [False] * 3])
    values, _ = find_columns(FLUXES, cat, {}, {}, (np.nan,)).read(cat, 0, 2)
    assert not np.isnan(values).any()


def test_declared_columns_and_converted_units(table):
    cat = table(
        units={"m1": "mag(AB)", "m2": "mag(AB)"}, m1=[20.0, np.nan], m2=[25.0, 31.4], m3=[22.5, 30.0], s=[0.1, 0.1]
    )
    columns = {"flux": ("m1", "m2", "m3"), "flux_err": ("s", "s", "s")}
    found = find_columns(FLUXES, cat, columns, {"m3": "ABmag"})
    values, errors = found.read(cat, 0, 2)
    expected = 3630.7805e9 * 10 ** (-0.4 * np.array([[20.0, 25.0, 22.5], [np.nan, 31.4, 30.0]]))
    np.testing.assert_allclose(values, expected, rtol=1e-6)  # 10^(-48.6 / 2.5) erg / (s cm2 Hz)
    np.testing.assert_allclose(errors, values * 0.1 * np.log(10) / 2.5, rtol=1e-5)
    assert not found.unstated


def test_units_both_ways():
    linear = unit_conversion("uJy", "nJy")
    assert linear.values(np.array([-2.0]))[0] == pytest.approx(-2000) and linear.errors(ONE, np.array(ONE))[
        1
    ] == pytest.approx(2000)
    to_magnitudes = unit_conversion("nJy", "mag(AB)")
    found = to_magnitudes.values(np.array([3631.0, -5.0, 0.0]))
    assert found[0] == pytest.approx(22.5, abs=1e-4) and np.isnan(found[1:]).all()
    assert to_magnitudes.errors(np.array([3631.0]), np.array([36.31]))[0] == pytest.approx(
        0.01 * 2.5 / np.log(10), rel=1e-6
    )
    assert unit_conversion("dex(solMass)", "solMass").values(np.array([10.0]))[0] == pytest.approx(1e10)
    assert unit_conversion("parrots", "parrots").values(np.array([3.0]))[0] == 3
    assert unit_conversion("", "Jy").values(np.array([3.0]))[0] == 3


@pytest.mark.parametrize(
    ("quantity", "columns", "declared", "units", "message"),
    [
        (MASS, {"mass": ONE}, {}, {}, "no column has this name; name one with --column stellar_mass=COLUMN; there are mass"),
        (MASS, {"stellar_mass": ["a", "b"]}, {}, {}, "'stellar_mass' is text"),
        (MASS, {"stellar_mass": THREE}, {}, {}, "3 numbers a row, but the method was trained on 1"),
        (MASS, {"STELLAR_mass": ONE, "stellar_Mass": ONE}, {}, {}, "could both be 'stellar_mass'"),
        (FLUXES, {"flux": [[1.0, 2.0]] * 2}, {}, {}, "2 numbers a row, but the method was trained on 3: u, g, r"),
        (FLUXES, {"u": ONE, "g": ONE}, {"flux": ("u", "g")}, {}, "3 components .u, g, r., got 2 columns: u, g"),
        (
            FLUXES,
            {"flux_g": ONE, "flux_u": ONE, "flux_r": ONE},
            {"flux": ("flux_g", "flux_u", "flux_r")},
            {},
            "another order, flux_g, flux_u, flux_r, than its components, u, g, r",
        ),
        (FLUXES, {"flux": THREE, "flux_err": [[1.0]] * 2}, {}, {}, "'flux_err' has 1 numbers a row"),
        (FLUXES, {"flux": THREE, "e": ONE}, {"flux_err": ("e", "e")}, {}, "1 columns of values, but 2 of errors"),
        (SED, {"sed": THREE, "sed_wave": [[4000.0, 6000.0, 5000.0]] * 2}, {}, {}, "'sed_wave' does not ascend"),
        (SED, {"sed": THREE, "sed_axis": [[1.0, 2.0, 3.0]] * 2}, {}, {}, "from 1 to 3, but the method was trained on 4000"),
        (SED, {"sed": THREE, "w": [[6e3, 5e3, 4e3]] * 2}, {"sed_axis": ("w",)}, {}, "'w' does not ascend"),
        (MASS, {"stellar_mass": ONE}, {}, {"stellar_mass": "Jy"}, "'Jy' cannot be converted to 'solMass'"),
        (FLUXES, {"flux": THREE}, {}, {"flux": "mag"}, "'mag' states no zero point: say 'mag.AB.'"),
        (MASS, {"stellar_mass": ONE, "stellar_mass_err": ONE}, {}, {"stellar_mass": "kg", "stellar_mass_err": "g"}, "is in 'g'"),
    ],
)  # fmt: skip
def test_refused(table, quantity, columns, declared, units, message):
    with pytest.raises(ValueError, match=message):
        find_columns(quantity, table(**columns), declared, units)


def test_an_axis_that_agrees(table):
    cat = table(sed=THREE, sed_wave=[[4000.0, 5000.1, 6000.0]] * 2)
    assert find_columns(SED, cat, {}, {}).values == ("sed",)
