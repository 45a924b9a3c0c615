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
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import INTERPRETER, Impl, Launch, use_triton
from armillary.kernels.mlp.gelu import gelu, silu
from armillary.kernels.mlp.gemm import COMPILED, Gemm, choose, launch_persistent, part_of, place_tile

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


@triton.jit
def _epilogue(
    p,
    q,
    bias_ptr,
    scale_ptr,
    row,
    column,
    in_rows,
    in_columns,
    H,
    DTYPE: tl.constexpr,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
):
    """z, its second half (GATED) and a, of the products p and q at `row` of the scale and `column` of the bias."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row, mask=in_rows, other=0.0)[:, None]
        p *= scale
        if GATED:
            q *= scale
    if bias_ptr is not None:
        p += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if GATED:
            q += tl.load(bias_ptr + H + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    z = p.to(DTYPE)
    if GATED:
        up = q.to(DTYPE)
        a = silu(z.to(tl.float32)) * up.to(tl.float32)
    else:
        up = z
        a = gelu(z.to(tl.float32), TANH)
    return z, up, a.to(DTYPE)


@triton.jit
def _write(
    p,
    q,
    bias_ptr,
    scale_ptr,
    z_ptr,
    a_ptr,
    m0,
    e,
    h0,
    M,
    E,
    H,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Epilogue of one tile through plain pointers."""
    G: tl.constexpr = 2 if GATED else 1
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    in_rows, in_columns = i < M - m0, j < H - h0
    inside = in_rows[:, None] & in_columns[None, :]
    first = e * G * H + h0
    z, up, a = _epilogue(
        p,
        q,
        bias_ptr,
        scale_ptr,
        e * M + m0 + i,
        first + j,
        in_rows,
        in_columns,
        H,
        a_ptr.dtype.element_ty,
        GATED,
        TANH,
    )
    if z_ptr is not None:
        z_at = z_ptr + m0.to(tl.int64) * (E * G * H) + first + i[:, None] * (E * G * H) + j[None, :]
        tl.store(z_at, z, mask=inside)
        if GATED:
            tl.store(z_at + H, up, mask=inside)
    tl.store(a_ptr + m0.to(tl.int64) * (E * H) + e * H + h0 + i[:, None] * (E * H) + j[None, :], a, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _fused_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [E, G, H, K], G = 2 if GATED else 1
    bias_ptr,  # [E, G, H] or None
    scale_ptr,  # float32 [E, M] or None
    z_ptr,  # [M, E, G, H] or None
    a_ptr,  # [M, E, H]
    M,
    E,
    H,
    K,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    G: tl.constexpr = 2 if GATED else 1
    m0, e, h0 = place_tile(tl.program_id(0), M, E, H, BM, BN, GROUP)
    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    # Tiles over the border read the last row again, so that only the stores need a mask.
    x_at = x_ptr + m0.to(tl.int64) * K + tl.minimum(i, M - 1 - m0)[:, None] * K + k[None, :]
    w_at = w_ptr + (e * G * H + h0).to(tl.int64) * K + tl.minimum(j, H - 1 - h0)[None, :] * K + k[:, None]
    up_at = w_ptr + (e * G * H + H + h0).to(tl.int64) * K + tl.minimum(j, H - 1 - h0)[None, :] * K + k[:, None]
    p = tl.zeros((BM, BN), tl.float32)
    q = tl.zeros((BM, BN), tl.float32)
    for done in range(0, K, BK):
        if EVEN:
            x, w = tl.load(x_at + done), tl.load(w_at + done)
        else:
            x = tl.load(x_at + done, mask=(k < K - done)[None, :], other=0.0)
            w = tl.load(w_at + done, mask=(k < K - done)[:, None], other=0.0)
        p = tl.dot(x, w, p, input_precision="ieee")
        if GATED:
            if EVEN:
                up = tl.load(up_at + done)
            else:
                up = tl.load(up_at + done, mask=(k < K - done)[:, None], other=0.0)
            q = tl.dot(x, up, q, input_precision="ieee")
    _write(p, q, bias_ptr, scale_ptr, z_ptr, a_ptr, m0, e, h0, M, E, H, GATED, TANH, BM, BN)


@triton.jit(do_not_specialize=["M"])
def _tma_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    z_ptr,
    a_ptr,
    M,
    E,
    H,
    K,
    programs,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    G: tl.constexpr = 2 if GATED else 1
    WIDTH: tl.constexpr = BN * G // 4
    i, j = tl.arange(0, BM), tl.arange(0, WIDTH)
    x_tiles = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BM, BK])
    w_tiles = tl.make_tensor_descriptor(w_ptr, [E * G * H, K], [K, 1], [BN, BK])
    a_tiles = tl.make_tensor_descriptor(a_ptr, [M, E * H], [E * H, 1], [BM, WIDTH])
    if z_ptr is not None:
        z_tiles = tl.make_tensor_descriptor(z_ptr, [M, E * G * H], [E * G * H, 1], [BM, WIDTH])
    tiles = tl.cdiv(M, BM) * E * tl.cdiv(H, BN)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        m0, e, h0 = place_tile(tile, M, E, H, BM, BN, GROUP)
        first = e * G * H + h0
        p = tl.zeros((BM, BN), tl.float32)
        q = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            x = x_tiles.load([m0, k])
            p = tl.dot(x, w_tiles.load([first, k]).T, p, input_precision="ieee")
            if GATED:
                q = tl.dot(x, w_tiles.load([first + H, k]).T, q, input_precision="ieee")
        for part in tl.static_range(BN // WIDTH):  # one after the other, to save registers
            at = h0 + part * WIDTH
            column = e * G * H + at
            z, up, a = _epilogue(
                part_of(p, part, BN // WIDTH, BM, BN),
                part_of(q, part, BN // WIDTH, BM, BN),
                bias_ptr,
                scale_ptr,
                e * M + m0 + i,
                column + j,
                i < M - m0,
                j < H - at,
                H,
                a_ptr.dtype.element_ty,
                GATED,
                TANH,
            )
            if z_ptr is not None:
                z_tiles.store([m0, column], z)
                if GATED:
                    z_tiles.store([m0, column + H], up)
            a_tiles.store([m0, e * H + at], a)


@triton.jit(do_not_specialize=["M"])
def _elementwise_kernel(
    p_ptr,  # [M, E, G, H]; z_ptr may be the same
    bias_ptr,
    scale_ptr,
    z_ptr,
    a_ptr,
    M,
    E,
    H,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    G: tl.constexpr = 2 if GATED else 1
    m0, e, h0 = place_tile(tl.program_id(0), M, E, H, BM, BN, 1)
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    inside = (i < M - m0)[:, None] & (j < H - h0)[None, :]
    p_at = p_ptr + m0.to(tl.int64) * (E * G * H) + e * G * H + h0 + i[:, None] * (E * G * H) + j[None, :]
    p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
    q = p
    if GATED:
        q = tl.load(p_at + H, mask=inside, other=0.0).to(tl.float32)
    _write(p, q, bias_ptr, scale_ptr, z_ptr, a_ptr, m0, e, h0, M, E, H, GATED, TANH, BM, BN)


LAUNCH = {
    INTERPRETER: Gemm({"BM": 32, "BN": 64, "BK": 16, "GROUP": 2}, source="small, so that small inputs have borders"),
    80: Gemm(
        {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8},
        num_warps=8,
        num_stages=4,
        source=COMPILED.format(193),
    ),
    90: Gemm(
        {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8},
        num_warps=8,
        num_stages=3,
        source=COMPILED.format(255),
        path="tma",
    ),
    100: Gemm(
        {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8},
        num_warps=8,
        num_stages=3,
        source=COMPILED.format(237),
        path="tma",
    ),
    120: Gemm(source="not measured; tiles as large as those of 10.0 do not fit its shared memory", path="cublas"),
}
FUSED = {  # where the path is "tma" and the shape has no descriptors
    INTERPRETER: LAUNCH[INTERPRETER],
    80: LAUNCH[80],
    90: Launch(
        {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8},
        num_warps=8,
        num_stages=3,
        source=COMPILED.format(197),
    ),
}
ELEMENTWISE = {
    INTERPRETER: Launch({"BM": 16, "BN": 32}, source=LAUNCH[INTERPRETER].source),
    80: Launch({"BM": 4, "BN": 512}, num_warps=4, source=COMPILED.format(64)),
}


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_scale: Tensor | None, activation: Activation, save_z: bool
) -> tuple[Tensor | None, Tensor]:
    (m, k), (experts, h), gates = x.shape, (weight.shape[0], weight.shape[-2]), weight.shape[1:-2].numel()
    empty = partial(torch.empty, dtype=x.dtype, device=x.device)
    a = empty(m, experts, h)
    z = empty(m, *weight.shape[:-1]) if save_z else None
    if not a.numel():
        return z, a
    form = {"GATED": activation == "swiglu", "TANH": activation == "gelu_tanh"}
    path, row, blocks = choose((LAUNCH, FUSED, ELEMENTWISE), x, gates, h, 0, (x, weight, z, a))
    tiles = triton.cdiv(m, blocks["BM"]) * experts * triton.cdiv(h, blocks["BN"])
    sizes = (m, experts, h)
    warps, stages = {"num_warps": row.num_warps}, {"num_stages": row.num_stages}
    if path == "cublas":
        weights = weight.view(-1, k).t()
        # The product goes into z, where scale and bias then change it.
        p = z if z is not None else a if gates == 1 else empty(m, *weight.shape[:-1])
        if row_scale is None and bias is not None:
            torch.addmm(bias.view(-1), x, weights, out=p.view(m, -1))
            bias, target = None, None
        else:
            torch.mm(x, weights, out=p.view(m, -1))
            target = None if row_scale is None else z
        _elementwise_kernel[(tiles,)](p, bias, row_scale, target, a, *sizes, **form, **blocks, **warps)
    elif path == "tma":
        arguments = (x, weight, bias, row_scale, z, a, *sizes, k)
        launch_persistent(_tma_kernel, tiles, x, *arguments, **form, **blocks, **warps, **stages)
    else:
        arguments = (x, weight, bias, row_scale, z, a, *sizes, k)
        even = k % blocks["BK"] == 0
        _fused_kernel[(tiles,)](*arguments, **form, EVEN=even, **blocks, **warps, **stages)
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
        x: [M, K] float32, bfloat16 or float16 (any float on the reference path); all tensors contiguous.
        weight: [E, H, K]; [E, 2, H, K] for "swiglu"; dtype of x.
        bias: [E, H]; [E, 2, H] for "swiglu"; or None.
        row_scale: [E, M] float32 or None.
        activation: "gelu", "gelu_tanh" or "swiglu".
        save_z: False where nobody will read z.
        impl: See `armillary.kernels.launch`.

    Returns:
        z [M, E, H] / [M, E, 2, H], or None without `save_z`; a [M, E, H]. Both in the dtype of x.
    """
    with torch.no_grad():
        if use_triton("up_projection", impl, x):
            return _launch(x, weight, bias, row_scale, activation, save_z)
        z, a = up_projection_reference(x, weight, bias, row_scale, activation)
        return (z if save_z else None), a
