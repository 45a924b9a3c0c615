"""AdamW against torch's, its average, clipping by group, the guard, and grouping of parameters."""

import copy
import math

import pytest
import torch
import toy
from torch import nn

from armillary.engine.zero.optim import AdamW, build_groups, squared_norms
from armillary.models.method import InputSpec, ParameterGroup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATES = {"learning_rate": 0.01, "weight_decay": 0.1, "ema_momentum": 0.9}


def group(params, **values):
    base = {"lr_scale": 1.0, "weight_decay_scale": 1.0, "clip_group": "all", "freeze": False, "average": False}
    return {"params": params, **base, **values}


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(DEVICE)) for s in shapes]


def fill_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator).to(DEVICE)


@pytest.fixture(params=["reference", "triton"])
def impl(request):
    return request.param


@pytest.fixture
def method():
    return toy.ToyConfig().build(InputSpec(channels=10, global_size=1))


@pytest.mark.parametrize("shapes", [[(5, 3), (7,)], [(1,)], [(129, 17)]], ids=str)
def test_is_adamw(shapes, impl):
    ours, theirs = parameters(*shapes), parameters(*shapes)
    groups = [group(ours[:1], lr_scale=0.5), group(ours[1:], weight_decay_scale=0.0)][: len(shapes)]
    a = AdamW(groups, (0.9, 0.99), impl=impl)
    groups = [{"params": theirs[:1], "lr": 0.005}, {"params": theirs[1:], "weight_decay": 0.0}][: len(shapes)]
    b = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, foreach=True)
    for step in range(5):
        fill_gradients(ours, step)
        fill_gradients(theirs, step)
        a.set_step(step, RATES)
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_average_follows_the_weights_after_the_step_in_float32(impl):
    (p,) = parameters((4, 4))
    optimizer = AdamW([group([p], average=True)], impl=impl)
    expected = p.detach().double().clone()
    teacher = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16, device=DEVICE), requires_grad=False)
    for step in range(20):
        fill_gradients([p], step)
        optimizer.set_step(step, RATES | {"ema_momentum": 0.999})
        optimizer.step()
        expected.lerp_(p.detach().double(), 0.001)
    average = optimizer.state[p]["ema"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)
    optimizer.refresh([(p, teacher)])
    assert torch.equal(teacher, average.bfloat16())


def test_each_clip_group_is_clipped_by_its_own_norm(impl):
    ours, theirs = parameters((6, 6), (3,), (5,)), parameters((6, 6), (3,), (5,))
    a = AdamW([group(ours[:2], clip_group="body"), group(ours[2:], clip_group="head")], clip_norm=0.7, impl=impl)
    b = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for step in range(3):
        fill_gradients(ours, step, 5.0)
        fill_gradients(theirs, step, 5.0)
        a.set_step(step, RATES)
        assert a.clip_local()
        body = torch.nn.utils.clip_grad_norm_(theirs[:2], 0.7)
        head = torch.nn.utils.clip_grad_norm_(theirs[2:], 0.7)
        assert a.norms == pytest.approx({"body": body.item(), "head": head.item()}, rel=1e-6)
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_clipped_gradients(impl):
    """Adam's step does not see a constant factor of its gradients, its moments do."""
    (p,) = parameters((6, 6))
    optimizer = AdamW([group([p])], (0.9, 0.99), clip_norm=0.7, impl=impl)
    fill_gradients([p], 0, 5.0)
    clipped = p.grad * (0.7 / p.grad.norm())
    optimizer.set_step(0, RATES)
    optimizer.clip_local()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * clipped, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], 0.01 * clipped.square(), rtol=1e-5, atol=1e-9)


def test_small_gradients_are_left_alone(impl):
    (p,), (q,) = parameters((8,)), parameters((8,))
    clipped, free = AdamW([group([p])], clip_norm=1e3, impl=impl), AdamW([group([q])], impl=impl)
    for optimizer, x in ((clipped, p), (free, q)):
        fill_gradients([x], 0)
        optimizer.set_step(0, RATES)
        optimizer.clip_local()
        optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_nothing_anywhere(bad, impl):
    params = parameters((4,), (5,))
    groups = [group(params[:1], average=True), group(params[1:], clip_group="other")]
    optimizer = AdamW(groups, clip_norm=1.0, impl=impl)
    for step in range(2):
        fill_gradients(params, step)
        optimizer.set_step(step, RATES)
        assert optimizer.clip_local()
        optimizer.step()
    kept = copy.deepcopy([[p.detach() for p in params], [optimizer.state[p] for p in params]])
    fill_gradients(params, 2)
    params[1].grad[3] = bad
    assert not optimizer.clip_local() and optimizer.skip
    optimizer.step()
    for p, before, state in zip(params, *kept, strict=True):
        assert torch.equal(p, before)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
    fill_gradients(params, 3)
    assert optimizer.clip_local()  # and it goes on
    optimizer.step()
    assert not torch.equal(params[0], kept[0][0])


def test_frozen_group_keeps_its_weights_while_its_moments_accumulate(impl):
    (p,) = parameters((6,))
    before = p.detach().clone()
    optimizer = AdamW([group([p], freeze=True)], freeze_steps=2, impl=impl)
    for step in range(2):
        fill_gradients([p], step)
        optimizer.set_step(step, RATES)
        optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["exp_avg"].abs().sum() > 0
    assert optimizer.state[p]["step"] == 2
    fill_gradients([p], 2)
    optimizer.set_step(2, RATES)
    optimizer.step()
    assert not torch.equal(p, before)


def test_parameters_without_gradient_are_left_alone(impl):
    p, q = parameters((3,), (3,))
    before = q.detach().clone()
    optimizer = AdamW([group([p, q])], impl=impl)
    fill_gradients([p], 0)
    optimizer.set_step(0, RATES)
    optimizer.step()
    assert torch.equal(q, before) and not optimizer.state[q]


def test_state_fits_either_implementation():
    """Same names, shapes and dtypes; a run may go on with the other, and hardly differs from one that did not."""

    def run(*impls):
        (p,) = parameters((33, 5))
        optimizer, step = None, 0
        for impl in impls:
            before, optimizer = optimizer, AdamW([group([p], average=True)], clip_norm=0.5, impl=impl)
            if before is not None:
                optimizer.init_state(p, p)
                for name, value in before.state[p].items():
                    assert (
                        optimizer.state[p][name].shape == value.shape and optimizer.state[p][name].dtype == value.dtype
                    )
                    optimizer.state[p][name].copy_(value)
            for _ in range(3):
                fill_gradients([p], step)
                optimizer.set_step(step, RATES)
                optimizer.clip_local()
                optimizer.step()
                step += 1
        assert optimizer.state[p]["step"] == step
        return p.detach(), optimizer.state[p]

    weights, state = run("reference", "reference")
    for impls in (("reference", "triton"), ("triton", "reference"), ("triton", "triton")):
        other, others = run(*impls)
        torch.testing.assert_close(other, weights, rtol=1e-6, atol=1e-7)
        for name in ("exp_avg", "exp_avg_sq", "ema"):
            torch.testing.assert_close(others[name], state[name], rtol=1e-6, atol=1e-7)


def test_the_kernel_counts_steps_on_the_host():
    (p,) = parameters((4,))
    assert AdamW([group([p])], impl="triton").init_state(p, None)["step"].device.type == "cpu"
    assert AdamW([group([p])], impl="reference").init_state(p, None)["step"].device == p.device


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="AdamW: impl must be one of auto, reference, triton, got 'fused'"):
        AdamW([group(parameters((4,)))], impl="fused")


def test_norms_do_not_depend_on_the_cut():
    x = torch.randn(10_001) * torch.logspace(-6, 3, 10_001)
    cpu = torch.device("cpu")
    whole = squared_norms({"all": [x]}, cpu)
    cut = squared_norms({"all": list(x.split(137)) + [torch.empty(0)]}, cpu)
    assert float(whole[0]) == pytest.approx(float(cut[0]), rel=1e-12)
    assert squared_norms({"none": [], "empty": [torch.empty(0)]}, cpu).tolist() == [0, 0]


def test_groups_are_split_by_teacher_and_merged_by_rates(method):
    groups = build_groups(method)
    names = {id(p): n for n, p in method.named_parameters()}
    found = {frozenset(names[id(p)] for p in g["params"]): g for g in groups}
    assert sum(len(g["params"]) for g in groups) == len([p for p in method.parameters() if p.requires_grad])
    assert found[frozenset({"extra"})]["average"] is False
    assert found[frozenset({"student.head.weight"})]["freeze"] is True
    assert all(g["average"] for key, g in found.items() if "extra" not in key)


def test_parameters_with_and_without_a_teacher_are_never_merged(method, monkeypatch):
    everything = {n: p for n, p in method.named_parameters() if p.requires_grad}
    monkeypatch.setattr(method, "parameter_groups", lambda: [ParameterGroup(everything)])
    without, with_teacher = build_groups(method)
    assert with_teacher["average"] and not without["average"]
    assert [id(p) for p in without["params"]] == [id(method.extra)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, g: g[:-1], "extra: is in no group"),
        (lambda m, g: [*g, g[-1]], "extra: is in two groups"),
        (lambda m, g: [*g, ParameterGroup({"t": m.teacher.gain})], "t: is frozen, so it belongs to no group"),
    ],
)
def test_wrong_groups_are_refused(method, monkeypatch, change, message):
    groups = change(method, method.parameter_groups())
    monkeypatch.setattr(method, "parameter_groups", lambda: groups)
    with pytest.raises(ValueError, match=message):
        build_groups(method)


def test_a_teacher_that_is_trained_is_refused(method):
    method.teacher.gain.requires_grad_(True)
    with pytest.raises(ValueError, match="teacher.gain: a teacher's parameter must not require a gradient"):
        build_groups(method)
