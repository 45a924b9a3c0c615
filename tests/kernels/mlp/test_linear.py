"""A linear layer that takes its bias's gradient from sums that came with the gradient of its output."""

import pytest
import torch
import torch.nn.functional as F
from products import assert_as_good, double

from armillary.kernels.column_sums import attach_column_sums
from armillary.kernels.mlp.linear import linear


def inputs(device, dtype=torch.float32):
    return [t.to(device, dtype) for t in (torch.randn(37, 19), torch.randn(23, 19), torch.randn(23))]


def run(function, given, dy):
    leaves = [t.detach().requires_grad_() for t in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_the_reference(dtype, device):
    given, dy = inputs(device, dtype), torch.randn(37, 23, device=device)
    eager, right = run(F.linear, given, dy), run(F.linear, double(*given), dy.double())
    ours = run(lambda *args: linear(*args, impl="triton"), given, dy)
    for got, *others in zip(ours, eager, right, strict=True):
        assert got.dtype == dtype
        assert_as_good(got, *others)


def test_sums_that_came_are_used(device):
    """And what they are sums of is left alone."""

    class Writer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.contiguous()
            attach_column_sums(grad, torch.full_like(grad[0], 7.0))
            return grad

    given = [t.requires_grad_() for t in inputs(device)]
    Writer.apply(linear(*given, impl="triton")).sum().backward()
    assert torch.equal(given[2].grad, torch.full_like(given[2], 7.0))
    torch.testing.assert_close(given[0].grad, given[1].detach().sum(0).expand(37, -1))


@pytest.mark.parametrize("trained", range(3), ids=["x", "weight", "bias"])
def test_only_one_argument_is_trained(trained, device):
    given, dy = inputs(device), torch.randn(37, 23, device=device)
    right = run(F.linear, given, dy)[1 + trained]
    leaves = [t.requires_grad_(i == trained) for i, t in enumerate(given)]
    (gradient,) = torch.autograd.grad(linear(*leaves, impl="triton"), leaves[trained], dy)
    torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-5)


def test_reference_and_autocast_are_plain_pytorch():
    given = [t.requires_grad_() for t in inputs("cpu")]
    assert linear(*given).grad_fn.name() == "AddmmBackward0"
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(*given, impl="triton")
    assert y.dtype == torch.bfloat16 and y.grad_fn.name() != "_LinearBackward"
