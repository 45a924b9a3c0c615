import pytest
import torch
import torch.nn.functional as F

from armillary.models.dinov2.koleo import koleo_loss


def by_hand(x):
    x = F.normalize(x, dim=1)
    total = 0.0
    for i in range(len(x)):
        j = max((k for k in range(len(x)) if k != i), key=lambda k: float((x[i] @ x[k]).detach()))
        total = total - (x[i] - x[j] + 1e-8).norm().add(1e-8).log()
    return total / len(x)


@pytest.mark.parametrize("n", [2, 3, 16])
def test_formula_and_gradient(n):
    x = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(koleo_loss(x), by_hand(x))
    assert torch.autograd.gradcheck(koleo_loss, x)


def test_does_not_depend_on_length_or_order():
    x = torch.randn(6, 4, dtype=torch.float64)
    scaled = (x * torch.rand(6, 1, dtype=torch.float64).add(0.1))[torch.randperm(6)]
    torch.testing.assert_close(koleo_loss(scaled), koleo_loss(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_features_give_finite_values(dtype):
    """In half precision the epsilons would vanish: infinity for duplicates."""
    x = torch.ones(4, 8, dtype=dtype, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("n", [0, 1])
def test_without_a_neighbour_there_is_nothing_to_spread(n):
    x = torch.randn(n, 4, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss == 0 and not x.grad.any()
