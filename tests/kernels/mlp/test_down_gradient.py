import pytest
import torch
from products import ACTIVATIONS, PATHS, PRODUCTS, count_persistent, double, force_path
from products import inputs_of_down as inputs

from armillary.kernels.mlp import down_gradient as module
from armillary.kernels.mlp.down_gradient import down_gradient
from armillary.kernels.mlp.up_projection import up_projection_reference


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_gradient_of_the_up_projection(activation):
    """Both halves of the contract: what a caller makes of the results is what autograd gives."""
    m, k, d, h, experts = 7, 5, 3, 4, 2
    du, weight2, _, bias, scale, _ = double(*inputs((m, d, h, experts), activation, "cpu"))
    x, weight = torch.randn(m, k).double(), torch.randn(*bias.shape, k).double()
    given = [t.requires_grad_() for t in (x, weight, bias, scale)]
    z, a = up_projection_reference(*given, activation)
    value = (torch.einsum("meh,edh->emd", a, weight2) * du).sum()
    right = torch.autograd.grad(value, given)
    dz, again, d_bias, d_scale = down_gradient(du, weight2, z.detach(), bias.detach(), scale.detach(), activation)
    assert torch.equal(again, a)
    d_weight = (dz.flatten(1).t() @ x).view_as(weight)
    for got, expected in zip((dz.flatten(1) @ weight.flatten(0, -2), d_weight, d_bias, d_scale), right, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("path", PATHS)
def test_tiles_over_several_rows_and_columns(path, device, monkeypatch, poison_empty):
    """Partial sums of several programs along both directions."""
    force_path(monkeypatch, module, path)
    PRODUCTS["down_gradient"].check(inputs((70, 16, 128, 2), "gelu_tanh", device))


def test_descriptors_only_where_they_can_be(device, monkeypatch):
    """An inner dimension of broken tiles would read the next expert's weights: such shapes take plain pointers."""
    force_path(monkeypatch, module, "tma")
    launches = count_persistent(monkeypatch)
    dtype, h, d = (torch.float32, 64, 16) if device == "cpu" else (torch.float16, 256, 64)
    for shape, expected in {
        (7, d, h, 2): 1,
        (7, d + 8, h, 2): 0,
        (7, d + 8, h, 1): 1,
        (7, d, h + 8, 1): 0,
        (7, d - 1, h, 1): 0,
    }.items():
        launches.clear()
        PRODUCTS["down_gradient"].check(inputs(shape, "gelu", device, dtype))
        assert len(launches) == expected, shape


@pytest.mark.parametrize("path", PATHS)
def test_empty(path, device, monkeypatch):
    force_path(monkeypatch, module, path)
    dz, a, d_bias, d_scale = down_gradient(*inputs((0, 16, 64, 3), "swiglu", device), impl="triton")
    assert dz.shape == (0, 3, 2, 64) and a.shape == (0, 3, 64) and d_scale.shape == (3, 0)
    assert torch.equal(d_bias, torch.zeros(3, 2, 64, device=device))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", PATHS)
def test_a_bad_row_spoils_no_other(path, value, device, monkeypatch):
    """Its own row of one expert, and the sums over rows; row 39 is the last, which tiles over the border repeat."""
    force_path(monkeypatch, module, path)
    given = inputs((40, 16, 64, 2), "gelu", device)
    right = down_gradient(*given, impl="triton")
    given[0][1, 39, 3] = value
    dz, a, d_bias, d_scale = down_gradient(*given, impl="triton")
    assert not dz[39, 1].isfinite().all() and not d_scale[1, 39].isfinite() and torch.equal(a, right[1])
    assert torch.equal(dz[:39], right[0][:39]) and torch.equal(dz[39, 0], right[0][39, 0])
    assert torch.equal(d_scale[:, :39], right[3][:, :39]) and torch.equal(d_bias[0], right[2][0])


def test_same_bits_again(device, monkeypatch):
    given = inputs((70, 16, 128, 2), "gelu", device)
    first = down_gradient(*given, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, down_gradient(*given, impl="triton"), strict=True))
