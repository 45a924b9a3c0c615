import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from armillary.engine.evaluate.posterior import calibration, flow_training
from armillary.engine.evaluate.posterior.flow_scaling import Scaling
from armillary.engine.evaluate.posterior.flows import PRESETS, FlowEnsemble, FlowOptions

TINY = FlowOptions(
    members=2, transforms=(1, 2), hidden=(16, 24), epochs=12, patience=3, batch=128, learning_rate=5e-3, held_out=0.2
)


def gaussian(count, *, seed=0, parameters=2, dimensions=4):
    """Embeddings and parameters of a known posterior: mean and spread depend on the embedding; units differ."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, dimensions))
    mean = np.stack([x[:, 0] + 0.5 * x[:, 1], -x[:, 2]], 1)[:, :parameters]
    sigma = 0.3 * np.exp(0.4 * x[:, 3])
    z = rng.standard_normal((count, 2))
    z = np.stack([z[:, 0], 0.8 * z[:, 0] + 0.6 * z[:, 1]], 1)[:, :parameters]  # correlated: 0.8
    scale, shift = np.array([1.0, 100.0])[:parameters], np.array([0.0, 10.0])[:parameters]
    theta = shift + scale * (mean + sigma[:, None] * z)
    determinant = 0.6 if parameters == 2 else 1.0
    log_prob = (
        -parameters / 2 * math.log(2 * math.pi)
        - math.log(determinant)
        - parameters * np.log(sigma)
        - np.log(scale).sum()
        - 0.5 * (z[:, 0] ** 2 + (((z[:, -1] - 0.8 * z[:, 0]) / 0.6) ** 2 if parameters == 2 else 0))
    )
    return x.astype(np.float32), theta, log_prob


@pytest.fixture(scope="module")
def fitted():
    x, theta, _ = gaussian(1200)
    return FlowEnsemble.fit(
        x, theta, replace(TINY, transforms=(1, 1), hidden=(24, 32), epochs=25, patience=25, learning_rate=1e-2)
    )


def test_flows_learn_a_known_posterior(fitted):
    x, theta, exact = gaussian(600, seed=1)
    divergence = (exact - fitted.log_prob(x, theta)).mean()
    assert 0 < divergence < 0.48  # 0.22 +- 0.06 over 8 seeds; flows without the correlation would lack 0.51
    unconditional = -np.log(2 * math.pi * math.e) - np.log(theta.std(0)).sum()
    assert fitted.log_prob(x, theta).mean() > unconditional + 2.6  # 2.91 +- 0.07


def test_their_draws_are_calibrated(fitted):
    x, theta, _ = gaussian(400, seed=2)
    draws = fitted.sample(x, 100, torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    bound = 1.6 * calibration.chance_deviation(400)  # over 8 seeds 0.58 +- 0.22, and 0.70 +- 0.21 for the worse PIT
    assert calibration.tarp(draws, theta, rng).test.deviation < bound
    assert all(calibration.uniformity(v).deviation < bound for v in calibration.pit(draws, theta, rng).T)


def test_draws_carry_the_correlation(fitted):
    draws = fitted.sample(np.zeros((1, 4), np.float32), 3000, torch.Generator().manual_seed(0))[0]
    assert np.corrcoef(draws.T)[0, 1] == pytest.approx(0.8, abs=0.3)  # 0.76 +- 0.06 over 8 seeds


def test_independent_flows_factorise():
    x, theta, _ = gaussian(600)
    ensemble = FlowEnsemble.fit(x, theta, replace(TINY, members=1, independent=True, epochs=4))
    point, other = theta[:1].copy(), theta[:1].copy()
    other[0, 0] += 0.3
    far = np.array([[0.0, 150.0]])
    gain = ensemble.log_prob(x[:1], other) - ensemble.log_prob(x[:1], point)
    np.testing.assert_allclose(
        gain, ensemble.log_prob(x[:1], other + far) - ensemble.log_prob(x[:1], point + far), atol=1e-4
    )


def test_density_integrates_to_one_in_the_parameters_units(fitted):
    x = gaussian(1, seed=3)[0]
    draws = fitted.sample(x, 2000, torch.Generator().manual_seed(0))[0]
    axes = [np.linspace(*np.quantile(d, [0, 1]) + np.array([-0.7, 0.7]) * np.ptp(d), 160) for d in draws.T]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(fitted.log_prob(np.repeat(x, len(grid), 0), grid)).reshape(160, 160)
    assert np.trapezoid(np.trapezoid(density, axes[1]), axes[0]) == pytest.approx(1, abs=0.01)


def test_nll_is_in_standardised_units(fitted):
    x, theta, _ = gaussian(300, seed=4)
    nll = fitted.nll(x, theta)
    jacobian = np.log(gaussian(1200)[1].std(0)).sum()
    assert nll.mixture == pytest.approx(-(fitted.log_prob(x, theta).mean() + jacobian), abs=1e-5)
    assert nll.members.shape == (2,) and nll.mixture <= nll.mean
    assert nll.std == pytest.approx(abs(nll.members[0] - nll.members[1]) / math.sqrt(2))


def test_nll_does_not_depend_on_units():
    x, theta, _ = gaussian(200)
    scale, shift = np.array([1e-4, 1e5]), np.array([3.0, -1e4])
    options = replace(TINY, members=1, epochs=2)
    one = FlowEnsemble.fit(x, theta, options).nll(x, theta).mean
    two = FlowEnsemble.fit(x * 1e3 - 50, theta * scale + shift, options).nll(x * 1e3 - 50, theta * scale + shift).mean
    assert one == pytest.approx(two, abs=1e-3)


def test_the_mixture_averages_densities(fitted):
    x, theta, _ = gaussian(50, seed=5)
    each = [replace(fitted, members=(m,)).log_prob(x, theta) for m in fitted.members]
    np.testing.assert_allclose(np.exp(fitted.log_prob(x, theta)), np.exp(each).mean(0), rtol=1e-9)
    assert math.isnan(replace(fitted, members=fitted.members[:1]).nll(x, theta).std)


def test_equal_seeds_give_equal_flows_and_draws():
    x, theta, _ = gaussian(200)
    options = replace(TINY, epochs=2)
    torch.manual_seed(1)
    one = FlowEnsemble.fit(x, theta, options)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = FlowEnsemble.fit(x, theta, options)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    np.testing.assert_array_equal(one.log_prob(x, theta), two.log_prob(x, theta))
    draws = [e.sample(x[:5], 7, torch.Generator().manual_seed(3)) for e in (one, two)]
    np.testing.assert_array_equal(*draws)
    assert draws[0].shape == (5, 7, 2)
    other = FlowEnsemble.fit(x, theta, replace(options, seed=1))
    assert [m.seed for m in other.members] != [m.seed for m in one.members]
    assert (other.log_prob(x, theta) != one.log_prob(x, theta)).any()


def test_the_best_weights_are_restored():
    """Few samples and a large step overfit at once: the last epoch is far from the best."""
    x, theta, _ = gaussian(60)
    ensemble = FlowEnsemble.fit(x, theta, replace(TINY, members=1, epochs=100, patience=20, learning_rate=0.02))
    (member,) = ensemble.members
    assert len(member.history) == member.best_epoch + 1 + 20 < 100  # 38 +- 9 over 10 seeds
    assert member.history[-1] > min(member.history) + 0.05  # 0.8 over 10 seeds, to a factor of 1.7: e^(-0.2 +- 0.5)
    held = ensemble.nll(x[member.held_out], theta[member.held_out]).mean
    assert held == pytest.approx(min(member.history), abs=1e-5)


def test_members_hold_out_the_asked_fraction():
    x, theta, _ = gaussian(100)
    first, second = FlowEnsemble.fit(x, theta, replace(TINY, epochs=1)).members
    assert len(first.held_out) == 20 and len(np.unique(first.held_out)) == 20
    assert not np.array_equal(first.held_out, second.held_out)


def test_rows_without_a_label_are_dropped_and_counted():
    x, theta, _ = gaussian(120)
    options = replace(TINY, members=1, epochs=2)
    clean = FlowEnsemble.fit(x[20:], theta[20:], options)
    theta[:20, 1] = np.nan
    ensemble = FlowEnsemble.fit(x, theta, options)
    assert ensemble.dropped == 20 and clean.dropped == 0
    np.testing.assert_array_equal(ensemble.log_prob(x[30:], theta[30:]), clean.log_prob(x[30:], theta[30:]))
    assert ensemble.nll(x, theta).samples == 100


def test_one_parameter_on_a_grid():
    x, theta, _ = gaussian(600, parameters=1)
    ensemble = FlowEnsemble.fit(x, theta, replace(TINY, epochs=6))
    grid = np.linspace(-6, 6, 1501)
    density, cdf = ensemble.on_grid(x[:3], grid)
    np.testing.assert_allclose(np.trapezoid(density, grid, axis=1), 1, atol=2e-3)
    steps = np.cumsum(np.diff(grid) * (density[:, 1:] + density[:, :-1]) / 2, axis=1)
    np.testing.assert_allclose(cdf[:, 1:] - cdf[:, :1], steps, atol=3e-3)
    repeated = ensemble.log_prob(np.repeat(x[:3], len(grid), 0), np.tile(grid, 3)[:, None]).reshape(3, -1)
    np.testing.assert_allclose(density, np.exp(repeated), rtol=1e-3, atol=1e-8)
    draws = ensemble.sample(x[:3], 4000, torch.Generator().manual_seed(0))[..., 0]
    for row, c in zip(draws, cdf, strict=True):
        assert (
            calibration.uniformity(np.interp(row, grid, c)).p_value > 1e-5
        )  # uniform within 0 and 1 where all is well


def test_parts_of_a_large_request_join_up(fitted, monkeypatch):
    x, theta, _ = gaussian(40, seed=6)
    whole = fitted.log_prob(x, theta), fitted.sample(x, 5, torch.Generator().manual_seed(0))
    monkeypatch.setattr("armillary.engine.evaluate.posterior.flows.CHUNK", 7)
    np.testing.assert_allclose(fitted.log_prob(x, theta), whole[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fitted.sample(x, 5, torch.Generator().manual_seed(0)), whole[1], rtol=1e-3, atol=1e-3)


def test_principal_components_keep_what_varies_most():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 20)) + 1e-3 * rng.standard_normal((400, 20))
    scaling = Scaling.fit(x.astype(np.float32), rng.standard_normal((400, 1)), 3)
    reduced = scaling.context(x.astype(np.float32)).numpy()
    assert reduced.shape == (400, 3)
    assert (reduced**2).mean() == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(np.cov(reduced.T) - np.diag(np.cov(reduced.T).diagonal()), 0, atol=1e-4)
    z = (x - x.mean(0)) / x.std(0)
    rebuilt = reduced @ np.linalg.lstsq(reduced, z, rcond=None)[0]
    # The noise that was added, 1e-3, and no more: 1.02e-3 +- 0.09e-3 over 40 seeds.
    assert np.sqrt(np.square((rebuilt - z) * x.std(0)).mean()) < 1.5e-3


def test_constant_dimensions_become_zero():
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    x[:, 1] = 7.0
    assert (Scaling.fit(x, x[:, :1].astype(float), None).context(x)[:, 1] == 0).all()


def test_fewer_dimensions_than_components_are_kept():
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    assert Scaling.fit(x, x[:, :1].astype(float), 3).axes is None


def test_a_diverging_member_starts_again_more_slowly(monkeypatch):
    x, theta, _ = gaussian(100)
    true_loss, calls = flow_training._loss, []

    def loss(flow, *data):
        calls.append(0)
        return true_loss(flow, *data) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(flow_training, "_loss", loss)
    (member,) = FlowEnsemble.fit(x, theta, replace(TINY, members=1, epochs=2)).members
    assert member.learning_rate == pytest.approx(TINY.learning_rate / 10)
    assert all(map(math.isfinite, member.history)) and len(member.history) == 2


def test_a_held_out_loss_that_is_not_finite_counts_too(monkeypatch):
    x, theta, _ = gaussian(100)
    true_loss = flow_training._loss
    monkeypatch.setattr(
        flow_training, "_loss", lambda f, *d: true_loss(f, *d) * (1 if torch.is_grad_enabled() else math.inf)
    )
    with pytest.raises(FloatingPointError, match="member 0"):
        FlowEnsemble.fit(x, theta, replace(TINY, epochs=1))


def test_a_member_that_never_converges_is_named(monkeypatch):
    x, theta, _ = gaussian(100)
    monkeypatch.setattr(flow_training, "_loss", lambda flow, *_: sum(p.sum() for p in flow.parameters()) * math.nan)
    with pytest.raises(
        FloatingPointError, match=r"member 0 \(\d transforms, \d+ wide, seed \d+\).*0.005 down to 5e-06"
    ):
        FlowEnsemble.fit(x, theta, TINY)


@pytest.mark.parametrize("name", list(PRESETS))
def test_members_are_drawn_from_the_presets_range(name):
    options = PRESETS[name]
    rng = np.random.default_rng(0)
    plans = [flow_training._draw(i, rng, options) for i in range(300)]
    transforms, hidden = [p.transforms for p in plans], [p.hidden for p in plans]
    assert (min(transforms), max(transforms)) == options.transforms
    assert options.hidden[0] <= min(hidden) <= options.hidden[0] + 3
    assert options.hidden[1] - 3 <= max(hidden) <= options.hidden[1]
    assert len({p.seed for p in plans}) == 300


def test_presets_of_the_paper_and_its_code():
    paper, released = PRESETS["paper"], PRESETS["released"]
    assert (paper.transforms, paper.hidden, paper.patience, paper.independent) == ((3, 6), (32, 128), 20, False)
    assert (released.transforms, released.hidden, released.epochs) == ((2, 3), (16, 32), 25)
    assert {(o.bins, o.batch, o.learning_rate, o.members) for o in (paper, released)} == {(8, 128, 5e-4, 10)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"members": 0}, "members: must be positive"),
        ({"transforms": (3, 2)}, "transforms: need"),
        ({"hidden": (0, 8)}, "hidden: need"),
        ({"bins": 1}, "bins"),
        ({"held_out": 1.0}, "held_out"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"components": 0}, "components"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x, t: (x[:10], t[:10]), "need 20 training samples with all parameters known, got 10"),
        (lambda x, t: (x[:9], t), "shapes: need embeddings"),
        (lambda x, t: (x, t[:, 0]), "shapes: need embeddings"),
        (lambda x, t: (np.where(x > 2, np.nan, x), t), "samples hold non-finite"),
        (lambda x, t: (x, t * [1, 0] + 3), "parameter 1 is constant"),
    ],
    ids=["few", "lengths", "one-axis", "nan-embedding", "constant"],
)
def test_bad_training_data(spoil, message):
    x, theta, _ = gaussian(60)
    with pytest.raises(ValueError, match=message):
        FlowEnsemble.fit(*spoil(x, theta), TINY)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e, x, t: e.log_prob(x[:, :3], t), "4 embedding dimensions and 2 parameters, got 3 and 2"),
        (lambda e, x, t: e.log_prob(x, np.full_like(t, np.nan)), "must be finite"),
        (lambda e, x, t: e.nll(x, np.full_like(t, np.nan)), "none of 9 samples"),
        (lambda e, x, t: e.sample(x, 0, torch.Generator()), "draws"),
        (lambda e, x, t: e.on_grid(x, np.linspace(0, 1, 5)), "one parameter, got one of 2"),
    ],
    ids=["dimensions", "nan", "all-nan", "no-draws", "grid-of-two"],
)
def test_bad_requests(fitted, call, message):
    x, theta, _ = gaussian(9)
    with pytest.raises(ValueError, match=message):
        call(fitted, x, theta)
