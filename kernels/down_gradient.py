r"""Backward of an MLP's second product down to its first: GEMM, derivative of the activation, and the sums beside it.

    da_e = du_e W2_e        dz_e = da_e * act'(z_e)

One pass gives what the remaining products of the backward need: s_e dz_e (for dx and dW1), a rebuilt from z (for dW2),
the column sums of dz (db1), and the row sums that are the gradient of the row scale s in z = s (x W1^T) + b:

    db_e = sum_m dz_e        ds_e[m] = sum_h dz_e (z_e - b_e) / s_e[m]

Shapes: du [E, M, D]; weight2 [E, D, H]; z [M, E, H] for "gelu" and "gelu_tanh", [M, E, 2, H] (gate, then up) for
"swiglu"; bias [E, H] / [E, 2, H] or None; row_scale [E, M] float32, nowhere 0, or None (1 everywhere). dz and a are in
the dtype of du; both sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.kernels.launch import Impl
from armillary.kernels.up_projection import Activation, activate

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
        du: [E, M, D].
        weight2: [E, D, H].
        z: [M, E, H]; [M, E, 2, H] for "swiglu".
        bias: [E, H]; [E, 2, H] for "swiglu"; or None.
        row_scale: [E, M] float32, nowhere 0, or None.
        activation: "gelu", "gelu_tanh" or "swiglu".
        impl: See `armillary.kernels.launch`.

    Returns:
        row_scale * dz, of the shape of z; a [M, E, H]; d_bias float32, of the shape of the bias, None without one;
        d_row_scale [E, M] float32, None without row_scale.
    """
    with torch.no_grad():
        return down_gradient_reference(du, weight2, z, bias, row_scale, activation)
