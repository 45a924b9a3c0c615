"""One joint posterior: an ensemble of flows on one feature set, its likelihood, draws, calibration and scores.

Shape legend: N training rows, M test rows, D embedding dimensions, S draws, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from armillary.engine.evaluate.posterior import calibration
from armillary.engine.evaluate.posterior.calibration import Coverage
from armillary.engine.evaluate.posterior.flows import FlowEnsemble, FlowOptions, NegativeLogLikelihood

__all__ = ["LEVELS", "Joint", "fit_joint", "gaussian_nll"]

LEVELS = (0.68, 0.95)


@dataclass(frozen=True)
class Joint:
    """What the joint posterior of one feature set gave.

    Attributes:
        nll: Over all test samples.
        coverage: TARP.
        pit: [scored, P].
        crps: [scored, P] in the labels' units.
        energy: Mean energy score of standardised parameters.
        ensemble: The flows.
    """

    nll: NegativeLogLikelihood
    coverage: Coverage
    pit: np.ndarray
    crps: np.ndarray
    energy: float
    ensemble: FlowEnsemble


def fit_joint(
    x: np.ndarray,
    theta: np.ndarray,
    x_test: np.ndarray,
    truth: np.ndarray,
    chosen: np.ndarray,
    flows: FlowOptions,
    draws: int,
) -> Joint:
    """Fit an ensemble and score it.

    Args:
        x: [N, D] training embeddings.
        theta: [N, P] training labels, NaN where unknown.
        x_test: [M, D] test embeddings.
        truth: [M, P] test labels, NaN where unknown.
        chosen: Test rows to draw for, their labels all known.
        flows: Members and training.
        draws: S.
    """
    ensemble = FlowEnsemble.fit(x, theta, flows)
    nll = ensemble.nll(x_test, truth)
    samples = ensemble.sample(x_test[chosen], draws, torch.Generator().manual_seed(flows.seed))
    true = truth[chosen]
    # The same references and coins for every feature set: their differences are not the draw's.
    rng = np.random.default_rng([flows.seed, 2])
    pit = calibration.pit(samples, true, rng)
    coverage = calibration.tarp(samples, true, rng)
    mean, std = ensemble.scaling.theta_mean, ensemble.scaling.theta_std
    energy = float(calibration.energy_score((samples - mean) / std, (true - mean) / std).mean())
    return Joint(nll, coverage, pit, calibration.crps(samples, true), energy, ensemble)


def gaussian_nll(theta: np.ndarray, truth: np.ndarray) -> float:
    """NLL of a Gaussian with the training labels' mean and covariance, in the convention of `FlowEnsemble.nll`.

    Flows must beat it to have used an embedding at all. Rows with an unknown label are left out.
    """
    theta, truth = theta[np.isfinite(theta).all(1)], truth[np.isfinite(truth).all(1)]
    mean, std = theta.mean(0), theta.std(0)
    t, s = (theta - mean) / std, (truth - mean) / std
    covariance = np.atleast_2d(np.cov(t.T)) + 1e-9 * np.eye(t.shape[1])  # labels may be functions of each other
    _, log_determinant = np.linalg.slogdet(covariance)
    distance = (s * np.linalg.solve(covariance, s.T).T).sum(1)
    return float((distance.mean() + log_determinant + t.shape[1] * math.log(2 * math.pi)) / 2)
