"""An image encoder of the timm library (extra `timm`), Zoobot's among them, to be fine-tuned on labels.

The network is timm's own, without its classifier; its pooled features are what the head sees. Weights come from a file or an
address that the recipe names (`image_from`); timm is never asked to download any.

Shape legend: B samples, C channels, S crop side in pixels, F features.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from armillary.models.rules import at_least, fractions

__all__ = ["Timm", "depths"]


@dataclass(frozen=True)
class Timm:
    """Which network.

    Attributes:
        name: As `timm.create_model` knows it, such as "convnext_nano".
        channels: Channels C of an image.
        drop_path: Fraction of the samples that skip a residual branch in training, where the network can.
    """

    name: str
    channels: int = 3
    drop_path: float = 0.0

    def problems(self) -> list[str]:
        """Every rule that the configuration breaks, as `field: rule, got value`."""
        if importlib.util.find_spec("timm") is None:
            return [f"name: needs timm, `pip install 'armillary[timm]'`, which is not installed, got {self.name!r}"]
        import timm

        found = at_least(1, self, "channels") + fractions(self, "drop_path")
        if not timm.is_model(self.name):
            near = timm.list_models(f"{self.name.partition('_')[0]}*")[:5]
            found.append(
                f"name: must be a network of timm (such as {', '.join(near) or 'resnet18'}), got {self.name!r}"
            )
        return found

    def build(self) -> nn.Module:
        """The network with timm's initialisation, from torch's global generator; its state dict has timm's names."""
        import timm

        return timm.create_model(
            self.name, pretrained=False, num_classes=0, in_chans=self.channels, drop_path_rate=self.drop_path
        )

    def flops(self, network: nn.Module, side: int) -> float:
        """FLOPs of the forward pass of one crop, 2 a multiply-add, counted on the meta device.

        Args:
            network: A result of `build`.
            side: Side S of the crop in pixels.
        """
        from torch.utils.flop_counter import FlopCounterMode

        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        meta = {name: torch.empty_like(x, device="meta") for name, x in tensors.items()}
        crop = torch.empty(1, self.channels, side, side, device="meta")
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            torch.func.functional_call(network, meta, (crop,))
        return float(counted.get_total_flops())


def depths(network: nn.Module) -> dict[str, int]:
    """Depth of each parameter of a network of timm by name, 0 the shallowest, as timm counts it for layer-wise decay."""
    from timm.models import group_parameters

    network_of: Any = network
    return group_parameters(network_of, network_of.group_matcher(coarse=False), reverse=True)
