"""Kernels of the up-projection: z = s (x W^T) + b and a = act(z) of one tile, on each path of gemm.py.

A program holds a tile [BM, BN] of one expert's product in float32 registers: p, and for "swiglu" (GATED) the second half
q beside it. `_epilogue` makes z and a of them, so no product without its scale, bias and activation is ever in memory.

Shapes: x [M, K]; w [E, G, H, K], G = 2 if GATED else 1; bias [E, G, H] or None; scale float32 [E, M] or None; z
[M, E, G, H] or None; a [M, E, H].
"""

import triton
import triton.language as tl

from armillary.kernels.mlp.gelu import gelu, silu
from armillary.kernels.mlp.gemm import part_of, place_tile

__all__ = ["elementwise_kernel", "fused_kernel", "tma_kernel"]


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
    DTYPE: tl.constexpr = a_ptr.dtype.element_ty
    row = e * M + m0 + i
    z, up, a = _epilogue(p, q, bias_ptr, scale_ptr, row, first + j, in_rows, in_columns, H, DTYPE, GATED, TANH)
    if z_ptr is not None:
        z_at = z_ptr + m0.to(tl.int64) * (E * G * H) + first + i[:, None] * (E * G * H) + j[None, :]
        tl.store(z_at, z, mask=inside)
        if GATED:
            tl.store(z_at + H, up, mask=inside)
    tl.store(a_ptr + m0.to(tl.int64) * (E * H) + e * H + h0 + i[:, None] * (E * H) + j[None, :], a, mask=inside)


@triton.jit(do_not_specialize=["M"])
def fused_kernel(
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
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile a program, through plain pointers."""
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
def tma_kernel(
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
    """Every `programs`-th tile, by tensor descriptors.

    A GATED tile is one product [BM, 2 BN] with the rows of both halves of the weight, cut in two afterwards: of two
    accumulators in a flattened loop ptxas would run the products of sm_90 one after the other (C7515).
    """
    G: tl.constexpr = 2 if GATED else 1
    WIDTH: tl.constexpr = BN * G // 4
    DTYPE: tl.constexpr = a_ptr.dtype.element_ty
    i, j = tl.arange(0, BM), tl.arange(0, WIDTH)
    x_tiles = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BM, BK])
    w_tiles = tl.make_tensor_descriptor(w_ptr, [E * G, H, K], [H * K, K, 1], [G, BN, BK])
    a_tiles = tl.make_tensor_descriptor(a_ptr, [M, E * H], [E * H, 1], [BM, WIDTH])
    if z_ptr is not None:
        z_tiles = tl.make_tensor_descriptor(z_ptr, [M, E * G * H], [E * G * H, 1], [BM, WIDTH])
    tiles = tl.cdiv(M, BM) * E * tl.cdiv(H, BN)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        m0, e, h0 = place_tile(tile, M, E, H, BM, BN, GROUP)
        p = tl.zeros((BM, G * BN), tl.float32)
        for k in range(0, K, BK):
            w = w_tiles.load([e * G, h0, k]).reshape(G * BN, BK)
            p = tl.dot(x_tiles.load([m0, k]), w.T, p, input_precision="ieee")
        q = p
        if GATED:
            p, q = tl.split(p.reshape(BM, 2, BN).permute(0, 2, 1))
        row, in_rows = e * M + m0 + i, i < M - m0
        for part in tl.static_range(BN // WIDTH):  # one after the other, to save registers
            at = h0 + part * WIDTH
            column = e * G * H + at
            left = part_of(p, part, BN // WIDTH, BM, BN)
            right = part_of(q, part, BN // WIDTH, BM, BN)
            z, up, a = _epilogue(
                left, right, bias_ptr, scale_ptr, row, column + j, in_rows, j < H - at, H, DTYPE, GATED, TANH
            )
            if z_ptr is not None:
                z_tiles.store([m0, column], z)
                if GATED:
                    z_tiles.store([m0, column + H], up)
            a_tiles.store([m0, e * H + at], a)


@triton.jit(do_not_specialize=["M"])
def elementwise_kernel(
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
    """Epilogue of a product that the library has made, one tile a program."""
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
