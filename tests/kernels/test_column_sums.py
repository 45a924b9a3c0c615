"""Sums over a gradient's rows that travel with it: used where it arrives as it left, made anew elsewhere."""

import pytest
import torch

from armillary.kernels.column_sums import attach_column_sums, column_sums


class Writer(torch.autograd.Function):
    """The identity of [M, 2, N / 2], which says that the sums of its gradient are 7."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad * 1
        attach_column_sums(grad, torch.full(grad.shape[1:], 7.0))
        return grad


class Reader(torch.autograd.Function):
    """The identity, which keeps the sums that it finds."""

    @staticmethod
    def forward(ctx, x, found):
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.found.append(column_sums(grad))
        return grad, None


def found(between):
    """Sums that a reader finds behind a writer, and the true ones."""
    x, seen, right = torch.randn(5, 6, requires_grad=True), [], []
    y = Reader.apply(x, seen)
    y.register_hook(lambda g: right.append(g.sum(0)))
    between(y).backward()
    return seen[0], right[0]


def test_used_where_the_gradient_arrives_as_it_left_or_reshaped():
    for shape in ((6,), (2, 3), (2, 3, 1)):
        sums, _ = found(lambda y, shape=shape: Writer.apply(y.unflatten(1, shape)).square().sum())
        assert torch.equal(sums, torch.full((6,), 7.0)), shape


@pytest.mark.parametrize(
    "between",
    [
        lambda y: Writer.apply(y).sum() + y.square().sum(),
        lambda y: y.square().sum() + Writer.apply(y).sum(),
        lambda y: Writer.apply(y * 2).square().sum(),
        lambda y: Writer.apply(y.view(10, 3)).square().sum(),
        lambda y: Writer.apply(y[:, :3]).square().sum(),
        lambda y: Writer.apply(y[1:]).square().sum(),
    ],
    ids=["used again", "used before", "other values", "other rows", "some columns", "some rows"],
)
def test_made_anew_where_it_is_another(between):
    sums, right = found(between)
    torch.testing.assert_close(sums, right)


@pytest.mark.parametrize("change", [lambda g: g.mul_(2), lambda g: g * 2], ids=["in place", "a new tensor"])
def test_made_anew_where_a_hook_changes_it(change):
    x, seen, right = torch.randn(5, 6, requires_grad=True), [], []
    y = Reader.apply(x, seen)
    y.register_hook(change)
    x.register_hook(lambda g: right.append(g.sum(0)))
    Writer.apply(y).square().sum().backward()
    torch.testing.assert_close(seen[0], right[0])


def test_half_precision_is_summed_in_float32():
    grad = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    assert column_sums(grad).dtype == torch.float32 and column_sums(grad).tolist() == [4096.0, 4096.0]
