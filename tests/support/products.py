"""What the tests of up_projection and down_gradient share."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from aot import ARCHITECTURES, SHARED_LIMIT, resources

from armillary.kernels.mlp import down_gradient, gemm, up_projection
from armillary.kernels.mlp.gemm import Gemm

PATHS = ("fused", "tma", "cublas")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")


def force_path(monkeypatch, module, path):
    """Let a product take one path on every device."""
    if path == "tma" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    rows = {}
    for key, row in module.LAUNCH.items():
        known = module.FUSED.get(key, row) if path == "fused" else row
        if known.blocks:
            rows[key] = Gemm(known.blocks, known.num_warps, known.num_stages, path=path)
    monkeypatch.setattr(module, "LAUNCH", rows)


def double(*tensors):
    return [t if t is None or not isinstance(t, torch.Tensor) else t.double() for t in tensors]


def assert_as_good(got, eager, right, floor=1e-6):
    """The 2x rule: at most twice the error of eager PyTorch at the same precision, relative to the largest value."""
    assert (got is None) == (right is None)
    if got is None:
        return
    assert got.shape == right.shape
    error, allowed = ((x.double() - right).abs().max() for x in (got, eager))
    assert error <= 2 * allowed + floor * right.abs().max(), (error, allowed)


def count_persistent(monkeypatch):
    """A list that grows with every launch of persistent programs."""
    launches, launch = [], gemm.launch_persistent
    monkeypatch.setattr(gemm, "launch_persistent", lambda *a, **k: (launches.append(1), launch(*a, **k)))
    return launches


COMPILED = {  # kernel, activation, one expert without row scale, architectures; one form for each: it takes seconds
    "fused, experts, erf, sm_80": ("fused", "gelu", False, (80,)),
    "fused, experts, erf": ("fused", "gelu", False, (90, 100)),
    "fused, experts, swiglu": ("fused", "swiglu", False, (90,)),
    "tma, ViT, erf": ("tma", "gelu", True, (90,)),
    "tma, experts, swiglu, sm_90": ("tma", "swiglu", False, (90,)),
    "tma, experts, swiglu": ("tma", "swiglu", False, (100,)),
    "elementwise, experts, erf": ("elementwise", "gelu", False, ARCHITECTURES),
}


def assert_compiles(module, path, activation, vit, architectures):
    """A product's kernel of this path compiles without spills, and uses the instructions that the path is for."""
    table = {"fused": module.FUSED, "tma": module.LAUNCH, "elementwise": module.ELEMENTWISE}[path]
    found = [table[max(key for key in table if 0 < key <= sm)] for sm in architectures]  # as `launch.settings` does
    (row,) = {id(row): row for row in found}.values()
    assert path != "tma" or row.path == "tma"
    kernel = getattr(module.KERNELS, path)
    gated = activation == "swiglu"
    blocks = {**row.blocks, "BN": row.blocks["BN"] // (2 if gated else 1)}  # a half for the gate, a half for the other
    fixed = {"GATED": gated, "TANH": activation == "gelu_tanh", "EVEN": True, **blocks}
    fixed |= {"scale_ptr": None, "ds_ptr": None, "E": 1} if vit else {}
    wide = dict.fromkeys(("scale_ptr", "db_ptr", "ds_ptr"), "*fp32")
    signature = {n: wide.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in kernel.arg_names if n not in fixed}
    for sm, used in resources(
        f"{module.__name__}_kernels:{kernel.__name__}",
        signature,
        {name: value for name, value in fixed.items() if name in kernel.arg_names},
        divisible=("H", "K", "D"),
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        architectures=architectures,
    ).items():
        assert used.stack == used.local == 0, (sm, used)
        assert used.shared <= SHARED_LIMIT[sm], (sm, used)
        if sm == 90 and path != "elementwise":
            assert "wgmma.mma_async" in used.ptx
        if path == "tma":
            assert "cp.async.bulk.tensor" in used.ptx


def inputs_of_up(shape, activation, device, dtype=torch.float32, bias=True, scale=True):
    m, k, h, experts = shape
    rows = (experts, 2, h) if activation == "swiglu" else (experts, h)
    x, weight, b = torch.randn(m, k), torch.randn(*rows, k) * k**-0.5, torch.randn(rows)
    row_scale = (torch.rand(experts, m) + 0.5).to(device) if scale else None
    x, weight, b = (t.to(device, dtype) for t in (x, weight, b))
    return x, weight, b if bias else None, row_scale, activation


def inputs_of_down(shape, activation, device, dtype=torch.float32, bias=True, scale=True):
    m, d, h, experts = shape
    columns = (experts, 2, h) if activation == "swiglu" else (experts, h)
    du, weight2, z, b = (
        torch.randn(experts, m, d),
        torch.randn(experts, d, h),
        torch.randn(m, *columns),
        torch.randn(columns),
    )
    row_scale = (torch.rand(experts, m) + 0.5).to(device) if scale else None
    du, weight2, z, b = (t.to(device, dtype) for t in (du, weight2 * d**-0.5, z, b))
    return du, weight2, z, b if bias else None, row_scale, activation


@dataclass(frozen=True)
class Product:
    """An operation of gemm.py; its results are two in the dtype of the inputs, then sums in float32."""

    module: ModuleType
    op: Callable
    reference: Callable
    inputs: Callable

    def check(self, given):
        """The 2x rule for every result."""
        eager, right = self.reference(*given), self.reference(*double(*given))
        results = self.op(*given, impl="triton")
        for i, (got, *others) in enumerate(zip(results, eager, right, strict=True)):
            assert got is None or got.dtype == (given[0].dtype if i < 2 else torch.float32)
            assert_as_good(got, *others)


PRODUCTS = {
    "up_projection": Product(
        up_projection, up_projection.up_projection, up_projection.up_projection_reference, inputs_of_up
    ),
    "down_gradient": Product(
        down_gradient, down_gradient.down_gradient, down_gradient.down_gradient_reference, inputs_of_down
    ),
}
