import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from armillary.models.method import InputSpec
from armillary.models.supervised.spectrum_attention import ConvAttention, SpectrumAttention

SMALL = ConvAttention(filters=(2, 3, 4), kernels=(3, 4, 2), pools=(2, 3), hidden=(5, 4))


def inputs(pixels=200, targets=("a",)):
    return InputSpec(pixels=pixels, targets=targets)


def reference(state, config, x):
    """The network by the names of its state: products of windows, in x's precision."""

    def activated(x, slope):
        slope = slope.view(-1, *[1] * (x.ndim - 2))
        return x.clamp(min=0) + slope * x.clamp(max=0)

    x = x[:, None]
    for i, k in enumerate(config.kernels):
        if i:
            p = config.pools[i - 1]
            x = torch.nn.functional.pad(x, (p // 2, p // 2), value=-torch.inf).unfold(2, p, p).amax(-1)
        windows = torch.nn.functional.pad(x, (k // 2, k // 2)).unfold(2, k, 1)
        name = f"convolutions.{i}"
        x = torch.einsum("bclk,dck->bdl", windows, state[f"{name}.0.weight"]) + state[f"{name}.0.bias"][:, None]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = activated(x, state[f"{name}.2.weight"])
    half = x.shape[1] // 2
    scores = (x[:, half:] - x[:, half:].amax(-1, keepdim=True)).exp()
    y = (x[:, :half] * scores).sum(-1) / scores.sum(-1)
    for i in range(len(config.hidden)):
        y = activated(y @ state[f"mlp.{2 * i}.weight"].T + state[f"mlp.{2 * i}.bias"], state[f"mlp.{2 * i + 1}.weight"])
    return y @ state["fc.weight"].T + state["fc.bias"], y


def test_defaults_are_the_published_baseline():
    config, spec = ConvAttention(), inputs(7781, tuple("abcd"))
    assert config.lengths(7781) == [7781, 1558, 157, 9]
    network = config.build(spec)
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    assert shapes["convolutions.0.0.weight"] == (8, 1, 5) and shapes["convolutions.3.0.weight"] == (32, 16, 40)
    assert shapes["convolutions.3.2.weight"] == (32,)  # a slope a channel
    assert [shapes[f"{n}.weight"] for n in ("mlp.0", "mlp.2", "fc")] == [(32, 16), (32, 32), (4, 32)]
    assert not any("convolutions.0.1" in name for name in shapes)  # the normalisation has no parameters
    outputs, features = network(torch.randn(2, 7781))
    assert outputs.shape == (2, 4) and features.shape == (2, 32)


@pytest.mark.parametrize("pixels", [7781, 7780, 4001, 997], ids=str)
def test_lengths_of_odd_spectra(pixels):
    config, seen = ConvAttention(), []
    network = config.build(inputs(pixels))
    for convolution in network.convolutions:
        convolution[0].register_forward_hook(lambda _m, _i, out: seen.append(out.shape[-1]))
    network(torch.randn(1, pixels))
    assert seen == config.lengths(pixels)


@pytest.mark.parametrize("pixels", [40, 41, 43], ids=str)
def test_forward_and_gradients_against_windows(pixels):
    torch.manual_seed(0)
    network = SpectrumAttention(SMALL, 3).double()
    state = {k: v.detach().clone().requires_grad_() for k, v in network.state_dict().items()}
    x = torch.randn(4, pixels, dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = network(mine), reference(state, SMALL, other)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(4, 3, dtype=torch.float64)
    (found[0] * weights).sum().backward()
    (expected[0] * weights).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, state[name].grad, rtol=1e-6, atol=1e-9, msg=name)


def test_pixels_without_data_are_zeros_like_any():
    torch.manual_seed(0)
    network = SpectrumAttention(SMALL, 3).double()
    x = torch.randn(2, 50, dtype=torch.float64)
    x[:, 10:20] = 0
    torch.testing.assert_close(network(x), reference(network.state_dict(), SMALL, x))


def test_gradients_against_differences():
    torch.manual_seed(1)
    network = SpectrumAttention(SMALL, 2).double()
    x = torch.randn(2, 37, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: network(x)[0], (x,))


def test_flux_unit_does_not_matter():
    torch.manual_seed(0)
    network = ConvAttention().build(inputs(997)).double()
    x = torch.randn(3, 997, dtype=torch.float64) * 5
    torch.testing.assert_close(network(1e4 * x), network(x), rtol=1e-4, atol=1e-5)


def test_empty_spectra_have_finite_gradients():
    torch.manual_seed(0)
    network = ConvAttention().build(inputs(997))
    x = torch.zeros(2, 997)
    x[1] = torch.randn(997)
    outputs, _ = network(x)
    outputs.square().sum().backward()
    assert outputs.isfinite().all() and all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("pixels", [7781, 998], ids=str)
def test_flops_are_those_of_the_products(pixels):
    config, spec = ConvAttention(), inputs(pixels, ("a", "b", "c"))
    with torch.device("meta"):
        network = config.build(spec)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, pixels))
    assert config.flops(spec) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "pixels", "text"),
    [
        (ConvAttention(), 0, "views.spectrum: must give spectra, which ConvAttention reads, got none"),
        (ConvAttention(filters=()), 200, "filters: must be one or more numbers, each at least 1, got ()"),
        (ConvAttention(kernels=(5, 0, 20, 40)), 200, "kernels: must be one or more numbers, each at least 1, got (5, 0, 20, 40)"),
        (ConvAttention(filters=(8, 16, 16, 31)), 7781, "filters: the last must be even, half values and half scores, got 31"),
        (ConvAttention(kernels=(5, 10)), 7781, "kernels: must be 4, one a convolution, got 2"),
        (ConvAttention(pools=(5,)), 7781, "pools: must be 3, one after each convolution but the last, got 1"),
        (
            ConvAttention(kernels=(5, 10, 20, 39), pools=(5, 10, 400)), 997,
            "views.spectrum: must have pixels for 2 positions after every convolution, got 997 pixels, which leave 1",
        ),
    ],
    ids=["no-spectrum", "no-filters", "zero-kernel", "odd-filters", "few-kernels", "few-pools", "short-spectrum"],
)  # fmt: skip
def test_broken_rules_are_named(config, pixels, text):
    found = config.problems(inputs(pixels))
    assert found == [text]
    assert ConvAttention().problems(inputs(997)) == []
    assert ConvAttention(filters=(4,), kernels=(3,), pools=()).problems(inputs(5)) == []
