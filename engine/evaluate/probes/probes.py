"""Predictors on frozen embeddings: nearest neighbours, ridge regression, small perceptrons.

Ridge is scikit-learn's; `MLP` predicts several labels at once, some of which may be unknown.

Shape legend: N training samples, M test samples, D embedding dimensions, T labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from armillary.engine.evaluate.probes.perceptron import PerceptronTraining, masked_mse, train_perceptron
from armillary.engine.evaluate.probes.similarity import Metric, within_nearest

__all__ = ["KNN", "MLP", "Probe", "Ridge", "labelled", "nearest", "standardised"]


class Probe(ABC):
    """A predictor that is fitted on labelled training embeddings."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What a table calls it."""

    @abstractmethod
    def predict(self, train: np.ndarray, label: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Fit on the training split and predict the test split.

        Args:
            train: [N, D] embeddings.
            label: [N] finite labels; drop the others with `labelled`.
            test: [M, D] embeddings.

        Returns:
            [M] float64 predictions.

        Raises:
            ValueError: Shapes disagree, numbers are not finite, or there are too few training samples.
        """

    def predict_jointly(self, train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Predict several labels, each from the training samples of which it is known.

        Args:
            train: [N, D] embeddings.
            labels: [N, T], NaN where unknown.
            test: [M, D] embeddings.

        Returns:
            [M, T] float64 predictions.

        Raises:
            ValueError: As `predict`, or a label is known of no sample.
        """
        return np.stack([self.predict(*labelled(train, label)[:2], test) for label in labels.T], 1)


@dataclass(frozen=True)
class KNN(Probe):
    """Mean label of the nearest training samples, found exactly.

    Samples that are as far as the last neighbour share its vote, so the order of the samples does not matter.

    Attributes:
        neighbours: How many.
        metric: Distance between embeddings.
        weights: Equal, or by inverse distance.
        standardise: Scale every dimension to unit variance first.
    """

    neighbours: int = 16
    metric: Metric = "cosine"
    weights: Literal["uniform", "distance"] = "uniform"
    standardise: bool = False

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.neighbours}-NN {self.metric}"

    def predict(self, train: np.ndarray, label: np.ndarray, test: np.ndarray) -> np.ndarray:
        """See `Probe.predict`; more neighbours than training samples are refused."""
        return self._predict(train, label[:, None], test)[:, 0]

    def predict_jointly(self, train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
        """See `Probe.predict_jointly`; labels that are known of the same samples share one search."""
        out = np.empty((len(test), labels.shape[1]))
        known, group = np.unique(np.isfinite(labels), axis=1, return_inverse=True)
        for number, keep in enumerate(known.T):
            columns = np.flatnonzero(np.ravel(group) == number)
            out[:, columns] = self._predict(train[keep], labels[np.ix_(keep, columns)], test)
        return out

    def _predict(self, train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
        train, labels, test = _checked(train, labels, test)
        _check_neighbours(self.neighbours, len(train))
        if self.standardise:
            train, test = standardised(train, test)
        out = np.empty((len(test), labels.shape[1]))
        for piece, row, sample, distance in within_nearest(train, test, self.neighbours, self.metric):
            last = np.zeros(piece.stop - piece.start)
            np.maximum.at(last, row, distance)
            tied = distance == last[row]
            share = (self.neighbours - np.bincount(row[~tied], minlength=len(last))) / np.bincount(row[tied])
            weight = np.where(tied, share[row], 1.0)
            if self.weights == "distance":  # a sample at the query's own place outweighs all others
                here = distance == 0
                any_here = np.bincount(row[here], minlength=len(last)) > 0
                weight *= np.where(any_here[row], here, 1 / np.where(here, 1, distance))
            sums = [np.bincount(row, weight * label[sample]) for label in labels.T]
            out[piece] = np.stack(sums, 1) / np.bincount(row, weight)[:, None]
        return out


@dataclass(frozen=True)
class Ridge(Probe):
    """Linear regression on standardised embeddings, its penalty chosen by leave-one-out cross-validation.

    Attributes:
        alphas: Penalties to choose from.
    """

    alphas: tuple[float, ...] = tuple(10.0**e for e in np.arange(-2, 6.5, 0.5))

    @property
    def name(self) -> str:
        """What a table calls it."""
        return "ridge"

    def predict(self, train: np.ndarray, label: np.ndarray, test: np.ndarray) -> np.ndarray:
        """See `Probe.predict`."""
        from sklearn.linear_model import RidgeCV

        train, label, test = _checked(train, label, test, least=2)
        train, test = standardised(train, test)
        return RidgeCV(list(self.alphas)).fit(train, label).predict(test).astype(np.float64)


@dataclass(frozen=True)
class MLP(Probe):
    """A perceptron on standardised embeddings, for one label or several at once.

    Its loss is the mean square error of standardised labels; unknown ones are left out.

    Attributes:
        hidden: Widths of the hidden layers. AstroCLIP's paper has one of 32, its released code 64 and 64.
        training: How it is trained; the default is AstroCLIP's.
    """

    hidden: tuple[int, ...] = (32,)
    training: PerceptronTraining = field(default_factory=PerceptronTraining)

    @property
    def name(self) -> str:
        """What a table calls it."""
        return "MLP " + "-".join(map(str, self.hidden))

    def predict(self, train: np.ndarray, label: np.ndarray, test: np.ndarray) -> np.ndarray:
        """See `Probe.predict`."""
        train, label, test = _checked(train, label, test)
        return self.predict_jointly(train, label[:, None], test)[:, 0]

    def predict_jointly(self, train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
        """See `Probe.predict_jointly`; one perceptron with an output for each label."""
        known = np.isfinite(labels)
        if not known.any(0).all():
            raise ValueError(
                f"labels: number {int(np.argmin(known.any(0)))} is known for none of {len(labels)} samples"
            )
        train, filled, test = _checked(train, np.where(known, labels, 0), test)
        labels = np.where(known, filled, np.nan)
        mean, spread = np.nanmean(labels, 0), np.nanstd(labels, 0)
        spread = np.where(spread > 0, spread, 1)
        train, test = standardised(train, test)
        run = train_perceptron(train, (labels - mean) / spread, masked_mse, self.hidden, self.training)
        return run(test) * spread + mean


def labelled(vectors: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drop samples without a label.

    Args:
        vectors: [N, D].
        label: [N], NaN or infinite where unknown.

    Returns:
        The embeddings and labels that are left, and the [N] bool mask of what was kept.

    Raises:
        ValueError: The lengths differ, or no label is known.
    """
    label = np.asarray(label, np.float64)
    if len(vectors) != len(label):
        raise ValueError(f"embeddings and labels: lengths differ, got {len(vectors)} and {len(label)}")
    keep = np.isfinite(label)
    if not keep.any():
        raise ValueError(f"labels: none of {len(label)} is known; choose another label or split")
    return vectors[keep], label[keep], keep


def nearest(
    train: np.ndarray, query: np.ndarray, neighbours: int, metric: Metric = "cosine"
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest training samples of each query, nearest first; of equally near ones the lower row.

    Args:
        train: [N, D] embeddings.
        query: [M, D] embeddings.
        neighbours: How many, at most N.
        metric: Distance between embeddings.

    Returns:
        Indices [M, neighbours] into `train`, and their distances.

    Raises:
        ValueError: Shapes disagree, numbers are not finite, or there are fewer than `neighbours` training samples.
    """
    train, _, query = _checked(train, np.zeros(len(train)), query)
    _check_neighbours(neighbours, len(train))
    index, distance = np.empty((len(query), neighbours), np.int64), np.empty((len(query), neighbours))
    for piece, row, sample, far in within_nearest(train, query, neighbours, metric):
        order = np.lexsort((sample, far, row))  # all samples of a query in one run, the nearest first
        first = np.searchsorted(row, np.arange(piece.stop - piece.start))[:, None] + np.arange(neighbours)
        index[piece], distance[piece] = sample[order][first], far[order][first]
    return index, distance


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zero mean and unit variance of every dimension over the training samples [N, D], float32; test samples [M, D] alike.

    Dimensions that vary by float32 rounding only, a spread of 1e-7 of their mean or less, become 0.
    """
    # Sums of a million float32 numbers are off by 1e-3 of the spread.
    mean, spread = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    spread = np.where(spread > 1e-7 * np.abs(mean), spread, np.inf)
    scaled = [((v - mean) / spread).astype(np.float32) for v in (train, test)]
    return scaled[0], scaled[1]


def _checked(
    train: np.ndarray, label: np.ndarray, test: np.ndarray, least: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    train, label, test = np.asarray(train, np.float32), np.asarray(label, np.float64), np.asarray(test, np.float32)
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or label.shape[:1] != (len(train),):
        raise ValueError(f"shapes: need [N, D], [N] and [M, D], got {train.shape}, {label.shape} and {test.shape}")
    if len(train) < least or not len(test):
        raise ValueError(f"samples: need {least} or more to train on and 1 to test, got {len(train)} and {len(test)}")
    for name, values in (("training embeddings", train), ("labels", label), ("test embeddings", test)):
        if bad := int((~np.isfinite(values)).reshape(len(values), -1).any(1).sum()):
            raise ValueError(f"{name}: {bad} of {len(values)} samples hold non-finite numbers")
    return train, label, test


def _check_neighbours(neighbours: int, samples: int) -> None:
    if not 1 <= neighbours <= samples:
        raise ValueError(
            f"neighbours: must be 1 or more and need as many labelled training samples, got {neighbours} and {samples}"
        )
