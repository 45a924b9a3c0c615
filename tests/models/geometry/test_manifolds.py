import math

import pytest
import torch

from armillary.models.geometry.manifolds import Curvature, distance, exp0, log0, mobius_add, project, sphere_normalise

CURVATURES = (1e-6, 1e-2, 1.0, 1e2)
DTYPES = [(torch.float64, "reference", 1e-12), (torch.float32, "reference", 2e-5), (torch.float32, "triton", 2e-5)]
of_each_precision = pytest.mark.parametrize(
    "dtype, impl, tolerance", DTYPES, ids=["float64", "float32", "float32-triton"]
)


@pytest.fixture(autouse=True)
def everything_on_the_device(device):
    with torch.device(device):
        yield


def tangents(lengths, width, dtype):
    u = torch.randn(len(lengths), width, dtype=torch.float64)
    return (u / u.norm(dim=1, keepdim=True) * torch.tensor(lengths, dtype=torch.float64)[:, None]).to(dtype)


def points(c, dtype, width=5, radii=(1e-6, 0.2, 0.5, 0.8, 0.95)):
    return tangents([r / c**0.5 for r in radii], width, dtype)


def close(got, expected, tolerance, per=None):
    scale = expected.norm(dim=-1, keepdim=True) if per is None else per
    return bool(((got - expected).norm(dim=-1, keepdim=True) <= tolerance * scale).all())


@of_each_precision
@pytest.mark.parametrize("c", CURVATURES)
def test_logarithm_and_exponential_are_inverse(c, dtype, impl, tolerance):
    decades = [10.0**d for d in range(-12, 4) if c**0.5 * 10.0**d < 2]
    u = tangents(decades, 7, dtype)
    assert close(log0(exp0(u, c, impl=impl), c, impl=impl), u, tolerance)
    x = points(c, dtype)
    assert close(exp0(log0(x, c, impl=impl), c, impl=impl), x, tolerance)


@of_each_precision
def test_the_flat_limit(dtype, impl, tolerance):
    c = 1e-12
    u, v = tangents([1e-3, 1.0, 10.0], 4, dtype), tangents([2.0, 1.0, 1e-2], 4, dtype)
    for flat in (exp0(u, c, impl=impl), log0(u, c, impl=impl), project(u, c, impl=impl)):
        assert close(flat, u, max(tolerance, 1e-9))
    assert close(mobius_add(u, v, c, impl=impl), u + v, max(tolerance, 1e-9))
    # Ganea et al.: the conformal factor is 2 at 0, so the distance tends to twice the Euclidean one.
    torch.testing.assert_close(distance(u, v, c, impl=impl), 2 * (u - v).norm(dim=1), rtol=max(tolerance, 1e-9), atol=0)


@of_each_precision
@pytest.mark.parametrize("c", CURVATURES)
def test_moebius_addition(c, dtype, impl, tolerance):
    x, y = points(c, dtype), points(c, dtype).flip(0)
    total = mobius_add(x, y, c, impl=impl)
    assert (c**0.5 * total.norm(dim=1) < 1).all()
    # Translations stretch errors by up to (1 - c |x|^2)^-1, here 10.
    assert close(mobius_add(-x, total, c, impl=impl), y, 20 * tolerance, per=1 / c**0.5)
    zero = torch.zeros_like(x)
    assert close(mobius_add(x, zero, c, impl=impl), x, tolerance)
    assert close(mobius_add(zero, x, c, impl=impl), x, tolerance)
    assert not mobius_add(-x, x, c, impl=impl).any()


@of_each_precision
@pytest.mark.parametrize("c", CURVATURES)
def test_distance_is_a_metric_invariant_under_translation_and_rotation(c, dtype, impl, tolerance):
    x, y, z = points(c, dtype), points(c, dtype).flip(0), points(c, dtype).roll(2, 0)
    d = distance(x, y, c, impl=impl)
    assert torch.equal(d, distance(y, x, c, impl=impl))
    assert not distance(x, x, c, impl=impl).any()
    assert (distance(x, z, c, impl=impl) <= (d + distance(y, z, c, impl=impl)) * (1 + tolerance)).all()
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    turned = distance(x @ rotation.to(dtype), y @ rotation.to(dtype), c, impl=impl)
    torch.testing.assert_close(turned, d, rtol=5 * tolerance, atol=0)
    by = 0.5 * z
    moved = distance(mobius_add(by, x, c, impl=impl), mobius_add(by, y, c, impl=impl), c, impl=impl)
    torch.testing.assert_close(moved, d, rtol=20 * tolerance, atol=0)


@of_each_precision
@pytest.mark.parametrize("c", CURVATURES)
def test_distance_from_the_origin(c, dtype, impl, tolerance):
    x = points(c, dtype)
    zero = torch.zeros_like(x)
    d = distance(zero, x, c, impl=impl)
    radius = c**0.5 * x.double().norm(dim=1)
    torch.testing.assert_close(d.double(), 2 / c**0.5 * radius.atanh(), rtol=tolerance, atol=0)
    torch.testing.assert_close(d, 2 * log0(x, c, impl=impl).norm(dim=1), rtol=tolerance, atol=0)
    u = tangents([1e-6 / c**0.5, 0.3 / c**0.5, 2 / c**0.5], 5, dtype)
    reached = distance(zero[:3], exp0(u, c, impl=impl), c, impl=impl)
    torch.testing.assert_close(reached, 2 * u.norm(dim=1), rtol=tolerance, atol=0)


@of_each_precision
@pytest.mark.parametrize("c", CURVATURES)
def test_projection_is_idempotent_and_leaves_the_ball_alone(c, dtype, impl, tolerance):
    x = points(c, dtype, radii=(0.0, 0.5, 0.99, 1.0, 2.0, 1e3))
    once = project(x, c, impl=impl)
    assert torch.equal(once[:3], x[:3])
    assert (c**0.5 * once.double().norm(dim=1) < 1).all()
    assert ((project(once, c, impl=impl) - once).abs() <= 2 * torch.finfo(dtype).eps * once.abs()).all()
    assert close(once[3:] / once[3:].norm(dim=1, keepdim=True), x[3:] / x[3:].norm(dim=1, keepdim=True), tolerance)


@of_each_precision
@pytest.mark.parametrize("kappa", [0.5, 3.0, -2.0])
def test_sphere(kappa, dtype, impl, tolerance):
    x = tangents([10.0**d for d in range(-12, 4)], 6, dtype)
    y = sphere_normalise(x, kappa, impl=impl)
    torch.testing.assert_close(y.norm(dim=1), torch.full((16,), abs(kappa), dtype=dtype), rtol=tolerance, atol=0)
    assert close(sphere_normalise(y, abs(kappa), impl=impl), y, tolerance)
    assert close(sphere_normalise(7 * x, kappa, impl=impl), y, tolerance)


def test_any_layout_and_broadcasting():
    x, y = 0.1 * torch.randn(3, 4, 5), 0.1 * torch.randn(5)
    assert torch.equal(exp0(x.transpose(0, 1), 1.0), exp0(x, 1.0).transpose(0, 1))
    assert torch.equal(mobius_add(x, y, 1.0), mobius_add(x, y.expand(3, 4, 5), 1.0))
    assert distance(x, y, 1.0).shape == (3, 4)
    bias = y.clone().requires_grad_()
    mobius_add(x, bias, 1.0).sum().backward()
    assert bias.grad.shape == (5,)


def descend(impl, steps, rows):
    """Losses of fitting c to the distances of rows of tangent vectors under c = 2, from 0.5; and the c reached."""
    generator = torch.Generator().manual_seed(3)
    u, v = 0.4 * torch.randn(2, rows, 3, generator=generator, device="cpu").to(torch.get_default_device())
    target = distance(exp0(u, 2.0, impl=impl), exp0(v, 2.0, impl=impl), 2.0, impl=impl)
    curvature = Curvature(0.5, 1e-2, 1e2)
    optimiser = torch.optim.Adam(curvature.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        c = curvature()
        moved = mobius_add(exp0(0.0 * u, c, impl=impl), exp0(u, c, impl=impl), c, impl=impl)
        loss = (distance(moved, exp0(v, c, impl=impl), c, impl=impl) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, curvature().item()


def test_a_curvature_is_learnt():
    losses, c = descend("reference", 150, 64)
    assert losses[-1] < 1e-4 * losses[0] and c == pytest.approx(2.0, rel=0.02)


def test_either_implementation_learns_alike():
    reference, triton = descend("reference", 8, 12), descend("triton", 8, 12)
    assert triton[0] == pytest.approx(reference[0], rel=1e-4) and triton[0][-1] < 0.8 * triton[0][0]


@pytest.mark.parametrize(
    "initial, c_min, c_max", [(1.0, 1e-2, 1e2), (0.013, 1e-2, 1e3), (50.0, 1e-6, 1e2), (0.3, 0.2, 0.4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_curvature_starts_at_its_initial_value_and_stays_in_bounds(initial, c_min, c_max, dtype):
    module = Curvature(initial, c_min, c_max).to(dtype)
    c = module()
    assert c.shape == () and c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert c.item() == pytest.approx(initial, rel=1e-7)
    c.backward()
    assert module.offset.grad.item() > 0
    for offset in (-1e4, -30.0, -1.0, 2.0, 30.0, 1e4):
        with torch.no_grad():
            module.offset.fill_(offset)
        assert c_min * (1 - 1e-7) <= module().item() <= c_max * (1 + 1e-7)
    module.reset_parameters()
    assert module().item() == pytest.approx(initial, rel=1e-7)


def test_curvature_moves_by_factors():
    module = Curvature(1.0, 1e-2, 1e2).double()
    steps = []
    for offset in (-0.4, 0.4):
        with torch.no_grad():
            module.offset.fill_(offset)
        steps.append(math.log(module().item()))
    assert steps[0] == pytest.approx(-steps[1]) and steps[1] > 0.3
    assert torch.autograd.gradcheck(
        lambda offset: torch.func.functional_call(module, {"offset": offset}), module.offset
    )


def test_curvature_state_is_one_tensor():
    module = Curvature(0.5)
    with torch.no_grad():
        module.offset.fill_(0.7)
    state = module.state_dict()
    assert list(state) == ["offset"] and state["offset"].shape == (1,)
    other = Curvature(0.5)
    other.load_state_dict(state)
    assert torch.equal(other(), module())


@pytest.mark.parametrize(
    "values", [(0.0, 0.0, 1.0), (1.0, 1.0, 2.0), (2.0, 1.0, 2.0), (1.0, -1.0, 2.0), (1.0, 0.5, math.inf)]
)
def test_curvature_refuses_bad_bounds(values):
    with pytest.raises(ValueError, match="Curvature: initial must lie strictly between"):
        Curvature(*values)


def test_errors_name_the_operation():
    x = torch.zeros(2, 3)
    for function in (exp0, log0, project):
        with pytest.raises(ValueError, match="radial_map: c must be finite and positive, got -1.0"):
            function(x, -1.0)
    with pytest.raises(ValueError, match="radial_map: kappa must be finite, got nan"):
        sphere_normalise(x, math.nan)
    for function in (mobius_add, distance):
        with pytest.raises(ValueError, match="c must be finite and positive, got 0.0"):
            function(x, x, 0.0)
