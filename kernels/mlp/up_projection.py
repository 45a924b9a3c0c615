r"""First product of an MLP with its epilogue: row scale, bias and activation of several experts in one GEMM.

    z_e = s_e[:, None] * (x W_e^T) + b_e        a_e = act(z_e)

Shapes: x [M, K]; weight [E, H, K] for the activations "gelu" and "gelu_tanh", [E, 2, H, K] (gate, then up) for "swiglu";
bias [E, H] / [E, 2, H] or None; row_scale s [E, M] float32 or None (1 everywhere). z [M, E, H] / [M, E, 2, H] and
a [M, E, H] are in the dtype of x. act sees z as rounded to that dtype, so that z alone rebuilds a:

    gelu, gelu_tanh     a = GELU(z), exact or by the tanh form
    swiglu              a = silu(z[:, :, 0]) * z[:, :, 1]

Products run in the inputs' dtype with float32 accumulation, the epilogue in float32. gemm.py describes the paths.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.kernels.launch import INTERPRETER, Impl, Launch, use_triton
from armillary.kernels.mlp.gemm import COMPILED, Kernels, choose, fused_table, launch, product_table
from armillary.kernels.mlp.up_projection_kernels import elementwise_kernel, fused_kernel, tma_kernel

__all__ = ["ACTIVATIONS", "Activation", "up_projection", "up_projection_reference"]

Activation = Literal["gelu", "gelu_tanh", "swiglu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def activate(z: Tensor, activation: Activation) -> Tensor:
    """act(z): [M, E, H] from z [M, E, H], or [M, E, 2, H] for "swiglu"."""
    if activation == "swiglu":
        return F.silu(z[:, :, 0]) * z[:, :, 1]
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def up_projection_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, differentiable, in any float dtype: the oracle of the tests and the CPU path."""
    weights = weight.flatten(0, -2)
    if row_scale is None:
        z = F.linear(x, weights, None if bias is None else bias.flatten()).unflatten(1, weight.shape[:-1])
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        z = F.linear(x, weights).unflatten(1, weight.shape[:-1]).to(wide)
        z = z * row_scale.t().reshape(len(x), -1, *[1] * (weight.dim() - 2))
        z = (z if bias is None else z + bias).to(x.dtype)
    return z, activate(z, activation)


LAUNCH = product_table(193, 255, 237)
FUSED = fused_table(LAUNCH, 197)
ELEMENTWISE = {
    INTERPRETER: Launch({"BM": 16, "BN": 32}, source=LAUNCH[INTERPRETER].source),
    80: Launch({"BM": 4, "BN": 512}, num_warps=4, source=COMPILED.format(64)),
}


KERNELS = Kernels(tma_kernel, fused_kernel, elementwise_kernel)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_scale: Tensor | None, activation: Activation, save_z: bool
) -> tuple[Tensor | None, Tensor]:
    (m, k), (experts, h), gates = x.shape, (weight.shape[0], weight.shape[-2]), weight.shape[1:-2].numel()
    empty = partial(torch.empty, dtype=x.dtype, device=x.device)
    a = empty(m, experts, h)
    z = empty(m, *weight.shape[:-1]) if save_z else None
    if not a.numel():
        return z, a
    chosen = choose((LAUNCH, FUSED, ELEMENTWISE), x, gates, h, 0, (x, weight, z, a))
    path, _, blocks = chosen
    operands: tuple[Tensor | None, ...] = (x, weight, bias, row_scale, z, a)
    if path == "cublas":
        weights = weight.view(-1, k).t()
        # The product goes into z, where scale and bias then change it.
        p = z if z is not None else a if gates == 1 else empty(m, *weight.shape[:-1])
        if row_scale is None and bias is not None:
            torch.addmm(bias.view(-1), x, weights, out=p.view(m, -1))
            operands = (p, None, None, None, a)
        else:
            torch.mm(x, weights, out=p.view(m, -1))
            operands = (p, bias, row_scale, None if row_scale is None else z, a)
    whole = path == "fused" and k % blocks["BK"] == 0
    launch(KERNELS, chosen, x, operands, (m, experts, h), k, whole=whole, activation=activation)
    return z, a


def up_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    activation: Activation,
    *,
    save_z: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor | None, Tensor]:
    """z and a of all experts, without gradients: a part of differentiable operations, which check the arguments.

    Args:
        x: float32, bfloat16 or float16 (any float on the reference path); all tensors contiguous, shapes as above.
        weight: Dtype of x.
        bias: Or None.
        row_scale: float32, or None.
        activation: "gelu", "gelu_tanh" or "swiglu".
        save_z: False where nobody will read z, which is None then.
        impl: See `armillary.kernels.launch`.
    """
    with torch.no_grad():
        if use_triton("up_projection", impl, x):
            return _launch(x, weight, bias, row_scale, activation, save_z)
        z, a = up_projection_reference(x, weight, bias, row_scale, activation)
        return (z if save_z else None), a
