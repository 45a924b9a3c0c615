import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from armillary.models.method import InputSpec
from armillary.models.supervised.resnet import ResNet, ResNet18

# Convolutions of torchvision's resnet18 with the shape of their weights; every one is followed by a normalisation.
PUBLIC = """
conv1 64,3,7,7 bn1
layer1.0.conv1 64,64,3,3 layer1.0.bn1
layer1.0.conv2 64,64,3,3 layer1.0.bn2
layer1.1.conv1 64,64,3,3 layer1.1.bn1
layer1.1.conv2 64,64,3,3 layer1.1.bn2
layer2.0.conv1 128,64,3,3 layer2.0.bn1
layer2.0.conv2 128,128,3,3 layer2.0.bn2
layer2.0.downsample.0 128,64,1,1 layer2.0.downsample.1
layer2.1.conv1 128,128,3,3 layer2.1.bn1
layer2.1.conv2 128,128,3,3 layer2.1.bn2
layer3.0.conv1 256,128,3,3 layer3.0.bn1
layer3.0.conv2 256,256,3,3 layer3.0.bn2
layer3.0.downsample.0 256,128,1,1 layer3.0.downsample.1
layer3.1.conv1 256,256,3,3 layer3.1.bn1
layer3.1.conv2 256,256,3,3 layer3.1.bn2
layer4.0.conv1 512,256,3,3 layer4.0.bn1
layer4.0.conv2 512,512,3,3 layer4.0.bn2
layer4.0.downsample.0 512,256,1,1 layer4.0.downsample.1
layer4.1.conv1 512,512,3,3 layer4.1.bn1
layer4.1.conv2 512,512,3,3 layer4.1.bn2
"""


def public_shapes():
    """Shapes of a public state dict by name."""
    shapes = {"fc.weight": (1000, 512), "fc.bias": (1000,)}
    for line in PUBLIC.split("\n")[1:-1]:
        conv, shape, norm = line.split()
        weight = tuple(map(int, shape.split(",")))
        shapes[f"{conv}.weight"] = weight
        shapes |= {f"{norm}.{k}": weight[:1] for k in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{norm}.num_batches_tracked"] = ()
    return shapes


def inputs(channels=3, side=32, targets=("a",)):
    return InputSpec(channels, side, targets=targets)


def convolved(x, weight, stride, pad):
    """Convolution as a matrix product of patches."""
    k = weight.shape[-1]
    columns = torch.nn.functional.unfold(x, k, padding=pad, stride=stride)
    side = (x.shape[-1] + 2 * pad - k) // stride + 1
    return (weight.flatten(1) @ columns).unflatten(2, (side, side))


def reference(state, x, training):
    """The network by the names of its state, in x's precision."""

    def norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        scale = state[f"{name}.weight"] / (var + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]

    x = norm(convolved(x, state["conv1.weight"], 2, 3), "bn1").clamp(min=0)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), value=-torch.inf)
    x = padded.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(convolved(x, state[f"{name}.conv1.weight"], stride, 1), f"{name}.bn1").clamp(min=0)
            y = norm(convolved(y, state[f"{name}.conv2.weight"], 1, 1), f"{name}.bn2")
            if stride == 2:
                x = norm(convolved(x, state[f"{name}.downsample.0.weight"], 2, 0), f"{name}.downsample.1")
            x = (x + y).clamp(min=0)
    features = x.flatten(2).mean(2)
    return features @ state["fc.weight"].T + state["fc.bias"], features


def test_names_shapes_and_size_are_torchvisions():
    with torch.device("meta"):
        network = ResNet(3, 1000)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == public_shapes()
    assert len(public_shapes()) == 122
    assert sum(p.numel() for p in network.parameters()) == 11_689_512


@pytest.mark.parametrize("training", [True, False], ids=["batch-statistics", "running-statistics"])
@pytest.mark.parametrize("side", [32, 45], ids=str)
def test_forward_and_gradients_against_patches(training, side):
    torch.manual_seed(0)
    network = ResNet(2, 3, width=4).double().train(training)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "bn" in name or "downsample.1" in name:
                tensor.copy_(torch.rand_like(tensor.double()) + 0.5)
    state = {k: v.detach().clone() for k, v in network.state_dict().items()}
    leaves = {k: state[k].requires_grad_() for k, _ in network.named_parameters()}
    x = torch.randn(3, 2, side, side, dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = network(mine), reference(state, other, training)
    assert found[0].shape == (3, 3) and found[1].shape == (3, 32)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(3, 3, dtype=torch.float64)
    (found[0] * weights).sum().backward()
    (expected[0] * weights).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, rtol=1e-6, atol=1e-8, msg=name)


def test_running_statistics_follow_training_alone():
    torch.manual_seed(0)
    network = ResNet(3, 1, width=2)
    x = 3 * torch.randn(4, 3, 32, 32) + 1
    first = network.conv1(x)
    network(x)
    torch.testing.assert_close(network.bn1.running_mean, 0.1 * first.mean((0, 2, 3)))
    torch.testing.assert_close(network.bn1.running_var, 0.9 + 0.1 * first.var((0, 2, 3)))  # unbiased
    network.eval()
    kept = {k: v.clone() for k, v in network.named_buffers()}
    alone = network(x[:1])[0]
    torch.testing.assert_close(alone, network(x)[0][:1])
    torch.testing.assert_close(dict(network.named_buffers()), kept, rtol=0, atol=0)
    assert network.bn1.num_batches_tracked == 1


def test_bfloat16_weights_keep_float32_statistics():
    torch.manual_seed(0)
    exact = ResNet(3, 5, width=4)
    half = ResNet(3, 5, width=4)
    half.load_state_dict(exact.state_dict())
    half.bfloat16()
    for name, buffer in list(half.named_buffers()):  # as the engine does
        owner, _, leaf = name.rpartition(".")
        setattr(half.get_submodule(owner), leaf, buffer.float() if buffer.is_floating_point() else buffer)
    x = torch.randn(8, 3, 32, 32)
    outputs, features = half(x.bfloat16())
    assert outputs.dtype == features.dtype == torch.bfloat16
    assert half.bn1.running_mean.dtype == torch.float32 and half.bn1.num_batches_tracked.dtype == torch.int64
    expected = exact(x)[0]
    # 20 roundings of 2**-9, amplified by the norms: 0.06 +- 0.02 over 12 seeds.
    assert (outputs.float() - expected).norm() < 0.15 * expected.norm()
    outputs.sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


def test_initialisation():
    torch.manual_seed(0)
    state = ResNet(3, 10).state_dict()
    for name, fan_out in (("conv1", 64 * 49), ("layer3.1.conv2", 256 * 9), ("layer4.0.downsample.0", 512)):
        weight = state[f"{name}.weight"]
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
        assert abs(weight.mean().item()) < 0.05 * (2 / fan_out) ** 0.5
    assert (state["layer2.0.bn2.weight"] == 1).all() and (state["layer2.0.bn2.bias"] == 0).all()


@pytest.mark.parametrize(("width", "side", "channels"), [(64, 144, 3), (16, 47, 5), (3, 33, 1)], ids=str)
def test_flops_are_those_of_the_products(width, side, channels):
    config, spec = ResNet18(width), inputs(channels, side, ("a", "b"))
    with torch.device("meta"):
        network = config.build(spec).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, channels, side, side))
    assert config.flops(spec) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "spec", "text"),
    [
        (ResNet18(0), inputs(), "width: must be at least 1, got 0"),
        (ResNet18(), inputs(0, 0), "views.image: must give a crop, which ResNet18 reads, got none"),
        (
            ResNet18(),
            inputs(3, 31),
            "views.image.global_size: must be at least 32, because it is halved five times, got 31",
        ),
    ],
    ids=["no-width", "no-image", "small-crop"],
)
def test_broken_rules_are_named(config, spec, text):
    assert config.problems(spec) == [text]
    assert ResNet18().problems(inputs(3, 32)) == []
