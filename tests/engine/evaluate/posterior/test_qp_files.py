"""Files of qp that hold predicted distributions of one number."""

import numpy as np
import pytest
import qp
import torch

from armillary.engine.evaluate.posterior.qp_files import DensityRows
from armillary.models.masked.density import PointDensity
from armillary.models.masked.heads import HeadConfig
from armillary.models.quantities import Quantity, Scaling

KINDS = {
    "gaussian": HeadConfig("mixture", 1),
    "mixture": HeadConfig("mixture", 3),
    "quantile": HeadConfig("quantile", 9),
}
KINDS |= {"binned": HeadConfig("binned", 12, reach=4.0)}
PLAIN = Quantity("stellar_mass")


def some(kind, shape=(3,), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return KINDS[kind].density(torch.randn(*shape, KINDS[kind].numbers, generator=draw, dtype=torch.float64))


def written(path, *densities, quantity=PLAIN, columns=None):
    rows = DensityRows(quantity)
    for density in densities:
        rows.add(density)
    return rows.write(path, columns)


@pytest.mark.parametrize("kind", list(KINDS))
def test_qp_reads_every_kind(tmp_path, kind):
    """Cumulative probabilities as qp has them: but for the .0001 beyond either end, and what a line over one cell leaves out."""
    density = some(kind, (3, 1))
    one, two = some(kind, (1, 1), seed=1), some(kind, (1,), seed=2)
    path = written(tmp_path / "d.hdf5", density, one, two, columns={"key": np.array(list("abcde"))})
    whole = qp.read(str(path))
    assert whole.npdf == 5 and list(whole.ancil["key"]) == list("abcde")
    np.testing.assert_allclose(whole.ancil["median"][3:], [one.median()[0, 0], two.median()[0]])
    ensemble = whole[:3]
    x = torch.linspace(-4, 4, 161, dtype=torch.float64)
    assert ensemble.npdf == 3 and ensemble.gen_class is qp.interp_irregular
    expected = density.cdf(x.expand(3, 1, -1))[:, 0].numpy()
    corners = 3e-3 if kind in ("binned", "quantile") else 0.0  # where lines meet within a cell
    np.testing.assert_allclose(ensemble.cdf(x.numpy()), expected, rtol=0, atol=5e-4 + corners)
    np.testing.assert_allclose(ensemble.ppf(0.5)[:, 0], ensemble.ancil["median"], atol=0.02)
    # Densities are means over a cell: half of one to the side of where they belong.
    away = np.abs(ensemble.pdf(x.numpy()) - density.pdf(x.expand(3, 1, -1))[:, 0].numpy())
    assert np.median(away) < 0.01


@pytest.mark.parametrize("kind", ["linear", "log10", "asinh"])
def test_scalings_are_undone(tmp_path, kind):
    """A distribution of the logarithm becomes one of the number itself: its density has the slope in it."""
    density = some("mixture", (3,))
    softening = (0.4,) if kind == "asinh" else ()
    quantity = Quantity("redshift", scaling=Scaling(kind, (0.3,), (0.2,), softening))
    ensemble = qp.read(str(written(tmp_path / "d.hdf5", density, quantity=quantity)))
    t = torch.linspace(-2, 2, 41, dtype=torch.float64)
    x = quantity.scaling.inverse(t[:, None])[:, 0].numpy()
    np.testing.assert_allclose(ensemble.cdf(x), density.cdf(t.expand(3, -1)).numpy(), atol=5e-4)
    assert "zmedian" in ensemble.ancil


def test_what_a_file_of_qp_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="has no width"):
        written(tmp_path / "d.hdf5", PointDensity(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"must be \[M\] or \[M, 1\]"):
        written(tmp_path / "d.hdf5", some("gaussian", (3, 2)))
    two = Quantity("sfh", components=("a", "b"), scaling=Scaling("linear", (0.0, 0.0), (1.0, 1.0)))
    with pytest.raises(ValueError, match="2 entries"):
        DensityRows(two)
    with pytest.raises(ValueError, match="must end in .hdf5"):
        written(tmp_path / "d.fits", some("gaussian"))
    with pytest.raises(ValueError, match="one value a galaxy"):
        written(tmp_path / "d.hdf5", some("gaussian"), columns={"key": np.zeros(2)})
