"""ResNet-18: the convolutional network that is trained on labels for comparison, with torchvision's parameter names.

A 7x7 convolution and a max-pooling quarter the image, then four stages of two residual blocks each work at widths W,
2W, 4W, 8W, all but the first halving the image once more; the mean over what is left of it goes through one linear layer.

Batch normalisation takes its statistics from the micro-batch of one rank, and the running ones that evaluation uses are
each rank's own: a checkpoint keeps them all, an exported encoder has rank 0's, as under torch's DistributedDataParallel.

Shape legend: B samples, C channels, S image side in pixels, W width, n outputs.

Source: He et al. 2016 (arXiv:1512.03385), table 1 and section 3.4; the stride of a block lies in its first 3x3
convolution. Initialisation: He et al. 2015 (arXiv:1502.01852), by fan-out. Names and shapes: torchvision's resnet18.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from armillary.models.method import InputSpec, Readout

__all__ = ["ResNet", "ResNet18"]

LEAST_SIDE = 32  # the image is halved five times


def _halved(side: int) -> int:
    """Side after a convolution or pooling of stride 2, all of which are padded alike."""
    return (side + 1) // 2


@dataclass(frozen=True)
class ResNet18:
    """Configuration of a network on image crops.

    Attributes:
        width: Channels W of the first stage; the last one's 8 W are the features. 64 is published.
    """

    width: int = 64
    readout: ClassVar[Readout] = Readout("ResNet18", "image")
    reads: ClassVar[str] = "crop"  # of a batch

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels of the four stages."""
        return self.width, 2 * self.width, 4 * self.width, 8 * self.width

    def problems(self, inputs: InputSpec) -> list[str]:
        """Every rule that is broken for these inputs, as `field: rule, got value`; empty if none."""
        found = [] if self.width >= 1 else [f"width: must be at least 1, got {self.width}"]
        if inputs.channels < 1:
            return [*found, "views.image: must give a crop, which ResNet18 reads, got none"]
        if inputs.global_size < LEAST_SIDE:
            size = inputs.global_size
            found.append(
                f"views.image.global_size: must be at least {LEAST_SIDE}, because it is halved five times, got {size}"
            )
        return found

    def build(self, inputs: InputSpec) -> ResNet:
        """Build the network, an output for each of the inputs' targets, freshly initialised."""
        return ResNet(inputs.channels, len(inputs.targets), self.width)

    def flops(self, inputs: InputSpec) -> float:
        """Matrix-product FLOPs of one forward pass of one sample."""
        side = _halved(inputs.global_size)
        products = 49 * inputs.channels * self.width * side**2
        side = _halved(side)
        below = self.width
        for stage, width in enumerate(self.widths):
            if stage:
                side = _halved(side)
                products += below * width * side**2  # the shortcut's projection
            products += 9 * (below + 3 * width) * width * side**2
            below = width
        return 2.0 * (products + below * len(inputs.targets))


class _BatchNorm(nn.BatchNorm2d):
    """Batch normalisation in the precision of its running statistics, which the engine keeps in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, h, w]."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        exact = self.running_mean.dtype
        weight, bias = self.weight.to(exact), self.bias.to(exact)
        momentum = 0.0 if self.momentum is None else self.momentum
        out = F.batch_norm(
            x.to(exact), self.running_mean, self.running_var, weight, bias, self.training, momentum, self.eps
        )
        return out.to(x.dtype)


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is projected where the shape changes."""

    def __init__(self, below: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(below, width, 3, stride, 1, bias=False)
        self.bn1 = _BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = _BatchNorm(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or below != width:
            self.downsample = nn.Sequential(nn.Conv2d(below, width, 1, stride, bias=False), _BatchNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, below, h, w] to [B, width, h / stride, w / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet(nn.Module):
    """ResNet-18.

    Args:
        channels: Channels C of an image.
        outputs: Outputs n.
        width: Channels W of the first stage.
    """

    def __init__(self, channels: int, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        self.bn1 = _BatchNorm(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        w1, w2, w3, w4 = ResNet18(width).widths
        self.layer1 = nn.Sequential(_Block(width, w1, 1), _Block(w1, w1, 1))
        self.layer2 = nn.Sequential(_Block(w1, w2, 2), _Block(w2, w2, 1))
        self.layer3 = nn.Sequential(_Block(w2, w3, 2), _Block(w3, w3, 1))
        self.layer4 = nn.Sequential(_Block(w3, w4, 2), _Block(w4, w4, 1))
        self.fc = nn.Linear(w4, outputs)
        self.initialise()

    def initialise(self) -> None:
        """Draw the convolutions anew from N(0, 2 / fan-out); the linear layer keeps torch's default."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            image: [B, C, S, S], in the dtype of the weights.

        Returns:
            Outputs [B, n], and the features [B, 8 W] that they are linear in.
        """
        x = self.maxpool(F.relu(self.bn1(self.conv1(image))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features = x.mean((2, 3))
        return self.fc(features), features
