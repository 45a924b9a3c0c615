"""Redshift distributions p(z | x) on a grid: densities of a one-parameter flow, point estimates, export for qp.

The file that `export_qp` writes is read by `qp.read` (qp-prob, the LSST DESC's package of distributions) as an ensemble of
its "interp" parameterisation: densities on one grid, linear in between.

Shape legend: M galaxies, G points of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from armillary.engine.evaluate.posterior.calibration import pit_on_grid
from armillary.engine.evaluate.posterior.flows import FlowEnsemble
from armillary.engine.evaluate.posterior.qp_files import write_qp

__all__ = ["RedshiftPDF", "export_qp", "redshift_grid", "redshift_pdf"]


@dataclass(frozen=True)
class RedshiftPDF:
    """Redshift distributions of M galaxies.

    Attributes:
        z: [G] ascending redshifts.
        density: [M, G] per unit redshift, 0 at the first point, linear in between; each integrates to 1 exactly.
        mass: [M] probability on the grid before it was normalised. Far below 1: the grid ends too early. Above 1: its
            points are too far apart for the galaxy's peak.
    """

    z: np.ndarray
    density: np.ndarray
    mass: np.ndarray

    @classmethod
    def from_density(cls, z: np.ndarray, density: np.ndarray) -> RedshiftPDF:
        """Normalise densities; that at the first redshift is set to 0.

        Nothing is observed at a redshift of 0, where there is no volume. It also makes qp's cumulative distribution,
        whose first step is half of the first value, agree with the integral.

        Args:
            z: [G] ascending redshifts, three or more.
            density: [M, G] non-negative, finite.

        Raises:
            ValueError: Shapes disagree, the grid does not ascend, a density is not a number or negative, or is zero
                everywhere on the grid.
        """
        z, density = np.asarray(z, np.float64), np.array(density, np.float64)
        if z.ndim != 1 or density.ndim != 2 or density.shape[1] != len(z) or len(z) < 3:
            raise ValueError(
                f"shapes: need [G] redshifts, 3 or more, and [M, G] densities, got {z.shape} and {density.shape}"
            )
        if not np.isfinite(z).all() or not (np.diff(z) > 0).all():
            raise ValueError("z: must be finite and ascend strictly")
        if not np.isfinite(density).all() or (density < 0).any():
            raise ValueError("density: must be finite and not negative")
        density[:, 0] = 0
        mass = np.trapezoid(density, z, axis=1)
        if empty := int((mass <= 0).sum()):
            raise ValueError(
                f"density: {empty} of {len(mass)} galaxies have none between z = {z[0]:g} and {z[-1]:g}; use a wider grid"
            )
        return cls(z, density / mass[:, None], mass)

    def __len__(self) -> int:
        """Number of galaxies."""
        return len(self.density)

    @property
    def cdf(self) -> np.ndarray:
        """[M, G] cumulative probability at the grid's points."""
        steps = np.diff(self.z) * (self.density[:, 1:] + self.density[:, :-1]) / 2
        cumulative = np.concatenate([np.zeros((len(self), 1)), np.cumsum(steps, axis=1)], axis=1)
        return cumulative / cumulative[:, -1:]

    @property
    def mode(self) -> np.ndarray:
        """[M] point of the grid with the largest density."""
        return self.z[self.density.argmax(1)]

    @property
    def mean(self) -> np.ndarray:
        """[M] mean redshift, exact for the linear interpolation."""
        a, b, width = self.z[:-1], self.z[1:], np.diff(self.z)
        left, right = self.density[:, :-1], self.density[:, 1:]
        return (width / 6 * (left * (2 * a + b) + right * (a + 2 * b))).sum(1)

    @property
    def median(self) -> np.ndarray:
        """[M] median redshift."""
        return self.quantile(0.5)

    def quantile(self, probability: float) -> np.ndarray:
        """[M] redshift below which the given probability lies, the cumulative probability taken linear between points.

        Args:
            probability: Between 0 and 1.

        Raises:
            ValueError: It does not.
        """
        if not 0 < probability < 1:
            raise ValueError(f"probability: must lie between 0 and 1, got {probability}")
        # Only where the cumulative probability grows is it a function of z that can be inverted.
        found = np.empty(len(self))
        for row, cumulative in enumerate(self.cdf):
            grows = np.concatenate([np.diff(cumulative) > 0, [True]])
            found[row] = np.interp(probability, cumulative[grows], self.z[grows])
        return found

    def odds(self, half_width: float = 0.03) -> np.ndarray:
        """[M] probability within half_width * (1 + mode) of the mode (Benitez 2000): near 1 for a sharp single peak.

        Args:
            half_width: In units of 1 + z.

        Raises:
            ValueError: It is not positive.
        """
        if not half_width > 0:
            raise ValueError(f"half_width: must be positive, got {half_width}")
        mode = self.mode
        reach = half_width * (1 + mode)
        return self._cumulative(mode + reach) - self._cumulative(mode - reach)

    def pit(self, true: np.ndarray) -> np.ndarray:
        """[M] cumulative probability at the true redshifts [M]."""
        return pit_on_grid(self.z, self.cdf, np.asarray(true, np.float64))

    def _cumulative(self, at: np.ndarray) -> np.ndarray:
        return np.array([np.interp(x, self.z, c, left=0.0, right=1.0) for x, c in zip(at, self.cdf, strict=True)])


def redshift_grid(redshift: np.ndarray, points: int = 401) -> np.ndarray:
    """[points] redshifts from 0 to a quarter beyond the largest known one.

    Args:
        redshift: Redshifts of the training split, NaN where unknown.
        points: How many.

    Raises:
        ValueError: None is known and positive, or there are fewer than 3 points.
    """
    known = redshift[np.isfinite(redshift)]
    if points < 3 or not len(known) or known.max() <= 0:
        raise ValueError(
            f"redshift_grid: need 3 or more points and a positive redshift, got {points} and {len(known)} known"
        )
    return np.linspace(0, 1.25 * float(known.max()), points)


def redshift_pdf(ensemble: FlowEnsemble, context: np.ndarray, z: np.ndarray) -> RedshiftPDF:
    """Evaluate the exact density of a one-parameter ensemble on a grid; nothing is sampled or smoothed.

    Args:
        ensemble: Fitted on the redshift alone.
        context: [M, D] embeddings.
        z: [G] ascending redshifts.

    Raises:
        ValueError: The ensemble is of several parameters, or has no probability on the grid.
    """
    density, _ = ensemble.on_grid(context, z)
    return RedshiftPDF.from_density(z, density)


def export_qp(path: Path | str, pdf: RedshiftPDF, ancillary: Mapping[str, np.ndarray] | None = None) -> Path:
    """Write distributions as HDF5 that `qp.read` opens, as its "interp": one grid for all, in `z`.

    Args:
        path: File to write, its name ending in .hdf5, by which qp knows the format; replaced at once.
        pdf: The distributions; point estimates zmode, zmean, zmedian and odds are written beside them.
        ancillary: Columns [M] of numbers or text, such as keys and true redshifts.

    Returns:
        The file.

    Raises:
        ValueError: The suffix is another, or a column is not of M values or has the name of a point estimate.
    """
    columns = {"zmode": pdf.mode, "zmean": pdf.mean, "zmedian": pdf.median, "odds": pdf.odds()}
    for name, values in (ancillary or {}).items():
        if name in columns:
            raise ValueError(f"ancillary {name!r}: is one of the point estimates; give it another name")
        columns[name] = values
    return write_qp(path, "interp", {"xvals": pdf.z[None]}, {"yvals": pdf.density}, columns)
