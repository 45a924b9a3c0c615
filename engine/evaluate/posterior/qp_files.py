"""Distributions as files of qp (qp-prob, the LSST DESC's package of distributions): `qp.read` opens them as ensembles.

Layout (qp-prob 1.1, tables_io): meta/pdf_name [1] bytes, meta/pdf_version [1] int64 0, what all distributions share under
meta/, arrays with a row a galaxy under data/, further columns under ancil/.

Shape legend: M galaxies, G points of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import torch

from armillary.engine.atomic_file import atomic_path
from armillary.models.quantities import Distribution, Quantity

__all__ = ["DensityRows", "write_qp"]

DEEP = 1e-4
"""Probability beyond either end of a grid."""


def write_qp(
    path: Path | str,
    form: str,
    shared: Mapping[str, np.ndarray],
    rows: Mapping[str, np.ndarray],
    columns: Mapping[str, np.ndarray],
) -> Path:
    """Write a file.

    Args:
        path: File to write, its name ending in .hdf5, by which qp knows the format; replaced at once.
        form: qp's name of the parameterisation.
        shared: Arrays that all distributions share.
        rows: Arrays [M, ...].
        columns: Numbers or text [M].

    Raises:
        ValueError: The suffix is another, or a column is not of M values.
    """
    path = Path(path)
    if path.suffix != ".hdf5":
        raise ValueError(f"path: must end in .hdf5 for qp to read it, got {path.name}")
    count = len(next(iter(rows.values())))
    for name, values in columns.items():
        if np.shape(values) != (count,):
            raise ValueError(f"ancillary {name!r}: must be one value a galaxy ({count}), got shape {np.shape(values)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file["meta/pdf_name"] = np.array([form.encode()])
        file["meta/pdf_version"] = np.array([0], np.int64)
        for name, values in shared.items():
            file[f"meta/{name}"] = values
        for name, values in rows.items():
            file[f"data/{name}"] = values
        for name, given in columns.items():
            values = np.asarray(given)
            text = values.dtype.kind in "OU"
            file[f"ancil/{name}"] = np.array([str(v).encode() for v in values]) if text else values
    return path


class DensityRows:
    """Predicted distributions of a scalar, of any kind, batch by batch, and then the file of all of them.

    Each galaxy gets a grid of its own (qp's "interp_irregular"): half of the points at quantiles of equal steps, which follow
    narrow peaks, half at equal distances, which follow what lies between them. All are held until they are written: 16 G
    bytes a galaxy.

    Args:
        quantity: A scalar, whose scaling is undone.
        points: G.

    Raises:
        ValueError: The quantity is a vector.
    """

    def __init__(self, quantity: Quantity, points: int = 400) -> None:
        if quantity.scaling.entries != 1:
            raise ValueError(
                f"quantity {quantity.name!r}: has {quantity.scaling.entries} entries, a file of qp holds scalars"
            )
        self.quantity, self.points = quantity, points
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    @torch.no_grad()
    def add(self, density: Distribution) -> None:
        """Put distributions [M] or [M, 1] of the scaled entry behind those that are there.

        Raises:
            ValueError: One has no width (a point), or they are of another shape.
        """
        median = density.median()
        count, points = len(median), self.points
        if median.numel() != count:
            raise ValueError(f"density: must be [M] or [M, 1] distributions, got {tuple(median.shape)}")
        each = median.shape + (points // 2,)
        levels = torch.linspace(DEEP, 1 - DEEP, points // 2, dtype=torch.float64, device=median.device)
        peaks = density.quantile(levels.expand(each)).double()
        low, high = peaks[..., :1], peaks[..., -1:]
        even = low + (high - low) * torch.linspace(
            0, 1, points - points // 2, dtype=torch.float64, device=median.device
        )
        grid = torch.cat([peaks, even], dim=-1).sort(-1).values
        # No point twice: densities are differences over distances.
        grid = grid + (high - low) * 1e-6 * torch.arange(points, dtype=torch.float64, device=median.device)
        below = density.cdf(grid).double()
        grid, median = (self.quantity.scaling.inverse(t[..., None].double())[..., 0] for t in (grid, median))
        x, steps = (t.reshape(count, points).cpu().numpy() for t in (grid, below))
        if not (np.diff(x) > 0).all():
            raise ValueError(
                f"density: that of {self.quantity.name} has no width; a point cannot be written as a distribution"
            )
        # qp sums a density times the step before it: so its cumulative probability is exact at every point.
        y = np.diff(steps, prepend=steps[:, :1]) / np.diff(x, prepend=x[:, :1] - 1) / (steps[:, -1:] - steps[:, :1])
        self._parts.append((x, y, median.reshape(count).cpu().numpy()))

    def write(self, path: Path | str, columns: Mapping[str, np.ndarray] | None = None) -> Path:
        """Write all as one file.

        Args:
            path: File to write, ending in .hdf5.
            columns: [M], such as keys and true values; `zmedian` is added for redshifts, else `median`.

        Raises:
            ValueError: A column does not fit.
        """
        x, y, median = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        name = "zmedian" if self.quantity.name == "redshift" else "median"
        return write_qp(path, "interp_irregular", {}, {"xvals": x, "yvals": y}, {name: median, **(columns or {})})
