"""Stage 1: losses by hand, unknown labels, links, both kinds of layers, long trainings, read-outs, broken rules."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from armillary.models.galaxy_walker.geometry_prompt.layers import Chart, ReleasedSAGE
from armillary.models.galaxy_walker.stage1 import Stage1
from armillary.models.method import Batch, InputSpec

INPUTS = InputSpec(
    targets=("z", "kind"), target_mean=(0.1, 0.8), target_std=(0.05, 0.6), graphs=3, node_features=4, node_mean=(0.0,)
)
SMALL = Stage1(
    hidden=8, out=3, tokens=6, dropout=0.0, head=5, classes=("kind",), class_counts=(3,), link_weight=0.3, temperature=0.5
)  # fmt: skip
B, NODES = 6, 20


def batch(seed=0, graphs=3, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    near = torch.randint(-1, NODES, (B, graphs, 4, 3), generator=g)
    near[2] = -1  # without neighbours
    z = 0.3 * torch.randn(B, generator=g)
    code = torch.randint(0, 3, (B,), generator=g)
    targets = torch.stack([z, (code - 0.8) / 0.6], 1)
    targets[0, 0] = targets[1, 1] = math.nan
    rows = torch.arange(NODES) + 100
    return Batch(
        row=rows[:B],
        node_features=(scale * torch.randn(NODES, 4, generator=g)).to(dtype),
        node_row=rows,
        neighbours=near,
        left_out=torch.zeros(B, dtype=torch.bool),
        targets=targets,
    )


def method(config=SMALL, inputs=INPUTS, seed=0):
    torch.manual_seed(seed)
    return config.build(inputs)


def test_losses_by_hand():
    model, data = method(), batch()
    losses = model(data, {})
    assert set(losses.terms) == {"z", "kind", "link"}
    assert losses.total.item() == pytest.approx(sum(v.item() for v in losses.terms.values()))
    tokens = model.encode(data)["geometry"]
    out = model.head(tokens)
    known = ~data["targets"].isnan()
    assert losses.terms["z"].item() == pytest.approx(
        (out[:, 0] - data["targets"][:, 0])[known[:, 0]].square().mean().item(), rel=1e-5
    )
    code = (data["targets"][:, 1] * 0.6 + 0.8).round()[known[:, 1]].long()
    assert losses.terms["kind"].item() == pytest.approx(F.cross_entropy(out[known[:, 1], 1:], code).item(), rel=1e-5)


def test_unknown_labels_leave_no_trace():
    model, data = method(replace(SMALL, link_weight=0.0)), batch()
    data["targets"] = torch.full((B, 2), math.nan)
    losses = model(data, {})
    losses.total.backward()
    assert losses.total.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_links_are_found_at_the_nearest():
    """Every galaxy's partner has its own features, so that they fall on one point: the loss is that of equal distances or less."""
    model = method(replace(SMALL, property_weight=0.0, spaces=("hyperbolic",)), replace(INPUTS, graphs=1))
    data = batch(graphs=1)
    data["neighbours"] = torch.full((B, 1, 1, 2), -1)
    assert model(data, {}).total.item() == 0  # nobody is linked
    data["neighbours"][:, 0, 0, 0] = torch.arange(B) + B
    data["node_features"][B : 2 * B] = data["node_features"][:B]
    start = model(data, {}).total.item()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(data, {}).total
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * start and start < 0.3 * math.log(B) * 3


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["equation", "released"])
def test_steps_at_a_high_rate_stay_finite(layers):
    config = replace(SMALL, layers=layers, learn_curvature=True, head=0, spaces=("hyperbolic", "spherical"))
    model, data = method(config, replace(INPUTS, graphs=1)), batch(0, 1, scale=10.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(30):
        loss = model(data, {}).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert math.isfinite(loss.item()) and all(bool(p.isfinite().all()) for p in model.parameters())


def test_half_precision_inputs_and_weights():
    model, data = method(), batch(dtype=torch.bfloat16)
    losses = model(data, {})
    wide = model(data | {"node_features": data["node_features"].float()}, {})
    assert losses.total.dtype == torch.float32 and torch.equal(losses.total, wide.total)
    narrow = method().bfloat16()
    losses = narrow(data, {})
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    # 8 bits of mantissa through two layers and a head: a few per cent.
    assert losses.total.item() == pytest.approx(wide.total.item(), rel=0.1)


@pytest.mark.parametrize("space", ["euclidean", "hyperbolic", "spherical"])
def test_released_layers_by_hand(space):
    torch.manual_seed(0)
    layer, c = ReleasedSAGE(4, 3, space, 0.0).double(), 0.7
    torch.nn.init.normal_(layer.bias, std=0.3)
    chart = Chart(space, c, "reference")
    h, around = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    known = torch.tensor([[True, True, False], [False, False, False]])
    got = layer(h, around, known, chart)

    def moved(x, b):
        """Along the geodesic from x whose direction is b, transported from the origin: by Moebius addition, or a rotation."""
        if space == "euclidean":
            return x + b
        if space == "hyperbolic":
            y = chart.exp(b)
            xy, x2, y2 = (x * y).sum(), x.square().sum(), y.square().sum()
            return ((1 + 2 * c * xy + c * y2) * x + (1 - c * x2) * y) / (1 + 2 * c * xy + c * c * x2 * y2)
        e = torch.zeros(4, dtype=torch.float64)
        e[0] = 1
        y, v = x * c**0.5, torch.cat([torch.zeros(1, dtype=torch.float64), b])
        # Rotation of e onto y in their plane.
        w = y - (y @ e) * e
        w = w / w.norm()
        cos, sin = y @ e, (y - (y @ e) * e).norm()
        rotated = v + (v @ w) * ((cos - 1) * w - sin * e)
        t = c**0.5 * b.norm()
        return torch.cos(t) * x + torch.sin(t) / t * rotated

    def points(rows):
        u = torch.stack([moved(x, layer.bias) for x in chart.exp(layer.linear(rows))])
        return chart.exp(layer.linear_norm(chart.log(u)).relu())

    mean = torch.stack([points(around[0, :2]).mean(0), torch.zeros(layer.itself.in_features, dtype=torch.float64)])
    wanted = layer.norm(layer.itself(points(h)) + layer.neighbours(mean)).relu()
    torch.testing.assert_close(got, wanted)


def test_readouts():
    model, data = method().eval(), batch()
    found = model.encode(data)
    assert list(found) == list(model.readouts()) == ["geometry", "euclidean", "hyperbolic", "spherical", "prediction"]
    assert found["geometry"].shape == (B, 18) and found["spherical"].shape == (B, 6)
    assert model.readouts()["prediction"].targets == ("z", "kind")
    z, kind = found["prediction"].T
    assert set(kind.tolist()) <= {0.0, 1.0, 2.0}
    out = model.head(found["geometry"])
    torch.testing.assert_close(z, out[:, 0] * 0.05 + 0.1)
    assert kind.tolist() == out[:, 1:].argmax(1).tolist()
    links = method(
        replace(SMALL, classes=(), class_counts=()), replace(INPUTS, targets=(), target_mean=(), target_std=())
    )
    assert "prediction" not in links.encode(data) and set(links(data, {}).terms) == {"link"}


def test_every_parameter_is_in_one_group():
    model = method(replace(SMALL, learn_curvature=True))
    named = [name for group in model.parameter_groups() for name in group.params]
    assert sorted(named) == sorted(dict(model.named_parameters()))
    assert model.flops_per_sample() > 0 and replace(SMALL, head=0).build(INPUTS).flops_per_sample() > 0


def test_one_graph_serves_all_spaces():
    model = method(inputs=replace(INPUTS, graphs=1))
    one, data = batch(graphs=1), batch(graphs=3)
    data["neighbours"] = one["neighbours"].expand(-1, 3, -1, -1)
    same = method()
    same.load_state_dict(model.state_dict())
    assert torch.equal(
        model.encode(one)["geometry"], same.encode(data | {k: one[k] for k in ("node_features",)})["geometry"]
    )


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        ({}, {"graphs": 0}, "views.neighbours: must be given"),
        ({}, {"graphs": 2}, "views.neighbours.graphs: must be one, or one for each of 3 spaces, got 2"),
        ({"link_weight": -1.0}, {}, "link_weight: must be at least 0 and finite, got -1.0"),
        ({"temperature": 0.0}, {}, "temperature: must be positive and finite, got 0.0"),
        ({"link_weight": 0.0, "property_weight": 0.0}, {}, "link_weight: must be above 0 without views.targets"),
        ({"classes": ("type",)}, {}, "classes: must be among views.targets"),
        ({"class_counts": ()}, {}, "class_counts: must be at least 2 for each of 1"),
        ({"layers": "mine"}, {}, "layers: must be one of equation, released, got 'mine'"),
        ({"out": 0}, {}, "out: must be at least 1, got 0"),
    ],
)
def test_broken_rules(config, inputs, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **config).build(replace(INPUTS, **inputs))


def test_batches_that_do_not_fit():
    model, data = method(), batch()
    with pytest.raises(ValueError, match=r"neighbours: must be \[B, 3, f1, 1 \+ f2\], got \[6, 1, 4, 3\]"):
        model(batch(graphs=1), {})
    with pytest.raises(ValueError, match="neighbours: must be .*, got none"):
        model.encode(Batch(row=data["row"], node_features=data["node_features"]))
    del data["targets"]
    with pytest.raises(ValueError, match=r"targets: must be \[B, 2\] for z, kind, got none"):
        model(data, {})
