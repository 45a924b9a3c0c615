"""8-bit products: exact where the numbers are, scales, what is not finite, and what a GPU is asked for."""

import math

import pytest
import torch
import torch.nn.functional as F
from absent_gpu import absent_gpu
from aot import SHARED_LIMIT, resources

from armillary.kernels.mlp.fp8_linear import BACKWARD, FORWARD, LAUNCH, fp8_linear, to_fp8

ROWS = (1, 16, 37)


def whole(generator, largest, *shape, dtype=torch.float32):
    """Small whole numbers, which 8-bit floats hold exactly."""
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


def through(linear, x, weight, bias, dy):
    """y and the gradients of x, weight and bias."""
    given = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = linear(*given)
    return (y.detach(), *torch.autograd.grad(y, given, dy))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("power", [-30, 0, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_whole_numbers_are_exact(rows, power, dtype):
    g = torch.Generator().manual_seed(rows)
    x, weight, bias = whole(g, 3, rows, 32), whole(g, 2, 48, 32), whole(g, 2, 48)
    dy = whole(g, 1, rows, 48)
    factor = 2.0**power
    found = through(fp8_linear, factor * x.to(dtype), weight.to(dtype), factor * bias.to(dtype), dy.to(dtype) / factor)
    y, dx, dw, db = through(F.linear, x, weight, bias, dy)
    expected = factor * y, dx / factor, dw, db / factor
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs.to(dtype))


def test_the_largest_number_meets_the_largest_of_the_format():
    for dtype in (FORWARD, BACKWARD):
        limit = torch.finfo(dtype).max
        for value in (limit, limit * (1 + 1e-6), limit * (1 - 1e-6), 1e-20, 3.0):
            eight, _, scale = to_fp8(torch.tensor([[value, -value, 0.0]]), dtype)
            assert eight.float().isfinite().all() and limit / 2 * 0.99 <= eight.float().max() <= limit
            assert scale.log2() == scale.log2().round()
            assert float(eight.float().max() * scale) == pytest.approx(value, rel=2**-3)
    eight, _, scale = to_fp8(torch.zeros(2, 16), FORWARD)
    assert not eight.float().any() and scale.isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    x, weight, bias = torch.ones(3, 16), torch.ones(16, 16), torch.zeros(16)
    x[1, 2] = bad
    assert not fp8_linear(x, weight, bias)[1].isfinite().any()
    dy = torch.ones(3, 16)
    dy[0, 0] = bad
    assert not all(t.isfinite().all() for t in through(fp8_linear, torch.ones(3, 16), weight, bias, dy)[1:])


@pytest.mark.parametrize("fmt", [FORWARD, BACKWARD], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (37, 48), (64, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_makes_the_same_bits_as_pytorch(fmt, shape, dtype):
    # exact in the formats: Triton's interpreter drops the carry of a mantissa that is rounded up
    x = whole(torch.Generator().manual_seed(0), 3, *shape).to(dtype) * 2.0**-20
    x[0, :2] = torch.tensor([5 * 2.0**-15, -(2.0**-24)])
    ours, theirs = to_fp8(x, fmt, "triton"), to_fp8(x, fmt, "reference")
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.float(), b.float()) and a.dtype == b.dtype
    assert torch.equal(ours.columns[:, : len(x)].float(), ours.rows.float().t())
    assert ours.columns.shape[1] % 16 == 0 and not ours.columns[:, len(x) :].float().any()


@pytest.mark.parametrize("fmt", ["fp8e4nv", "fp8e5"])
def test_compiles_without_spilling(fmt):
    signature = {"x_ptr": "*bf16", "inverse_ptr": "*fp32", "rows_ptr": f"*{fmt}", "columns_ptr": f"*{fmt}"}
    sizes = dict.fromkeys(("M", "N", "PADDED"), "i32")
    row = LAUNCH[90]
    found = resources(
        "armillary.kernels.mlp.fp8_linear:_cast_kernel",
        signature | sizes,
        row.blocks,
        divisible=("N", "PADDED"),
        architectures=(90, 100),
        num_warps=row.num_warps,
    )
    for sm, used in found.items():
        assert used.stack == used.local == used.spills == 0 and used.shared <= SHARED_LIMIT[sm], (sm, used)


def test_errors_are_those_of_the_formats():
    """Normal numbers: a factor's rounding is 2^-4 of itself at most, 2^-4 / sqrt(12) to 2^-5 / sqrt(12) in the mean square."""
    g = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(*shape, generator=g) for shape in ((96, 64), (48, 64), (96, 48)))
    found = through(fp8_linear, x, weight, torch.zeros(48), dy)
    exact = through(F.linear, *(t.double() for t in (x, weight, torch.zeros(48), dy)))
    for ours, theirs, bits in zip(found[:3], exact[:3], (4, 3, 3), strict=True):
        error = float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())
        assert 0.2 * 2**-bits < error < 2**-bits, (bits, error)


def test_is_the_product_that_torch_makes():
    """torch._scaled_mm on a CPU, from the same 8-bit numbers."""
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(32, 64, generator=g), torch.randn(48, 64, generator=g)
    (a, _, a_scale), (b, _, b_scale) = to_fp8(x, FORWARD), to_fp8(weight, FORWARD)
    theirs = torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.float32)
    torch.testing.assert_close(fp8_linear(x, weight, None), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
def test_a_gpu_gets_factors_that_it_takes(rows):
    with absent_gpu(90) as gpu:
        x, weight = (torch.empty(*s, device="meta", dtype=torch.bfloat16) for s in ((rows, 32), (48, 32)))
        y = fp8_linear(
            x.requires_grad_(), weight.requires_grad_(), torch.empty(48, device="meta", dtype=torch.bfloat16)
        )
        y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.shape == x.shape and weight.grad.shape == weight.shape
    assert gpu.operations["_scaled_mm"] == 3
    padded = -(-rows // 16) * 16
    assert gpu.flops == 2 * 48 * 32 * (2 * rows + padded)


def test_bad_input_is_refused():
    x = torch.ones(2, 32)
    for wrong, message in (
        (
            (torch.ones(2, 24), torch.ones(16, 24), None),
            r"weight must have sides that are multiples of 16, got \[16, 24\]",
        ),
        ((x, torch.ones(15, 32), None), "multiples of 16"),
        ((x.half(), torch.ones(16, 32).half(), None), "x must be torch.float32 or torch.bfloat16"),
        ((x, torch.ones(16, 16), None), "weight must have shape"),
        ((x, torch.ones(16, 32), torch.ones(15)), "bias must have shape"),
    ):
        with pytest.raises(ValueError, match=f"fp8_linear: {message}" if " must" in message[:12] else message):
            fp8_linear(*wrong)
    with (
        absent_gpu(80),
        pytest.raises(ValueError, match=r"compute capability 8.9 or later for 8-bit products, got 8.0"),
    ):
        fp8_linear(torch.empty(16, 16, device="meta"), torch.empty(16, 16, device="meta"), None)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
def test_a_gpu_multiplies_as_the_emulation_does(rows):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit products")
    g = torch.Generator().manual_seed(rows)
    x, weight, bias, dy = (
        torch.randn(*s, generator=g).cuda().bfloat16() for s in ((rows, 256), (512, 256), (512,), (rows, 512))
    )
    ours = through(fp8_linear, x, weight, bias, dy)
    emulated = through(lambda *given: fp8_linear(*given, impl="reference"), x, weight, bias, dy)
    for fmt in (FORWARD, BACKWARD):
        for a, b in zip(to_fp8(x, fmt, "triton"), to_fp8(x, fmt), strict=True):
            assert torch.equal(a.float(), b.float())
    for a, b in zip(ours, emulated, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))
