"""Convolutions and attention over wavelength: the network on spectra that is trained on labels for comparison.

Each layer is convolution, instance normalisation, PReLU and, but for the last, max-pooling. Half of the last layer's
channels are values, the other half scores: a softmax of the scores over the length weighs the values into one vector,
whatever lines it is found at. A small perceptron turns the vector into the outputs.

The first normalisation takes out each channel's mean and scale over the spectrum, so that outputs depend on the shape of
a spectrum and, but for the 0 of pixels without data, not on its flux unit; its epsilon of 1e-5 asks for a unit in which
spectra vary by much more than 0.003, as they do in the 1e-17 erg/s/cm2/Angstrom of SDSS and DESI.

Shape legend: B samples, L pixels of a spectrum, l positions after the last convolution, n outputs.

Source: Melchior et al. 2023 (arXiv:2211.07890), section 2.1, after Serra et al. 2018 (arXiv:1805.03908); sizes of the
layers as in AstroCLIP's released baseline (Parker et al. 2024, arXiv:2310.03024).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from armillary.models.method import InputSpec, Readout

__all__ = ["ConvAttention", "SpectrumAttention"]


@dataclass(frozen=True)
class ConvAttention:
    """Configuration of a network on spectra; the defaults are AstroCLIP's baseline.

    Attributes:
        filters: Channels after each convolution; the last number is even, half values and half scores.
        kernels: Length of each convolution in pixels; k // 2 zeros are put at either end.
        pools: Length and stride of the max-pooling after all convolutions but the last.
        hidden: Widths of the perceptron's hidden layers; the last one's are the features.
    """

    filters: tuple[int, ...] = (8, 16, 16, 32)
    kernels: tuple[int, ...] = (5, 10, 20, 40)
    pools: tuple[int, ...] = (5, 10, 20)
    hidden: tuple[int, ...] = (32, 32)
    readout: ClassVar[Readout] = Readout("Conv+Att", "spectrum")
    reads: ClassVar[str] = "spectrum"  # of a batch

    def lengths(self, pixels: int) -> list[int]:
        """Positions after each convolution of a spectrum of so many pixels."""
        found: list[int] = []
        for i, k in enumerate(self.kernels):
            if i:
                p = self.pools[i - 1]
                pixels = (found[-1] + 2 * (p // 2) - p) // p + 1
            found.append(pixels + 2 * (k // 2) - k + 1)
        return found

    def problems(self, inputs: InputSpec) -> list[str]:
        """Every rule that is broken for these inputs, as `field: rule, got value`; empty if none."""
        found = [
            f"{name}: must be one or more numbers, each at least 1, got {getattr(self, name)}"
            for name in ("filters", "kernels", "pools", "hidden")
            if not all(n >= 1 for n in getattr(self, name)) or (name != "pools" and not getattr(self, name))
        ]
        if inputs.pixels < 1:
            found.append("views.spectrum: must give spectra, which ConvAttention reads, got none")
        if found:
            return found
        layers = len(self.filters)
        if self.filters[-1] % 2:
            found.append(f"filters: the last must be even, half values and half scores, got {self.filters[-1]}")
        if len(self.kernels) != layers:
            found.append(f"kernels: must be {layers}, one a convolution, got {len(self.kernels)}")
        if len(self.pools) != layers - 1:
            found.append(f"pools: must be {layers - 1}, one after each convolution but the last, got {len(self.pools)}")
        if not found and min(self.lengths(inputs.pixels)) < 2:
            found.append(
                f"views.spectrum: must have pixels for 2 positions after every convolution, got {inputs.pixels} pixels, "
                f"which leave {min(self.lengths(inputs.pixels))}"
            )
        return found

    def build(self, inputs: InputSpec) -> SpectrumAttention:
        """Build the network, an output for each of the inputs' targets, with torch's default initialisation."""
        return SpectrumAttention(self, len(inputs.targets))

    def flops(self, inputs: InputSpec) -> float:
        """Matrix-product FLOPs of one forward pass of one sample."""
        channels = pairwise((1, *self.filters))
        convolutions = sum(
            a * b * k * length
            for (a, b), k, length in zip(channels, self.kernels, self.lengths(inputs.pixels), strict=True)
        )
        layers = sum(a * b for a, b in pairwise((self.filters[-1] // 2, *self.hidden, len(inputs.targets))))
        return 2.0 * (convolutions + layers)


class SpectrumAttention(nn.Module):
    """Convolutions, attention over their positions, perceptron.

    Args:
        config: Sizes.
        outputs: Outputs n.
    """

    def __init__(self, config: ConvAttention, outputs: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, b, k, padding=k // 2), nn.InstanceNorm1d(b), nn.PReLU(b))
            for (a, b), k in zip(pairwise((1, *config.filters)), config.kernels, strict=True)
        )
        self.pools = nn.ModuleList(nn.MaxPool1d(p, padding=p // 2) for p in config.pools)
        widths = (config.filters[-1] // 2, *config.hidden)
        self.mlp = nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.PReLU(b))))
        self.fc = nn.Linear(widths[-1], outputs)

    def forward(self, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            spectrum: [B, L] flux in the dtype of the weights, 0 where a pixel carries no data.

        Returns:
            Outputs [B, n], and the features [B, hidden] that they are linear in.
        """
        x = self.convolutions[0](spectrum[:, None])
        for pool, convolution in zip(self.pools, self.convolutions[1:], strict=True):
            x = convolution(pool(x))
        values, scores = x.chunk(2, dim=1)  # [B, channels, l] each
        features = self.mlp((values * scores.softmax(-1)).sum(-1))
        return self.fc(features), features
