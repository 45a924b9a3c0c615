"""Small perceptrons on frozen embeddings, and how they are trained: by Adam for a fixed number of epochs.

Everything runs on the CPU and depends on the seed alone.

Shape legend: N samples, D inputs, K outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from armillary.models.supervised.regression import known_squares

__all__ = ["PerceptronTraining", "masked_mse", "perceptron", "soft_cross_entropy", "train_perceptron"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PerceptronTraining:
    """How a perceptron is trained.

    Attributes:
        epochs: Passes over the training samples.
        batch: Samples of a step.
        learning_rate: Of Adam.
        dropout: Share of every hidden layer that is dropped while training.
        held_out: Share of the samples that is not trained on, but chooses the epoch that is kept; 0 keeps the last.
        patience: Epochs in a row that do not lower the held-out loss, after which training ends; None trains all epochs.
        seed: Of the initial weights, the order of the samples, dropout and what is held out.
    """

    epochs: int = 10
    batch: int = 64
    learning_rate: float = 1e-3
    dropout: float = 0.1
    held_out: float = 0.0
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be 1 or more, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: must be positive, got {self.learning_rate}")
        for name in ("dropout", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 0 and less than 1, got {getattr(self, name)}")
        if self.patience is not None and (self.patience < 1 or not self.held_out):
            raise ValueError(f"patience: must be 1 or more, with samples held out, got {self.patience}")


def perceptron(inputs: int, hidden: Sequence[int], outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU and dropout between them; ValueError without a hidden layer or with a width below 1."""
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hidden: need one or more widths of 1 or more, got {tuple(hidden)}")
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((inputs, *hidden)):
        layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], outputs))


def masked_mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean square error of [N, K] outputs over the known targets, those that are not NaN; 0 where none is known."""
    return known_squares(predicted, target).sum()


def soft_cross_entropy(logits: Tensor, share: Tensor) -> Tensor:
    """Mean over samples of -sum_k share_k log softmax(logits)_k; [N, K] logits and shares, whose rows sum to 1."""
    return -(share * logits.log_softmax(1)).sum(1).mean()


def train_perceptron(
    inputs: np.ndarray, targets: np.ndarray, loss: Loss, hidden: Sequence[int], training: PerceptronTraining
) -> Callable[[np.ndarray], np.ndarray]:
    """Train a perceptron.

    Args:
        inputs: [N, D] finite, standardised.
        targets: [N, K].
        loss: Of outputs and targets.
        hidden: Widths of the hidden layers.
        training: How.

    Returns:
        A function from inputs [M, D] to outputs [M, K] float64.

    Raises:
        ValueError: A sample is held out of so few that it leaves none to train on or none to choose by, or the loss is
            not finite in the end.
    """
    count = len(inputs)
    held = round(training.held_out * count)
    if held >= count or (training.held_out and not held):
        raise ValueError(f"held_out: {training.held_out:g} of {count} training samples is {held}; need more samples")
    x = torch.from_numpy(np.ascontiguousarray(inputs, np.float32))
    y = torch.from_numpy(np.ascontiguousarray(targets, np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = perceptron(x.shape[1], hidden, y.shape[1], training.dropout)
        optimiser = torch.optim.Adam(model.parameters(), training.learning_rate, fused=True)
        order = torch.randperm(count)
        judged, used = order[:held], order[held:]
        least, best, waited = float("inf"), None, 0
        for _ in range(training.epochs):
            model.train()
            for part in used[torch.randperm(len(used))].split(training.batch):
                optimiser.zero_grad(set_to_none=True)
                value = loss(model(x[part]), y[part])
                value.backward()
                optimiser.step()
            if held:
                model.eval()
                with torch.no_grad():
                    value = loss(model(x[judged]), y[judged])
                waited += 1
                if float(value) < least:
                    least, best, waited = float(value), {k: v.clone() for k, v in model.state_dict().items()}, 0
                if waited == training.patience:
                    break
    if not value.isfinite():
        raise ValueError(
            f"perceptron {'-'.join(map(str, hidden))}: the loss is {value.item()} after {training.epochs} epochs; "
            "choose a smaller learning_rate"
        )
    if best is not None:
        model.load_state_dict(best)
    model.eval()

    def predict(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(np.ascontiguousarray(rows, np.float32))).double().numpy()

    return predict
