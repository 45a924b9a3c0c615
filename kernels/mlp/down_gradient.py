r"""Backward of an MLP's second product down to its first: GEMM, derivative of the activation, and the sums beside it.

    da_e = du_e W2_e        dz_e = da_e * act'(z_e)

One pass gives what the remaining products of the backward need: s_e dz_e (for dx and dW1), a rebuilt from z (for dW2),
the column sums of dz (db1), and the row sums that are the gradient of the row scale s in z = s (x W1^T) + b:

    db_e = sum_m dz_e        ds_e[m] = sum_h dz_e (z_e - b_e) / s_e[m]

Shapes: du [E, M, D]; weight2 [E, D, H]; z [M, E, H] for "gelu" and "gelu_tanh", [M, E, 2, H] (gate, then up) for
"swiglu"; bias [E, H] / [E, 2, H] or None; row_scale [E, M] float32, nowhere 0, or None (1 everywhere). dz and a are in
the dtype of du; both sums are float32.

Products run in the inputs' dtype with float32 accumulation, everything after in float32: the sums see dz before it is
rounded. A program sums over its own tile, one torch.sum over the tiles follows, so results do not depend on the order in
which programs run. gemm.py describes the paths.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from armillary.kernels.launch import INTERPRETER, Impl, Launch, use_triton
from armillary.kernels.mlp.down_gradient_kernels import elementwise_kernel, fused_kernel, tma_kernel
from armillary.kernels.mlp.gemm import COMPILED, Kernels, choose, fused_table, launch, product_table
from armillary.kernels.mlp.up_projection import Activation, activate

__all__ = ["DownGradient", "down_gradient", "down_gradient_reference"]

DownGradient = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # scaled dz, a, d_bias, d_row_scale


def down_gradient_reference(
    du: Tensor,
    weight2: Tensor,
    z: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    activation: Activation,
) -> DownGradient:
    """The same in plain PyTorch, in any float dtype: the oracle of the tests and the CPU path.

    Sums are float32, or float64 for float64 inputs.
    """
    wide = torch.promote_types(du.dtype, torch.float32)
    da = torch.bmm(du, weight2).transpose(0, 1)
    if activation == "swiglu":
        gate, up = z.unbind(2)
        dz = torch.stack([torch.ops.aten.silu_backward(da * up, gate), da * torch.nn.functional.silu(gate)], dim=2)
    else:
        dz = torch.ops.aten.gelu_backward(da, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    a = activate(z, activation)
    d_bias = None if bias is None else dz.sum(0, dtype=wide)
    if row_scale is None:
        return dz, a, d_bias, None
    product = (z if bias is None else z.to(wide) - bias) * dz.to(wide)
    d_row_scale = product.flatten(2).sum(2).t() / row_scale
    scaled = dz.to(wide) * row_scale.t().reshape(len(z), -1, *[1] * (z.dim() - 2))
    return scaled.to(du.dtype), a, d_bias, d_row_scale.contiguous()


LAUNCH = product_table(209, 246, 254)
FUSED = fused_table(LAUNCH, 231)
ELEMENTWISE = {
    INTERPRETER: Launch({"BM": 16, "BN": 32}, source=LAUNCH[INTERPRETER].source),
    80: Launch({"BM": 16, "BN": 128}, num_warps=4, source=COMPILED.format(80)),
}


KERNELS = Kernels(tma_kernel, fused_kernel, elementwise_kernel)


def _launch(
    du: Tensor, weight2: Tensor, z: Tensor, bias: Tensor | None, row_scale: Tensor | None, activation: Activation
) -> DownGradient:
    (experts, m, d), h = du.shape, weight2.shape[2]
    a = torch.empty(m, experts, h, dtype=du.dtype, device=du.device)
    if not a.numel():
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        return torch.zeros_like(z), a, d_bias, None if row_scale is None else torch.zeros_like(row_scale)
    # More than one expert: the last loads of one meet the weights of the next where BK does not divide D.
    depth, gates = d if experts > 1 else 0, z.shape[2:-1].numel()
    chosen = choose((LAUNCH, FUSED, ELEMENTWISE), du, gates, h, depth, (du, weight2, z, a))
    path, _, blocks = chosen
    partials = partial(torch.empty, dtype=torch.float32, device=du.device)
    columns = None if bias is None else partials(triton.cdiv(m, blocks["BM"]), *bias.shape)
    rows = None if row_scale is None else partials(triton.cdiv(h, blocks["BN"]), experts, m)
    da = torch.bmm(du, weight2) if path == "cublas" else None
    dz = da.view_as(z) if da is not None and experts == gates == 1 else torch.empty_like(z)
    factors = (du, weight2) if da is None else (da,)
    operands = (*factors, z, bias, row_scale, dz, a, columns, rows)
    whole = path == "fused" and d % blocks["BK"] == 0 and h % blocks["BN"] == 0
    launch(KERNELS, chosen, du, operands, (m, experts, h), d, whole=whole, activation=activation)
    return dz, a, None if columns is None else columns.sum(0), None if rows is None else rows.sum(0)


def down_gradient(
    du: Tensor,
    weight2: Tensor,
    z: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    activation: Activation,
    *,
    impl: Impl = "auto",
) -> DownGradient:
    """Gradient at z, a rebuilt, and the gradients of bias and row scale; callers have checked the arguments.

    Args:
        du: float32, bfloat16 or float16 (any float on the reference path); all tensors contiguous, shapes as above.
        weight2: Dtype of du.
        z: Likewise.
        bias: Or None.
        row_scale: float32, nowhere 0, or None.
        activation: "gelu", "gelu_tanh" or "swiglu".
        impl: See `armillary.kernels.launch`.

    Returns:
        row_scale * dz and a in the dtype of du; d_bias and d_row_scale in float32, None without bias or row_scale.
    """
    with torch.no_grad():
        if use_triton("down_gradient", impl, du):
            return _launch(du, weight2, z, bias, row_scale, activation)
        return down_gradient_reference(du, weight2, z, bias, row_scale, activation)
