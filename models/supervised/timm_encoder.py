"""An image encoder of the timm library (extra `timm`), Zoobot's among them, to be fine-tuned on labels.

The network is timm's own, without its classifier; its pooled features are what the head sees. Weights come from a file or an
address that the recipe names (`image_from`); timm is never asked to download any.

Shape legend: B samples, C channels, S crop side in pixels, F features.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from armillary.models.rules import at_least, fractions

__all__ = ["Timm", "depths", "is_of_timm", "published_weights"]

CLASSIFIERS = ("head.", "head_dist.", "fc.", "classifier.")
"""How names of a classifier begin in files of timm."""


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

    def problems(self, side: int) -> list[str]:
        """Every rule that the configuration breaks for crops of a side S, as `field: rule, got value`."""
        if importlib.util.find_spec("timm") is None:
            return [f"name: needs timm, `pip install 'armillary[timm]'`, which is not installed, got {self.name!r}"]
        try:
            import timm
        except Exception as error:  # a torchvision of another build of torch fails as it likes
            return [
                f"name: needs timm, which cannot be imported here ({_said(error)}); torchvision must be that of this torch, "
                f"{torch.__version__}, got {self.name!r}"
            ]
        found = at_least(1, self, "channels") + fractions(self, "drop_path")
        if not timm.is_model(self.name):
            near = ", ".join(get_close_matches(self.name.partition(".")[0], timm.list_models(), 5))
            such = f" (such as {near})" if near else ""
            found.append(f"name: must be a network of timm {timm.__version__}{such}, got {self.name!r}")
        if not found and side > 0:
            try:
                _tried(self, side)
            except Exception as error:  # each network says in its own way what it cannot do
                such = f" with drop_path {self.drop_path:g}" if self.drop_path else ""
                found.append(
                    f"name: must read crops of {side} x {side} pixels{such}, got {self.name!r} ({_said(error)})"
                )
        return found

    def build(self, side: int) -> nn.Module:
        """The network with timm's initialisation, from torch's global generator; its state dict has timm's names.

        Args:
            side: Side S of the crops, for networks that are made for one.
        """
        import timm

        known: dict[str, Any] = {"drop_path_rate": self.drop_path} if self.drop_path else {}
        if timm.get_pretrained_cfg(self.name).fixed_input_size:
            known["img_size"] = side
        return timm.create_model(self.name, pretrained=False, num_classes=0, in_chans=self.channels, **known)

    def width(self, side: int) -> int:
        """Features F of a crop of a side S."""
        return _tried(self, side)[0]

    def flops(self, side: int) -> float:
        """FLOPs of the forward pass of one crop of a side S, 2 a multiply-add, counted on the meta device."""
        return _tried(self, side)[1]


@cache
def _tried(config: Timm, side: int) -> tuple[int, float]:
    """Features and FLOPs of a crop, by a forward pass on the meta device; raises what the network raises."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = config.build(side).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counted:
            features = network(torch.empty(1, config.channels, side, side))
    depths(network)
    if features.ndim != 2:
        raise ValueError(f"gives features of shape {tuple(features.shape)} where one vector is wanted")
    return features.shape[1], float(counted.get_total_flops())


def _said(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")


def depths(network: nn.Module) -> dict[str, int]:
    """Depth of each parameter of a network of timm by name, 0 the shallowest, as timm counts it for layer-wise decay."""
    from timm.models import group_parameters

    network_of: Any = network
    return group_parameters(network_of, network_of.group_matcher(coarse=False), reverse=True)


def is_of_timm(network: nn.Module) -> bool:
    """Whether a network is one of timm."""
    return type(network).__module__.startswith("timm.")


def published_weights(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A published state dict for a network of timm: without its classifier, and as timm itself changes it when it reads one.

    Each family of networks has its own rules, such as older names, and positions interpolated for another size of crop.

    Args:
        state: Tensors with timm's names.
        network: The network that shall take them.

    Returns:
        Tensors by name; whether they fit is not looked at.
    """
    own = network.state_dict()
    kept = {name: x for name, x in state.items() if name in own or not name.startswith(CLASSIFIERS)}
    convert = getattr(sys.modules.get(type(network).__module__), "checkpoint_filter_fn", None)
    return dict(convert(kept, network)) if convert else kept
