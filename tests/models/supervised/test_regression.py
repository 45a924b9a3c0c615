from dataclasses import replace

import pytest
import torch

from armillary.engine.config.config_json import from_json, to_json, type_problems
from armillary.engine.zero.optim import AdamW, build_groups
from armillary.models.method import Batch, InputSpec
from armillary.models.supervised.photometry_mlp import PhotometryMLP
from armillary.models.supervised.regression import Regression, known_squares
from armillary.models.supervised.resnet import ResNet18
from armillary.models.supervised.spectrum_attention import ConvAttention

NAN = float("nan")
SPEC = InputSpec(
    channels=2,
    global_size=33,
    pixels=997,
    columns=("mag_g", "mag_r"),
    targets=("redshift", "log_mstar", "tage_mw"),
    target_mean=(0.2, 10.5, 6.0),
    target_std=(0.1, 0.5, 2.0),
)
NETWORKS = {"resnet18": ResNet18(width=2), "conv-attention": ConvAttention(), "photometry": PhotometryMLP((16, 16))}
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def batch(size=6, seed=0):
    torch.manual_seed(seed)
    return Batch(
        crop=torch.randn(size, 2, 33, 33),
        spectrum=torch.randn(size, 997),
        columns=torch.randn(size, 2),
        targets=torch.randn(size, 3),
    )


def method(network, seed=0):
    torch.manual_seed(seed)
    return Regression(network).build(SPEC)


def test_known_squares_leave_out_unknown_targets():
    prediction = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0.0, NAN], [5.0, 4.0]])
    squares = known_squares(prediction, targets)
    assert squares.tolist() == [[1 / 3, 0], [4 / 3, 1 / 3]]
    squares.sum().backward()
    torch.testing.assert_close(prediction.grad, torch.tensor([[2, 0], [-4, 2]]).double() / 3)
    known = torch.where(targets.isnan(), 0, targets).double()
    assert torch.autograd.gradcheck(lambda p: known_squares(p, targets), (prediction,))
    torch.testing.assert_close(known_squares(prediction, known).sum(), torch.nn.functional.mse_loss(prediction, known))


@every_network
def test_loss_is_the_mean_over_known_targets(network):
    m, b = method(network), batch()
    b["targets"][1, 0] = b["targets"][4] = NAN
    losses = m(b, {})
    prediction = m._run(b)[0].detach()
    known = b["targets"].isfinite()
    expected = (prediction - b["targets"])[known].square().mean()
    torch.testing.assert_close(losses.total, expected)
    assert list(losses.terms) == ["redshift", "log_mstar", "tage_mw"]
    torch.testing.assert_close(sum(losses.terms.values()), losses.total)
    losses.total.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())
    assert any(p.grad.any() for p in m.parameters())


@every_network
def test_batch_without_known_targets_moves_nothing(network):
    m, b = method(network), batch()
    b["targets"][:] = NAN
    losses = m(b, {})
    losses.total.backward()
    assert losses.total.item() == 0 and all(t.item() == 0 for t in losses.terms.values())
    assert all(p.grad is not None and not p.grad.any() for p in m.parameters())


def test_unknown_targets_change_no_other_gradient():
    """A sample whose targets are all unknown might as well not be there, but for its part in batch statistics."""
    few, many = batch(), batch()
    many["targets"][3:] = NAN
    few = Batch(columns=few["columns"][:3], targets=few["targets"][:3])
    grads = []
    for b in (few, many):
        m = method(NETWORKS["photometry"])
        m(b, {}).total.backward()
        grads.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(*grads)


def test_infinite_predictions_are_not_hidden():
    m, b = method(NETWORKS["photometry"]), batch()
    b["columns"][0] = torch.inf
    b["targets"][0] = NAN
    assert not m(b, {}).total.isfinite()


@every_network
def test_encode_predicts_in_the_labels_units(network):
    m, b = method(network).eval(), batch()
    found = m.encode(b)
    assert list(found) == ["prediction", "features"]
    assert m.readouts() == {"prediction": replace(network.readout, targets=SPEC.targets)}
    assert found["prediction"].shape == (6, 3) and found["prediction"].dtype == torch.float32
    assert not found["prediction"].requires_grad and len(found["features"]) == 6
    standardised = m.network.fc(found["features"])
    expected = standardised * torch.tensor([0.1, 0.5, 2.0]) + torch.tensor([0.2, 10.5, 6.0])
    torch.testing.assert_close(found["prediction"], expected)


@every_network
def test_bfloat16_weights_give_float32_losses(network):
    m, b = method(network), batch()
    exact = m(b, {}).total
    m.network.bfloat16()
    for name, buffer in list(m.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(m.get_submodule(owner), leaf, buffer.float() if buffer.is_floating_point() else buffer)
    losses = m(b, {})
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(exact.item(), rel=0.01)  # ResNet18: 0.0025 +- 0.0011 over 8 seeds


@every_network
def test_every_parameter_is_trained_and_only_weights_decay(network):
    m = method(network)
    groups = build_groups(m)
    assert sum(len(g["params"]) for g in groups) == len(list(m.parameters()))
    decayed, plain = m.parameter_groups()
    assert all(name.endswith("weight") for name in decayed.params) and plain.weight_decay_scale == 0
    assert "network.fc.bias" in plain.params
    assert m.flops_per_sample() == 3 * network.flops(SPEC) > 0


@every_network
def test_learns_and_its_state_is_whole(network):
    m, b = method(network), batch(16)
    optimizer = AdamW(build_groups(m))
    first = m(b, {}).total.item()
    for step in range(60):
        optimizer.set_step(step, {"learning_rate": 5e-3, "weight_decay": 0.0})
        losses = m(b, {})
        losses.total.backward()
        optimizer.clip_local()
        optimizer.step()
        optimizer.zero_grad()
    assert losses.total.item() < 0.7 * first
    again = method(network, seed=9)
    again.load_state_dict(m.state_dict())
    torch.testing.assert_close(again.eval().encode(b), m.eval().encode(b), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("crop", "crop: needed by ResNet18, missing from the batch"),
        ("targets", r"targets: must be \[B, 3\] for redshift, log_mstar, tage_mw, got none"),
    ],
)
def test_incomplete_batches_are_refused(missing, text):
    m, b = method(NETWORKS["resnet18"]), batch()
    del b[missing]
    with pytest.raises(ValueError, match=text):
        m(b, {})


def test_targets_of_another_number_are_refused():
    m, b = method(NETWORKS["photometry"]), batch()
    b["targets"] = b["targets"][:, :2]
    with pytest.raises(ValueError, match=r"targets: must be \[B, 3\] .*, got \[6, 2\]"):
        m(b, {})


@pytest.mark.parametrize(
    ("network", "change", "text"),
    [
        (ResNet18(0), {}, "network.width: must be at least 1, got 0"),
        (ResNet18(), {"global_size": 16}, "views.image.global_size: must be at least 32, because it is halved five times, got 16"),
        (ConvAttention(), {"pixels": 0}, "views.spectrum: must give spectra, which ConvAttention reads, got none"),
        (
            PhotometryMLP(),
            {"columns": ()},
            "views.columns: must name columns, which PhotometryMLP reads, got none",
        ),
        (
            PhotometryMLP(),
            {"targets": (), "target_mean": (), "target_std": ()},
            "views.targets: must name labels to learn, got none",
        ),
        (PhotometryMLP(), {"target_std": (1.0,)}, "views.targets: must come with a mean and a standard deviation for each of 3, got 3 and 1"),
        (
            PhotometryMLP(),
            {"target_std": (0.1, 0.0, 1.0)},
            "views.targets: must be labels that vary, got log_mstar with mean 10.5 and deviation 0.0",
        ),
    ],
    ids=["width", "crop", "spectrum", "columns", "no-targets", "no-statistics", "constant-target"],
)  # fmt: skip
def test_broken_rules_are_named(network, change, text):
    config, spec = Regression(network), replace(SPEC, **change)
    assert config.problems(spec) == [text]
    with pytest.raises(ValueError, match="Regression: "):
        config.build(spec)


@every_network
def test_configuration_survives_its_record(network):
    config = Regression(network)
    assert from_json(to_json(config)) == config
    assert type_problems(config) == [] == config.problems(SPEC)
