import math

import pytest
import torch
import torch.distributed as dist
from two_ranks import run_on_ranks

from armillary.models.astroclip.info_nce import info_nce, normalise


def by_hand(a, b, scale):
    """Both halves of the loss from their formula, pair by pair, in float64."""
    a, b = a.double(), b.double()
    a = a / a.norm(dim=1, keepdim=True).clamp(min=1e-3)
    b = b / b.norm(dim=1, keepdim=True).clamp(min=1e-3)
    logits = scale * a @ b.T
    n = len(a)
    rows = -sum(logits[i, i] - logits[i].logsumexp(0) for i in range(n)) / (2 * n)
    columns = -sum(logits[i, i] - logits[:, i].logsumexp(0) for i in range(n)) / (2 * n)
    return rows, columns


@pytest.mark.parametrize("n", [1, 2, 37])
def test_value_and_gradient_equal_the_formula(n):
    a, b = torch.randn(n, 12, requires_grad=True), torch.randn(n, 12, requires_grad=True)
    found = info_nce(a, b, 15.5, gather=True)
    rows, columns = by_hand(a, b, 15.5)
    assert found.a_to_b.item() == pytest.approx(rows.item(), abs=1e-5)
    assert found.b_to_a.item() == pytest.approx(columns.item(), abs=1e-5)
    got = torch.autograd.grad(found.a_to_b + found.b_to_a, (a, b))
    want = torch.autograd.grad(rows + columns, (a, b))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-4, atol=1e-6)


def test_gradcheck():
    a, b = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, 3.0, gather=False)[:2], (a, b))


def test_known_values():
    """Pairs that agree wholly among orthogonal others; embeddings that say nothing; partners exchanged."""
    eye, scale = torch.eye(4), 15.5
    right = info_nce(eye, 3 * eye, scale, gather=False)
    assert right.a_hits == right.b_hits == 1
    assert 2 * right.a_to_b.item() == pytest.approx(math.log(1 + 3 * math.exp(-scale)), abs=1e-6)
    same = info_nce(torch.ones(4, 4), torch.ones(4, 4), scale, gather=False)
    assert 2 * same.a_to_b.item() == pytest.approx(math.log(4))
    assert same.a_hits == 0.25
    wrong = info_nce(eye, eye.roll(1, 0), scale, gather=False)
    assert wrong.a_hits == wrong.b_hits == 0
    assert 2 * wrong.b_to_a.item() == pytest.approx(scale + math.log(1 + 3 * math.exp(-scale)), abs=1e-4)


def test_zero_rows_and_bf16_stay_finite():
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    a[0] = 0
    a, b = a.bfloat16().requires_grad_(), b.bfloat16().requires_grad_()
    found = info_nce(a, b, 15.5, gather=False)
    (found.a_to_b + found.b_to_a).backward()
    assert found.a_to_b.dtype == torch.float32 and a.grad.isfinite().all() and b.grad.isfinite().all()
    torch.testing.assert_close(normalise(torch.full((1, 1), 1e-4)), torch.full((1, 1), 0.1))


@pytest.mark.parametrize(
    "a, b", [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((0, 4), (0, 4)), ((4,), (4,))], ids=["n", "D", "empty", "one row"]
)
def test_wrong_shapes(a, b):
    with pytest.raises(ValueError, match=r"info_nce: needs two tensors \[n, D\]"):
        info_nce(torch.randn(a), torch.randn(b), 1.0, gather=False)


def _average_over_ranks_is_the_whole_batch(rank):
    """Parameters that every rank shares, their gradients averaged over ranks as DDP and ZeRO do."""
    from torch import nn

    from armillary.models.astroclip.info_nce import info_nce

    world, n = dist.get_world_size(), 6
    torch.manual_seed(0)
    left, right = nn.Linear(10, 8).double(), nn.Linear(7, 8).double()
    x, y = torch.randn(world * n, 10).double(), torch.randn(world * n, 7).double()
    parameters = [*left.parameters(), *right.parameters()]

    def step(rows, gather):
        found = info_nce(left(x[rows]), right(y[rows]), 15.5, gather)
        return found, torch.autograd.grad(found.a_to_b + found.b_to_a, parameters)

    def average(tensor):
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
        return tensor / world

    own = slice(rank * n, (rank + 1) * n)
    whole, expected = step(slice(None), gather=False)
    part, gradients = step(own, gather=True)
    for name, value in part._asdict().items():
        torch.testing.assert_close(average(value), getattr(whole, name).detach(), rtol=0, atol=1e-12, msg=name)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(average(got), want, rtol=0, atol=1e-12)
    alone, _ = step(own, gather=False)  # per-rank negatives: fewer, so an easier choice
    assert alone.a_to_b < part.a_to_b and alone.b_to_a < part.b_to_a

    wrapped = nn.parallel.DistributedDataParallel(nn.ModuleList([left, right]))
    wrapped.module.forward = lambda: info_nce(left(x[own]), right(y[own]), 15.5, True)
    found = wrapped()
    (found.a_to_b + found.b_to_a).backward()
    for p, want in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=0, atol=1e-12)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_gathered_negatives_give_the_step_of_one_process(tmp_path, ranks):
    run_on_ranks(_average_over_ranks_is_the_whole_batch, tmp_path, ranks)
