"""The prompt against a float64 loop over nodes, its flat limit, its gradients; the maps of the sphere."""

import math
from dataclasses import replace

import pytest
import torch

from armillary.models.galaxy_walker.geometry_prompt.network import GeometryPrompt, GeometryPromptConfig
from armillary.models.geometry.sphere import exp_pole, log_pole

CONFIG = GeometryPromptConfig(features=7, hidden=6, out=5, tokens=8, dropout=0.0)
N = 12


def batch(dtype=torch.float32, scale=1.0):
    """Features, rows, and neighbours of which some are missing; row 3 has none."""
    g = torch.Generator().manual_seed(1)
    features = (scale * torch.randn(N, 7, generator=g, dtype=torch.float64)).to(dtype)
    rows, hops = torch.tensor([0, 3, 11]), {}
    for space in CONFIG.spaces:
        first, second = (torch.randint(-1, N, shape, generator=g) for shape in ((3, 4), (3, 4, 2)))
        first[1] = -1
        hops[space] = (first, second)
    return features, rows, hops


def oracle_map(space, u, c):
    """Point of a tangent vector at sqrt(c) |u| <= 2.3, and the tangent vector that its logarithm gives."""
    length = math.sqrt(c) * float(u.norm())
    if space == "euclidean" or length == 0:
        return torch.cat([torch.ones(1, dtype=u.dtype) / math.sqrt(c), u]) if space == "spherical" else u, u
    u = u * min(1.0, 2.3 / length)
    length = min(length, 2.3)
    if space == "hyperbolic":
        return math.tanh(length) / length * u, u
    return torch.cat([torch.tensor([math.cos(length) / math.sqrt(c)], dtype=u.dtype), math.sin(length) / length * u]), u


def oracle_layer(layer, h, around):
    w, v, b = (p.detach().double() for p in (layer.itself.weight, layer.neighbours.weight, layer.neighbours.bias))
    mean = torch.stack(around).mean(0) if around else torch.zeros_like(h)
    y = w @ h + v @ mean + b
    y = (y - y.mean()) / (y.var(unbiased=False) + layer.norm.eps).sqrt()
    y = y * layer.norm.weight.detach().double() + layer.norm.bias.detach().double()
    return y.clamp(min=0) / math.sqrt(len(y))


def oracle(prompt, features, rows, hops):
    c, x = prompt.config.curvature, features.double()
    tokens, points = [], []
    for space in prompt.config.spaces:
        one, two = prompt.layers[space]
        first, second = hops[space]
        for b, row in enumerate(rows.tolist()):
            seen = [
                (n, [m for m in second[b, i].tolist() if m >= 0]) for i, n in enumerate(first[b].tolist()) if n >= 0
            ]
            near = [oracle_map(space, oracle_layer(one, x[n], [x[m] for m in far]), c)[1] for n, far in seen]
            centre = oracle_map(space, oracle_layer(one, x[row], [x[n] for n, _ in seen]), c)[1]
            point, u = oracle_map(space, oracle_layer(two, centre, near), c)
            y = prompt.projection.weight.detach().double() @ u + prompt.projection.bias.detach().double()
            tokens.append((y - y.mean()) / (y.var(unbiased=False) + prompt.norm.eps).sqrt())
            points.append(point)
    spaces, width = len(prompt.config.spaces), len(rows)
    where = [torch.stack(points[s * width : (s + 1) * width]) for s in range(spaces)]
    return torch.stack(tokens).view(spaces, width, -1).transpose(0, 1), where


@pytest.mark.parametrize("gain", [1.0, 30.0], ids=["inside", "cut"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
def test_a_loop_over_nodes(dtype, tolerance, gain):
    """1e-4: a token of 8 is normalised by its spread of some .05, which carries 1e-6 of float32 through two layers."""
    prompt = GeometryPrompt(CONFIG, "reference").to(dtype)
    with torch.no_grad():
        for layers in prompt.layers.values():
            for layer in layers:
                layer.norm.weight.mul_(gain)
    features, rows, hops = batch(dtype)
    tokens, points = prompt(features, rows, hops)
    expected, where = oracle(prompt, features, rows, hops)
    assert tokens.shape == (3, 3, 8) and tokens.dtype == dtype
    torch.testing.assert_close(tokens.double(), expected, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(points, where, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    assert bool((points[1].norm(dim=1) < 1).all()) and points[2].norm(dim=1).tolist() == pytest.approx([1] * 3)


def test_flat_limit_equals_euclid():
    prompt = GeometryPrompt(replace(CONFIG, curvature=1e-12), "reference").double()
    same = prompt.layers["euclidean"].state_dict()
    for layers in prompt.layers.values():
        layers.load_state_dict(same)
    features, rows, hops = batch(torch.float64)
    tokens, points = prompt(features, rows, dict.fromkeys(CONFIG.spaces, hops["euclidean"]))
    for i in (1, 2):
        torch.testing.assert_close(tokens[:, i], tokens[:, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(points[1], points[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(points[2][:, 1:], points[0], rtol=1e-9, atol=1e-9)


def test_gradients():
    prompt = GeometryPrompt(replace(CONFIG, learn_curvature=True), "reference").double()
    features, rows, hops = batch(torch.float64)
    parameters = dict(prompt.named_parameters())
    assert sum("curvature" in name for name in parameters) == 2

    def run(*values):
        called = dict(zip(parameters, values, strict=True))
        tokens, points = torch.func.functional_call(prompt, called, (features, rows, hops))
        return tokens, *points

    assert torch.autograd.gradcheck(run, tuple(parameters.values()), fast_mode=True)


def test_missing_neighbours_are_not_seen():
    prompt = GeometryPrompt(CONFIG)
    features, rows, hops = batch()
    before = prompt(features, rows, hops).tokens
    seen = {int(n) for pair in hops.values() for part in pair for n in part.flatten()} | set(rows.tolist())
    assert seen >= {-1, 0}
    more = {s: (torch.nn.functional.pad(a, (0, 2), value=-1), torch.nn.functional.pad(b, (0, 1, 0, 2), value=-1)) for s, (a, b) in hops.items()}  # fmt: skip
    torch.testing.assert_close(prompt(features, rows, more).tokens, before)


def test_half_precision_stays_outside():
    prompt = GeometryPrompt(CONFIG)
    features, rows, hops = batch()
    features = features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        tokens, points = prompt(features, rows, hops)
    assert tokens.dtype == points[0].dtype == torch.float32
    assert torch.equal(tokens, prompt(features.float(), rows, hops).tokens)


def test_steps_at_a_high_rate_stay_finite():
    prompt = GeometryPrompt(replace(CONFIG, learn_curvature=True), "reference")
    features, rows, hops = batch(scale=100.0)
    features[3] = 0.0
    optimizer = torch.optim.Adam(prompt.parameters(), lr=0.3)
    for _ in range(60):
        tokens, points = prompt(features, rows, hops)
        loss = (tokens - 1).square().mean() + sum(p.square().mean() for p in points)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in prompt.parameters()) and bool(loss.isfinite())


def test_flops():
    config = GeometryPromptConfig()
    assert config.flops(5) == 2 * 3 * (6 * 2 * 1024 * 512 + 2 * 512 * 256 + 256 * 1536)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"hidden": 0}, "hidden: must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout: must be in \[0, 1\), got 1.0"),
        ({"curvature": 0.0}, "curvature: must be positive, got 0.0"),
        ({"curvature": 3.0, "learn_curvature": True}, "curvature: must lie between 0.01 and 2.0 to be learnt, got 3.0"),
        ({"spaces": ()}, "spaces: must be some of euclidean, spherical, hyperbolic, each once"),
        ({"spaces": ("flat",)}, "spaces: must be some of"),
        ({"spaces": ("spherical", "spherical")}, "spaces: must be some of"),
    ],
)
def test_broken_configurations(broken, message):
    with pytest.raises(ValueError, match=message):
        GeometryPrompt(replace(CONFIG, **broken))


def test_shapes_that_do_not_fit():
    prompt = GeometryPrompt(CONFIG)
    features, rows, hops = batch()
    with pytest.raises(ValueError, match=r"features and rows: must be \[N, 7\] and \[B\]"):
        prompt(features[:, :3], rows, hops)
    with pytest.raises(ValueError, match="hops: must have the space 'hyperbolic', got euclidean"):
        prompt(features, rows, {"euclidean": hops["euclidean"]})
    with pytest.raises(ValueError, match=r"hops\['euclidean'\]: must be \[B, f1\] and \[B, f1, f2\] with B = 2"):
        prompt(features, rows[:2], hops)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("c", [1e-6, 0.01, 1.0, 100.0])
def test_round_trips_on_the_sphere(c, dtype, tolerance):
    """A float32 angle just below pi is read off a sine of .04, which carries 1e-7 of 1: 3e-6 of it."""
    g = torch.Generator().manual_seed(0)
    angles = torch.cat([10.0 ** torch.arange(-12, 0, dtype=torch.float64), torch.tensor([0.03, 0.032, 1, 2, 3, 3.1])])
    u = torch.randn(len(angles), 5, generator=g, dtype=torch.float64)
    u = (u / u.norm(dim=1, keepdim=True) * angles[:, None] / c**0.5).to(dtype)
    x = exp_pole(u, c)
    assert ((log_pole(x, c) - u).norm(dim=1) <= tolerance * u.norm(dim=1)).all()
    assert ((x.norm(dim=1) * c**0.5 - 1).abs() < tolerance).all()


def test_poles_have_gradients():
    u = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    log_pole(exp_pole(u, 1.0), 1.0).sum().backward()
    assert u.grad is not None and torch.equal(u.grad, torch.ones(1, 3, dtype=torch.float64))
    x = torch.tensor([[-1.0, 0.0, 0.0]], requires_grad=True)
    y = log_pole(x, 1.0)
    y.sum().backward()
    assert y.tolist() == [[0, 0]] and x.grad is not None and bool(x.grad.isfinite().all())
