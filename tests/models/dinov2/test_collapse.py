import math

import pytest
import torch
import torch.nn.functional as F

from armillary.models.dinov2.collapse import CollapseMonitor, effective_rank, perplexity


def test_effective_rank_of_known_spectra():
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    centred = torch.linalg.qr(torch.cat([torch.ones(200, 1), torch.randn(200, 20)], 1).double())[0][:, 1:]
    x = centred @ basis[:20]  # 20 equal directions
    assert effective_rank(x + 3.0) == pytest.approx(20, rel=1e-6)
    assert effective_rank(x[:, :5]) <= 5 + 1e-9
    assert effective_rank(x[:11]) <= 10 + 1e-9  # centred: one less than rows
    line = torch.linspace(0, 1, 9)[:, None] * torch.randn(1, 30)
    assert effective_rank(line) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
def test_effective_rank_of_constant_features(value):
    x = torch.full((100, 8), value) * torch.rand(8)
    assert effective_rank(x) == 1.0


def test_effective_rank_of_broken_features():
    x = torch.randn(5, 3)
    x[1, 2] = math.inf
    assert math.isnan(effective_rank(x))


def test_perplexity():
    assert perplexity(torch.full((8,), 1 / 8)) == pytest.approx(8)
    assert perplexity(torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(2)


def feed(monitor, steps, make, rows=64, prototypes=256):
    torch.manual_seed(1)
    w = F.normalize(torch.randn(prototypes, 32), dim=1)
    for _ in range(steps):
        x = make(rows)
        monitor.update(x, F.normalize(x, dim=1), w, 0.05)


def spread(rows):
    return torch.randn(rows, 32)


def collapsed(rows):
    return torch.ones(rows, 32) + 1e-3 * torch.randn(rows, 1)


def test_fires_when_features_collapse():
    monitor = CollapseMonitor()
    feed(monitor, 16, spread)
    healthy = monitor.measure()
    assert healthy["effective_rank"] > 25 and healthy["prototypes_in_use"] > 128
    assert monitor.warnings(healthy, 256) == []
    feed(monitor, 80, collapsed)
    sick = monitor.measure()
    assert sick["effective_rank"] < 2 and sick["prototypes_in_use"] < 32
    first, second = monitor.warnings(sick, 256)
    assert "effective rank" in first and "few prototypes" in second and "half of what 1024 samples" in second


def test_a_new_encoder_has_its_grace():
    monitor = CollapseMonitor()
    feed(monitor, 20, collapsed)
    assert monitor.warnings(monitor.measure(), 256) == []
    feed(monitor, monitor.GRACE - 20, collapsed, rows=2)
    assert len(monitor.warnings(monitor.measure(), 256)) == 2


def test_no_warning_before_the_window_is_full():
    monitor = CollapseMonitor()
    feed(monitor, 600, collapsed, rows=1)
    assert monitor.measure()["window_rows"] == 600
    assert monitor.warnings(monitor.measure(), 256) == []
    assert monitor.warnings({}, 256) == []


@pytest.mark.parametrize("prototypes, bound", [(100, 50), (65536, 512)])
def test_bound_is_what_the_window_can_show(prototypes, bound):
    monitor = CollapseMonitor()
    monitor._steps = monitor.GRACE
    measures = {"effective_rank": 30.0, "prototypes_in_use": bound - 1.0, "window_rows": 1024.0}
    assert len(monitor.warnings(measures, prototypes)) == 1
    assert monitor.warnings({**measures, "prototypes_in_use": bound + 1.0}, prototypes) == []


@pytest.mark.parametrize("rows", [1, 7, 1000, 1024, 3000])
def test_ring_keeps_the_latest_rows(rows):
    monitor = CollapseMonitor()
    seen = []

    def make(n):
        seen.append(torch.randn(n, 32))
        return seen[-1]

    feed(monitor, 3, make, rows=rows)
    kept = torch.cat(seen)[-monitor.WINDOW :]
    ring = monitor._ring[: monitor._written]
    assert torch.equal(ring.sum(1).sort().values, kept.sum(1).sort().values)


def test_nothing_seen_yet():
    monitor = CollapseMonitor()
    assert monitor.measure() == {}
    feed(monitor, 1, spread, rows=1)
    assert monitor.measure() == {}
