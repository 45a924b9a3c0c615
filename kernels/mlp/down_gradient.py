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
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import INTERPRETER, Impl, Launch, use_triton
from armillary.kernels.mlp.gelu import gelu_and_gradient, silu_and_gradient
from armillary.kernels.mlp.gemm import COMPILED, Gemm, choose, launch_persistent, part_of, place_tile
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


@triton.jit
def _epilogue(
    da,
    z,  # float32, 0 where nothing is
    up,  # the second half of z if GATED, else unused
    bias_ptr,
    scale_ptr,
    columns_ptr,
    row,  # of this tile in the scale
    column,  # and in the bias
    in_rows,
    in_columns,
    H,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
):
    """scaled dz, its second half (GATED) and a in float32, and the row sums; column sums go to columns_ptr."""
    da = tl.where(in_rows[:, None], da, 0.0)  # rows over the border repeat another one
    if GATED:
        s, ds = silu_and_gradient(z)
        a = s * up
        dz, d_up = da * up * ds, da * s
    else:
        a, ds = gelu_and_gradient(z, TANH)
        dz = da * ds
        d_up = dz
    if columns_ptr is not None:
        tl.store(columns_ptr + column, tl.sum(dz, 0), mask=in_columns)
        if GATED:
            tl.store(columns_ptr + H + column, tl.sum(d_up, 0), mask=in_columns)
    sums = tl.zeros_like(in_rows).to(tl.float32)
    if scale_ptr is not None:
        if bias_ptr is not None:
            z -= tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up -= tl.load(bias_ptr + H + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        scale = tl.load(scale_ptr + row, mask=in_rows, other=1.0)
        product = dz * z
        dz *= scale[:, None]
        if GATED:
            product += d_up * up
            d_up *= scale[:, None]
        sums = tl.sum(product, 1) / scale
    return dz, d_up, a, sums


@triton.jit
def _write(
    da,
    z_ptr,
    bias_ptr,
    scale_ptr,
    dz_ptr,
    a_ptr,
    columns_ptr,
    rows_ptr,
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
    WIDTH: tl.constexpr,
):
    """Epilogue of one tile through plain pointers, in parts of WIDTH columns, one after the other, to save registers."""
    G: tl.constexpr = 2 if GATED else 1
    PARTS: tl.constexpr = BN // WIDTH
    DTYPE: tl.constexpr = dz_ptr.dtype.element_ty
    i, j = tl.arange(0, BM), tl.arange(0, WIDTH)
    in_rows = i < M - m0
    row = e * M + m0 + i
    if columns_ptr is not None:
        columns_ptr += (m0 // BM).to(tl.int64) * (E * G * H)
    row_sums = tl.zeros((BM,), tl.float32)
    for part in tl.static_range(PARTS):
        at = h0 + part * WIDTH
        column = e * G * H + at + j
        inside = in_rows[:, None] & (j < H - at)[None, :]
        z_at = m0.to(tl.int64) * (E * G * H) + i[:, None] * (E * G * H) + column[None, :]
        z = tl.load(z_ptr + z_at, mask=inside, other=0.0).to(tl.float32)
        up = z
        if GATED:
            up = tl.load(z_ptr + H + z_at, mask=inside, other=0.0).to(tl.float32)
        dz, d_up, a, sums = _epilogue(
            part_of(da, part, PARTS, BM, BN),
            z,
            up,
            bias_ptr,
            scale_ptr,
            columns_ptr,
            row,
            column,
            in_rows,
            j < H - at,
            H,
            GATED,
            TANH,
        )
        row_sums += sums
        tl.store(dz_ptr + z_at, dz.to(DTYPE), mask=inside)
        if GATED:
            tl.store(dz_ptr + H + z_at, d_up.to(DTYPE), mask=inside)
        a_at = m0.to(tl.int64) * (E * H) + i[:, None] * (E * H) + (e * H + at + j)[None, :]
        tl.store(a_ptr + a_at, a.to(DTYPE), mask=inside)
    if scale_ptr is not None:
        tl.store(rows_ptr + (h0 // BN).to(tl.int64) * (E * M) + row, row_sums, mask=in_rows)


@triton.jit(do_not_specialize=["M"])
def _fused_kernel(
    du_ptr,  # [E, M, D]
    w_ptr,  # [E, D, H]
    z_ptr,  # [M, E, G, H], G = 2 if GATED else 1
    bias_ptr,  # [E, G, H] or None
    scale_ptr,  # float32 [E, M] or None
    dz_ptr,  # [M, E, G, H]
    a_ptr,  # [M, E, H]
    columns_ptr,  # float32 [tiles along M, E, G, H] or None
    rows_ptr,  # float32 [tiles along H, E, M], None without scale_ptr
    M,
    E,
    H,
    D,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides D and BN divides H
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    m0, e, h0 = place_tile(tl.program_id(0), M, E, H, BM, BN, GROUP)
    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    du_at = du_ptr + (e.to(tl.int64) * M + m0) * D + tl.minimum(i, M - 1 - m0)[:, None] * D + k[None, :]
    w_at = w_ptr + e.to(tl.int64) * D * H + h0 + k[:, None] * H + j[None, :]
    da = tl.zeros((BM, BN), tl.float32)
    for done in range(0, D, BK):
        if EVEN:
            du, w = tl.load(du_at + done), tl.load(w_at)
        else:
            du = tl.load(du_at + done, mask=(k < D - done)[None, :], other=0.0)
            w = tl.load(w_at, mask=(k < D - done)[:, None] & (j < H - h0)[None, :], other=0.0)
        da = tl.dot(du, w, da, input_precision="ieee")
        w_at += BK * H
    _write(
        da,
        z_ptr,
        bias_ptr,
        scale_ptr,
        dz_ptr,
        a_ptr,
        columns_ptr,
        rows_ptr,
        m0,
        e,
        h0,
        M,
        E,
        H,
        GATED,
        TANH,
        BM,
        BN,
        32,
    )


@triton.jit(do_not_specialize=["M"])
def _tma_kernel(
    du_ptr,
    w_ptr,
    z_ptr,
    bias_ptr,
    scale_ptr,
    dz_ptr,
    a_ptr,
    columns_ptr,
    rows_ptr,
    M,
    E,
    H,
    D,
    programs,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    G: tl.constexpr = 2 if GATED else 1
    WIDTH: tl.constexpr = 32
    PARTS: tl.constexpr = BN // WIDTH
    i, j = tl.arange(0, BM), tl.arange(0, WIDTH)
    du_tiles = tl.make_tensor_descriptor(du_ptr, [E * M, D], [D, 1], [BM, BK])
    w_tiles = tl.make_tensor_descriptor(w_ptr, [E * D, H], [H, 1], [BK, BN])
    z_tiles = tl.make_tensor_descriptor(z_ptr, [M, E * G * H], [E * G * H, 1], [BM, WIDTH])
    dz_tiles = tl.make_tensor_descriptor(dz_ptr, [M, E * G * H], [E * G * H, 1], [BM, WIDTH])
    a_tiles = tl.make_tensor_descriptor(a_ptr, [M, E * H], [E * H, 1], [BM, WIDTH])
    DTYPE: tl.constexpr = dz_ptr.dtype.element_ty
    tiles = tl.cdiv(M, BM) * E * tl.cdiv(H, BN)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        m0, e, h0 = place_tile(tile, M, E, H, BM, BN, GROUP)
        da = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            da = tl.dot(du_tiles.load([e * M + m0, k]), w_tiles.load([e * D + k, h0]), da, input_precision="ieee")
        row, in_rows = e * M + m0 + i, i < M - m0
        row_sums = tl.zeros((BM,), tl.float32)
        sums_ptr = columns_ptr
        if columns_ptr is not None:
            sums_ptr += (m0 // BM).to(tl.int64) * (E * G * H)
        for part in tl.static_range(PARTS):
            at = h0 + part * WIDTH
            column = e * G * H + at
            z = z_tiles.load([m0, column]).to(tl.float32)
            up = z
            if GATED:
                up = z_tiles.load([m0, column + H]).to(tl.float32)
            dz, d_up, a, sums = _epilogue(
                part_of(da, part, PARTS, BM, BN),
                z,
                up,
                bias_ptr,
                scale_ptr,
                sums_ptr,
                row,
                column + j,
                in_rows,
                j < H - at,
                H,
                GATED,
                TANH,
            )
            row_sums += sums
            dz_tiles.store([m0, column], dz.to(DTYPE))
            if GATED:
                dz_tiles.store([m0, column + H], d_up.to(DTYPE))
            a_tiles.store([m0, e * H + at], a.to(DTYPE))
        if scale_ptr is not None:
            tl.store(rows_ptr + (h0 // BN).to(tl.int64) * (E * M) + row, row_sums, mask=in_rows)


@triton.jit(do_not_specialize=["M"])
def _elementwise_kernel(
    da_ptr,  # [E, M, H]; dz_ptr may be the same for E = 1
    z_ptr,
    bias_ptr,
    scale_ptr,
    dz_ptr,
    a_ptr,
    columns_ptr,
    rows_ptr,
    M,
    E,
    H,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    m0, e, h0 = place_tile(tl.program_id(0), M, E, H, BM, BN, 1)
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    inside = (i < M - m0)[:, None] & (j < H - h0)[None, :]
    da_at = da_ptr + (e.to(tl.int64) * M + m0) * H + h0 + i[:, None] * H + j[None, :]
    da = tl.load(da_at, mask=inside, other=0.0).to(tl.float32)
    _write(
        da,
        z_ptr,
        bias_ptr,
        scale_ptr,
        dz_ptr,
        a_ptr,
        columns_ptr,
        rows_ptr,
        m0,
        e,
        h0,
        M,
        E,
        H,
        GATED,
        TANH,
        BM,
        BN,
        BN,
    )


LAUNCH = {
    INTERPRETER: Gemm({"BM": 32, "BN": 64, "BK": 16, "GROUP": 2}, source="small, so that small inputs have borders"),
    80: Gemm(
        {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8},
        num_warps=8,
        num_stages=4,
        source=COMPILED.format(209),
    ),
    90: Gemm(
        {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8},
        num_warps=8,
        num_stages=3,
        source=COMPILED.format(246),
        path="tma",
    ),
    100: Gemm(
        {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8},
        num_warps=8,
        num_stages=3,
        source=COMPILED.format(254),
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
        source=COMPILED.format(231),
    ),
}
ELEMENTWISE = {
    INTERPRETER: Launch({"BM": 16, "BN": 32}, source=LAUNCH[INTERPRETER].source),
    80: Launch({"BM": 16, "BN": 128}, num_warps=4, source=COMPILED.format(80)),
}


def _launch(
    du: Tensor, weight2: Tensor, z: Tensor, bias: Tensor | None, row_scale: Tensor | None, activation: Activation
) -> DownGradient:
    (experts, m, d), h = du.shape, weight2.shape[2]
    a = torch.empty(m, experts, h, dtype=du.dtype, device=du.device)
    if not a.numel():
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        return torch.zeros_like(z), a, d_bias, None if row_scale is None else torch.zeros_like(row_scale)
    form = {"GATED": activation == "swiglu", "TANH": activation == "gelu_tanh"}
    # More than one expert: the last loads of one meet the weights of the next where BK does not divide D.
    depth, gates = d if experts > 1 else 0, z.shape[2:-1].numel()
    path, row, blocks = choose((LAUNCH, FUSED, ELEMENTWISE), du, gates, h, depth, (du, weight2, z, a))
    down, across = triton.cdiv(m, blocks["BM"]), triton.cdiv(h, blocks["BN"])
    tiles = down * experts * across
    partials = partial(torch.empty, dtype=torch.float32, device=du.device)
    columns = None if bias is None else partials(down, *bias.shape)
    rows = None if row_scale is None else partials(across, experts, m)
    sizes = (m, experts, h)
    warps, stages = {"num_warps": row.num_warps}, {"num_stages": row.num_stages}
    if path == "cublas":
        da = torch.bmm(du, weight2)
        dz = da.view_as(z) if experts == gates == 1 else torch.empty_like(z)
        arguments = (da, z, bias, row_scale, dz, a, columns, rows, *sizes)
        _elementwise_kernel[(tiles,)](*arguments, **form, **blocks, **warps)
    else:
        dz = torch.empty_like(z)
        products = (du, weight2, z, bias, row_scale, dz, a, columns, rows, *sizes, d)
        if path == "tma":
            launch_persistent(_tma_kernel, tiles, du, *products, **form, **blocks, **warps, **stages)
        else:
            even = d % blocks["BK"] == 0 and h % blocks["BN"] == 0
            _fused_kernel[(tiles,)](*products, **form, EVEN=even, **blocks, **warps, **stages)
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
        du: [E, M, D] float32, bfloat16 or float16 (any float on the reference path); all tensors contiguous.
        weight2: [E, D, H], dtype of du.
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
        if use_triton("down_gradient", impl, du):
            return _launch(du, weight2, z, bias, row_scale, activation)
        return down_gradient_reference(du, weight2, z, bias, row_scale, activation)
