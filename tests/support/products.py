"""What the tests of up_projection and down_gradient share."""

import pytest
import torch

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


def row_of(table, sm):
    """The row of a launch table for an architecture, as `launch.settings` finds it."""
    return table[max(key for key in table if 0 < key <= sm)]


def blocks_of(row, gated):
    """Blocks as launched: a tile of "swiglu" has half its columns for the gate, half for the other."""
    return {**row.blocks, "BN": row.blocks["BN"] // (2 if gated else 1)}


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
