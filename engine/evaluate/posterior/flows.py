"""Neural posterior estimation: an ensemble of conditional neural spline flows p(theta | x) on frozen embeddings x.

Each member is zuko's autoregressive rational-quadratic spline flow (Durkan et al. 2019, arXiv:1906.04032) with
architecture and seed of its own; the posterior is the equal mixture of the members. Members learn standardised
parameters t = (theta - mean) / std, moments of the training split. Hence two conventions of a density:

* `FlowEnsemble.log_prob` is the density of theta in its own units: log p(t | x) - sum_p log std_p.
* `FlowEnsemble.nll` is the mean of -log p(t | x), in nats over all P parameters, without that Jacobian, which is what
  AstroCLIP (Parker et al. 2024) prints. It compares feature sets on the same parameters and training rows only.

Shape legend: N training samples, M samples asked for, D embedding dimensions, P parameters, K members, S draws a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from armillary.engine.evaluate.posterior.flow_scaling import Scaling
from armillary.engine.evaluate.posterior.flow_training import PRESETS, EnsembleFlow, FlowOptions, train_members

__all__ = ["PRESETS", "FlowEnsemble", "FlowOptions", "EnsembleFlow", "NegativeLogLikelihood"]

LEAST_SAMPLES = 20
CHUNK = 65536  # rows a pass: splines of 8 bins in 5 dimensions then need about 100 MB


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Mean of -log p(t | x) over samples, in nats, t the standardised parameters.

    Attributes:
        members: [K] of each member.
        mixture: Of the equal mixture; by convexity never more than the members' mean.
        samples: How many samples had all parameters known.
    """

    members: np.ndarray
    mixture: float
    samples: int

    @property
    def mean(self) -> float:
        """Mean over members, the number that AstroCLIP prints."""
        return float(self.members.mean())

    @property
    def std(self) -> float:
        """Standard deviation over members (ddof 1); NaN for one member."""
        return float(self.members.std(ddof=1)) if len(self.members) > 1 else math.nan


@dataclass(frozen=True)
class FlowEnsemble:
    """p(theta | x) as an equal mixture of conditional flows.

    Attributes:
        members: The K flows.
        scaling: Of embeddings and parameters, fitted on the training samples.
        dropped: Training samples left out because a parameter was unknown.
    """

    members: tuple[EnsembleFlow, ...]
    scaling: Scaling
    dropped: int

    @classmethod
    def fit(cls, context: np.ndarray, theta: np.ndarray, options: FlowOptions) -> FlowEnsemble:
        """Train the members one after the other.

        Args:
            context: [N, D] embeddings.
            theta: [N, P] parameters; rows with an unknown one (NaN) are dropped and counted.
            options: Members and training.

        Raises:
            ValueError: Shapes disagree, embeddings are not finite, a parameter is constant or too few rows are left.
            FloatingPointError: A member's loss is not finite, whatever the learning rate.
        """
        context, theta = _checked(context, theta)
        known = np.isfinite(theta).all(1)
        if known.sum() < LEAST_SAMPLES:
            raise ValueError(
                f"theta: need {LEAST_SAMPLES} training samples with all parameters known, got {int(known.sum())} of {len(theta)}"
            )
        scaling = Scaling.fit(context[known], theta[known], options.components)
        x, t = scaling.context(context[known]), scaling.standardised(theta[known])
        return cls(train_members(x, t, options), scaling, int((~known).sum()))

    @property
    def parameters(self) -> int:
        """P."""
        return len(self.scaling.theta_mean)

    def log_prob(self, context: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """[M] float64 log density of theta in its own units, under the mixture.

        Args:
            context: [M, D] embeddings.
            theta: [M, P] finite parameters.
        """
        return _mixture(self._member_log_prob(context, theta)) - self.scaling.log_volume

    def nll(self, context: np.ndarray, theta: np.ndarray) -> NegativeLogLikelihood:
        """Held-out loss in standardised units (see the head of this module).

        Args:
            context: [M, D] embeddings.
            theta: [M, P] parameters; rows with an unknown one are left out.

        Raises:
            ValueError: Shapes disagree or no row is fully known.
        """
        context, theta = self._checked(context, theta)
        known = np.isfinite(theta).all(1)
        if not known.any():
            raise ValueError(f"theta: none of {len(theta)} samples has all parameters known")
        each = self._member_log_prob(context[known], theta[known])
        return NegativeLogLikelihood(-each.mean(1), float(-_mixture(each).mean()), int(known.sum()))

    def on_grid(self, context: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact density and cumulative probability of the mixture on a grid; for one parameter.

        Args:
            context: [M, D] embeddings.
            grid: [G] finite values of the parameter.

        Returns:
            [M, G] float64 density per unit of the parameter, and [M, G] float64 P(parameter < value | x).

        Raises:
            ValueError: The ensemble is of several parameters.
        """
        if self.parameters != 1:
            raise ValueError(f"on_grid: needs an ensemble of one parameter, got one of {self.parameters}")
        context, _ = self._checked(context, np.zeros((len(context), 1)))
        if np.ndim(grid) != 1 or not np.isfinite(grid).all():
            raise ValueError(f"grid: must be finite numbers [G], got shape {np.shape(grid)}")
        # The splines depend on the embedding alone: one evaluation of the network serves all points of the grid.
        x, t = self.scaling.context(context)[:, None], self.scaling.standardised(np.asarray(grid, np.float64)[:, None])
        density, cumulative = np.zeros((len(x), len(t))), np.zeros((len(x), len(t)))
        rows = max(1, CHUNK // len(t))
        with torch.no_grad():
            for start in range(0, len(x), rows):
                part = slice(start, start + rows)
                values = t.expand(len(x[part]), *t.shape)
                for member in self.members:
                    u, log_slope = member.flow(x[part]).transform.call_and_ladj(values)
                    u = u[..., 0].double()  # standard normal
                    density[part] += torch.exp(log_slope.double() - u**2 / 2).numpy() / math.sqrt(2 * math.pi)
                    cumulative[part] += torch.special.ndtr(u).numpy()
        return density / len(self.members) / float(self.scaling.theta_std[0]), cumulative / len(self.members)

    def sample(self, context: np.ndarray, draws: int, generator: torch.Generator) -> np.ndarray:
        """[M, S, P] float64 independent draws of the mixture: the member of each is drawn, too.

        Args:
            context: [M, D] embeddings.
            draws: S.
            generator: On the CPU; the same state gives the same draws.

        Raises:
            ValueError: The embeddings are of another shape or not finite, or nothing is asked for.
        """
        if draws < 1:
            raise ValueError(f"draws: must be positive, got {draws}")
        context, _ = self._checked(context, np.zeros((len(context), self.parameters)))
        x = self.scaling.context(context)
        which = torch.randint(len(self.members), (len(x) * draws,), generator=generator)
        u = torch.randn(len(which), self.parameters, generator=generator)
        t = torch.empty_like(u)
        with torch.no_grad():
            for number, member in enumerate(self.members):
                for place in torch.nonzero(which == number)[:, 0].split(CHUNK):
                    t[place] = member.flow(x[place // draws]).transform.inv(u[place])
        return self.scaling.physical(t).reshape(len(x), draws, self.parameters)

    def _member_log_prob(self, context: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """[K, M] float64 log p(t | x) of each member, in standardised units."""
        context, theta = self._checked(context, theta)
        if not np.isfinite(theta).all():
            raise ValueError("theta: must be finite to have a density; drop rows with unknown parameters")
        x, t = self.scaling.context(context), self.scaling.standardised(theta)
        with torch.no_grad():
            return np.stack(
                [
                    np.concatenate(
                        [
                            m.flow(a).log_prob(b).double().numpy()
                            for a, b in zip(x.split(CHUNK), t.split(CHUNK), strict=True)
                        ]
                    )
                    for m in self.members
                ]
            )

    def _checked(self, context: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        context, theta = _checked(context, theta)
        have = (len(self.scaling.context_mean), self.parameters)
        if (context.shape[1], theta.shape[1]) != have:
            raise ValueError(
                f"shapes: this ensemble is of {have[0]} embedding dimensions and {have[1]} parameters, got "
                f"{context.shape[1]} and {theta.shape[1]}"
            )
        return context, theta


def _mixture(log_prob: np.ndarray) -> np.ndarray:
    """[M] log of the mean density of [K, M]."""
    return np.logaddexp.reduce(log_prob, axis=0) - math.log(len(log_prob))


def _checked(context: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    context, theta = np.asarray(context, np.float32), np.asarray(theta, np.float64)
    if context.ndim != 2 or theta.ndim != 2 or len(context) != len(theta):
        raise ValueError(f"shapes: need embeddings [N, D] and parameters [N, P], got {context.shape} and {theta.shape}")
    if bad := int((~np.isfinite(context)).any(1).sum()):
        raise ValueError(f"embeddings: {bad} of {len(context)} samples hold non-finite numbers")
    return context, theta
