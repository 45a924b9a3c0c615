"""Members of an ensemble of conditional spline flows: what they are drawn from and how one is trained.

Shape legend: N training samples, C context dimensions, P parameters.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["PRESETS", "FlowOptions", "EnsembleFlow", "train_members"]

RESTARTS = 3
FINAL_LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class FlowOptions:
    """What the members are drawn from and how they are trained.

    Attributes:
        members: K.
        transforms: Least and most spline transforms of a member, drawn uniformly.
        hidden: Least and most width of the three hidden layers, drawn uniformly.
        log_hidden: Draw the logarithm of the width uniformly instead.
        independent: Transform each parameter on its own, so that the posterior factorises over them.
        bins: Of each spline.
        epochs: At most.
        patience: Epochs without a better held-out loss before a member stops.
        batch: Samples a step.
        learning_rate: Of Adam at the start; it falls by a cosine over `epochs` to 1e-6.
        clip_norm: Largest norm of a gradient.
        held_out: Fraction of the training samples that a member does not see and is stopped by, drawn for each member.
        components: Principal components that embeddings of more dimensions are reduced to; None keeps all dimensions.
        seed: Of everything random.
    """

    members: int = 10
    transforms: tuple[int, int] = (3, 6)
    hidden: tuple[int, int] = (32, 128)
    log_hidden: bool = False
    independent: bool = False
    bins: int = 8
    epochs: int = 200
    patience: int = 20
    batch: int = 128
    learning_rate: float = 5e-4
    clip_norm: float = 5.0
    held_out: float = 0.2
    components: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("members", "epochs", "patience", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")
        for name in ("transforms", "hidden"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name}: need 1 <= least <= most, got {low} and {high}")
        if self.bins < 2:
            raise ValueError(f"bins: a spline needs two or more, got {self.bins}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: must lie between 0 and 1, got {self.held_out}")
        if not self.learning_rate > 0 or not self.clip_norm > 0:
            raise ValueError(
                f"learning_rate and clip_norm: must be positive, got {self.learning_rate} and {self.clip_norm}"
            )
        if self.components is not None and self.components < 1:
            raise ValueError(f"components: must be positive or None, got {self.components}")


PRESETS: dict[str, FlowOptions] = {
    # The text of the paper: 3 to 6 transforms, widths 32 to 128; it names no largest number of epochs.
    "paper": FlowOptions(),
    # Its released code: element-wise splines, 2 or 3 of them, at most 25 epochs, for four properties without redshift.
    # It scales embeddings by one mean and spread, ends its splines at 3 sigma (zuko: 5) and keeps the last weights.
    "released": FlowOptions(
        transforms=(2, 3), hidden=(16, 32), log_hidden=True, independent=True, epochs=25, patience=5
    ),
    # A demonstration on one processor core: four feature sets of some thousand samples in under two minutes.
    "quick": FlowOptions(
        members=3,
        transforms=(2, 3),
        hidden=(32, 64),
        epochs=16,
        patience=5,
        batch=256,
        learning_rate=3e-3,
        held_out=0.1,
        components=32,
    ),
}


@dataclass(frozen=True)
class EnsembleFlow:
    """One trained flow.

    Attributes:
        flow: zuko's flow of standardised parameters given scaled embeddings, its weights those of the best epoch.
        transforms: How many it has.
        hidden: Width of its hidden layers.
        seed: It was initialised, split and shuffled with.
        learning_rate: At its start; smaller than asked for where a restart was needed.
        history: Held-out negative log-likelihood after each epoch.
        held_out: Training samples that it did not see, positions among the rows without unknown values.
    """

    flow: Any
    transforms: int
    hidden: int
    seed: int
    learning_rate: float
    history: tuple[float, ...]
    held_out: np.ndarray = field(repr=False)

    @property
    def best_epoch(self) -> int:
        """Epoch whose weights it has, from 0."""
        return int(np.argmin(self.history))


@dataclass(frozen=True)
class _Plan:
    """A member before it is trained."""

    number: int
    transforms: int
    hidden: int
    seed: int


def _draw(number: int, rng: np.random.Generator, options: FlowOptions) -> _Plan:
    low, high = options.hidden
    width = math.exp(rng.uniform(math.log(low), math.log(high))) if options.log_hidden else rng.integers(low, high + 1)
    transforms = int(rng.integers(options.transforms[0], options.transforms[1] + 1))
    return _Plan(number, transforms, math.ceil(width), int(rng.integers(2**31)))


def train_members(x: Tensor, t: Tensor, options: FlowOptions) -> tuple[EnsembleFlow, ...]:
    """Draw and train the members, one after the other.

    Args:
        x: [N, C] float32 scaled context, finite.
        t: [N, P] float32 standardised parameters, finite.
        options: Members and training.

    Raises:
        FloatingPointError: A member's loss is not finite, whatever the learning rate.
    """
    rng = np.random.default_rng([options.seed, 0])
    return tuple(_train(_draw(number, rng, options), x, t, options) for number in range(options.members))


def _train(plan: _Plan, x: Tensor, t: Tensor, options: FlowOptions) -> EnsembleFlow:
    """Train a member; where its loss is not finite, begin again with a tenth of the learning rate."""
    rate = options.learning_rate
    for _ in range(1 + RESTARTS):
        member = _attempt(plan, x, t, replace(options, learning_rate=rate))
        if member is not None:
            return member
        rate /= 10
    raise FloatingPointError(
        f"member {plan.number} ({plan.transforms} transforms, {plan.hidden} wide, seed {plan.seed}): its loss is not finite, "
        f"with learning rates from {options.learning_rate:g} down to {rate * 10:g}; standardised parameters reach "
        f"{float(t.abs().max()):.3g}, embeddings {float(x.abs().max()):.3g}: drop outliers"
    )


def _attempt(plan: _Plan, x: Tensor, t: Tensor, options: FlowOptions) -> EnsembleFlow | None:
    """One training; None as soon as a loss or gradient is not finite."""
    generator = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(len(x), generator=generator)
    count = min(max(round(options.held_out * len(x)), 1), len(x) - 1)
    held, seen = order[:count], order[count:]
    flow = _flow(plan, x.shape[1], t.shape[1], options)
    optimiser = torch.optim.Adam(flow.parameters(), lr=options.learning_rate)
    steps = math.ceil(len(seen) / options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, options.epochs * steps, eta_min=FINAL_LEARNING_RATE
    )
    history: list[float] = []
    best: dict[str, Tensor] = {}
    for _ in range(options.epochs):
        for batch in seen[torch.randperm(len(seen), generator=generator)].split(options.batch):
            loss = _loss(flow, x[batch], t[batch])
            optimiser.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), options.clip_norm)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                return None
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            history.append(float(_loss(flow, x[held], t[held])))
        if not math.isfinite(history[-1]):
            return None
        since_best = len(history) - 1 - int(np.argmin(history))
        if not since_best:
            best = copy.deepcopy(flow.state_dict())
        elif since_best >= options.patience:
            break
    flow.load_state_dict(best)
    flow.eval()
    return EnsembleFlow(
        flow, plan.transforms, plan.hidden, plan.seed, options.learning_rate, tuple(history), np.sort(held.numpy())
    )


def _flow(plan: _Plan, context: int, parameters: int, options: FlowOptions) -> Any:
    from zuko.flows import NSF

    extra: dict[str, Any] = {}
    if options.independent and parameters > 1:
        extra["adjacency"] = torch.eye(parameters, dtype=torch.bool)
    with torch.random.fork_rng(devices=[]):  # zuko initialises from the global generator
        torch.manual_seed(plan.seed)
        return NSF(
            parameters,
            context,
            bins=options.bins,
            transforms=plan.transforms,
            hidden_features=(plan.hidden,) * 3,
            **extra,
        )


def _loss(flow: Any, x: Tensor, t: Tensor) -> Tensor:
    return -flow(x).log_prob(t).mean()
