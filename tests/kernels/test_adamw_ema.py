"""AdamW with its average in one pass: against float64, and against torch's fused AdamW and lerp."""

import math

import pytest
import torch
from aot import ARCHITECTURES, SHARED_LIMIT, resources

from armillary.kernels.adamw_ema import LAUNCH, adamw_ema_, adamw_ema_reference

# under the interpreter numpy warns of what is meant to become infinite or NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

RATES = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.04}
NAMES = ("p", "m", "v", "ema")


class Shard:
    """Weights over some decades, their gradient and the state after some steps."""

    def __init__(self, n, dtype=torch.float32, average=True, device="cpu"):
        decades = torch.logspace(-6, 2, max(n, 1), device=device)[:n]
        self.p = torch.randn(n, device=device)
        self.grad = (decades * torch.randn(n, device=device)).to(dtype)
        self.m = 0.3 * decades * torch.randn(n, device=device)
        self.v = (decades * torch.randn(n, device=device)).square()
        self.ema = torch.randn(n, device=device) if average else None

    def copy(self, dtype=None):
        other = object.__new__(Shard)
        for name, x in vars(self).items():
            value = None if x is None else x.to(dtype if name != "grad" else None, copy=True)
            setattr(other, name, value)
        return other

    def step(self, function=adamw_ema_, **kwargs):
        function(self.p, self.grad, self.m, self.v, self.ema, **{**RATES, "step": 7, "momentum": 0.996, **kwargs})
        return self


def torchs(shard, *, step=7, momentum=0.996, grad_scale=None, **rates):
    """What the optimizer runs without Triton."""
    scale = None if grad_scale is None else torch.tensor(grad_scale, device=shard.p.device)
    count = torch.full((), float(step), device=shard.p.device)
    grad = shard.grad.float()
    lists = [[shard.p], [grad], [shard.m], [shard.v], [], [count]]
    torch._fused_adamw_(*lists, **(RATES | rates), amsgrad=False, maximize=False, grad_scale=scale)
    if shard.ema is not None:
        torch._foreach_lerp_([shard.ema], [shard.p], 1 - momentum)
    return shard


def agree_with_torch(ours, theirs, before):
    """Moments to 4 roundings of their larger term, weights to 2 and 16 of their change, the average to 4.

    float32 rounds to 6e-8. Each term is rounded a few times, fused or not as the compiler likes.
    """
    unit = 2.0**-24
    far = (theirs.p - before.p).abs()
    bounds = {
        "p": 2 * before.p.abs() + 16 * far,
        "m": 4 * (before.m.abs() + before.grad.float().abs()),
        "v": 4 * (before.v + before.grad.float().square()),
    }
    if before.ema is not None:
        bounds["ema"] = 4 * (before.ema.abs() + theirs.p.abs())
    for name, bound in bounds.items():
        error = (getattr(ours, name) - getattr(theirs, name)).abs()
        assert (error <= unit * bound).all(), name


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("average", [True, False], ids=["average", "no average"])
def test_agrees_with_torch(n, average, device, poison_empty):
    before = Shard(n, average=average, device=device)
    agree_with_torch(before.copy().step(impl="triton"), torchs(before.copy()), before)


@pytest.mark.parametrize("step", [1, 2, 1000, 10**6])
@pytest.mark.parametrize("grad_scale", [1.0, 3.7])
@pytest.mark.parametrize("momentum", [0.2, 0.9995])
def test_agrees_with_torch_at(step, grad_scale, momentum, device):
    before, rates = Shard(300, device=device), {"step": step, "grad_scale": grad_scale, "momentum": momentum}
    agree_with_torch(before.copy().step(impl="triton", **rates), torchs(before.copy(), **rates), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_at_most_twice_that_of_eager(dtype, device):
    """Against float64 from the same gradients, over ten steps."""
    ours, eager = (Shard(700, dtype, device=device) for _ in range(2))
    exact = ours.copy(torch.float64)
    eager = ours.copy()
    for step in range(1, 11):
        for shard, impl in ((ours, "triton"), (eager, "reference"), (exact, "auto")):
            shard.step(impl=impl, step=step, grad_scale=1.3, lr=0.01)
    for name in NAMES:
        x, e, o = (getattr(shard, name).double() for shard in (exact, eager, ours))
        assert exact.p.dtype == torch.float64 and ours.p.dtype == torch.float32
        assert (o - x).norm() <= 2 * (e - x).norm() + 1e-8 * x.norm()


def test_the_reference_is_torchs_adamw():
    shard = Shard(50).copy(torch.float64)
    theirs = torch.nn.Parameter(shard.p.clone())
    optimizer = torch.optim.AdamW([theirs], 1e-3, (0.9, 0.999), 1e-8, weight_decay=0.04)
    shard.m.zero_()
    shard.v.zero_()
    average = shard.ema.clone()
    for step in range(1, 6):
        theirs.grad = shard.grad.double() / 2.5
        optimizer.step()
        average.lerp_(theirs.detach(), 0.004)
        shard.step(adamw_ema_reference, step=step, grad_scale=2.5)
    torch.testing.assert_close(shard.p, theirs.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shard.ema, average, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_frozen_step_moves_moments_and_average_only(impl, device):
    before = Shard(200, device=device)
    after = before.copy().step(impl=impl, lr=0.0, weight_decay=0.0)
    assert torch.equal(after.p, before.p) and torch.equal(after.grad, before.grad)
    assert not torch.equal(after.m, before.m) and not torch.equal(after.v, before.v)
    torch.testing.assert_close(after.ema, before.ema.lerp(before.p, 1 - 0.996))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_ends_of_the_average(impl, device):
    before = Shard(200, device=device)
    still, jump = (before.copy().step(impl=impl, momentum=momentum) for momentum in (1, 0))
    assert torch.equal(still.ema, before.ema)
    assert torch.equal(jump.ema, jump.p) and not torch.equal(jump.p, before.p)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_spoils_only_its_element(impl, bad, device):
    before = Shard(200, device=device)
    clean = before.copy().step(impl=impl)
    before.grad[77] = bad
    others = torch.arange(200) != 77
    after = before.step(impl=impl)
    for name in NAMES:
        a, b = getattr(clean, name), getattr(after, name)
        assert torch.equal(a[others], b[others])
        assert not b[77].isfinite()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_nothing_to_do(impl, device):
    assert Shard(0, device=device).step(impl=impl).p.shape == (0,)


def test_any_shape_and_the_same_bits_again(device):
    shard = Shard(300, device=device)
    flat = shard.copy().step(impl="triton")
    again = shard.copy().step(impl="triton")
    for name in (*NAMES, "grad"):
        setattr(shard, name, getattr(shard, name).view(5, 60))
    shard.step(impl="triton")
    for name in NAMES:
        assert torch.equal(getattr(flat, name), getattr(again, name))
        assert torch.equal(getattr(flat, name).view(5, 60), getattr(shard, name))


def test_autograd_notices_the_change(device):
    """A backward pass through weights that were overwritten must raise, not use the new ones."""
    shard = Shard(10, device=device)
    shard.p = torch.nn.Parameter(shard.p)
    loss = shard.p.square().sum()
    shard.step(impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": torch.zeros(3).double(), "impl": "triton"}, r"adamw_ema_: impl must be .* for torch.float64"),
        ({"p": torch.zeros(3).half(), "impl": "triton"}, r"adamw_ema_: p must be torch.float32, got torch.float16"),
        ({"p": torch.zeros(3, 2).T}, r"adamw_ema_: p must be contiguous"),
        ({"grad": torch.zeros(4)}, r"adamw_ema_: grad must have shape \[3\], got \[4\]"),
        ({"grad": torch.zeros(3, dtype=torch.int32)}, r"adamw_ema_: grad must be torch.float32 or .*, got torch.int32"),
        ({"m": torch.zeros(2)}, r"adamw_ema_: m must have shape \[3\], got \[2\]"),
        ({"v": torch.zeros(3).half()}, r"adamw_ema_: v must be torch.float32, got torch.float16"),
        ({"ema": torch.zeros(3).bfloat16()}, r"adamw_ema_: ema must be torch.float32, got torch.bfloat16"),
        ({"step": 0}, r"adamw_ema_: step must be at least 1, got 0"),
        ({"beta1": 1.0}, r"adamw_ema_: beta1 must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, r"adamw_ema_: beta2 must be in \[0, 1\), got -0.1"),
        ({"eps": -1e-8}, r"adamw_ema_: eps must be at least 0, got -1e-08"),
        ({"grad_scale": 0.0}, r"adamw_ema_: grad_scale must be positive, got 0.0"),
        ({"grad_scale": math.nan}, r"adamw_ema_: grad_scale must be positive, got nan"),
        ({"momentum": 1.5}, r"adamw_ema_: momentum must be in \[0, 1\], got 1.5"),
        ({"impl": "fused"}, r"adamw_ema_: impl must be one of auto, reference, triton, got '"),
    ],
)
def test_bad_inputs(change, message, device):
    arguments = dict.fromkeys(("p", "grad", "m", "v", "ema"), torch.zeros(3)) | RATES | {"step": 1} | change
    arguments = {name: x.to(device) if torch.is_tensor(x) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        adamw_ema_(**arguments)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(("grad", "count"), [("fp32", "i32"), ("bf16", "i64")])
def test_compiles_without_spilling(sm, grad, count):
    row = LAUNCH[sm]
    numbers = "grad_scale decay beta1 gain1 beta2 gain2 step_size root2 eps pull keep".split()
    used = resources(
        "armillary.kernels.adamw_ema:_adamw_ema_kernel",
        dict.fromkeys((f"{name}_ptr" for name in NAMES), "*fp32")
        | {"grad_ptr": f"*{grad}", "count": count}
        | dict.fromkeys(numbers, "fp32"),
        row.blocks,
        divisible=("count",),
        num_warps=row.num_warps,
    )[sm]
    assert used.stack == used.local == 0 and used.shared <= SHARED_LIMIT[sm], used
    assert "ld.global.v4" in used.ptx and "st.global.v4" in used.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    before = Shard(20_000_003, dtype, device="cuda")
    ours = before.copy()
    ours.step()  # compiles, which may wait for the device
    ours = before.copy()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    agree_with_torch(ours, torchs(before.copy()), before)
