r"""First product of an MLP with its epilogue: row scale, bias and activation of several experts in one GEMM.

    z_e = s_e[:, None] * (x W_e^T) + b_e        a_e = act(z_e)

Shapes: x [M, K]; weight [E, H, K] for the activations "gelu" and "gelu_tanh", [E, 2, H, K] (gate, then up) for "swiglu";
bias [E, H] / [E, 2, H] or None; row_scale s [E, M] float32 or None (1 everywhere). z [M, E, H] / [M, E, 2, H] and
a [M, E, H] are in the dtype of x. act sees z as rounded to that dtype, so that z alone rebuilds a:

    gelu, gelu_tanh     a = GELU(z), exact or by the tanh form
    swiglu              a = silu(z[:, :, 0]) * z[:, :, 1]
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.kernels.launch import Impl

__all__ = ["ACTIVATIONS", "Activation", "up_projection", "up_projection_reference"]

Activation = Literal["gelu", "gelu_tanh", "swiglu"]
ACTIVATIONS: tuple[str, ...] = ("gelu", "gelu_tanh", "swiglu")


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
    """z and a of all experts; callers have checked the arguments.

    Args:
        x: [M, K].
        weight: [E, H, K]; [E, 2, H, K] for "swiglu".
        bias: [E, H]; [E, 2, H] for "swiglu"; or None.
        row_scale: [E, M] float32 or None.
        activation: "gelu", "gelu_tanh" or "swiglu".
        save_z: False where nobody will read z.
        impl: See `armillary.kernels.launch`.

    Returns:
        z [M, E, H] / [M, E, 2, H], or None without `save_z`; a [M, E, H]. Both in the dtype of x, without gradients.
    """
    with torch.no_grad():
        z, a = up_projection_reference(x, weight, bias, row_scale, activation)
    return (z if save_z else None), a
