import pytest
import torch
from products import ACTIVATIONS, COMPILED, PATHS, assert_as_good, assert_compiles, count_persistent, double, force_path

from armillary.kernels.mlp import down_gradient as module
from armillary.kernels.mlp.down_gradient import down_gradient, down_gradient_reference
from armillary.kernels.mlp.up_projection import up_projection_reference

CASES = {  # (M, D, H, E), bias, row scale
    "odd": ((37, 19, 45, 2), True, True),
    "whole columns": ((40, 32, 64, 2), True, True),
    "one expert, bias": ((33, 40, 64, 1), True, False),
    "one expert, scale": ((5, 8, 72, 1), False, True),
    "bare": ((35, 16, 64, 2), False, False),
    "ones": ((1, 1, 1, 1), True, True),
}
NAMES = ("dz", "a", "d_bias", "d_row_scale")


def inputs(shape, activation, device, dtype=torch.float32, bias=True, scale=True):
    m, d, h, experts = shape
    columns = (experts, 2, h) if activation == "swiglu" else (experts, h)
    du, weight2, z, b = (
        torch.randn(experts, m, d),
        torch.randn(experts, d, h),
        torch.randn(m, *columns),
        torch.randn(columns),
    )
    row_scale = (torch.rand(experts, m) + 0.5).to(device) if scale else None
    du, weight2, z, b = (t.to(device, dtype) for t in (du, weight2 * d**-0.5, z, b))
    return du, weight2, z, b if bias else None, row_scale, activation


def check(given):
    eager, right = down_gradient_reference(*given), down_gradient_reference(*double(*given))
    results = down_gradient(*given, impl="triton")
    for name, got, *others in zip(NAMES, results, eager, right, strict=True):
        assert got is None or got.dtype == (given[0].dtype if name in ("dz", "a") else torch.float32)
        assert_as_good(got, *others)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_equals_the_reference(path, activation, case, device, monkeypatch, poison_empty):
    force_path(monkeypatch, module, path)
    check(inputs(case[0], activation, device, torch.float32, *case[1:]))


@pytest.mark.parametrize("case", [CASES["odd"], CASES["whole columns"]], ids=["odd", "whole columns"])
@pytest.mark.parametrize("path", PATHS)
def test_half_precision(path, case, device, monkeypatch, poison_empty):
    """float16: the interpreter multiplies bit patterns for bfloat16, which the GPU test covers."""
    force_path(monkeypatch, module, path)
    check(inputs(case[0], "gelu", device, torch.float16, *case[1:]))


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
    check(inputs((70, 16, 128, 2), "gelu_tanh", device))


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
        check(inputs(shape, "gelu", device, dtype))
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


@pytest.mark.slow
@pytest.mark.parametrize("kernel, activation, vit, architectures", COMPILED.values(), ids=COMPILED)
def test_compiles_without_spilling(kernel, activation, vit, architectures):
    assert_compiles(module, kernel, activation, vit, architectures)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_training_shape(path, activation, monkeypatch):
    force_path(monkeypatch, module, path)
    for scale in (True, False):
        check(inputs((8000, 1024, 4096, 3), activation, "cuda", torch.bfloat16, True, scale))
