r"""Linear + GELU and GELU + linear: the two halves of an MLP, each reading the parameters of one layer only.

    linear_gelu   z = x W1^T + b1,  a = gelu(z)         dx = dz W1,  dW1 = dz^T x,  db1 = sum_m dz
    gelu_linear   y = a W2^T + b2                       dz = (dy W2) * gelu'(z),  dW2 = dy^T a,  db2 = sum_m dy

Shapes: x [M, K], W1 [H, K], z and a [M, H], W2 [D, H], y [M, D]. On the Triton path the gradient flows through z; a has
none, and is not kept. x and W1, then z and W2, are saved for the backward pass, which makes dz, a and the column sums
db1 in one kernel (down_gradient.py); the forward pass is that of up_projection.py. On the reference path, and where no
gradient is asked for, z is None and a carries the graph: plain F.linear and F.gelu.

db1 is made in the backward of gelu_linear and wanted in that of linear_gelu: it travels with dz
(`armillary.kernels.column_sums`). So may db2 have come with dy.

Products accumulate in float32; epilogues and sums are float32 throughout.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.column_sums import attach_column_sums, column_sums
from armillary.kernels.launch import Impl, check_tensor, refuse, untraced, use_triton
from armillary.kernels.mlp.down_gradient import down_gradient
from armillary.kernels.mlp.up_projection import Activation, up_projection

__all__ = ["Approximate", "gelu_linear", "gelu_linear_reference", "linear_gelu", "linear_gelu_reference"]

Approximate = Literal["none", "tanh"]
_ACTIVATION: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}


def linear_gelu_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: Approximate = "none"
) -> tuple[Tensor, Tensor]:
    """z and a in plain PyTorch, both differentiable, in any float dtype: the oracle of the tests."""
    z = F.linear(x, weight, bias)
    return z, F.gelu(z, approximate=approximate)


def gelu_linear_reference(z: Tensor, weight: Tensor, bias: Tensor | None, approximate: Approximate = "none") -> Tensor:
    """y in plain PyTorch, in any float dtype: the oracle of the tests."""
    return F.linear(F.gelu(z, approximate=approximate), weight, bias)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
    ) -> tuple[Tensor | None, Tensor]:
        z, a = _up(x, weight, bias, activation, save_z=True)
        ctx.mark_non_differentiable(a)
        ctx.set_materialize_grads(False)  # or backward would make zeros of a's size, which nobody reads
        ctx.save_for_backward(x, weight)
        return z, a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dz is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        return (
            dz @ weight if for_x else None,
            dz.t() @ x if for_weight else None,
            column_sums(dz).to(dz.dtype) if for_bias else None,
            None,
        )


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        ctx.save_for_backward(z, weight)
        ctx.activation = activation
        return F.linear(a, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = ctx.saved_tensors
        for_z, _, for_weight, for_bias, _ = ctx.needs_input_grad
        dy = dy.contiguous()
        dz = a = None
        if for_z:
            bias = torch.empty(1, z.shape[1], dtype=z.dtype, device=z.device)  # unread: it asks for the column sums
            dz, a, sums, _ = down_gradient(
                dy[None], weight[None], z[:, None], bias, None, ctx.activation, impl="triton"
            )
            dz, a = dz.view_as(z), a.view_as(z)
            if sums is not None:
                attach_column_sums(dz, sums)
        elif for_weight:
            a = F.gelu(z, approximate="tanh" if ctx.activation == "gelu_tanh" else "none")
        return (
            dz,
            None,
            None if a is None or not for_weight else dy.t() @ a,
            column_sums(dy).to(dy.dtype) if for_bias else None,
            None,
        )


def _up(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, save_z: bool
) -> tuple[Tensor | None, Tensor]:
    bias = None if bias is None else bias[None]
    z, a = up_projection(x, weight[None], bias, None, activation, save_z=save_z, impl="triton")
    return (None if z is None else z.squeeze(1)), a.squeeze(1)


@untraced
def _linear_gelu_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
) -> tuple[Tensor | None, Tensor]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _LinearGelu.apply(x, weight, bias, activation)
    return _up(x, weight, bias, activation, save_z=False)


@untraced
def _gelu_linear_triton(z: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    return _GeluLinear.apply(z, a, weight, bias, activation)


def _under_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as torch.autocast would hand them to F.linear."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _check(
    operation: str, x: Tensor, name: str, columns: str, weight: Tensor, rows: str, bias: Tensor | None, approximate: str
) -> None:
    if approximate not in _ACTIVATION:
        refuse(operation, "approximate", 'must be "none" or "tanh"', repr(approximate))
    check_tensor(operation, name, x, ["M", columns])
    check_tensor(operation, "weight", weight, [rows, x.shape[1]], like=x, dtypes=[x.dtype])
    if bias is not None:
        check_tensor(operation, "bias", bias, [weight.shape[0]], like=x, dtypes=[x.dtype])


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    approximate: Approximate = "none",
    impl: Impl = "auto",
) -> tuple[Tensor | None, Tensor]:
    """First half of an MLP: gelu(x W^T + b), and what the backward pass of the second half needs.

    Both results go to `gelu_linear`, which knows which of them carries the gradient.

    Args:
        x: [M, K] float32, bfloat16 or float16 (also float64 on the reference path), contiguous as all arguments are.
        weight: [H, K], dtype of x.
        bias: [H], dtype of x, or None.
        approximate: "none" for the erf form, "tanh" for the tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415).
        impl: See `armillary.kernels.launch`.

    Returns:
        z [M, H] before the GELU, and a [M, H] = gelu(z), in the dtype of x (of autocast, where it is on). On the Triton
        path gradients flow through z, not through a. z is None on the reference path, where they flow through a, and
        where there are none.

    Raises:
        ValueError: Wrong shape, dtype, device or layout, or an unknown form of GELU.
    """
    x, weight, bias = _under_autocast(x, weight, bias)
    _check("linear_gelu", x, "x", "K", weight, "H", bias, approximate)
    if use_triton("linear_gelu", impl, x):
        return _linear_gelu_triton(x, weight, bias, _ACTIVATION[approximate])
    return None, F.gelu(F.linear(x, weight, bias), approximate=approximate)


def gelu_linear(
    z: Tensor | None,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    approximate: Approximate = "none",
    impl: Impl = "auto",
) -> Tensor:
    """Second half of an MLP: y = gelu(z) W^T + b, with a = gelu(z) at hand.

    Args:
        z: [M, H] from `linear_gelu`, contiguous as all arguments are: y is differentiable in z. None where a carries
            the gradient: then in a.
        a: [M, H] from `linear_gelu`.
        weight: [D, H], dtype of a.
        bias: [D], dtype of a, or None.
        approximate: As given to `linear_gelu`.
        impl: As given to `linear_gelu`.

    Returns:
        [M, D] in the dtype of a.

    Raises:
        ValueError: Wrong shape, dtype, device or layout, or an unknown form of GELU.
    """
    z, a, weight, bias = _under_autocast(z, a, weight, bias)
    _check("gelu_linear", a, "a", "H", weight, "D", bias, approximate)
    triton = use_triton("gelu_linear", impl, a)
    if z is None:
        return F.linear(a, weight, bias)
    check_tensor("gelu_linear", "z", z, a.shape, like=a, dtypes=[a.dtype])
    if triton:
        return _gelu_linear_triton(z, a, weight, bias, _ACTIVATION[approximate])
    return gelu_linear_reference(z, weight, bias, approximate)
