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

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armillary.engine.evaluate.flow_scaling import Scaling

__all__ = ["PRESETS", "FlowEnsemble", "FlowOptions", "Member", "NegativeLogLikelihood"]

LEAST_SAMPLES = 20
RESTARTS = 3
FINAL_LEARNING_RATE = 1e-6
CHUNK = 65536  # rows a pass: splines of 8 bins in 5 dimensions then need about 100 MB


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
    # Its released code: element-wise splines, 2 or 3 of them, at most 25 epochs (its splines end at 3 sigma, zuko's at 5).
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
class Member:
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

    members: tuple[Member, ...]
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
        draws = np.random.default_rng([options.seed, 0])
        members = tuple(_train(_draw(number, draws, options), x, t, options) for number in range(options.members))
        return cls(members, scaling, int((~known).sum()))

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


def _train(plan: _Plan, x: Tensor, t: Tensor, options: FlowOptions) -> Member:
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


def _attempt(plan: _Plan, x: Tensor, t: Tensor, options: FlowOptions) -> Member | None:
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
        if history[-1] <= min(history):
            best = copy.deepcopy(flow.state_dict())
        elif len(history) - 1 - int(np.argmin(history)) >= options.patience:
            break
    flow.load_state_dict(best)
    flow.eval()
    return Member(
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
