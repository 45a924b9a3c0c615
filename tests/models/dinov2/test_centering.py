import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from two_ranks import run_on_two_ranks

from armillary.models.dinov2.centering import SoftmaxCentre, sinkhorn_bias


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def sinkhorn(logits, iterations):
    """Sinkhorn-Knopp on the [M, V] matrix itself, as the papers write it."""
    q = (logits - logits.max()).exp().T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk_rows", [1, 4, 256])
def test_sinkhorn_bias_gives_sinkhorn_targets(iterations, chunk_rows):
    features, prototypes = unit(9, 5), unit(12, 5)
    bias = sinkhorn_bias(features, prototypes, 0.05, iterations, chunk_rows)
    logits = features @ prototypes.T / 0.05
    torch.testing.assert_close((logits + bias).softmax(-1), sinkhorn(logits, iterations))


def test_sinkhorn_survives_small_temperatures_and_common_logits():
    features = unit(8, 16, dtype=torch.float32) * 1e-3 + unit(1, 16, dtype=torch.float32)
    prototypes = unit(40, 16, dtype=torch.float32)
    bias = sinkhorn_bias(features, prototypes, 2e-3)  # logits to +-500
    assert bias.isfinite().all()
    use = (features @ prototypes.T / 2e-3 + bias).softmax(-1).sum(0)
    assert use.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_kernels_are_as_exact_as_pytorch(iterations, dtype, device):
    """Targets against float64 of the same features, in chunks that do not divide the rows."""
    features, prototypes = (unit(*shape, dtype=dtype).to(device) for shape in ((11, 16), (150, 16)))
    logits = features.double() @ prototypes.double().T / 0.06
    exact = (logits + sinkhorn_bias(features.double(), prototypes.double(), 0.06, iterations)).softmax(-1)
    error = {}
    for impl in ("reference", "triton"):
        bias = sinkhorn_bias(features, prototypes, 0.06, iterations, 4, impl=impl)
        assert bias.dtype == torch.float32 and bias.shape == (150,)
        error[impl] = ((logits + bias).softmax(-1) - exact).norm() / exact.norm()
    assert error["triton"] <= 2 * error["reference"] + 1e-6


def test_sinkhorn_kernels_survive_small_temperatures(device):
    features = (unit(8, 16, dtype=torch.float32) * 1e-3 + unit(1, 16, dtype=torch.float32)).to(device)
    prototypes = unit(40, 16, dtype=torch.float32).to(device)
    ours, eager = (sinkhorn_bias(features, prototypes, 2e-3, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_sinkhorn_without_rows(impl, device):
    features, prototypes = torch.zeros(0, 5, device=device), unit(12, 5, dtype=torch.float32).to(device)
    bias = sinkhorn_bias(features, prototypes, 0.05, impl=impl)
    assert bias.shape == (12,) and bias.isfinite().all() and (bias == bias[0]).all()


def test_centre_is_the_lazy_mean_of_logits():
    centre = SoftmaxCentre(11, momentum=0.9)
    features, prototypes = unit(6, 4, dtype=torch.float32), unit(11, 4, dtype=torch.float32)
    before = centre.bias(0.05)
    finish = centre.start_update(features, prototypes)
    assert not before.any() and not centre.center.any()  # this step still sees the old centre
    finish()
    expected = 0.1 * (features @ prototypes.T).mean(0)
    torch.testing.assert_close(centre.center, expected)
    torch.testing.assert_close(centre.bias(0.05), -expected / 0.05)
    assert not before.any()
    centre.start_update(features[:0], prototypes)()
    torch.testing.assert_close(centre.center, expected)


@pytest.mark.parametrize(
    "cast", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.bfloat16)], ids=["bfloat16", "half", "to"]
)
def test_centre_stays_float32(cast):
    holder = nn.ModuleDict({"centre": SoftmaxCentre(3), "linear": nn.Linear(2, 2)})
    value = torch.tensor([1 / 3, 1e-6, -7.77777])
    holder["centre"].center.copy_(value)
    cast(holder)
    assert holder["linear"].weight.dtype != torch.float32
    assert torch.equal(holder["centre"].center, value) and holder["centre"].center.dtype == torch.float32
    assert "centre.center" in holder.state_dict()
    assert holder.to("meta")["centre"].center.is_meta


def _ranks_agree_with_one_process(rank):
    import triton

    from armillary.models.dinov2.centering import SoftmaxCentre, sinkhorn_bias

    torch.manual_seed(0)
    whole = torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=-1)
    prototypes = torch.nn.functional.normalize(torch.randn(12, 5, dtype=torch.float64), dim=-1)
    for cut in (3, 7, 0):  # 7 and 0: one rank has no rows
        mine = whole[:cut] if rank == 0 else whole[cut:]
        bias = sinkhorn_bias(mine, prototypes, 0.05, 3, 2)
        logits = whole @ prototypes.T / 0.05
        q = logits.exp().T
        for _ in range(3):
            q = q / q.sum(1, keepdim=True)
            q = q / q.sum(0, keepdim=True)
        torch.testing.assert_close((logits + bias).softmax(-1), q.T)
        centre = SoftmaxCentre(12)
        centre.start_update(mine.float(), prototypes.float())()
        rows = [r for r in (whole[:cut], whole[cut:]) if len(r)]
        mean = torch.stack([(r @ prototypes.T).mean(0) for r in rows]).mean(0)
        torch.testing.assert_close(centre.center, 0.1 * mean.float())
        both = [torch.empty(12), torch.empty(12)]
        dist.all_gather(both, centre.center)
        assert torch.equal(*both)
    if triton.knobs.runtime.interpret:  # the kernels' sums are reduced in the same way
        mine, single = (whole[:3], whole[3:])[rank].float(), prototypes.float()
        ours, eager = (sinkhorn_bias(mine, single, 0.05, 3, 2, impl=impl) for impl in ("triton", "reference"))
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
        none = whole[:0].float() if rank else whole.float()
        torch.testing.assert_close(sinkhorn_bias(none, single, 0.05, impl="triton"), eager, rtol=1e-5, atol=1e-5)
    empty = sinkhorn_bias(whole[:0], prototypes, 0.05)
    assert empty.isfinite().all() and (empty == empty[0]).all()


@pytest.mark.dist
def test_two_ranks(tmp_path):
    run_on_two_ranks(_ranks_agree_with_one_process, tmp_path)
