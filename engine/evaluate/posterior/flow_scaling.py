"""Scales of what a conditional flow reads and gives: embeddings and parameters in units of the training samples' spread.

Shape legend: N samples, D embedding dimensions, C of them after the reduction, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Scaling"]


@dataclass(frozen=True)
class Scaling:
    """Moments of the training samples, and their principal components where asked for.

    Attributes:
        context_mean: [D].
        context_spread: [D], infinite where a dimension is constant, which makes it 0.
        axes: [D, C] principal axes of the standardised embeddings, divided by one number so that the C scores have a mean
            variance of 1 and keep their relative sizes; None for no reduction.
        theta_mean: [P].
        theta_std: [P].
    """

    context_mean: np.ndarray
    context_spread: np.ndarray
    axes: np.ndarray | None
    theta_mean: np.ndarray
    theta_std: np.ndarray

    @classmethod
    def fit(cls, context: np.ndarray, theta: np.ndarray, components: int | None) -> Scaling:
        """Take moments and axes.

        Args:
            context: [N, D] finite embeddings.
            theta: [N, P] finite parameters.
            components: C, if embeddings have more dimensions than that; None for no reduction.

        Raises:
            ValueError: A parameter is constant.
        """
        values = context.astype(np.float64)
        mean, spread = values.mean(0), values.std(0)
        spread = np.where(spread > 1e-7 * (np.abs(mean) + 1e-30), spread, np.inf)
        std = theta.std(0)
        if (constant := np.flatnonzero(np.ptp(theta, axis=0) == 0)).size:
            which = int(constant[0])
            raise ValueError(f"theta: parameter {which} is constant, all {len(theta)} values are {theta[0, which]:g}")
        axes = None
        if components is not None and components < context.shape[1]:
            z = (values - mean) / spread
            variance, vectors = np.linalg.eigh(z.T @ z / len(z))
            variance, axes = variance[::-1][:components], vectors[:, ::-1][:, :components]
            # An eigenvector's sign is the library's choice: fix it, so that equal data give equal flows everywhere.
            axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(components)])
            axes = axes / np.sqrt(max(variance.mean(), 1e-30))
        return cls(mean, spread, axes, theta.mean(0), std)

    @property
    def log_volume(self) -> float:
        """Sum over parameters of log std: what a log density loses on the way from standardised to physical units."""
        return float(np.log(self.theta_std).sum())

    def context(self, context: np.ndarray) -> Tensor:
        """[N, C] float32 of embeddings [N, D]."""
        z = (context.astype(np.float64) - self.context_mean) / self.context_spread
        return torch.from_numpy((z if self.axes is None else z @ self.axes).astype(np.float32))

    def standardised(self, theta: np.ndarray) -> Tensor:
        """[N, P] float32 of parameters [N, P]."""
        return torch.from_numpy(((theta - self.theta_mean) / self.theta_std).astype(np.float32))

    def physical(self, t: Tensor) -> np.ndarray:
        """[N, P] float64 parameters of standardised ones [N, P]."""
        return t.numpy().astype(np.float64) * self.theta_std + self.theta_mean
