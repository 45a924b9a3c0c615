r"""Feed-forward layer of three experts in three geometries, mixed by a gate.

    y = sum_i g_i F_i(x),  g = softmax((x Wg^T + bg) / tau)
    u_i = W2_i act(W1_i v_i + b1_i) + b2_i,   v_E = v_S = x,  v_H = log_0(project(input_scale x))
    F_E = u_E,  F_S = kappa u_S / |u_S|,  F_H = exp_0(u_H) [(+)_c Moebius bias]

Shapes: x, y [M, D]; Wg [3, D], bg [3]; W1 [3, H, D], b1 [3, H] for act "gelu" and "gelu_tanh", W1 [3, 2, H, D] (gate,
then up), b1 [3, 2, H] for "swiglu"; W2 [3, D, H], b2 [3, D]; experts in the order E, S, H; biases may be absent. Three
operations make it, each with its backward:

    geometry_rows       logits, and log_0(project) as one factor of the row, from one read of x     1 pass, backward 3
    experts             the three up-projections are one GEMM over x, with scale, bias and activation in its epilogue
                        (`up_projection`, `down_gradient`); so are their weights' gradients and dx
    geometry_combine    the three maps and the gate in one read of u                                4 passes, backward 7

The last two share one autograd.Function, so that the gradient of b2 falls out of the combine's pass as well.
Matrix products take the dtype of x and accumulate in float32; everything between them is float32.

Saved for backward, beside the parameters: z = W1 v + b1, u, x, and logits and row scales of 12 bytes each a row; for
bodies of h = 1 (gelu) or 2 (swiglu) matrices and itemsize b that is (3 h H + 4 D) b + 24 bytes a row (`saved_bytes`), and
the activations are rebuilt from z. For M = 16,384, D = 1,024, H = 4,096 in bfloat16 it is 0.54 GB.

With `routing="top1"` each row goes to the expert of its greatest logit alone (Switch Transformer, arXiv:2101.03961):
y = g_k F_k(x). Rows are sorted by expert and each expert computes its own; the three counts are read by the host, once
a layer, which waits for the device there. Saved then: z and u of one expert, x as it came and as sorted, logits likewise,
the scale and the order: (h H + 3 D) b + 44 bytes a row.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.geometry.combine_backward import combine_backward
from armillary.kernels.geometry.combine_forward import combine_forward
from armillary.kernels.geometry.curvature import log_scale_reference
from armillary.kernels.geometry.geometry_combine import CLIP, check_maps, geometry_combine_reference
from armillary.kernels.geometry.geometry_rows import check_gate, geometry_rows
from armillary.kernels.launch import Impl, check_tensor, refuse, use_triton
from armillary.kernels.mlp.down_gradient import down_gradient
from armillary.kernels.mlp.up_projection import ACTIVATIONS, Activation, activate, up_projection
from armillary.kernels.rows import wide

__all__ = ["ROUTINGS", "Routing", "geometry_ffn", "geometry_ffn_reference", "saved_bytes"]

Routing = Literal["soft", "top1"]
ROUTINGS: tuple[str, ...] = get_args(Routing)


def saved_bytes(dim: int, hidden: int, body: Activation, itemsize: int, routing: Routing = "soft") -> int:
    """Bytes a row that the layer keeps for its backward, beside the parameters."""
    experts, rows, scalars = (3, 4, 24) if routing == "soft" else (1, 3, 44)
    return (experts * (2 if body == "swiglu" else 1) * hidden + rows * dim) * itemsize + scalars


def geometry_ffn_reference(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    temperature: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    kappa: Tensor,
    c: Tensor,
    moebius_bias: Tensor | None = None,
    *,
    body: Activation,
    input_scale: float,
    routing: Routing = "soft",
    clip: float = CLIP,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, expert by expert, any float dtype: the oracle of the tests and the CPU path."""
    dtype = wide(x)
    logits = F.linear(x.to(dtype), gate_weight.to(dtype), None if gate_bias is None else gate_bias.to(dtype))
    logits = logits / temperature

    def expert(k: int, x: Tensor) -> Tensor:
        if k == 2:
            a2 = c * input_scale**2 * x.to(dtype).square().sum(1, keepdim=True)
            x = (input_scale * log_scale_reference(a2) * x).to(x.dtype)
        z = F.linear(x, weight1[k].flatten(0, -2), None if bias1 is None else bias1[k].flatten())
        a = activate(z.view(len(x), 1, *weight1.shape[1:-1]), body).squeeze(1)
        return F.linear(a, weight2[k], None if bias2 is None else bias2[k])

    if routing == "soft":
        u = torch.stack([expert(k, x) for k in range(3)])
        return geometry_combine_reference(u, logits, kappa, c, moebius_bias, clip=clip), logits
    choice = logits.argmax(1)
    y = torch.zeros_like(x)
    for k in range(3):
        rows = (choice == k).nonzero().squeeze(1)
        u = expert(k, x[rows])[None]
        y = y.index_copy(
            0, rows, geometry_combine_reference(u, logits[rows], kappa, c, moebius_bias, expert=k, clip=clip)
        )
    return y, logits


class _Experts(torch.autograd.Function):
    """Up-projections, down-projections and maps of all three experts, or of one."""

    @staticmethod
    def forward(
        ctx, x, logits, scale, weight1, bias1, weight2, bias2, kappa, c, moebius_bias, expert, body, clip, keep
    ):
        z, a = up_projection(x, weight1, bias1, scale, body, save_z=keep, impl="triton")
        u = torch.empty(len(weight2), *x.shape, dtype=x.dtype, device=x.device)
        for k, plane in enumerate(u):
            if bias2 is None:
                torch.mm(a[:, k], weight2[k].t(), out=plane)
            else:
                torch.addmm(bias2[k], a[:, k], weight2[k].t(), out=plane)
        if keep:
            ctx.save_for_backward(x, logits, scale, weight1, bias1, weight2, bias2, kappa, c, moebius_bias, z, u)
            ctx.expert, ctx.body, ctx.clip = expert, body, clip
        return combine_forward(u, logits, kappa, c, moebius_bias, expert, clip)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, logits, scale, weight1, bias1, weight2, bias2, kappa, c, moebius_bias, z, u = ctx.saved_tensors
        need_x, _, need_scale, need_weight1, need_bias1, need_weight2 = ctx.needs_input_grad[:6]
        du, dlogits, dkappa, dc, db, dbias2 = combine_backward(
            dy.contiguous(), u, logits, kappa, c, moebius_bias, ctx.expert, ctx.clip, column_sums=bias2 is not None
        )
        dx = dscale = dweight1 = dbias1 = dweight2 = None
        if need_x or need_scale or need_weight1 or need_bias1 or need_weight2:
            dz, a, dbias1, dscale = down_gradient(du, weight2, z, bias1, scale, ctx.body, impl="triton")
            if need_weight2:
                dweight2 = torch.bmm(du.transpose(1, 2), a.transpose(0, 1))
            del du, a
            dz = dz.flatten(1)
            if need_weight1:
                dweight1 = torch.mm(dz.t(), x).view_as(weight1)
            if need_x:
                dx = torch.mm(dz, weight1.flatten(0, -2))  # the sum over the experts is the product's own
        return (
            dx,
            dlogits,
            dscale,
            dweight1,
            None if dbias1 is None else dbias1.to(bias1.dtype),
            dweight2,
            None if dbias2 is None else dbias2.to(bias2.dtype),
            dkappa,
            dc,
            db,
            *(None,) * 4,
        )


class _Permute(torch.autograd.Function):
    """x[order]; the gradient is permuted back, where indexing would add into zeros."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, g):
        order, inverse = ctx.saved_tensors
        return _Permute.apply(g, inverse, order), None, None


def _top1(x, logits, scale, weights, kappa, c, moebius_bias, body, clip, keep) -> Tensor:
    choice = logits.detach().argmax(1)
    order = choice.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    experts = torch.arange(3, device=x.device)
    counts = (choice[:, None] == experts).sum(0).tolist()  # the one wait for the device
    x = _Permute.apply(x, order, inverse).split(counts)
    logits = _Permute.apply(logits, order, inverse).split(counts)
    scale = _Permute.apply(scale[2], order, inverse).split(counts)[2].unsqueeze(0)
    parts = [(None,) * 3 if w is None else w.split(1) for w in weights]
    mixed = [
        _Experts.apply(
            x[k],
            logits[k],
            scale if k == 2 else None,
            *(part[k] for part in parts),
            kappa,
            c,
            moebius_bias if k == 2 else None,
            k,
            body,
            clip,
            keep,
        )
        for k in range(3)
    ]
    return _Permute.apply(torch.cat(mixed), inverse, order)


def geometry_ffn(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    temperature: Tensor | float,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    kappa: Tensor | float,
    c: Tensor | float,
    moebius_bias: Tensor | None = None,
    *,
    body: Activation,
    input_scale: float,
    routing: Routing = "soft",
    clip: float = CLIP,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Mixture of a Euclidean, a spherical and a hyperbolic feed-forward expert.

    Args:
        x: [M, D], float32, bfloat16, float16, or float64 on the reference path. D at most 8,192.
        gate_weight: [3, D], in the dtype of x or float32.
        gate_bias: [3] likewise, or None.
        temperature: What the gate's logits are divided by, > 0; a number or a 0-d float32 or float64 tensor.
        weight1: [3, H, D], or [3, 2, H, D] (gate, then up) for "swiglu", in the dtype of x.
        bias1: [3, H] or [3, 2, H] in the dtype of x, or None.
        weight2: [3, D, H] in the dtype of x.
        bias2: [3, D] in the dtype of x, or None.
        kappa: Radius of the sphere, likewise.
        c: Likewise, > 0: the ball has curvature -c.
        moebius_bias: [D] point of the ball, in the dtype of x or float32, or None.
        body: "gelu", "gelu_tanh" or "swiglu".
        input_scale: Factor that brings x into the ball; 0.5 / sqrt(D) puts the rows of a LayerNorm at radius 0.5.
        routing: "soft" mixes all three; "top1" computes the expert of the greatest logit, and reads three counts.
        clip: Where sqrt(c) |u_H| is cut; math.inf for the plain exponential map.
        impl: See `armillary.kernels.launch`. "triton" is differentiable once, "reference" any number of times.

    Returns:
        y [M, D] in the dtype of x, and the gate's logits [M, 3] float32 (divided by the temperature, differentiable).

    Raises:
        ValueError: Wrong shape, dtype, device or layout, an unknown body or routing; c or temperature <= 0 (not
            looked at in a tensor on a GPU); clip <= 0.

    Source:
        Galaxy-Walker (arXiv:2503.18578), equations 4 to 7.
    """
    name = "geometry_ffn"
    if body not in ACTIVATIONS:
        refuse(name, "body", f"must be one of {', '.join(ACTIVATIONS)}", repr(body))
    if routing not in ROUTINGS:
        refuse(name, "routing", f"must be one of {', '.join(ROUTINGS)}", repr(routing))
    temperature = check_gate(name, x, gate_weight, gate_bias, temperature, input_scale)
    kappa, c = check_maps(name, x, kappa, c, moebius_bias, clip)
    dim, halves = x.shape[1], [2] if body == "swiglu" else []
    check_tensor(name, "weight1", weight1, [3, *halves, "H", dim], like=x, dtypes=(x.dtype,))
    hidden = weight1.shape[-2]
    check_tensor(name, "weight2", weight2, [3, dim, hidden], like=x, dtypes=(x.dtype,))
    if bias1 is not None:
        check_tensor(name, "bias1", bias1, [3, *halves, hidden], like=x, dtypes=(x.dtype,))
    if bias2 is not None:
        check_tensor(name, "bias2", bias2, [3, dim], like=x, dtypes=(x.dtype,))
    weights = (weight1, bias1, weight2, bias2)
    given = (x, gate_weight, gate_bias, temperature, *weights, kappa, c, moebius_bias)
    if not use_triton(name, impl, x):
        return geometry_ffn_reference(*given, body=body, input_scale=input_scale, routing=routing, clip=clip)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    passed, logits, scale = geometry_rows(
        x, gate_weight, gate_bias, temperature, c, input_scale=input_scale, impl="triton"
    )
    x = passed if x.requires_grad else x  # else its gradient would be computed to be dropped
    if routing == "top1":
        return _top1(x, logits, scale, weights, kappa, c, moebius_bias, body, float(clip), keep), logits
    y = _Experts.apply(x, logits, scale, *weights, kappa, c, moebius_bias, None, body, float(clip), keep)
    return y, logits
