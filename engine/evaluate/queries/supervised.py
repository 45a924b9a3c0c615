"""What supervised models make of the same columns: the bar beside every answer.

A masked model that has not been trained enough gains from more data what it should have known before. So each error stands
beside those of boosted trees and of a perceptron, trained for the one query, on the training split, on what the method
would be shown: values as its views give them, noise included.

Features of a vector are its components as its scaling has them (arsinh of fluxes, logarithms), less their mean, and that
mean: colours and a level. Unknown ones are NaN for the trees, and 0 with a flag for the perceptron. The trees are fitted for the
median, the perceptron for the mean. The trees' settings were chosen on held-out training galaxies of two redshift catalogues.

Shape legend: N training and M test galaxies, D features, n components of a quantity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from armillary.engine.evaluate.probes.perceptron import PerceptronTraining, masked_mse, train_perceptron
from armillary.engine.evaluate.probes.probes import standardised
from armillary.engine.evaluate.queries.answers import Values
from armillary.engine.evaluate.queries.question import Query, parts_of
from armillary.models.quantities import Quantity, Scaling

__all__ = ["BARS", "supervised_medians"]

HIDDEN = (128, 128)
PERCEPTRON = PerceptronTraining(60, 256, 2e-3, dropout=0.0, held_out=0.1, patience=10)

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def supervised_medians(
    name: str, query: Query, train: Values, test: Values, quantities: Sequence[Quantity], seed: int
) -> np.ndarray:
    """[M] predictions of a number, in its unit, for all test galaxies; NaN where the model cannot say.

    Args:
        name: Of `BARS`.
        query: What is wanted, given what.
        train: What is fitted on.
        test: What is predicted for.
        quantities: With their scalings; targets are scaled by them.
        seed: Of the model.
    """
    wanted = next(q for q in quantities if q.name == query.want)
    target = _apply(wanted.scaling, train.of[query.want])[:, 0]
    known = np.isfinite(target)
    x, x_test = (_features(query, v, quantities) for v in (train, test))
    predicted = BARS[name](x[known], target[known], x_test, seed)
    return wanted.scaling.inverse(torch.from_numpy(predicted[:, None])).numpy()[:, 0]


def _features(query: Query, values: Values, quantities: Sequence[Quantity]) -> np.ndarray:
    """[., D] float64."""
    columns = []
    for given in query.given:
        quantity, part = parts_of(given, quantities)
        kind = "linear" if quantity.scaling.kind == "shape" else quantity.scaling.kind
        n = quantity.size
        plain = replace(quantity.scaling, kind=kind, mean=(0.0,) * n, std=(1.0,) * n, levels=0)
        t = _apply(plain, values.of[quantity.name])[:, part]
        if t.shape[1] > 1:
            count = np.isfinite(t).sum(1, keepdims=True)
            level = np.where(count > 0, np.nansum(t, 1, keepdims=True) / np.maximum(count, 1), np.nan)
            t = np.concatenate([level, t - level], axis=1)
        columns.append(t)
    return np.concatenate(columns, axis=1)


def _apply(scaling: Scaling, values: np.ndarray) -> np.ndarray:
    return scaling(torch.from_numpy(values)).numpy()


def _trees(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.ensemble import HistGradientBoostingRegressor

    model = HistGradientBoostingRegressor(
        loss="absolute_error",
        max_iter=600,
        learning_rate=0.05,
        early_stopping=len(x) >= 100,
        validation_fraction=0.1,
        n_iter_no_change=40,
        random_state=seed,
    )
    return model.fit(x, y).predict(x_test)


def _perceptron(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, seed: int) -> np.ndarray:
    both = [_flagged(one) for one in (x, x_test)]
    scaled, scaled_test = standardised(*both)
    run = train_perceptron(scaled, y[:, None], masked_mse, HIDDEN, replace(PERCEPTRON, seed=seed))
    return run(scaled_test)[:, 0]


def _flagged(x: np.ndarray) -> np.ndarray:
    """Features with 0 for what is unknown, and flags of that."""
    known = np.isfinite(x)
    return np.concatenate([np.where(known, x, 0.0), known.astype(float)], axis=1)


BARS: dict[str, Fit] = {"boosted trees": _trees, "perceptron": _perceptron}
"""Models by name: (features [N, D], scaled targets [N], features [M, D], seed) -> scaled predictions [M]."""
