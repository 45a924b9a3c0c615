"""Regression: a network trained on labels alone, the baseline that frozen embeddings are compared with.

Targets are standardised labels, NaN where a label is unknown; the loss is the mean squared error over the known ones of
a micro-batch. `encode` gives predictions in the labels' own units.

Shape legend: B samples, n targets, D features.

Source: the supervised baselines of AstroCLIP (Parker et al. 2024, arXiv:2310.03024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from armillary.models.method import Batch, InputSpec, Losses, Method, MethodConfig, ParameterGroup, Readout
from armillary.models.rules import refuse
from armillary.models.supervised.photometry_mlp import PhotometryMLP
from armillary.models.supervised.resnet import ResNet18
from armillary.models.supervised.spectrum_attention import ConvAttention

__all__ = ["Regression", "RegressionMethod", "known_squares"]


@dataclass(frozen=True)
class Regression(MethodConfig):
    """Configuration.

    Attributes:
        network: What reads the image's crop, the spectrum, or columns of the catalogue.
    """

    network: ResNet18 | ConvAttention | PhotometryMLP = field(default_factory=ResNet18)

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, see `MethodConfig`."""
        found = [p if p.startswith("views.") else f"network.{p}" for p in self.network.problems(inputs)]
        n = len(inputs.targets)
        if not n:
            found.append("views.targets: must name labels to learn, got none")
        if not len(inputs.target_mean) == len(inputs.target_std) == n:
            found.append(
                f"views.targets: must come with a mean and a standard deviation for each of {n}, got {len(inputs.target_mean)} and "
                f"{len(inputs.target_std)}"
            )
            return found
        for name, mean, std in zip(inputs.targets, inputs.target_mean, inputs.target_std, strict=True):
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                found.append(
                    f"views.targets: must be labels that vary, got {name} with mean {mean} and deviation {std}"
                )
        return found

    def build(self, inputs: InputSpec) -> RegressionMethod:
        """Build the method, see `MethodConfig`."""
        refuse("Regression", self.problems(inputs))
        return RegressionMethod(self, inputs)


def known_squares(prediction: Tensor, targets: Tensor) -> Tensor:
    """Squared errors of the known targets, each over their number: they sum to the mean squared error.

    Args:
        prediction: [B, n].
        targets: [B, n], NaN where unknown.

    Returns:
        [B, n] in the predictions' dtype; 0, with a gradient of 0, where the target is unknown.
    """
    known = ~targets.isnan()
    # Not `known * squares`: the gradient of a NaN that is multiplied by 0 is a NaN.
    error = prediction - torch.where(known, targets.to(prediction.dtype), prediction.detach())
    return error.square() / known.sum().clamp(min=1)


class RegressionMethod(Method):
    """A network with a squared-error loss.

    Args:
        config: Configuration.
        inputs: What the views hand over, with the targets' mean and standard deviation.
    """

    def __init__(self, config: Regression, inputs: InputSpec) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        self.network: nn.Module = config.network.build(inputs)

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Standardised predictions [B, n] and features [B, D], float32."""
        name = self.config.network.reads
        value: object = batch.get(name)
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: needed by {type(self.config.network).__name__}, missing from the batch")
        dtype = next(self.network.parameters()).dtype
        prediction, features = self.network(value.to(dtype))
        return prediction.float(), features.float()

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """Mean squared error over the known targets of a micro-batch.

        A micro-batch without any known target has a loss and gradients of 0. Micro-batches count alike, however many
        known targets they have.

        Args:
            batch: The network's input, and `targets` [B, n] float32, standardised, NaN where unknown.
            scalars: Not read.

        Returns:
            The loss, and each target's part of it by the target's name.

        Raises:
            ValueError: The batch lacks the input or the targets, or has other ones than the method was built for.
        """
        targets = batch.get("targets")
        n = len(self.inputs.targets)
        if targets is None or targets.ndim != 2 or targets.shape[1] != n:
            got = "none" if targets is None else list(targets.shape)
            raise ValueError(f"targets: must be [B, {n}] for {', '.join(self.inputs.targets)}, got {got}")
        prediction, _ = self._run(batch)
        parts = known_squares(prediction, targets).sum(0)
        return Losses(parts.sum(), dict(zip(self.inputs.targets, parts.detach(), strict=True)))

    def parameter_groups(self) -> list[ParameterGroup]:
        """Weights, and without weight decay biases, gains and slopes."""
        named = dict(self.named_parameters())
        return [
            ParameterGroup({k: p for k, p in named.items() if p.ndim > 1}),
            ParameterGroup({k: p for k, p in named.items() if p.ndim <= 1}, weight_decay_scale=0.0),
        ]

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one training sample: the backward pass costs two forward ones."""
        return 3.0 * self.config.network.flops(self.inputs)

    def readouts(self) -> dict[str, Readout]:
        """The predictions."""
        return {"prediction": replace(self.config.network.readout, targets=self.inputs.targets)}

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions and what they are linear in. Call `eval()` first, or batch normalisation sees only this batch.

        Args:
            batch: The network's input as the views' evaluation view makes it: `crop`, `spectrum` or `columns`.

        Returns:
            "prediction" [B, n], in the units and order of the inputs' targets, and "features" [B, D], float32.

        Raises:
            ValueError: The batch lacks the input.
        """
        prediction, features = self._run(batch)
        std, mean = (prediction.new_tensor(x) for x in (self.inputs.target_std, self.inputs.target_mean))
        return {"prediction": prediction * std + mean, "features": features}
