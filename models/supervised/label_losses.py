"""What a network says of labels, and how wrong that is: numbers with their uncertainty, classes, shares of votes.

A loss turns a network's outputs into a likelihood of the labels. Labels come standardised by their mean and deviation, NaN where
they are unknown; classes and votes are put back into their own units first. A sample without any known label counts nothing.

    Gaussian    -log N(y | mu, sigma^2),  sigma = exp(s), s within [-7, 3]         of standardised labels
    Classes     -log softmax(outputs)[class]
    Votes       -log DirichletMultinomial(k | alpha) of each question,  alpha_i = 1 + 100 sigmoid(output_i)

The Dirichlet-multinomial is the chance of k_1 .. k_K votes among N = sum k where the shares of answers are themselves drawn from a
Dirichlet distribution, so that few votes weigh little and the network can say how sure it is:

    log P = log N! + log G(A) - log G(N + A) + sum_i [log G(k_i + alpha_i) - log G(alpha_i) - log k_i!],   A = sum alpha

Where two samples are mixed, share by share, numbers are mixed alike, and the loss of classes is that of either sample by its share;
votes, which are counts, cannot be mixed.

Source: Walmsley et al. 2022 (Zoobot, arXiv:2102.08414), section 3.2, for votes and the range of alpha; Zhang et al. 2018 (mixup,
arXiv:1710.09412), equation 1 and section 2.

Shape legend: B samples, n labels, m outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.models.constants import constant
from armillary.models.method import InputSpec
from armillary.models.rules import fractions

__all__ = ["Classes", "Gaussian", "LabelLoss", "Mix", "Votes"]

LOG_SIGMA = -7.0, 3.0
MOST_ALPHA = 100.0


class Mix(NamedTuple):
    """What is mixed into each sample.

    Attributes:
        partner: [B] int64, place of the other sample.
        share: [B] share of the sample itself; where it is below 1 both have known labels.
    """

    partner: Tensor
    share: Tensor

    def of(self, values: Tensor) -> Tensor:
        """[B, ...] values of samples, mixed."""
        share = self.share.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
        other = values.index_select(0, self.partner)
        return torch.where(share < 1, share * values + (1 - share) * other, values)


def _mean(values: Tensor, known: Tensor) -> Tensor:
    """Mean over what is known; 0, with gradients of 0, where nothing is."""
    return torch.where(known, values, 0.0).sum() / known.sum().clamp(min=1)


@dataclass(frozen=True)
class Gaussian:
    """Numbers, each with the deviation that the network gives it."""

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, as `field: rule, got value`."""
        return []

    def outputs(self, inputs: InputSpec) -> int:
        """Outputs m of the network: a mean and a deviation for each label."""
        return 2 * len(inputs.targets)

    def loss(self, out: Tensor, targets: Tensor, inputs: InputSpec, mix: Mix | None = None) -> dict[str, Tensor]:
        """Mean negative log likelihood over known labels, by label; the parts sum to the mean over all of them."""
        targets = targets if mix is None else mix.of(targets)
        mu, log_sigma = self._split(out)
        known = ~targets.isnan()
        y = torch.where(known, targets, mu.detach())
        nll = 0.5 * ((y - mu) / log_sigma.exp()).square() + log_sigma + 0.5 * math.log(2 * math.pi)
        parts = torch.where(known, nll, 0.0).sum(0) / known.sum().clamp(min=1)
        return dict(zip(inputs.targets, parts, strict=True))

    def said(self, out: Tensor, inputs: InputSpec) -> dict[str, Tensor]:
        """ "prediction" and "sigma" [B, n], in the labels' units."""
        mu, log_sigma = self._split(out)
        mean, std = (out.new_tensor(x) for x in (inputs.target_mean, inputs.target_std))
        return {"prediction": mu * std + mean, "sigma": log_sigma.exp() * std}

    @staticmethod
    def _split(out: Tensor) -> tuple[Tensor, Tensor]:
        mu, raw = out.chunk(2, dim=1)
        return mu, raw.clamp(*LOG_SIGMA)


@dataclass(frozen=True)
class Classes:
    """One label whose values 0 .. K - 1 are classes.

    Attributes:
        names: Names of the K classes.
        weights: Weight of each in the loss, for rare ones; all alike if empty.
        smoothing: Share of each sample's probability that is spread over all classes.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    smoothing: float = 0.0

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, as `field: rule, got value`."""
        found = fractions(self, "smoothing")
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            found.append(f"names: must be two or more different classes, got {', '.join(self.names) or 'none'}")
        if self.weights and (len(self.weights) != len(self.names) or not all(w > 0 for w in self.weights)):
            found.append(f"weights: must be one positive number a class ({len(self.names)}), got {self.weights}")
        if len(inputs.targets) != 1:
            found.append(f"views.targets: must be the one label of the classes, got {len(inputs.targets)}")
        return found

    def outputs(self, inputs: InputSpec) -> int:
        """Outputs m of the network: K."""
        return len(self.names)

    def loss(self, out: Tensor, targets: Tensor, inputs: InputSpec, mix: Mix | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy over samples of known class.

        Raises:
            ValueError: A label is no number of a class.
        """
        raw = _in_units(targets, inputs)[:, 0]
        known = ~raw.isnan()
        classes = torch.where(known, raw, 0.0).round().long()
        if bool(((classes < 0) | (classes >= len(self.names))).any()):
            wrong = int(classes[(classes < 0) | (classes >= len(self.names))][0])
            raise ValueError(f"{inputs.targets[0]}: must be in 0 .. {len(self.names) - 1}, the classes, got {wrong}")
        each = self._each(out, classes)
        if mix is not None:
            each = mix.share * each + (1 - mix.share) * self._each(out, classes.index_select(0, mix.partner))
        return {inputs.targets[0]: _mean(each, known)}

    def _each(self, out: Tensor, classes: Tensor) -> Tensor:
        weight = out.new_tensor(self.weights) if self.weights else None
        return F.cross_entropy(out, classes, weight, label_smoothing=self.smoothing, reduction="none")

    def said(self, out: Tensor, inputs: InputSpec) -> dict[str, Tensor]:
        """ "prediction" [B, 1], the likeliest class, and "probability" [B, K]."""
        return {"prediction": out.argmax(1, keepdim=True).float(), "probability": out.softmax(1)}


@dataclass(frozen=True)
class Votes:
    """Shares of votes: for each question the labels are the shares of its answers, then the number of votes.

    So has a survey of Galaxy Zoo them (`<question>_<answer>`, `<question>_votes`).

    Attributes:
        answers: Answers K of each question, in the order of the labels.
    """

    answers: tuple[int, ...]

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, as `field: rule, got value`."""
        if not self.answers or min(self.answers) < 2:
            return [f"answers: must be two or more of each question, got {self.answers}"]
        needed = sum(self.answers) + len(self.answers)
        if needed != len(inputs.targets):
            rule = f"must go with {needed} labels in views.targets, shares and number of votes of each question"
            return [f"answers: {rule}, got {len(inputs.targets)}"]
        return []

    def outputs(self, inputs: InputSpec) -> int:
        """Outputs m of the network: one an answer."""
        return sum(self.answers)

    def loss(self, out: Tensor, targets: Tensor, inputs: InputSpec, mix: Mix | None = None) -> dict[str, Tensor]:
        """Mean negative log likelihood over the samples with votes on it, by question (the name of its number of votes).

        Raises:
            ValueError: Samples are mixed.
        """
        if mix is not None:
            raise ValueError("Votes: counts cannot be mixed, but the batch has a mixture")
        labels, alpha = _in_units(targets, inputs), self._alpha(out)
        parts: dict[str, Tensor] = {}
        columns = [length + 1 for length in self.answers]
        last = -1
        for label, a, length in zip(labels.split(columns, 1), alpha.split(self.answers, 1), columns, strict=True):
            last += length
            known = ~label.isnan().any(1) & (label[:, -1] > 0)
            label = torch.where(known[:, None], label, 0.0)
            k = (label[:, :-1] * label[:, -1:]).round()
            total, prior = k.sum(1), a.sum(1)
            log = (total + 1).lgamma() + prior.lgamma() - (total + prior).lgamma()
            log = log + ((k + a).lgamma() - a.lgamma() - (k + 1).lgamma()).sum(1)
            parts[inputs.targets[last]] = _mean(-log, known)
        return parts

    def shares(self, inputs: InputSpec) -> tuple[str, ...]:
        """Labels that "share" predicts, in its order."""
        names, found = iter(inputs.targets), []
        for length in self.answers:
            found += [next(names) for _ in range(length)]
            next(names)  # the number of votes
        return tuple(found)

    def said(self, out: Tensor, inputs: InputSpec) -> dict[str, Tensor]:
        """ "share", expected shares of each question's votes, and "concentration", the alphas; [B, m]."""
        alpha = self._alpha(out)
        shares = [a / a.sum(1, keepdim=True) for a in alpha.split(self.answers, 1)]
        return {"share": torch.cat(shares, 1), "concentration": alpha}

    @staticmethod
    def _alpha(out: Tensor) -> Tensor:
        return 1 + MOST_ALPHA * out.sigmoid()


LabelLoss = Gaussian | Classes | Votes


def _in_units(targets: Tensor, inputs: InputSpec) -> Tensor:
    """Labels as the catalogue has them, of standardised ones."""
    wide = targets.double()
    mean, std = (constant(x, wide) for x in (inputs.target_mean, inputs.target_std))
    return (wide * std + mean).float()
