"""Networks of timm as encoders: what is asked of timm, learning rates by depth, weights from files.

Everything runs against a stand-in, since timm needs torchvision, which has to fit the build of torch; and against timm itself, where it
can be imported.
"""

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from armillary.engine.weights.export import export_dinov2
from armillary.engine.weights.init_weights import init_encoder
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import Batch, InputSpec
from armillary.models.supervised.finetune import FineTune
from armillary.models.supervised.timm_encoder import Timm, depths

SIDE = 64
INPUTS = InputSpec(channels=2, global_size=SIDE, n_global=1, targets=("z",), target_mean=(0.0,), target_std=(1.0,))
BATCH = Batch(crop=torch.randn(3, 2, SIDE, SIDE), targets=torch.randn(3, 1))


class Small(nn.Module):
    """What timm's networks have, in two blocks."""

    def __init__(self, in_chans, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 4, 3, stride=3)
        self.block = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse):
        return {"stem": "^stem"}

    def forward(self, x):
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


Small.__module__ = "timm.models.small"


@pytest.fixture
def stand_in(monkeypatch):
    """timm with one network."""
    asked = []

    def create_model(name, *, pretrained, num_classes, in_chans, drop_path_rate=0.0):
        asked.append((name, pretrained, drop_path_rate))
        return Small(in_chans, num_classes)

    made, models = ModuleType("timm"), ModuleType("timm.models")
    made.is_model, made.list_models, made.__version__ = (lambda name: name == "small"), (lambda: ["small"]), "0"
    made.get_pretrained_cfg = lambda name: SimpleNamespace(fixed_input_size=False)
    made.create_model, made.models, made.asked = create_model, models, asked
    models.group_parameters = lambda network, matcher, reverse: {
        name: int(not name.startswith("stem")) for name, _ in network.named_parameters()
    }
    monkeypatch.setitem(sys.modules, "timm", made)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: SimpleNamespace() if name == "timm" else None)
    return made


@pytest.fixture
def timm():
    """The library."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision is of another build of torch
        pytest.skip(f"needs the extra timm with the torchvision of this torch: {error}")
    return timm


FAMILIES = ["test_convnext", "test_resnet", "test_vit", "test_efficientnet", "test_mambaout", "test_vit3"]
"""The smallest networks of timm: one a family, one whose last layer is wider than its features, and one that pools by attention."""


@pytest.fixture(params=["stand-in", *FAMILIES])
def name(request):
    """Name of a network."""
    stand_in = request.param == "stand-in"
    request.getfixturevalue("stand_in" if stand_in else "timm")
    return "small" if stand_in else request.param


def test_a_network_of_timm_is_trained_by_depth(name):
    torch.manual_seed(0)
    config = FineTune(encoder=Timm(name, channels=2, drop_path=0.1), layer_decay=0.5)
    assert config.problems(INPUTS) == []
    method = config.build(INPUTS)
    scale = {n: group.lr_scale for group in method.parameter_groups() for n in group.params}
    assert scale.keys() == dict(method.named_parameters()).keys() and scale["head.weight"] == 1
    of, first = depths(method.encoder), next(iter(dict(method.encoder.named_parameters())))
    assert scale[f"encoder.{first}"] == 0.5 ** (max(of.values()) - of[first]) < 1
    before = method(BATCH, {}).total
    before.backward()
    assert all(p.grad is not None for p in method.parameters())
    method.eval()
    features = method.encode(BATCH)["features"]
    assert features.shape == (3, config.encoder.width(SIDE)) and features.isfinite().all()
    assert method.flops_per_sample() > 3 * config.encoder.flops(SIDE) > 0


def test_what_is_asked_of_timm(stand_in):
    method = FineTune(encoder=Timm("small", channels=2, drop_path=0.1)).build(INPUTS)
    assert set(stand_in.asked) == {("small", False, 0.1)}
    convolutions = 2 * (21**2 * 4 * 2 * 9 + 21**2 * 6 * 4)
    assert method.flops_per_sample() == 3 * convolutions + 3 * 2 * 6 * 2


def test_published_weights_come_without_their_classifier(name, tmp_path):
    import timm

    torch.manual_seed(0)
    published, path = timm.create_model(name, pretrained=False, in_chans=2, num_classes=10), tmp_path / "f.safetensors"
    save_file(published.state_dict(), path)
    method = FineTune(encoder=Timm(name, channels=2), image_from=path, trained="head").build(INPUTS)
    init_encoder(method, "image", TrainedEncoder.open(path), None, None)
    first, value = next((n, p) for n, p in published.named_parameters() if "pos_embed" not in n and p.ndim > 3)
    torch.testing.assert_close(method.encoder.get_parameter(first), value)
    assert not any(p.requires_grad for p in method.encoder.parameters())
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"other: not in the method; .*{first}: not in the file"):
        init_encoder(method, "image", TrainedEncoder.open(path), None, None)


def test_positions_are_interpolated_for_another_size_of_crop(timm, tmp_path):
    published, path = timm.create_model("test_vit", pretrained=False), tmp_path / "vit.safetensors"
    with torch.no_grad():
        published.pos_embed.fill_(3.0)
    save_file(published.state_dict(), path)
    inputs = replace(INPUTS, channels=3)
    method = FineTune(encoder=Timm("test_vit"), image_from=path).build(inputs)
    init_encoder(method, "image", TrainedEncoder.open(path), None, None)
    got = method.encoder.pos_embed
    assert got.shape[1] == (SIDE // 16) ** 2 + 1 < published.pos_embed.shape[1]
    torch.testing.assert_close(got, torch.full_like(got, 3.0))


def test_weights_for_other_bands_are_refused_by_name(timm, tmp_path):
    path = tmp_path / "rgb.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    method = FineTune(encoder=Timm("test_resnet", channels=2), image_from=path).build(INPUTS)
    with pytest.raises(ValueError, match=r"conv1\S*: \(\d+, 3, 3, 3\) in the file, \(\d+, 2, 3, 3\) in the method"):
        init_encoder(method, "image", TrainedEncoder.open(path), None, None)


@pytest.mark.parametrize(
    ("network", "side", "message"),
    [
        (
            Timm("convnxt_nano", channels=2),
            64,
            r"must be a network of timm .* \(such as convnext_nano, .*got 'convnxt_nano'",
        ),
        (
            Timm("test_vit", channels=2),
            65,
            "must read crops of 65 x 65 pixels, got 'test_vit' .*divisible by patch size",
        ),
        (
            Timm("vgg11", channels=2, drop_path=0.1),
            64,
            "must read crops of 64 x 64 pixels with drop_path 0.1, got 'vgg11'",
        ),
    ],
)
def test_what_a_network_cannot_do_is_said_before_the_start(timm, network, side, message):
    (problem,) = FineTune(encoder=network).problems(replace(INPUTS, global_size=side))
    with pytest.raises(AssertionError, match=f"encoder.name: {message}"):
        raise AssertionError(problem)


def test_it_is_not_written_under_the_names_of_dinov2(stand_in, tmp_path):
    method = FineTune(encoder=Timm("small", channels=2)).build(INPUTS)
    source = SimpleNamespace(path=tmp_path / "run", method=method)
    with pytest.raises(
        ValueError, match="must be a vision transformer of armillary.*got timm's Small; --format safetensors"
    ):
        export_dinov2(source, tmp_path / "x.safetensors")


def test_what_timm_has_not_is_named(stand_in, tmp_path):
    config = FineTune(encoder=Timm("smell", channels=2), image_from=tmp_path)
    assert config.problems(INPUTS) == ["encoder.name: must be a network of timm 0 (such as small), got 'smell'"]
    lora = replace(config, encoder=Timm("small", channels=2), trained="lora")
    assert lora.problems(INPUTS) == [
        "trained: must be head or whole with a network of timm, whose layers have no additions, got lora"
    ]


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    assert FineTune(encoder=Timm("resnet18", channels=2)).problems(INPUTS) == [
        "encoder.name: needs timm, `pip install 'armillary[timm]'`, which is not installed, got 'resnet18'"
    ]


def test_a_torchvision_of_another_torch_is_named(stand_in, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # an import of it fails
    (problem,) = FineTune(encoder=Timm("resnet18", channels=2)).problems(INPUTS)
    assert problem.startswith("encoder.name: needs timm, which cannot be imported here (import of timm halted; ")
    assert f"torchvision must be that of this torch, {torch.__version__}" in problem
