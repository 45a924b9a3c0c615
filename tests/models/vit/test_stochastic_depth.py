import pytest
import torch

from armillary.kernels.tokens.attention import PackedSequences
from armillary.models.vit.stochastic_depth import branch_scale, draw_subsets, fork, join, split_groups

RUNS = ((4, 3), (7, 2), (1, 5))
LAYOUT = PackedSequences.from_runs(RUNS)


def branch(y):
    return y.sin() * y


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def path(request, monkeypatch):
    """Both forms of fork and join; torch.compile traces the second."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param)


def expected(x, subsets):
    """One sample after the other, out of place."""
    for subset in subsets:
        rows = []
        scale = branch_scale(subset, x)
        samples = [
            s for (_, length), g in zip(RUNS, x.split([n * m for n, m in RUNS]), strict=True) for s in g.split(length)
        ]
        for factor, sample in zip(scale, samples, strict=True):
            rows.append(sample + factor * branch(sample))
        x = torch.cat(rows)
    return x


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("own", [False, True])
def test_two_branches_and_their_gradients(path, rate, own):
    subsets = draw_subsets(RUNS, rate, 2, torch.device("cpu"))
    leaf = torch.randn(31, 6, dtype=torch.float64, requires_grad=True)
    before = leaf.detach().clone()
    x = leaf * 1.0 if own else leaf
    for i, subset in enumerate(subsets):
        x, y = fork(x, subset, own=own or i > 0)
        assert len(y) == sum(n * length for n, length in subset.layout.runs)
        x = join(x, branch(y), subset)
    weights = torch.randn_like(x)
    (grad,) = torch.autograd.grad((x * weights).sum(), leaf)
    want = expected(leaf, subsets)
    torch.testing.assert_close(x, want)
    torch.testing.assert_close(grad, torch.autograd.grad((want * weights).sum(), leaf)[0])
    assert torch.equal(leaf, before)


def test_gradcheck():
    subsets = draw_subsets(RUNS, 0.5, 1, torch.device("cpu"))

    def function(x):
        x, y = fork(x, subsets[0], own=False)
        return join(x, branch(y), subsets[0])

    assert torch.autograd.gradcheck(function, torch.randn(31, 2, dtype=torch.float64, requires_grad=True))


def test_subsets():
    subsets = draw_subsets(((90, 3), (10, 2), (1, 1)), 0.3, 40, torch.device("cpu"))
    for subset in subsets:
        assert [len(r) for r in subset.rows] == [62, 7, 1]  # int() of a float product, at least one
        assert all(len(r.unique()) == len(r) for r in subset.rows)
        assert subset.scales == (90 / 62, 10 / 7, 1.0)
        assert subset.layout.runs == ((62, 3), (7, 2), (1, 1))
    counts = torch.cat([s.rows[1] for s in subsets]).bincount(minlength=10)
    assert counts.min() > 15  # of 40, 28 expected
    assert not torch.equal(subsets[0].rows[0], subsets[1].rows[0])


@pytest.mark.parametrize("rate", [0.0, 0.4, 0.9])
def test_packing_says_by_sample_what_rows_say_by_group(rate):
    tokens = torch.arange(31.0)[:, None].repeat(1, 2)
    for subset in draw_subsets(RUNS, rate, 5, torch.device("cpu")):
        packing = subset.packing
        _, branch = fork(tokens, subset, own=False)
        assert torch.equal(packing.tokens(), branch[:, 0].long()) and packing.rows == len(branch)
        scale = torch.where(packing.start >= 0, packing.scale, 0)
        assert torch.equal(scale, branch_scale(subset, tokens)[:, 0])
        assert packing.sample.bincount().tolist() == [3] * 4 + [2] * 7 + [5]
        assert all(m.dtype == torch.int32 and m.is_contiguous() for m in (packing.sample, packing.place, packing.start))


def test_groups_are_views():
    x = torch.zeros(31, 6)
    groups = split_groups(x, LAYOUT)
    assert [g.shape for g in groups] == [(4, 18), (7, 12), (1, 30)]
    groups[1].fill_(1)
    assert x.sum() == 7 * 12
