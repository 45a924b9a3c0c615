"""Loss and in-place gradient of a chunk of logits against float64: PyTorch rows, Triton rows, and on a CPU those in C++ ("auto")."""

import pytest
import torch
from allocations import PeakBytes
from aot import ARCHITECTURES, SHARED_LIMIT, resources

from armillary.kernels.objective.prototype_rows import LAUNCH, TILE_BYTES, prototype_rows_, prototype_rows_reference

# under the interpreter numpy warns of the infinities that these tests are about
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

IBOT = ((1.0,),)
DINO = ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (1.0, 1.0))
UNEVEN = ((0.5, 0.0, -2.0), (0.0, 0.0, 0.0))
PAIRS = {"ibot": IBOT, "dino": DINO, "uneven": UNEVEN}
SCALE = 10.0


class Chunk:
    """Logits of one piece; weights with a 0 among them."""

    def __init__(self, factors, n=3, v=130, dtype=torch.float32, bias=True, size=4.0, device="cpu"):
        self.factors = factors
        self.x = (size * torch.randn(len(factors), n, v)).to(device, dtype)
        self.y = (size * torch.randn(len(factors[0]), n, v)).to(device, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self.bias = torch.randn(v, dtype=wide, device=device) if bias else None
        self.weight = torch.rand(len(factors), n, dtype=wide, device=device)
        if n:
            self.weight[0, 0] = 0

    def rows(self, impl="triton", **kwargs):
        """Losses, and what the logits become."""
        x = self.x.clone()
        loss = prototype_rows_(x, self.y, self.factors, self.bias, self.weight, scale=SCALE, impl=impl, **kwargs)
        return loss, x

    def exact(self):
        """In float64, of the same logits, from the definition and by autograd."""
        x = self.x.double().requires_grad_()
        target = (self.y.double() + (0 if self.bias is None else self.bias.double())).softmax(-1)
        pairs = torch.tensor(self.factors, dtype=torch.float64, device=x.device)
        loss = -torch.einsum("sj,jnv,snv->sn", pairs, target, x.log_softmax(-1))
        (gradient,) = torch.autograd.grad((self.weight.double() * loss).sum() * SCALE, x)
        return loss.detach(), gradient


def check(chunk, ours, eager):
    """The 2x rule, for the losses and for the gradient of every row."""
    loss, gradient = chunk.exact()
    bound = 2 * (eager[0].double() - loss).abs().max() + 3e-7 * (1 + loss.abs().max())
    assert (ours[0].double() - loss).abs().max() <= bound
    # the interpreter truncates to bf16 where hardware rounds: at most twice the error
    floor = 1e-6 if ours[1].dtype == torch.float32 else 1e-3 * (8 if ours[1].dtype == torch.bfloat16 else 1)
    error, allowed = ((g.double() - gradient).norm(dim=-1) for g in (ours[1], eager[1]))
    assert (error <= 2 * allowed + floor * (1e-6 + gradient.norm(dim=-1))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [1, 63, 64, 131])
@pytest.mark.parametrize("factors", PAIRS.values(), ids=PAIRS)
def test_loss_and_gradient(factors, v, dtype, device, poison_empty):
    chunk = Chunk(factors, v=v, dtype=dtype, bias=v != 63, device=device)
    check(chunk, chunk.rows(), chunk.rows("reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v", [1, 15, 511, 512, 1100])  # blocks are of 512
@pytest.mark.parametrize("factors", PAIRS.values(), ids=PAIRS)
def test_loss_and_gradient_in_cpp(factors, v, dtype, poison_empty):
    chunk = Chunk(factors, n=4, v=v, dtype=dtype, bias=v != 511)
    one = chunk.rows("auto")
    check(chunk, one, chunk.rows("reference"))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(one, chunk.rows("auto"), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_logits_that_fall_from_block_to_block():
    """Sums of blocks are joined by the row's greatest logit; far below it they vanish."""
    chunk = Chunk(DINO, v=2048)
    for logits in (chunk.x, chunk.y):
        logits += torch.linspace(0, -300, 2048)
    check(chunk, chunk.rows("auto"), chunk.rows("reference"))
    chunk.x[2, 0, :600] = chunk.y[0, 0, :600] = -torch.inf  # a whole block
    chunk.bias[1024:] = -torch.inf
    loss, gradient = chunk.rows("auto")
    expected, expected_gradient = chunk.rows("reference")
    torch.testing.assert_close(loss, expected, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)


@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_of_ten_thousand(dtype, impl, device):
    chunk = Chunk(DINO, dtype=dtype, device=device)
    for logits in (chunk.x, chunk.y):
        logits.copy_(torch.where(torch.rand_like(logits.float()) < 0.5, -1e4, 1e4) + logits.float())
    loss, gradient = chunk.rows(impl)
    assert loss.isfinite().all() and gradient.isfinite().all()
    check(chunk, (loss, gradient), chunk.rows("reference"))


@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
@pytest.mark.parametrize("low", [-1e4, -1e30, -torch.inf])
def test_a_bias_that_rules_prototypes_out(low, impl, device):
    chunk = Chunk(DINO, device=device)
    chunk.bias[:70] = low  # more than a block
    loss, gradient = chunk.rows(impl)
    check(chunk, (loss, gradient), chunk.rows("reference"))
    assert (gradient[2:, 1:, :70] > 0).all()  # only pushed down


@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_rows_spoil_only_themselves(bad, impl, device):
    chunk = Chunk(DINO, n=5, device=device)
    clean = chunk.rows(impl)
    chunk.x[2, 1, 77] = bad
    chunk.y[1, 3, 5] = bad
    spoilt = torch.zeros(4, 5, dtype=torch.bool)
    spoilt[2, 1] = True
    spoilt[[0, 2, 3], 3] = True  # student 1 does not look at teacher 1
    for before, after in zip(clean, chunk.rows(impl), strict=True):
        assert torch.equal(before[~spoilt], after[~spoilt])
        assert after[spoilt].isnan().flatten(1).any(1).all() if after.dim() > 2 else after[spoilt].isnan().all()


@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
def test_minus_infinity_in_a_students_logits(impl, device):
    """A target on an impossible prototype costs infinitely much; the other rows do not notice."""
    chunk = Chunk(IBOT, device=device)
    clean, _ = chunk.rows(impl)
    chunk.x[0, 1, 3] = -torch.inf
    loss, gradient = chunk.rows(impl)
    assert loss[0, 1] == torch.inf and torch.equal(loss[0, [0, 2]], clean[0, [0, 2]])
    assert gradient.isfinite().all() and gradient[0, 1, 3] < 0


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_a_weight_of_zero(impl, device):
    chunk = Chunk(DINO, device=device)
    loss, gradient = chunk.rows(impl)
    assert loss[0, 0] > 0 and not gradient[0, 0].any() and gradient[0, 1].any()


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_a_weight_for_all_rows(impl, device):
    chunk = Chunk(DINO, device=device)
    chunk.weight = torch.full((1, 1), 0.3, device=device).expand(4, 3)
    expanded = chunk.rows(impl)
    chunk.weight = chunk.weight.contiguous()
    assert all(torch.equal(a, b) for a, b in zip(expanded, chunk.rows(impl), strict=True))
    chunk.weight = torch.full((3, 4), 0.3, device=device).T
    assert all(torch.equal(a, b) for a, b in zip(expanded, chunk.rows(impl), strict=True))


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_rows_do_not_depend_on_their_company(impl, device):
    chunk = Chunk(DINO, n=6, device=device)
    whole = chunk.rows(impl)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunk.rows(impl), strict=True))
    for name in ("x", "y", "weight"):
        setattr(chunk, name, getattr(chunk, name)[:, 4:5].contiguous())
    assert all(torch.equal(a[:, 4:5], b) for a, b in zip(whole, chunk.rows(impl), strict=True))


@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
def test_without_gradient_the_logits_stay(impl, device):
    chunk = Chunk(DINO, device=device)
    loss, x = chunk.rows(impl, gradient=False)
    assert torch.equal(x, chunk.x) and torch.equal(loss, chunk.rows(impl)[0])


@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
def test_no_rows(impl, device):
    loss, x = Chunk(DINO, n=0, device=device).rows(impl)
    assert loss.shape == (4, 0) and x.shape == (4, 0, 130)


def test_pytorch_rows_in_tiles(monkeypatch):
    chunk = Chunk(DINO, n=7)
    whole = chunk.rows("reference")
    monkeypatch.setattr("armillary.kernels.objective.prototype_rows.TILE_BYTES", 4 * 130 * 2 * 2)
    assert TILE_BYTES > 4 * 130 * 2 * 2
    assert all(torch.equal(a, b) for a, b in zip(whole, chunk.rows("reference"), strict=True))


def on(device, arguments):
    return {name: x.to(device) if torch.is_tensor(x) else x for name, x in arguments.items()}


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, chunk):
        work = x.clone()
        loss = prototype_rows_reference(work, chunk.y, chunk.factors, chunk.bias, chunk.weight, scale=1.0)
        ctx.save_for_backward(work)
        return (loss * chunk.weight).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None


@pytest.mark.parametrize("factors", PAIRS.values(), ids=PAIRS)
def test_gradcheck_of_the_pytorch_rows(factors):
    chunk = Chunk(factors, n=2, v=5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _Rows.apply(x, chunk), chunk.x.requires_grad_())


def test_memory_beyond_the_chunk(device):
    """One float32 a student row (its loss) and two a teacher row (its log-sum-exp); the factors are kept."""
    chunk = Chunk(DINO, n=2, dtype=torch.bfloat16, device=device)
    x = chunk.x.clone()
    for _ in range(2):
        with PeakBytes() as mode:
            prototype_rows_(x, chunk.y, DINO, chunk.bias, chunk.weight, scale=SCALE, impl="triton")
    assert mode.peak == 4 * 4 * 2 + 8 * 2 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"prototype_rows_: x must have shape \[S, n, V\], got \[2, 3\]"),
        ({"x": torch.zeros(4, 6, 3).mT}, r"prototype_rows_: x must be contiguous"),
        ({"y": torch.zeros(2, 3, 5)}, r"prototype_rows_: y must have shape \[J, 3, 6\], got \[2, 3, 5\]"),
        ({"y": torch.zeros(2, 3, 6).half()}, r"prototype_rows_: y must be torch.float32, got torch.float16"),
        ({"factors": DINO[:3]}, r"prototype_rows_: factors must be 4 rows of 2"),
        ({"factors": ((1.0,),) * 4}, r"prototype_rows_: factors must be 4 rows of 2"),
        ({"bias": torch.zeros(5)}, r"prototype_rows_: bias must have shape \[6\], got \[5\]"),
        ({"bias": torch.zeros(6).double(), "impl": "triton"}, r"prototype_rows_: bias must be torch.float32"),
        ({"weight": torch.zeros(4, 1)}, r"prototype_rows_: weight must be torch.float32 \[4, 3\] on c"),
        ({"weight": torch.zeros(4, 3).half()}, r"prototype_rows_: weight .* got torch.float16"),
        ({"impl": "fast"}, r"prototype_rows_: impl must be one of auto, reference, triton, got '"),
    ],
)
def test_bad_inputs(change, message, device):
    good = {
        "x": torch.zeros(4, 3, 6),
        "y": torch.zeros(2, 3, 6),
        "factors": DINO,
        "bias": None,
        "weight": torch.ones(4, 3),
    }
    with pytest.raises(ValueError, match=message):
        prototype_rows_(**on(device, good | change), scale=1.0)


POINTERS = dict.fromkeys(("bias_ptr", "rows_ptr", "factors_ptr", "weight_ptr", "loss_ptr"), "*fp32")
NUMBERS = dict.fromkeys(("weight_s", "weight_n", "students", "samples", "columns"), "i32") | {"scale": "fp32"}


@pytest.mark.parametrize(("kind", "dtype"), [("dino", "bf16"), ("ibot", "bf16"), ("dino", "fp32")])
@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_compiles_without_spilling(sm, kind, dtype):
    """As launched for 65,536 and 131,072 prototypes alike: their number is no compile-time value."""
    row = LAUNCH[sm]
    assert 65536 % row.blocks["BLOCK"] == 0
    numbers, fixed = dict(NUMBERS), {}
    if kind == "ibot":
        fixed = {"students": numbers.pop("students") and 1, "weight_n": numbers.pop("weight_n") and 1}
    used = resources(
        "armillary.kernels.objective.prototype_rows:_prototype_rows_kernel",
        {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", **POINTERS, **numbers},
        {**row.blocks, "TEACHERS": len(PAIRS[kind][0]), "GRADIENT": True, **fixed},
        divisible=("columns",),
        num_warps=row.num_warps,
    )[sm]
    assert used.stack == used.local == 0 and used.shared <= SHARED_LIMIT[sm], used
    assert "ld.global.v4" in used.ptx and "st.global.v4" in used.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("v", [65536, 131072])
@pytest.mark.parametrize("kind", ["dino", "ibot"])
def test_on_a_gpu(kind, v):
    chunk = Chunk(PAIRS[kind], n=64, v=v, dtype=torch.bfloat16, device="cuda")
    ours = chunk.rows()
    check(chunk, ours, chunk.rows("reference"))
    assert all(torch.equal(a, b) for a, b in zip(ours, chunk.rows(), strict=True))
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunk.rows()
    finally:
        torch.cuda.set_sync_debug_mode("default")
