"""What holds for every row map: the four radial ones, Moebius addition and the distance."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import pytest
import torch
from aot import ARCHITECTURES, SHARED_LIMIT, resources
from ball import scalar, unit
from float64 import assert_as_good_as_eager, evaluate

from armillary.kernels.geometry import mobius_add, poincare_distance, radial_map
from armillary.kernels.geometry.curvature import A_MAX, EDGE
from armillary.kernels.rows import tiles

SHAPES = [(1,), (1, 1), (5, 1), (3, 17), (2, 3, 64), (7, 129), (2, 1000)]
RADIAL_ROWS = [(0.0,), (1e-9, 1e-3), (0.1**0.5 - 1e-3, 0.1**0.5 + 1e-3), (0.6, 0.9), (1.3, 7.0)]


@dataclass(frozen=True)
class Map:
    """An operation of `count` tensors of rows and a scalar.

    Attributes:
        of_half: Lengths of the rows that half precision is tested with, one a tensor.
        of_oracle: Lengths of each tensor's rows, and the scalar, that the oracle is differentiated at.
        bad: What spoils a row; an infinite coordinate may leave a distance finite.
        reduces: Whether a row gives one number.
    """

    module: ModuleType
    op: Callable
    reference: Callable
    count: int
    of_half: list
    of_oracle: list
    bad: tuple = (float("nan"), float("inf"))
    reduces: bool = False

    @property
    def names(self):
        return (*"xy"[: self.count], "p")

    def rows(self, lengths, width, dtype=torch.float32, device="cpu"):
        return [(unit(len(r), width) * torch.tensor(r).double()[:, None]).to(dtype).to(device) for r in lengths]

    def cotangent(self, x):
        """Random, and leaning along the rows; of one sign for distances, whose sum may not cancel."""
        g = torch.rand(x.shape[:-1]) + 0.5 if self.reduces else torch.randn(x.shape) + x.cpu().float()
        return g.to(x.device)


def radial(kind):
    def op(x, p, impl):
        return radial_map.radial_map(x, p, kind, impl=impl)

    # No finite difference crosses the sphere's singularity at 0.
    oracle = [([r], 0.9 if max(r) < 1 else 1.1) for r in RADIAL_ROWS if kind != "sphere" or min(r) > 1e-2]
    half = [([length, 1.1 * length],) for length in (1e-3, 0.3, 0.9, 5.0, 30.0)]
    return Map(radial_map, op, partial(radial_map.radial_map_reference, kind=kind), 1, half, oracle)


def pair(module, near, **more):
    name = module.__name__.split(".")[-1]
    oracle = [([[a] * 2, [b] * 2], 0.9) for a, b in (*near, (0.5, 0.9), (0.9, 1.3), (1.5, 2.0))]
    half = [([a] * 3, [b] * 3) for a, b in ((1e-3, 0.4), (0.3, 0.6), (0.9, 0.9))]
    op, reference = getattr(module, name), getattr(module, f"{name}_reference")
    return Map(module, lambda x, y, c, impl: op(x, y, c, impl=impl), reference, 2, half, oracle, **more)


MAPS = {kind: radial(kind) for kind in radial_map.KINDS} | {
    "mobius_add": pair(mobius_add, ((0.0, 0.0), (1e-9, 0.4))),
    "poincare_distance": pair(poincare_distance, ((0.0, 0.1), (1e-3, 0.4)), bad=(float("nan"),), reduces=True),
}
PAIRS = {name: m for name, m in MAPS.items() if m.count == 2}
of_every_map = pytest.mark.parametrize("m", MAPS.values(), ids=MAPS)


@of_every_map
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(m, shape, device, poison_empty):
    if m is MAPS["sphere"] and shape[-1] == 1:
        pytest.skip("in one dimension the truth is 0: test_no_radial_gradient_...")
    rows = [(torch.rand(shape) / shape[-1] ** 0.5).to(device) for _ in range(m.count)]
    assert_as_good_as_eager(m.op, (*rows, scalar(0.8, device=device)), m.cotangent(rows[0]), m.names)


@of_every_map
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_rows(m, dtype, device):
    for lengths in m.of_half:
        rows = m.rows(lengths, 33, dtype, device)
        assert_as_good_as_eager(m.op, (*rows, scalar(1.0, device=device)), m.cotangent(rows[0]), m.names)


@of_every_map
def test_oracle_gradients(m):
    for lengths, p in m.of_oracle:
        inputs = *m.rows(lengths, 3, torch.float64), scalar(p, torch.float64)
        inputs = [t.requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(m.reference, inputs)
        assert torch.autograd.gradgradcheck(m.reference, inputs, atol=1e-4)


@of_every_map
def test_only_the_gradients_asked_for(m, device):
    inputs = *m.rows([[0.5] * 3] * m.count, 5, device=device), scalar(0.4, device=device)
    cotangent = m.cotangent(inputs[0])
    _, *expected = evaluate(m.op, inputs, cotangent, "triton")
    for i in range(len(inputs)):
        leaves = [v.clone().requires_grad_(j == i) for j, v in enumerate(inputs)]
        m.op(*leaves, impl="triton").backward(cotangent)
        assert torch.equal(leaves[i].grad, expected[i])
        assert all(leaf.grad is None for j, leaf in enumerate(leaves) if j != i)
    with torch.no_grad():
        assert not m.op(*leaves, impl="triton").requires_grad


@of_every_map
def test_gradient_of_a_sum_and_of_a_number(m, device):
    x, *others = m.rows([[0.5] * 3] * m.count, 5, device=device)
    x.requires_grad_()
    m.op(x, *others, 0.5, impl="triton").sum().backward()  # the incoming gradient has strides 0
    (expected,) = torch.autograd.grad(m.op(x, *others, 0.5, impl="reference").sum(), x)
    torch.testing.assert_close(x.grad, expected)
    (first,) = torch.autograd.grad(m.op(x, *others, 0.5, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@of_every_map
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_wide_curvature_gets_a_wide_gradient(m, impl, device):
    p = scalar(0.7, torch.float64, device).requires_grad_()
    rows = m.rows([[0.5] * 4] * m.count, 3, device=device)
    m.op(*rows, p, impl=impl).sum().backward()
    assert p.grad.dtype == torch.float64


@of_every_map
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 7)], ids=str)
def test_empty(m, shape, impl, device):
    x = torch.zeros(shape, device=device)
    y, *drows, dp = evaluate(m.op, (*[x] * m.count, scalar(1.0, device=device)), m.cotangent(x), impl)
    assert y.shape == (shape[:-1] if m.reduces else shape) and all(dx.shape == shape for dx in drows) and dp == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
@of_every_map
def test_a_bad_row_spoils_no_other(m, device):
    for bad in m.bad:
        inputs = *m.rows([[0.1, 0.5, 0.9, 0.3]] * m.count, 6, device=device), scalar(1.0, device=device)
        cotangent = m.cotangent(inputs[0])
        clean = evaluate(m.op, inputs, cotangent, "triton")
        inputs[-2][1, 2] = bad
        spoilt = evaluate(m.op, inputs, cotangent, "triton")
        for before, after in zip(clean[:-1], spoilt[:-1], strict=True):
            assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and not after[1].isfinite().all()


@pytest.mark.parametrize("name", ["log0", "sphere", *PAIRS])
def test_widest_rows(name, device):
    m = MAPS[name]
    rows = m.rows([[0.7, 0.3], [0.6, 0.8]][: m.count], 8192, device=device)
    assert_as_good_as_eager(m.op, (*rows, scalar(1.0, device=device)), m.cotangent(rows[0]), m.names)


@pytest.mark.parametrize("m", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_finite_on_and_beyond_the_boundary(m, impl, dtype, device):
    radius = torch.tensor([0.0, 0.5, 1.0 - EDGE / 2, 1.0, 1.01, 30.0], dtype=torch.float64)
    x = unit(1, 7).repeat(36, 1)
    x, y = (x * radius.repeat_interleave(6)[:, None]), (-x * radius.repeat(6)[:, None])
    x, y = x.to(dtype).to(device), y.to(dtype).to(device)
    cotangent = torch.ones(36) if m.reduces else unit(36, 7)  # a longer one is too much for float16
    for result in evaluate(m.op, (x, y, scalar(1.0, device=device)), cotangent.to(device), impl):
        assert result.isfinite().all()


X = torch.zeros(2, 3)
BAD = [
    (X, 1.0, "gpu", "impl must be one of"),
    (X.double(), 1.0, "triton", "impl must be .* for torch.float64"),
    (X.long(), 1.0, "auto", "x must be torch.float32 or .*, got torch.int64"),
    (X.T, 1.0, "auto", "x must be contiguous"),
    (torch.tensor(1.0), 1.0, "auto", r"x must be a tensor \[..., D\], got \[\]"),
    ([1.0], 1.0, "auto", "x must be a tensor"),
    (torch.zeros(2, 0), 1.0, "auto", r"x must have rows of 1 to 8192 elements, got \[2, 0\]"),
    (torch.zeros(1, 8193), 1.0, "auto", r"x must have rows of 1 to 8192 elements, got \[1, 8193\]"),
    (X, float("nan"), "auto", "{p} must be finite.*, got nan"),
    (X, float("inf"), "auto", "{p} must be finite.*, got inf"),
    (X, torch.ones(1), "auto", r"{p} must have shape \[\], got \[1\]"),
    (X, torch.tensor(1.0, dtype=torch.bfloat16), "auto", "{p} must be torch.float32 or torch.float64"),
    (X, torch.tensor(1.0, device="meta"), "auto", "{p} must be on cpu, got meta"),
    (X, "1", "auto", "{p} must be a number or a 0-d tensor, got str"),
]


@of_every_map
@pytest.mark.parametrize("x, p, impl, message", BAD)
def test_bad_input_is_refused(m, x, p, impl, message):
    operation = m.module.__name__.split(".")[-1]
    message = message.replace("{p}", "kappa" if m is MAPS["sphere"] else "c")
    with pytest.raises(ValueError, match=f"^{operation}: {message}"):
        m.op(*[x] * m.count, p, impl=impl)


@pytest.mark.parametrize("c", [0.0, torch.tensor(-2.0)])
@pytest.mark.parametrize("name", [name for name in MAPS if name != "sphere"])  # whose radius may have any sign
def test_curvatures_of_a_ball_are_positive(name, c):
    m = MAPS[name]
    operation = m.module.__name__.split(".")[-1]
    with pytest.raises(ValueError, match=rf"^{operation}: c must be finite and positive, got {float(c)}"):
        m.op(*[X] * m.count, c, impl="auto")


def test_an_unknown_map_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^radial_map: kind must be one of exp0, log0, project, sphere, got 'exp'"):
        radial_map.radial_map(X, 1.0, "exp", impl="auto")


@pytest.mark.parametrize("m", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize(
    "y, message",
    [
        (torch.zeros(3, 2).T, "y must be contiguous"),
        (X.half(), "y must be torch.float32, got torch.float16"),
        (X[:1], r"y must have shape \[2, 3\], got \[1, 3\]"),
        (X.to("meta"), "y must be on cpu, got meta"),
    ],
)
def test_rows_that_do_not_pair_are_refused(m, y, message):
    with pytest.raises(ValueError, match=message):
        m.op(X, y, 1.0, impl="auto")


COMPILED = {
    f"{name} {way} {dtype} {width}": (MAPS[name], way, dtype, width)
    for name, way, dtype, width in [
        ("log0", "forward", "*bf16", 1024),
        ("log0", "backward", "*bf16", 1024),
        ("exp0", "backward", "*fp32", 1),
        *(
            (name, *form)
            for name in PAIRS
            for form in [
                ("forward", "*bf16", 1024),
                ("backward", "*bf16", 1024),
                ("backward", "*fp32", 1),
                ("backward", "*fp32", 8192),
            ]
        ),
    ]
}


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_without_spilling(case, sm, monkeypatch):
    m, way, dtype, width = COMPILED[case]
    monkeypatch.setattr("armillary.kernels.rows.settings", lambda table, x: table[sm])
    options = tiles(m.module.LAUNCH, torch.empty(64, width)).options
    kernel = getattr(m.module.KERNELS, way)
    pointers = {name: dtype for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= {name: "*fp32" for name in ("c_ptr", "dc_ptr", "parameter_ptr", "dp_ptr") if name in pointers}
    known = {"LIMIT": A_MAX, "KIND": case.split()[0], "width": 1, **options}
    constants = {name: known[name] for name in kernel.arg_names if name in known and (name != "width" or width == 1)}
    sizes = {"rows": "i32"} | ({"width": "i32"} if width > 1 else {})
    used = resources(
        f"{m.module.__name__}:{kernel.__name__}",
        pointers | sizes,
        constants,
        divisible=tuple(sizes),
        num_warps=options["num_warps"],
    )[sm]
    assert used.stack == used.local == 0, used
    assert used.shared <= SHARED_LIMIT[sm], used


@pytest.mark.gpu
@of_every_map
def test_training_shape(m):
    lengths = torch.linspace(0.01, 0.9 if m.count == 2 else 2.0, 4096).tolist()
    for dtype, width in itertools.product((torch.bfloat16, torch.float32), (1024, 3, 8192)):
        rows = m.rows([lengths] * m.count, width, dtype, "cuda")
        inputs = *rows, scalar(0.9, device="cuda")
        floor = 5e-6 if m.count == 2 else 2e-6
        assert_as_good_as_eager(m.op, inputs, m.cotangent(rows[0]), m.names, floor=floor)
