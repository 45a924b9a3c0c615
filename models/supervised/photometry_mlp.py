"""A perceptron on magnitudes: the simplest of the models that are trained on labels for comparison.

A magnitude that is unknown (of a flux below 0, say) counts as its mean over the training split.

Shape legend: B samples, m columns, n outputs.

Source: the photometry baseline of AstroCLIP (Parker et al. 2024, arXiv:2310.03024): 3-64-64-n with ReLU. There one mean
and standard deviation are taken over all magnitudes; here each column has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from armillary.models.method import InputSpec, Readout

__all__ = ["Perceptron", "PhotometryMLP"]


@dataclass(frozen=True)
class PhotometryMLP:
    """Configuration of a network on catalogue columns; the defaults are AstroCLIP's baseline.

    Attributes:
        hidden: Widths of the hidden layers; the last one's are the features.
    """

    hidden: tuple[int, ...] = (64, 64)
    readout: ClassVar[Readout] = Readout("photometry MLP", "columns")
    reads: ClassVar[str] = "columns"  # of a batch

    def problems(self, inputs: InputSpec) -> list[str]:
        """Every rule that is broken for these inputs, as `field: rule, got value`; empty if none."""
        found = []
        if not self.hidden or min(self.hidden) < 1:
            found.append(f"hidden: must be one or more widths, each at least 1, got {self.hidden}")
        if not inputs.columns:
            found.append("views.columns: must name columns, which PhotometryMLP reads, got none")
        return found

    def build(self, inputs: InputSpec) -> Perceptron:
        """Build the network, an output for each of the inputs' targets, with torch's default initialisation."""
        return Perceptron((len(inputs.columns), *self.hidden), len(inputs.targets))

    def flops(self, inputs: InputSpec) -> float:
        """Matrix-product FLOPs of one forward pass of one sample."""
        return 2.0 * sum(a * b for a, b in pairwise((len(inputs.columns), *self.hidden, len(inputs.targets))))


class Perceptron(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: Inputs m and the widths of the hidden layers.
        outputs: Outputs n.
    """

    def __init__(self, widths: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())))
        self.fc = nn.Linear(widths[-1], outputs)

    def forward(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            columns: [B, m] standardised columns in the dtype of the weights, NaN where unknown.

        Returns:
            Outputs [B, n], and the features [B, hidden] that they are linear in.
        """
        features = self.mlp(columns.masked_fill(columns.isnan(), 0.0))
        return self.fc(features), features
