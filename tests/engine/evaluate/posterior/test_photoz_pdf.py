import h5py
import numpy as np
import pytest
import qp
from astropy.table import Table
from scipy.stats import norm

from armillary.engine.evaluate.posterior import calibration
from armillary.engine.evaluate.posterior.flows import PRESETS, FlowEnsemble
from armillary.engine.evaluate.posterior.photoz_pdf import RedshiftPDF, export_qp, redshift_grid, redshift_pdf

Z = np.linspace(0, 1.2, 601)


@pytest.fixture
def two_peaks():
    first = norm.pdf(Z, 0.3, 0.02)
    return RedshiftPDF.from_density(Z, np.stack([0.8 * first + 0.2 * norm.pdf(Z, 0.9, 0.05), norm.pdf(Z, 0.5, 0.1)]))


def test_every_distribution_is_normalised(two_peaks):
    np.testing.assert_allclose(np.trapezoid(two_peaks.density, Z, axis=1), 1, rtol=1e-13)
    np.testing.assert_allclose(two_peaks.mass, 1, rtol=1e-6)
    assert (two_peaks.density[:, 0] == 0).all()
    assert (two_peaks.cdf[:, 0] == 0).all() and (two_peaks.cdf[:, -1] == 1).all()
    assert (np.diff(two_peaks.cdf, axis=1) >= 0).all()


def test_point_estimates(two_peaks):
    np.testing.assert_allclose(two_peaks.mode, [0.3, 0.5], atol=1e-9)
    np.testing.assert_allclose(two_peaks.mean, [0.8 * 0.3 + 0.2 * 0.9, 0.5], atol=1e-5)
    np.testing.assert_allclose(two_peaks.median, [norm.ppf(0.625, 0.3, 0.02), 0.5], atol=1e-3)
    np.testing.assert_allclose(two_peaks.quantile(0.16)[1], norm.ppf(0.16, 0.5, 0.1), atol=1e-3)
    reach = 0.03 * 1.3 / 0.02
    expected = [0.8 * (2 * norm.cdf(reach) - 1), 2 * norm.cdf(0.03 * 1.5 / 0.1) - 1]
    np.testing.assert_allclose(two_peaks.odds(), expected, atol=2e-3)
    assert (two_peaks.odds(0.5) > two_peaks.odds(0.05)).all()


def test_median_between_separated_peaks():
    """Where the density is zero the cumulative probability is flat: the median is where it began to be so, or later."""
    density = np.where((Z > 0.2) & (Z < 0.3), 1.0, 0.0) + np.where((Z > 0.8) & (Z < 0.9), 1.0, 0.0)
    pdf = RedshiftPDF.from_density(Z, density[None])
    assert 0.29 <= pdf.median[0] <= 0.81
    assert pdf.quantile(0.25)[0] == pytest.approx(0.25, abs=0.005)
    assert pdf.quantile(0.75)[0] == pytest.approx(0.85, abs=0.005)


def test_pit_of_the_truth(two_peaks):
    np.testing.assert_allclose(two_peaks.pit([0.3, 0.5]), [0.4, 0.5], atol=1e-3)
    np.testing.assert_array_equal(two_peaks.pit([-0.1, 2.0]), [0, 1])


def test_mass_tells_a_short_grid():
    short = RedshiftPDF.from_density(Z, norm.pdf(Z, 1.2, 0.1)[None])
    assert short.mass[0] == pytest.approx(0.5, abs=0.01)


class Gaussians:
    """Stands for an ensemble: p(z | x) = N(x_0, 0.05)."""

    parameters = 1

    def on_grid(self, context, grid):
        return norm.pdf(grid, context[:, :1], 0.05), norm.cdf(grid, context[:, :1], 0.05)


def test_density_of_an_ensemble():
    pdf = redshift_pdf(Gaussians(), np.array([[0.4], [0.6]]), Z)
    np.testing.assert_allclose(pdf.mode, [0.4, 0.6], atol=1e-9)
    np.testing.assert_allclose(pdf.cdf, Gaussians().on_grid(np.array([[0.4], [0.6]]), Z)[1], atol=1e-4)


@pytest.mark.slow
def test_real_photometry_gives_calibrated_redshifts(real_data):
    """CFHTLS ugriz with DEEP2/3 and 3D-HST redshifts to 3: colours leave several peaks.

    Bounds are four spreads or more away from the mean over 6 seeds: NLL -0.54 +- 0.03, deviation 0.80 +- 0.16 of chance's,
    median error 0.0151 +- 0.0002, catastrophic 0.043 +- 0.004, of the surer half 0.11 +- 0.03 of the other's.
    """
    table = Table.read(real_data / "catalogs" / "combined_catalog.fits.gz")
    magnitudes = np.stack([np.asarray(table[band], np.float64) for band in "ugriz"], 1)
    z = np.asarray(table["redshift"], np.float64)
    order = np.random.default_rng(0).permutation(np.flatnonzero((magnitudes < 40).all(1)))
    x, z = np.concatenate([magnitudes[:, 2:3], -np.diff(magnitudes, axis=1)], 1)[order], z[order]
    train, test = slice(0, 4000), slice(4000, 6000)
    ensemble = FlowEnsemble.fit(x[train], z[train, None], PRESETS["quick"])
    pdf = redshift_pdf(ensemble, x[test], redshift_grid(z[train]))
    assert ensemble.nll(x[test], z[test, None]).mixture < -0.4, "a Gaussian without photometry has 1.42"
    assert calibration.uniformity(pdf.pit(z[test])).deviation < 1.6 * calibration.chance_deviation(2000)
    off = np.abs(pdf.mode - z[test]) / (1 + z[test])
    assert np.median(off) < 0.02 and (off > 0.15).mean() < 0.065
    sure = pdf.odds() > np.median(pdf.odds())
    assert (off[sure] > 0.15).mean() < 0.25 * (off[~sure] > 0.15).mean(), "odds tell which redshifts to trust"


def test_redshift_grid_covers_the_known_redshifts():
    grid = redshift_grid(np.array([0.1, np.nan, 0.8]), 11)
    assert grid[0] == 0 and grid[-1] == pytest.approx(1.0) and len(grid) == 11


def test_qp_reads_what_is_exported(two_peaks, tmp_path):
    path = export_qp(
        tmp_path / "new" / "pz.hdf5",
        two_peaks,
        {"key": np.array(["a", "galaxy-β"], dtype=object), "redshift": np.array([0.31, np.nan])},
    )
    ensemble = qp.read(str(path))
    assert ensemble.npdf == 2 and ensemble.gen_class is qp.interp
    at = np.linspace(0.003, 1.19, 333)
    expected = np.stack([np.interp(at, Z, p) for p in two_peaks.density])
    np.testing.assert_allclose(ensemble.pdf(at), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(ensemble.cdf(Z), two_peaks.cdf, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(ensemble.ppf(0.5)[:, 0], two_peaks.median, rtol=1e-10)
    ancil = ensemble.ancil
    assert list(ancil["key"]) == ["a", "galaxy-β"]
    np.testing.assert_array_equal(ancil["redshift"], [0.31, np.nan])
    for name, value in {"zmode": two_peaks.mode, "zmean": two_peaks.mean, "odds": two_peaks.odds()}.items():
        np.testing.assert_array_equal(ancil[name], value)


def test_export_has_the_layout_of_qp(two_peaks, tmp_path):
    qp.Ensemble(qp.interp, data={"xvals": Z, "yvals": two_peaks.density}).write_to(str(tmp_path / "theirs.hdf5"))
    export_qp(tmp_path / "ours.hdf5", two_peaks)
    with h5py.File(tmp_path / "theirs.hdf5") as theirs, h5py.File(tmp_path / "ours.hdf5") as ours:
        for name in ("meta/pdf_name", "meta/pdf_version", "meta/xvals", "data/yvals"):
            assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
            if name == "data/yvals":  # theirs are normalised once more
                np.testing.assert_allclose(ours[name][()], theirs[name][()], rtol=1e-12)
            else:
                np.testing.assert_array_equal(ours[name][()], theirs[name][()])


def test_export_replaces_a_file_at_once(two_peaks, tmp_path):
    path = export_qp(tmp_path / "pz.hdf5", two_peaks)
    with pytest.raises(ValueError, match="one value a galaxy"):
        export_qp(path, two_peaks, {"redshift": np.zeros(3)})
    export_qp(path, two_peaks)
    assert [p.name for p in tmp_path.iterdir()] == ["pz.hdf5"]


@pytest.mark.parametrize(
    "density, message",
    [
        (np.zeros((2, 601)), "2 of 2 galaxies have none"),
        (np.full((1, 601), np.nan), "finite"),
        (-np.ones((1, 601)), "not negative"),
        (np.ones(601), "shapes"),
        (np.ones((1, 600)), "shapes"),
    ],
    ids=["empty", "nan", "negative", "one-dimension", "other-grid"],
)
def test_bad_densities(density, message):
    with pytest.raises(ValueError, match=message):
        RedshiftPDF.from_density(Z, density)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda pdf: RedshiftPDF.from_density(Z[::-1], pdf.density), "ascend"),
        (lambda pdf: pdf.quantile(1.0), "probability"),
        (lambda pdf: pdf.odds(0.0), "half_width"),
        (lambda pdf: export_qp("pz.fits", pdf), "must end in .hdf5"),
        (lambda pdf: export_qp("pz.hdf5", pdf, {"odds": np.zeros(2)}), "another name"),
        (lambda pdf: redshift_grid(np.array([np.nan])), "positive redshift"),
        (lambda pdf: redshift_grid(np.array([0.5]), 2), "3 or more points"),
    ],
    ids=["grid-descends", "quantile", "odds", "suffix", "name-taken", "no-redshifts", "few-points"],
)
def test_bad_inputs(two_peaks, call, message):
    with pytest.raises(ValueError, match=message):
        call(two_peaks)
