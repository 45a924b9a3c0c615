"""Schedules against the arrays of DINOv2's CosineScheduler, and their rules."""

import numpy as np
import pytest
import torch

from armillary.engine.config.schedule import Constant, Cosine, Linear, Schedules, WarmRestarts


def dinov2(start, end, total, warmup=0, warmup_start=0.0):
    """The released code's array: linspace, end points included, then half a cosine over the rest."""
    i = np.arange(total - warmup)
    cosine = end + 0.5 * (start - end) * (1 + np.cos(np.pi * i / len(i)))
    return np.concatenate([np.linspace(warmup_start, start, warmup), cosine])


@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 19])
def test_cosine_is_dinov2s(warmup):
    schedule = Cosine(start=2e-3, end=1e-6, warmup_steps=warmup, warmup_start=1e-5)
    got = [schedule.at(step, 20) for step in range(20)]
    np.testing.assert_allclose(got, dinov2(2e-3, 1e-6, 20, warmup, 1e-5), rtol=1e-12)
    assert schedule.at(20, 20) == schedule.at(99, 20) == 1e-6


def test_a_warm_up_may_outlast_the_run():
    schedule = Cosine(start=1.0, warmup_steps=5)
    assert [schedule.at(s, 3) for s in range(3)] == [0.0, 0.25, 0.5]


def test_constant_warms_up_and_stays():
    schedule = Constant(0.07, warmup_steps=4, warmup_start=0.04)
    np.testing.assert_allclose([schedule.at(s, 6) for s in range(6)], [0.04, 0.05, 0.06, 0.07, 0.07, 0.07])


@pytest.mark.parametrize("total", [1, 2, 9])
def test_linear_reaches_its_end_at_the_last_step(total):
    schedule = Linear(start=1.0, end=3.0)
    np.testing.assert_allclose([schedule.at(s, total) for s in range(total)], np.linspace(1, 3, total))
    assert schedule.at(total + 5, total) == (3.0 if total > 1 else 1.0)


def test_warm_restarts_are_torchs_schedulers_once_an_epoch():
    """LinearLR for 10 epochs of 3 steps, then CosineAnnealingWarmRestarts: periods of 25, 50 and 100 epochs."""
    schedule = WarmRestarts(1e-4, 1e-6, 75, 2, 3, warmup_steps=30, warmup_start=1e-5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=25, T_mult=2, eta_min=1e-6)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    optimizer.step()
    for epoch in range(120):
        expected = optimizer.param_groups[0]["lr"]
        np.testing.assert_allclose([schedule.at(3 * epoch + i, 360) for i in range(3)], 3 * [expected], rtol=1e-9)
        (warmup if epoch < 10 else restarts).step()


def test_only_the_schedules_that_are_set_are_handed_out():
    values = Schedules(learning_rate=Cosine(end=0.1)).at(0, 10, peak_lr=0.5)
    assert values == {"learning_rate": 0.5, "weight_decay": 0.04}


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        (
            Schedules(learning_rate=Constant(0.1)),
            "learning_rate.start: must be None, because its peak is optim.lr, got 0.1",
        ),
        (Schedules(weight_decay=Cosine()), "weight_decay.start: must be a number, got None"),
        (Schedules(weight_decay=Constant(-1.0)), "weight_decay.start: must be a finite number >= 0, got -1.0"),
        (Schedules(ema_momentum=Linear(0.9, 1.5)), r"ema_momentum.end: must be in \[0, 1\], got 1.5"),
        (Schedules(teacher_temperature=Constant(0.0)), "teacher_temperature.start: must be positive, got 0.0"),
        (
            Schedules(teacher_temperature=Constant(0.1, warmup_steps=3)),
            "teacher_temperature.warmup_start: must be positive, got 0.0",
        ),
        (Schedules(learning_rate=Cosine(warmup_steps=-1)), "warmup_steps: must be at least 0, got -1"),
        (Schedules(weight_decay=Constant(float("nan"))), "weight_decay.start: must be a finite number"),
        (
            Schedules(learning_rate=WarmRestarts(period_steps=0)),
            "learning_rate.period_steps: must be at least 1, got 0",
        ),
        (Schedules(learning_rate=WarmRestarts(growth=0)), "learning_rate.growth: must be at least 1, got 0"),
        (Schedules(learning_rate=WarmRestarts(hold_steps=-1)), "learning_rate.hold_steps: must be at least 1, got -1"),
    ],
)
def test_rules(schedules, message):
    import re

    found = schedules.problems()
    assert len(found) == 1 and re.search(message, found[0]), found


def test_no_rule_is_broken_by_the_defaults():
    assert Schedules(teacher_temperature=Constant(0.07)).problems() == []


def test_a_start_that_is_left_out_is_an_error_elsewhere():
    with pytest.raises(ValueError, match="must be a number, as only learning_rate may leave it out"):
        Cosine().at(0, 10)
