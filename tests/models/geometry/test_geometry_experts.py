import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from armillary.kernels.geometry.geometry_combine import EXPERTS
from armillary.models.geometry.geometry_experts import GeometryExperts, GeometryFFN, gate_statistics

SMALL = GeometryFFN(dim=24, hidden=40)
VARIANTS = {
    "gelu": SMALL,
    "gelu_tanh": replace(SMALL, body="gelu_tanh", moebius_bias=True),
    "swiglu": replace(SMALL, body="swiglu", bias=False, learn_temperature=False),
    "top1": replace(SMALL, routing="top1"),
}


class SwiGLU(nn.Module):
    """The MLP of Qwen2."""

    def __init__(self, dim, hidden, bias):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """The MLP of a vision transformer."""

    def __init__(self, dim, hidden, bias, approximate):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.approximate = approximate

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


def plain_mlp(body, bias):
    if body == "swiglu":
        return SwiGLU(24, 40, bias)
    return MLP(24, 40, bias, "tanh" if body == "gelu_tanh" else "none")


def tokens(*shape):
    return F.layer_norm(torch.randn(*shape, 24), [24])


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("routing", ["soft", "top1"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("body", ["gelu", "gelu_tanh", "swiglu"])
def test_starts_as_the_mlp_that_it_replaces(body, bias, routing, impl, device):
    mlp = plain_mlp(body, bias).to(device)
    layer = GeometryExperts(replace(SMALL, body=body, bias=bias, routing=routing), impl).to(device)
    layer.load_mlp(mlp.state_dict())
    layer.prefer("euclidean", 1.0)
    x = tokens(2, 5).to(device)
    torch.testing.assert_close(layer(x).y, mlp(x))


@pytest.mark.parametrize("expert", EXPERTS)
def test_preferred_share(expert):
    layer = GeometryExperts(SMALL)
    layer.prefer(expert, 0.9)
    share = gate_statistics(layer(tokens(6)).logits).share
    expected = torch.full((3,), 0.05)
    expected[EXPERTS.index(expert)] = 0.9
    torch.testing.assert_close(share, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_trains_alike_with_each_implementation(name, device):
    """Losses fall, agree between implementations, and every parameter moves."""
    target = torch.randn(24, 24) / 5
    x = tokens(6)
    losses, moved = {}, {}
    for impl in ("reference", "triton"):
        torch.manual_seed(1)
        layer = GeometryExperts(VARIANTS[name], impl).to(device)
        start = {key: p.detach().clone() for key, p in layer.named_parameters()}
        optimiser = torch.optim.AdamW(layer.parameters(), 2e-2, weight_decay=0.0)
        losses[impl] = []
        for _ in range(5):
            y, _ = layer(x.to(device))
            loss = F.mse_loss(y, (x @ target).to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[impl].append(loss.item())
        moved[impl] = {key for key, p in layer.named_parameters() if not torch.equal(p, start[key])}
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-3)
    assert losses["triton"][-1] < 0.9 * losses["triton"][0]
    trained = set(start) - (set() if VARIANTS[name].learn_temperature else {"log_temperature"})
    assert moved["triton"] == moved["reference"] == trained


def test_a_thousand_steps_at_a_high_rate_stay_finite():
    """Towards outputs that the sphere and the ball cannot give, from inputs a hundred times too long."""
    config = GeometryFFN(dim=4, hidden=6, body="swiglu", bias=False, moebius_bias=True)
    layer, x = GeometryExperts(config, "reference"), 100 * torch.randn(5, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.3)
    for _ in range(1000):
        y, _ = layer(x)
        loss = (y - 1000).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert math.isfinite(loss.item()) and all(bool(p.isfinite().all()) for p in layer.parameters())


def test_shapes_and_state():
    layer = GeometryExperts(replace(SMALL, body="swiglu", moebius_bias=True))
    assert {name: list(p.shape) for name, p in layer.state_dict().items()} == {
        "router_weight": [3, 24],
        "router_bias": [3],
        "up_weight": [3, 2, 40, 24],
        "up_bias": [3, 2, 40],
        "down_weight": [3, 24, 40],
        "down_bias": [3, 24],
        "log_temperature": [1],
        "kappa": [1],
        "moebius_bias": [24],
        "curvature.offset": [1],
    }
    for shape in ((), (4,), (2, 0, 3)):
        y, logits = layer(tokens(*shape))
        assert y.shape == (*shape, 24) and logits.shape == (*shape, 3)


def test_initial_values():
    layer = GeometryExperts(GeometryFFN(dim=256, hidden=512, temperature=0.3, kappa=2.0, curvature=0.5))
    y, logits = layer(F.layer_norm(torch.randn(64, 256), [256]))
    statistics = gate_statistics(logits)
    assert (statistics.share - 1 / 3).abs().max() < 0.1 and statistics.entropy > 0.8
    assert float(layer.curvature().detach()) == pytest.approx(0.5)
    assert float(layer.log_temperature.exp().detach()) == pytest.approx(0.3)
    ratio = layer.down_weight[2].std() / layer.down_weight[0].std()
    assert float(ratio.detach()) == pytest.approx(0.1, rel=0.05)
    for expert, length in (("spherical", 2.0), ("hyperbolic", 0.0)):
        layer.prefer(expert, 1.0)
        norm = layer(F.layer_norm(torch.randn(4, 256), [256])).y.norm(dim=1).detach()
        torch.testing.assert_close(norm, torch.full((4,), length), rtol=1e-5, atol=0.1)


def test_bfloat16_parameters(device):
    """Curvature, kappa and temperature are computed in float32 whatever the parameters' dtype."""
    layer = GeometryExperts(replace(SMALL, moebius_bias=True), "reference").to(device, torch.bfloat16)
    x = tokens(7).to(device, torch.bfloat16).requires_grad_()
    y, logits = layer(x)
    assert y.dtype == torch.bfloat16 and logits.dtype == torch.float32
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_fixed_temperature_and_bounds():
    layer = GeometryExperts(replace(SMALL, learn_temperature=False))
    assert not layer.log_temperature.requires_grad
    with torch.no_grad():
        layer.curvature.offset.fill_(1e4)
        layer.log_temperature.fill_(-20.0)
    assert float(layer.curvature().detach()) == pytest.approx(2.0)
    assert layer(tokens(3)).y.isfinite().all()


def test_gate_statistics():
    logits = torch.tensor([[[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]], [[0.0, 0.0, 100.0], [0.0, 0.0, 100.0]]])
    share, chosen, entropy = gate_statistics(logits)
    torch.testing.assert_close(share, torch.tensor([1 / 3 + 1, 1 / 3, 1 / 3 + 2]) / 4)
    torch.testing.assert_close(chosen, torch.tensor([0.5, 0.0, 0.5]))
    torch.testing.assert_close(entropy, torch.tensor(0.25))


def test_flops():
    config = GeometryFFN(dim=1024, hidden=4096)
    assert 16384 * config.flops() == pytest.approx(825e9, rel=1e-3)
    assert replace(config, body="swiglu").flops() / config.flops() == pytest.approx(1.5, rel=1e-3)
    assert config.flops() / replace(config, routing="top1").flops() == pytest.approx(3, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim: must be at least 1, got 0"),
        ({"body": "relu"}, "body: must be one of gelu, gelu_tanh, swiglu, got 'relu'"),
        ({"routing": "top2"}, "routing: must be one of soft, top1, got 'top2'"),
        ({"temperature": 0.0}, "temperature: must be positive, got 0.0"),
        ({"clip": math.nan}, "clip: must be positive, got nan"),
        ({"curvature": 3.0}, "curvature: must lie between .* got 3.0, 0.01 and 2.0"),
        ({"input_radius": 0.8}, "input_radius: must be below .* = 0.707, got 0.8"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match="GeometryFFN: " + message):
        GeometryExperts(replace(SMALL, **change))


def test_bad_mlp_is_refused_and_nothing_copied():
    layer = GeometryExperts(SMALL)
    before = layer.up_weight.detach().clone()
    state = plain_mlp("gelu", True).state_dict()
    with pytest.raises(ValueError, match="load_mlp: state must have fc1.bias, fc1.weight, fc2.bias, fc2.weight, got"):
        layer.load_mlp({name: t for name, t in state.items() if name != "fc2.bias"})
    with pytest.raises(ValueError, match=r"load_mlp: fc2.weight must have shape \[24, 40\], got \[24, 41\]"):
        layer.load_mlp(state | {"fc2.weight": torch.zeros(24, 41)})
    assert torch.equal(layer.up_weight, before)
    with pytest.raises(ValueError, match="prefer: expert must be one of euclidean, spherical, hyperbolic, got 'flat'"):
        layer.prefer("flat", 0.5)
    with pytest.raises(ValueError, match=r"prefer: probability must be in \(0, 1\], got 0"):
        layer.prefer("spherical", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("body", ["gelu", "swiglu"])
def test_training_step_in_bfloat16(body):
    """At M = 4,096, D = 1,024, H = 4,096 the kernels give eager's gradients to bfloat16."""
    x = F.layer_norm(torch.randn(4096, 1024, device="cuda"), [1024]).bfloat16()
    dy = torch.randn_like(x)
    found = {}
    for impl in ("reference", "triton"):
        torch.manual_seed(1)
        layer = GeometryExperts(GeometryFFN(body=body, moebius_bias=True), impl).to("cuda", torch.bfloat16)
        layer(x).y.backward(dy)
        found[impl] = {name: p.grad.float() for name, p in layer.named_parameters()}
    for name, expected in found["reference"].items():
        assert (found["triton"][name] - expected).norm() <= 0.05 * expected.norm() + 1e-3, name
