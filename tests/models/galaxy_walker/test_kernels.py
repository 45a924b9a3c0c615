"""The mixture of experts inside of a language model on its Triton kernels, and these at the sizes of published models."""

from dataclasses import replace

import pytest
import torch
from ball import assert_rows_compile
from products import PRODUCTS, force_path
from tiny_vlm import INPUTS, galaxies, key

from armillary.kernels.geometry import combine_backward, combine_forward, geometry_rows
from armillary.models.galaxy_walker.adapter import GeometryAdapter
from armillary.models.galaxy_walker.stage2 import GalaxyWalker

TINY = GalaxyWalker(tiny_dim=32, tiny_depth=2, adapter=GeometryAdapter(every=2))
WIDTHS = {"Qwen2-VL-2B": 1536, "Qwen2-VL-7B": 3584}
"""Their hidden widths, 8,960 and 18,944, are loops of the products, and whole multiples of every tile as 1,536 and 3,584 are."""


def step(impl, dtype, device):
    """Loss and gradients of one step of a fresh model with these weights."""
    torch.manual_seed(0)
    config = replace(TINY, adapter=replace(TINY.adapter, impl=impl))
    method = config.build(replace(INPUTS, channels=0, questions=(), options=())).to(device, dtype)
    batch = {name: x.to(device) for name, x in galaxies(2).items() if name not in ("crop", "answers")}
    loss = method.training_step(method.prepare(batch, key(2)), {}).total
    loss.backward()
    return {n: p.grad.float() for n, p in method.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_learns_alike_with_kernels_and_reference(dtype, device, monkeypatch):
    """A step's loss and every gradient: in bfloat16 at most twice the reference's distance from its float32 step."""
    if device == "cpu" and dtype == torch.bfloat16:  # the interpreter's own products of bfloat16 are wrong
        for product in PRODUCTS.values():
            force_path(monkeypatch, product.module, "cublas")
    exact = step("reference", torch.float32, device)
    eager, ours = (step(impl, dtype, device) for impl in ("reference", "triton"))
    assert ours.keys() == eager.keys() == exact.keys()
    for name, truth in exact.items():
        scale = truth.norm() + 1e-3 * max(g.norm() for g in exact.values())
        error, allowed = (float((x[name] - truth).norm() / scale) for x in (ours, eager))
        assert error <= 2 * allowed + (1e-4 if dtype == torch.float32 else 0.02), (name, error, allowed)


@pytest.mark.parametrize("dim", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize(
    "module, name, table",
    [
        (geometry_rows, "_rows_fwd_kernel", geometry_rows.LAUNCH_FORWARD),
        (geometry_rows, "_rows_bwd_kernel", geometry_rows.LAUNCH_BACKWARD),
        (combine_forward, "_combine_fwd_kernel", combine_forward.LAUNCH),
        (combine_backward, "_combine_bwd_kernel", combine_backward.LAUNCH),
    ],
    ids=["rows, forward", "rows, backward", "combine, forward", "combine, backward"],
)
def test_row_kernels_compile_at_published_widths(module, name, table, dim):
    constants = {"BIAS": True, "LOGITS": True, "SCALE": True, "DY": True, "EXPERT": -1, "MOEBIUS": False}
    half = {"x_ptr", "weight_ptr", "bias_ptr", "u_ptr", "y_ptr", "dy_ptr", "du_ptr", "dx_ptr"}
    constants["COLUMN_SUMS"] = False
    assert_rows_compile(f"{module.__name__}:{name}", getattr(module, name).arg_names, table, dim, half, constants)
