import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from armillary.models.method import InputSpec
from armillary.models.supervised.photometry_mlp import PhotometryMLP

MAGNITUDES = InputSpec(columns=("mag_g", "mag_r", "mag_z"), targets=("a", "b"))


def test_forward_against_products():
    torch.manual_seed(0)
    network = PhotometryMLP().build(MAGNITUDES).double()
    s = network.state_dict()
    assert [tuple(s[f"{n}.weight"].shape) for n in ("mlp.0", "mlp.2", "fc")] == [(64, 3), (64, 64), (2, 64)]
    x = torch.randn(5, 3, dtype=torch.float64)
    y = x
    for layer in ("mlp.0", "mlp.2"):
        y = (y @ s[f"{layer}.weight"].T + s[f"{layer}.bias"]).clamp(min=0)
    torch.testing.assert_close(network(x), (y @ s["fc.weight"].T + s["fc.bias"], y))
    assert network(x[:0])[0].shape == (0, 2)


def test_unknown_columns_count_as_their_mean():
    torch.manual_seed(0)
    network = PhotometryMLP().build(MAGNITUDES)
    known = torch.tensor([[0.5, 0.0, -1.0]])
    unknown = torch.tensor([[0.5, float("nan"), -1.0]])
    torch.testing.assert_close(network(unknown), network(known), rtol=0, atol=0)
    network(unknown)[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_flops_are_those_of_the_products():
    with torch.device("meta"):
        network = PhotometryMLP((7, 5)).build(MAGNITUDES)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3))
    assert PhotometryMLP((7, 5)).flops(MAGNITUDES) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "spec", "text"),
    [
        (PhotometryMLP(()), MAGNITUDES, "hidden: must be one or more widths, each at least 1, got ()"),
        (PhotometryMLP((64, 0)), MAGNITUDES, "hidden: must be one or more widths, each at least 1, got (64, 0)"),
        (
            PhotometryMLP(),
            InputSpec(targets=("a",)),
            "views.columns: must name columns, which PhotometryMLP reads, got none",
        ),
    ],
    ids=["no-layers", "empty-layer", "no-columns"],
)
def test_broken_rules_are_named(config, spec, text):
    assert config.problems(spec) == [text]
    assert PhotometryMLP().problems(MAGNITUDES) == []
