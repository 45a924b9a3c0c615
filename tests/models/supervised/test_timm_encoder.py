"""Networks of timm as encoders: what is asked of timm, learning rates by depth, weights from files. A stand-in where it is not installed."""

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from armillary.models.method import Batch, InputSpec
from armillary.models.supervised.finetune import FineTune
from armillary.models.supervised.timm_encoder import Timm

INPUTS = InputSpec(channels=2, global_size=12, n_global=1, targets=("z",), target_mean=(0.0,), target_std=(1.0,))


class Small(nn.Module):
    """What timm's networks have, in two blocks."""

    num_features = 6

    def __init__(self, in_chans, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 4, 3, stride=3)
        self.block = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse):
        return {"stem": "^stem"}

    def forward(self, x):
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


@pytest.fixture
def timm(monkeypatch):
    """A stand-in, since timm needs torchvision, which has to fit the build of torch."""
    asked = []

    def create_model(name, *, pretrained, num_classes, in_chans, drop_path_rate):
        asked.append((name, pretrained, drop_path_rate))
        return Small(in_chans, num_classes)

    made, models = ModuleType("timm"), ModuleType("timm.models")
    made.is_model, made.list_models = (lambda name: name == "small"), (lambda pattern: ["small"])
    made.create_model, made.models, made.asked = create_model, models, asked
    models.group_parameters = lambda network, matcher, reverse: {
        name: int(not name.startswith("stem")) for name, _ in network.named_parameters()
    }
    monkeypatch.setitem(sys.modules, "timm", made)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: SimpleNamespace() if name == "timm" else None)
    return made


def test_a_network_of_timm_is_trained_by_depth(timm):
    torch.manual_seed(0)
    config = FineTune(encoder=Timm("small", channels=2, drop_path=0.1), layer_decay=0.5)
    assert config.problems(INPUTS) == []
    method = config.build(INPUTS)
    assert timm.asked == [("small", False, 0.1)]
    scale = {name: group.lr_scale for group in method.parameter_groups() for name in group.params}
    assert (scale["encoder.stem.weight"], scale["encoder.block.0.weight"], scale["head.weight"]) == (0.5, 1.0, 1.0)
    method(Batch(crop=torch.randn(3, 2, 12, 12), targets=torch.randn(3, 1)), {}).total.backward()
    assert all(p.grad is not None for p in method.parameters())
    assert method.eval().encode(Batch(crop=torch.randn(3, 2, 12, 12)))["features"].shape == (3, 6)
    convolutions = 2 * (16 * 4 * 2 * 9 + 16 * 6 * 4)
    assert method.flops_per_sample() == 3 * convolutions + 3 * 2 * 6 * 2


def test_published_weights_come_without_their_classifier(timm, tmp_path):
    from safetensors.torch import save_file

    from armillary.engine.weights.init_weights import init_encoder
    from armillary.engine.weights.trained_encoder import TrainedEncoder

    torch.manual_seed(0)
    published, path = Small(2, 1000), tmp_path / "published.safetensors"
    save_file(published.state_dict(), path)
    method = FineTune(encoder=Timm("small", channels=2), image_from=path, trained="head").build(INPUTS)
    init_encoder(method, "image", TrainedEncoder.open(path), None, None)
    torch.testing.assert_close(method.encoder.stem.weight, published.stem.weight)
    assert not any(p.requires_grad for p in method.encoder.parameters())
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"missing: stem\.weight.*unexpected: other"):
        init_encoder(method, "image", TrainedEncoder.open(path), None, None)


def test_what_timm_has_not_is_named(timm, tmp_path):
    config = FineTune(encoder=Timm("another", channels=2), image_from=tmp_path)
    assert config.problems(INPUTS) == ["encoder.name: must be a network of timm (such as small), got 'another'"]
    lora = replace(config, encoder=Timm("small", channels=2), trained="lora")
    assert lora.problems(INPUTS) == [
        "trained: must be head or whole with a network of timm, whose layers have no additions, got lora"
    ]


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    assert FineTune(encoder=Timm("resnet18", channels=2)).problems(INPUTS) == [
        "encoder.name: needs timm, `pip install 'armillary[timm]'`, which is not installed, got 'resnet18'"
    ]
