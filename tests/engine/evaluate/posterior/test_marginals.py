"""Distributions of one number beside the truth, and files of qp that hold them."""

import math

import numpy as np
import pytest
import qp
import torch

from armillary.engine.evaluate.posterior.calibration import chance_deviation
from armillary.engine.evaluate.posterior.marginals import Marginal
from armillary.engine.evaluate.posterior.qp_files import export_density
from armillary.models.masked.density import PointDensity
from armillary.models.masked.heads import HeadConfig
from armillary.models.quantities import Quantity, Scaling

KINDS = {
    "gaussian": HeadConfig("mixture", 1),
    "mixture": HeadConfig("mixture", 3),
    "quantile": HeadConfig("quantile", 9),
}
KINDS |= {"binned": HeadConfig("binned", 12, reach=4.0)}


def some(kind, shape=(3,), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return KINDS[kind].density(torch.randn(*shape, KINDS[kind].numbers, generator=draw, dtype=torch.float64))


@pytest.mark.parametrize("kind", list(KINDS))
def test_own_draws_are_covered(kind):
    """4,000 distributions and a truth drawn of each: bounds of four binomial errors, and of chance in one of 10,000."""
    density = some(kind, (4000,))
    true = density.draw(torch.rand(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[:, 0]
    true[::8] = math.nan
    found = Marginal.of_density(density, true)
    assert found.samples == 3500
    for interval in found.coverage():
        assert abs(interval.inside - interval.level) < 4 * interval.error
    assert found.uniformity.deviation < chance_deviation(3500, 0.9999)
    narrow = Marginal(0.5 + 2 * (found.pit - 0.5), found.crps)
    assert narrow.coverage()[0].inside < 0.4

    u = torch.rand(4000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn = Marginal.of_draws(density.draw(u).numpy(), true.numpy(), np.random.default_rng(0))
    (mean, error), (exact, _) = drawn.mean_crps, found.mean_crps
    assert abs(mean - exact) < 4 * error
    assert np.corrcoef(drawn.pit, found.pit)[0, 1] > 0.95


def test_samples_without_truth_or_answer():
    draws = np.array([[0.0, 1.0], [np.nan, np.nan], [2.0, 3.0]])
    found = Marginal.of_draws(draws, np.array([0.5, 1.0, np.nan]), np.random.default_rng(0))
    assert found.samples == 1 and math.isnan(found.mean_crps[1])
    with pytest.raises(ValueError, match="none of 3 is known"):
        Marginal.of_draws(draws, np.full(3, np.nan), np.random.default_rng(0))
    with pytest.raises(ValueError, match="need draws"):
        Marginal.of_draws(draws, np.zeros(2), np.random.default_rng(0))


@pytest.mark.parametrize("kind", list(KINDS))
def test_qp_reads_every_kind(tmp_path, kind):
    """Cumulative probabilities as qp has them: but for the .0001 beyond either end, and what a line over one cell leaves out."""
    density = some(kind, (3, 1))
    path = export_density(tmp_path / "d.hdf5", density, ancillary={"key": np.array(["a", "b", "c"])})
    ensemble = qp.read(str(path))
    x = torch.linspace(-4, 4, 161, dtype=torch.float64)
    assert ensemble.npdf == 3 and ensemble.gen_class is qp.interp_irregular
    expected = density.cdf(x.expand(3, 1, -1))[:, 0].numpy()
    corners = 3e-3 if kind in ("binned", "quantile") else 0.0  # where lines meet within a cell
    np.testing.assert_allclose(ensemble.cdf(x.numpy()), expected, rtol=0, atol=5e-4 + corners)
    np.testing.assert_allclose(ensemble.ppf(0.5)[:, 0], ensemble.ancil["median"], atol=0.02)
    # Densities are means over a cell: half of one to the side of where they belong.
    away = np.abs(ensemble.pdf(x.numpy()) - density.pdf(x.expand(3, 1, -1))[:, 0].numpy())
    assert np.median(away) < 0.01
    assert list(ensemble.ancil["key"]) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["linear", "log10", "asinh"])
def test_scalings_are_undone(tmp_path, kind):
    """A distribution of the logarithm becomes one of the number itself: its density has the slope in it."""
    density = some("mixture", (3,))
    softening = (0.4,) if kind == "asinh" else ()
    quantity = Quantity("redshift", scaling=Scaling(kind, (0.3,), (0.2,), softening))
    ensemble = qp.read(str(export_density(tmp_path / "d.hdf5", density, quantity)))
    t = torch.linspace(-2, 2, 41, dtype=torch.float64)
    x = quantity.scaling.inverse(t[:, None])[:, 0].numpy()
    np.testing.assert_allclose(ensemble.cdf(x), density.cdf(t.expand(3, -1)).numpy(), atol=5e-4)
    assert "zmedian" in ensemble.ancil


def test_what_a_file_of_qp_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="has no width"):
        export_density(tmp_path / "d.hdf5", PointDensity(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"must be \[M\] or \[M, 1\]"):
        export_density(tmp_path / "d.hdf5", some("gaussian", (3, 2)))
    two = Quantity("sfh", components=("a", "b"), scaling=Scaling("linear", (0.0, 0.0), (1.0, 1.0)))
    with pytest.raises(ValueError, match="2 entries"):
        export_density(tmp_path / "d.hdf5", some("gaussian", (3, 2)), two)
    with pytest.raises(ValueError, match="must end in .hdf5"):
        export_density(tmp_path / "d.fits", some("gaussian"))
    with pytest.raises(ValueError, match="one value a galaxy"):
        export_density(tmp_path / "d.hdf5", some("gaussian"), ancillary={"key": np.zeros(2)})
