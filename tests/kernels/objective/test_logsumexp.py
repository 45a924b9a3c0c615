"""Log-sum-exp along rows and, chunk by chunk, along columns, against float64."""

import pytest
import torch
from aot import ARCHITECTURES, SHARED_LIMIT, resources

from armillary.kernels.objective.logsumexp import (
    COLUMN_LAUNCH,
    ROW_LAUNCH,
    column_logsumexp_,
    column_logsumexp_reference,
    row_logsumexp,
    row_logsumexp_reference,
)

# under the interpreter numpy warns of the infinities that these tests are about
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

SHAPES = [(1, 1), (3, 63), (4, 64), (5, 65), (9, 131), (2, 1000)]
TRITON_TYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def close(ours, eager, exact):
    """Error at most twice that of the same in PyTorch, and a floor of two roundings."""
    floor = 3e-7 * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max() + floor


@pytest.mark.parametrize("dtype", TRITON_TYPE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_rows(shape, dtype, biased, device, poison_empty):
    x = (5 * torch.randn(shape, device=device)).to(dtype)
    bias = 5 * torch.randn(shape[1], device=device) if biased else None
    ours, eager = row_logsumexp(x, bias, impl="triton"), row_logsumexp_reference(x, bias)
    assert ours.dtype == torch.float32 and torch.equal(ours[0], eager[0])
    exact = row_logsumexp_reference(x.double(), bias)
    torch.testing.assert_close(exact.sum(0), (x.double() + (0 if bias is None else bias)).logsumexp(1))
    close(ours.double().sum(0), eager.double().sum(0), exact.sum(0))


@pytest.mark.parametrize("dtype", TRITON_TYPE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunks", [1, 2], ids=["whole", "in two"])
def test_columns(shape, dtype, chunks, device):
    x = (5 * torch.randn(shape, device=device)).to(dtype)
    bias = 5 * torch.randn(shape[1], device=device)
    sums = {impl: torch.full(shape[1:], -torch.inf, device=device) for impl in ("triton", "reference")}
    for impl, total in sums.items():
        for part in x.chunk(chunks):
            rows = row_logsumexp(part, bias, impl=impl)
            assert column_logsumexp_(total, part, bias, rows, impl=impl) is total
    close(sums["triton"], sums["reference"], (x.double() + bias).softmax(1).sum(0).log())


def test_columns_as_they_are(device):
    x = torch.randn(7, 70, device=device)
    sums = column_logsumexp_(torch.full((70,), -torch.inf, device=device), x, impl="triton")
    torch.testing.assert_close(sums, x.logsumexp(0))


@pytest.mark.parametrize("magnitude", [1e-30, 1e4, 3e38])
def test_extreme_logits(magnitude, device):
    x = magnitude * torch.linspace(-1, 1, 3 * 130, device=device).view(3, 130)
    high, log_total = row_logsumexp(x, impl="triton")
    exact = x.double() - x.double().amax(1, keepdim=True)
    torch.testing.assert_close(log_total, exact.logsumexp(1).float())
    assert torch.equal(high, x.amax(1))
    sums = column_logsumexp_(torch.full((130,), -torch.inf, device=device), x, impl="triton")
    torch.testing.assert_close(sums, x.double().logsumexp(0).float())


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_what_is_not_finite(impl, device):
    """-inf counts for nothing; NaN and +inf spoil their own row and column."""
    x = torch.randn(6, 150, device=device)
    x[0, :100] = -torch.inf  # whole blocks, and the start of a row
    x[1] = -torch.inf
    x[2, 140] = torch.nan
    x[3, 7] = torch.inf
    rows = row_logsumexp(x, impl=impl)
    torch.testing.assert_close(rows.sum(0)[[0, 4, 5]], x[[0, 4, 5]].logsumexp(1))
    assert rows[0, 1].isfinite() and rows[1, 1] == -torch.inf and rows[1, 2:4].isnan().all()
    columns = column_logsumexp_(torch.full((150,), -torch.inf, device=device), x, impl=impl)
    clean = torch.ones(150, dtype=torch.bool)
    clean[[7, 140]] = False
    torch.testing.assert_close(columns[clean], x[:, clean].logsumexp(0))
    assert columns[~clean].isnan().all()
    nothing = torch.full((2, 150), -torch.inf, device=device)
    assert (column_logsumexp_(torch.full((150,), -torch.inf, device=device), nothing, impl=impl) == -torch.inf).all()
    assert column_logsumexp_(columns.clone(), nothing, impl=impl).isnan().equal(~clean.to(device))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_rows(impl, device):
    assert row_logsumexp(torch.empty(0, 5, device=device), impl=impl).shape == (2, 0)
    sums = torch.randn(5, device=device)
    torch.testing.assert_close(column_logsumexp_(sums.clone(), torch.empty(0, 5, device=device), impl=impl), sums)


def test_the_same_bits_again(device):
    x, bias = torch.randn(5, 300, device=device), torch.randn(300, device=device)
    rows = row_logsumexp(x, bias, impl="triton")
    assert torch.equal(rows, row_logsumexp(x, bias, impl="triton"))
    assert torch.equal(rows[:, 2:3], row_logsumexp(x[2:3], bias, impl="triton"))


def test_float64_takes_pytorch(device):
    x = torch.randn(3, 9, dtype=torch.float64, device=device)
    torch.testing.assert_close(row_logsumexp(x).sum(0), x.logsumexp(1))
    sums = torch.zeros(9, dtype=torch.float64, device=device)
    torch.testing.assert_close(column_logsumexp_(sums, x), column_logsumexp_reference(torch.zeros_like(sums), x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: row_logsumexp(x[0]), r"row_logsumexp: x must have shape \[R, V\], got \[6\]"),
        (lambda x: row_logsumexp(x.T), r"row_logsumexp: x must be contiguous"),
        (lambda x: row_logsumexp(x, x[0, :5]), r"row_logsumexp: bias must have shape \[6\], got \[5\]"),
        (lambda x: row_logsumexp(x, impl="cuda"), r"row_logsumexp: impl must be one of .*, got 'cuda'"),
        (lambda x: row_logsumexp(x.double(), impl="triton"), r"row_logsumexp: impl must be .* for torch.float64"),
        (lambda x: row_logsumexp(x, x[0].double(), impl="triton"), r"row_logsumexp: bias must be torch.float32"),
        (lambda x: column_logsumexp_(x[0, :4], x), r"column_logsumexp_: sums must have shape \[6\], got \[4\]"),
        (lambda x: column_logsumexp_(x[0].half(), x.half()), r"column_logsumexp_: sums must be torch.float32"),
        (lambda x: column_logsumexp_(x[0], x, x[0, :2]), r"column_logsumexp_: bias must have shape \[6\], got \[2\]"),
        (lambda x: column_logsumexp_(x[0], x, None, x[:2]), r"column_logsumexp_: rows must have shape \[2, 4\]"),
    ],
)
def test_bad_inputs(call, message, device):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 6, device=device))


POINTERS = {"bias_ptr": "*fp32", "rows_ptr": "*fp32", "sums_ptr": "*fp32"}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_compiles_without_spilling(sm, dtype):
    row, column = ROW_LAUNCH[sm], COLUMN_LAUNCH[sm]
    used = resources(
        "armillary.kernels.objective.logsumexp:_row_logsumexp_kernel",
        {"x_ptr": f"*{dtype}", "bias_ptr": "*fp32", "out_ptr": "*fp32", "columns": "i32"},
        row.blocks,
        divisible=("columns",),
        num_warps=row.num_warps,
    )[sm]
    assert used.stack == used.local == 0 and used.shared <= SHARED_LIMIT[sm], used
    assert "ld.global.v4" in used.ptx
    used = resources(
        "armillary.kernels.objective.logsumexp:_column_logsumexp_kernel",
        {"x_ptr": f"*{dtype}", **POINTERS, "rows": "i32", "columns": "i32"},
        column.blocks,
        divisible=("columns",),
        num_warps=column.num_warps,
    )[sm]
    assert used.stack == used.local == 0 and used.shared <= SHARED_LIMIT[sm], used
    assert "ld.global.v4" in used.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("v", [65536, 131072])
def test_on_a_gpu(v):
    x = (8 * torch.randn(512, v, device="cuda")).bfloat16()
    bias = torch.randn(v, device="cuda")
    rows, eager = row_logsumexp(x, bias), row_logsumexp_reference(x, bias)
    close(rows.double().sum(0), eager.double().sum(0), (x.double() + bias).logsumexp(1))
    sums = torch.full((v,), -torch.inf, device="cuda")
    eager = column_logsumexp_reference(sums, x, bias, eager)
    for part in x.split(200):
        column_logsumexp_(sums, part, bias, row_logsumexp(part, bias))
    close(sums, eager, (x.double() + bias).softmax(1).sum(0).log())
