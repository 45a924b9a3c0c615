import numpy as np
import pytest

from armillary.engine.data.format.survey import WaveGrid
from armillary.engine.data.sources.resample import pixel_edges, rebin, resample

LINEAR = WaveGrid("linear", 3600.0, 0.8, 7781)
LOG = WaveGrid("log10", 3.55, 1e-4, 4157)
FINE = WaveGrid("linear", 3700.0, 0.31, 9000)
ODD = WaveGrid("table", 0.0, 0.0, 900, tuple((3650 + np.cumsum(np.linspace(1, 9, 900))).tolist()))


def slow(flux, ivar, old, new, coverage):
    """Carnall's equations, pixel by pixel."""
    out = np.zeros((2, len(new) - 1))
    for j in range(len(new) - 1):
        weights = [
            max(0.0, min(old[i + 1], new[j + 1]) - max(old[i], new[j])) if ivar[i] > 0 else 0.0
            for i in range(len(flux))
        ]
        used = [i for i, w in enumerate(weights) if w > 1e-9]
        total = sum(weights[i] for i in used)
        if used and total >= coverage * (new[j + 1] - new[j]) * (1 - 1e-9):
            out[0, j] = sum(weights[i] * flux[i] for i in used) / total
            out[1, j] = total**2 / sum(weights[i] ** 2 / ivar[i] for i in used)
    return out


def spectrum(grid, seed=0, masked=0.0, leading=()):
    rng = np.random.default_rng(seed)
    flux = rng.normal(2, 1, (*leading, grid.count)).astype(np.float32)
    ivar = rng.uniform(0.5, 2, flux.shape).astype(np.float32)
    ivar[rng.random(flux.shape) < masked] = 0
    return flux, ivar


@pytest.mark.parametrize("coverage", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_formula(seed, coverage):
    rng = np.random.default_rng(seed)
    old = np.cumsum(rng.uniform(0.2, 2, 41)) + 5
    new = np.unique(np.concatenate([np.cumsum(rng.uniform(0.1, 4, 31)) + rng.uniform(0, 8), old[[7, 15]]]))
    flux, ivar = rng.normal(0, 1, 40), rng.uniform(0.1, 3, 40)
    ivar[rng.random(40) < 0.2] = 0
    flux[ivar == 0] = np.nan
    found = rebin(flux, ivar, old, new, coverage=coverage)
    np.testing.assert_allclose(np.stack(found), slow(flux, ivar, old, new, coverage), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grid", [LINEAR, LOG, ODD], ids=["linear", "log", "table"])
def test_identical_grids_copy_the_bits(grid):
    flux, ivar = spectrum(grid, masked=0.1)
    flux[ivar == 0] = 0
    found = resample(flux, ivar, grid, grid)
    np.testing.assert_array_equal(found[0], flux)
    np.testing.assert_array_equal(found[1], ivar)
    assert found[0].dtype == np.float32


def test_shifted_piece_of_one_lattice_copies_the_bits():
    piece = WaveGrid("log10", 3.5805, 1e-4, 3000)
    flux, ivar = spectrum(piece)
    found = resample(flux, ivar, piece, LOG)
    np.testing.assert_array_equal(found[0][305:3305], flux)
    np.testing.assert_array_equal(found[1][305:3305], ivar)
    assert not found[1][:305].any() and not found[0][3305:].any()


@pytest.mark.parametrize("new", [LINEAR, LOG, FINE, ODD], ids=["linear", "log", "fine", "table"])
@pytest.mark.parametrize("old", [LINEAR, LOG, FINE, ODD], ids=["linear", "log", "fine", "table"])
def test_flux_is_conserved(old, new):
    centre = (old.angstrom() - 5000) / 60
    flux = np.exp(-(centre**2) / 2) * (1 + 0.3 * np.sin(old.angstrom()))
    found, weight = resample(flux, np.ones(old.count), old, new)
    total = [
        (f * np.diff(pixel_edges(g.angstrom(), log=g.kind == "log10"))).sum() for f, g in ((flux, old), (found, new))
    ]
    assert total[1] == pytest.approx(total[0], rel=1e-12)
    assert (weight >= 0).all()


def test_constant_spectrum_stays_constant_and_ivar_counts_pixels():
    old, new = WaveGrid("linear", 1000.0, 1.0, 400), WaveGrid("linear", 1001.5, 4.0, 90)
    flux, ivar = resample(np.full(400, 3.0), np.full(400, 2.0), old, new)
    np.testing.assert_allclose(flux, 3, rtol=1e-14)
    np.testing.assert_allclose(ivar, 8, rtol=1e-12)  # four whole pixels each


def test_propagated_variance_is_that_of_noise():
    rng = np.random.default_rng(0)
    old, new = WaveGrid("linear", 4000.0, 1.0, 60), WaveGrid("linear", 4003.3, 2.7, 18)
    sigma = rng.uniform(0.5, 2, 60)
    flux = rng.normal(0, 1, (20000, 60)) * sigma
    found, ivar = resample(flux, np.broadcast_to(sigma**-2, flux.shape), old, new)
    np.testing.assert_allclose(found.var(axis=0) * ivar[0], 1, atol=0.05)  # 1 % of sampling noise
    np.testing.assert_array_equal(ivar[0], ivar[-1])


def test_leading_axes_with_masks_of_their_own():
    flux, ivar = spectrum(ODD, masked=0.3, leading=(2, 3))
    together = resample(flux, ivar, ODD, LOG)
    for place in np.ndindex(2, 3):
        alone = resample(flux[place], ivar[place], ODD, LOG)
        np.testing.assert_array_equal(together[0][place], alone[0])
        np.testing.assert_array_equal(together[1][place], alone[1])


def test_coverage_decides_at_masks():
    old, new = np.arange(0.0, 9), np.array([0.0, 4, 8])
    flux, ivar = np.arange(8.0), np.array([1, 1, 0, 0, 1, 0, 0, 0.0])
    found = rebin(flux, ivar, old, new)
    np.testing.assert_array_equal(found[0], [0.5, 0])
    np.testing.assert_array_equal(found[1], [2, 0])
    assert not rebin(flux, ivar, old, new, coverage=0.75)[1].any()
    assert rebin(flux, ivar, old, new, coverage=0.25)[0][1] == 4


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_values_without_data_do_not_leak(poison):
    flux, ivar = spectrum(LOG)
    expected = None
    for value in (0, poison):
        spoiled, weight = flux.copy(), ivar.copy()
        spoiled[100:110], weight[100:110] = value, 0
        found = resample(spoiled, weight, LOG, LINEAR)
        expected = found if expected is None else expected
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    weight = ivar.copy()
    weight[100:110] = 0
    spoiled = flux.copy()
    spoiled[100:110] = poison  # with data, says ivar
    np.testing.assert_array_equal(resample(spoiled, ivar, LOG, LINEAR)[1], expected[1])


def test_grids_that_do_not_overlap():
    found = rebin(np.ones(3), np.ones(3), np.arange(4.0), np.arange(10.0, 15))
    assert found[0].shape == (4,) and not found[1].any()


def test_big_endian_values():
    flux, ivar = spectrum(LOG)
    found = resample(flux.astype(">f4"), ivar.astype(">f4"), LOG, LINEAR)
    assert found[0].dtype == np.float32 and found[0].dtype.isnative
    np.testing.assert_array_equal(found[0], resample(flux, ivar, LOG, LINEAR)[0])


def test_edges():
    np.testing.assert_allclose(pixel_edges([1, 2, 4]), [0.5, 1.5, 3, 5])
    np.testing.assert_allclose(pixel_edges([10, 1000], log=True), [1, 100, 10000])


@pytest.mark.parametrize(
    ("wave", "match"),
    [
        ([1.0], "at least 2, got shape"),
        ([1.0, np.nan, 3], "pixel 1 is not finite"),
        ([1.0, 2, 2], "must increase, and do not at pixel 2"),
        ([3.0, 2, 1], "must increase, and do not at pixel 1"),
        ([0.0, 2, 4], "must be positive for edges half-way in log"),
    ],
    ids=["one", "nan", "repeated", "decreasing", "zero"],
)
def test_wrong_wavelengths(wave, match):
    with pytest.raises(ValueError, match=match):
        pixel_edges(wave, log=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"flux": np.ones(4)}, r"must be \[\.\.\., 3\] for 4 edges"),
        ({"ivar": np.ones((2, 3))}, r"must be \[\.\.\., 3\] for 4 edges"),
        ({"ivar": np.array([1, -2.0, 1])}, "ivar: must be >= 0, its smallest is -2"),
        ({"old": np.array([0, 1, 1, 3.0])}, "old: edges must be a finite, increasing vector"),
        ({"new": np.array([0, np.nan, 1])}, "new: edges must be a finite, increasing vector"),
        ({"coverage": 0.0}, "coverage: must be above 0"),
        ({"coverage": 1.5}, "coverage: must be above 0"),
    ],
    ids=["flux", "ivar", "negative", "old", "new", "none", "over"],
)
def test_wrong_arguments(changes, match):
    given = {"flux": np.ones(3), "ivar": np.ones(3), "old": np.arange(4.0), "new": np.arange(3.0)} | changes
    with pytest.raises(ValueError, match=match):
        rebin(**given)
