"""Kernels of the down-gradient: dz = da act'(z), a, and partial sums of db and ds of one tile, on each path of gemm.py.

A program holds a tile [BM, BN] of da = du W2 in float32 registers. `_epilogue` reads z beside it, forms act and act' of
the same exponential, and sums dz over the tile's rows (db) and dz (z - b) / s over its columns (ds) before it is rounded.

Shapes: du [E, M, D]; w [E, D, H]; z and dz [M, E, G, H], G = 2 if GATED else 1; bias [E, G, H] or None; scale float32
[E, M] or None; a [M, E, H]; db float32 [tiles along M, E, G, H] or None; ds float32 [tiles along H, E, M], None without
scale.
"""

import triton
import triton.language as tl

from armillary.kernels.mlp.gelu import gelu_and_gradient, silu_and_gradient
from armillary.kernels.mlp.gemm import part_of, place_tile

__all__ = ["elementwise_kernel", "fused_kernel", "tma_kernel"]


@triton.jit
def _epilogue(
    da,
    z,  # float32, 0 where nothing is
    up,  # the second half of z if GATED, else unused
    bias_ptr,
    scale_ptr,
    db_ptr,
    row,  # of this tile in the scale
    column,  # and in the bias
    in_rows,
    in_columns,
    H,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
):
    """scaled dz, its second half (GATED) and a in float32, and the row sums; column sums go to db_ptr."""
    da = tl.where(in_rows[:, None], da, 0.0)  # rows over the border repeat another one
    if GATED:
        s, ds = silu_and_gradient(z)
        a = s * up
        dz, d_up = da * up * ds, da * s
    else:
        a, ds = gelu_and_gradient(z, TANH)
        dz = da * ds
        d_up = dz
    if db_ptr is not None:
        tl.store(db_ptr + column, tl.sum(dz, 0), mask=in_columns)
        if GATED:
            tl.store(db_ptr + H + column, tl.sum(d_up, 0), mask=in_columns)
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
    db_ptr,
    ds_ptr,
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
    if db_ptr is not None:
        db_ptr += (m0 // BM).to(tl.int64) * (E * G * H)
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
        of_part = part_of(da, part, PARTS, BM, BN)
        dz, d_up, a, sums = _epilogue(
            of_part, z, up, bias_ptr, scale_ptr, db_ptr, row, column, in_rows, j < H - at, H, GATED, TANH
        )
        row_sums += sums
        tl.store(dz_ptr + z_at, dz.to(DTYPE), mask=inside)
        if GATED:
            tl.store(dz_ptr + H + z_at, d_up.to(DTYPE), mask=inside)
        a_at = m0.to(tl.int64) * (E * H) + i[:, None] * (E * H) + (e * H + at + j)[None, :]
        tl.store(a_ptr + a_at, a.to(DTYPE), mask=inside)
    if scale_ptr is not None:
        tl.store(ds_ptr + (h0 // BN).to(tl.int64) * (E * M) + row, row_sums, mask=in_rows)


@triton.jit(do_not_specialize=["M"])
def fused_kernel(
    du_ptr,
    w_ptr,
    z_ptr,
    bias_ptr,
    scale_ptr,
    dz_ptr,
    a_ptr,
    db_ptr,
    ds_ptr,
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
    """One tile a program, through plain pointers."""
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
    _write(da, z_ptr, bias_ptr, scale_ptr, dz_ptr, a_ptr, db_ptr, ds_ptr, m0, e, h0, M, E, H, GATED, TANH, BM, BN, 32)


@triton.jit(do_not_specialize=["M"])
def tma_kernel(
    du_ptr,
    w_ptr,
    z_ptr,
    bias_ptr,
    scale_ptr,
    dz_ptr,
    a_ptr,
    db_ptr,
    ds_ptr,
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
    """Every `programs`-th tile, by tensor descriptors."""
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
        sums_ptr = db_ptr
        if db_ptr is not None:
            sums_ptr += (m0 // BM).to(tl.int64) * (E * G * H)
        for part in tl.static_range(PARTS):
            at = h0 + part * WIDTH
            column = e * G * H + at
            z = z_tiles.load([m0, column]).to(tl.float32)
            up = z
            if GATED:
                up = z_tiles.load([m0, column + H]).to(tl.float32)
            of_part = part_of(da, part, PARTS, BM, BN)
            dz, d_up, a, sums = _epilogue(
                of_part, z, up, bias_ptr, scale_ptr, sums_ptr, row, column + j, in_rows, j < H - at, H, GATED, TANH
            )
            row_sums += sums
            dz_tiles.store([m0, column], dz.to(DTYPE))
            if GATED:
                dz_tiles.store([m0, column + H], d_up.to(DTYPE))
            a_tiles.store([m0, e * H + at], a.to(DTYPE))
        if scale_ptr is not None:
            tl.store(ds_ptr + (h0 // BN).to(tl.int64) * (E * M) + row, row_sums, mask=in_rows)


@triton.jit(do_not_specialize=["M"])
def elementwise_kernel(
    da_ptr,  # [E, M, H]; dz_ptr may be the same for E = 1
    z_ptr,
    bias_ptr,
    scale_ptr,
    dz_ptr,
    a_ptr,
    db_ptr,
    ds_ptr,
    M,
    E,
    H,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Epilogue of a product that the library has made, one tile a program."""
    m0, e, h0 = place_tile(tl.program_id(0), M, E, H, BM, BN, 1)
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    inside = (i < M - m0)[:, None] & (j < H - h0)[None, :]
    da_at = da_ptr + (e.to(tl.int64) * M + m0) * H + h0 + i[:, None] * H + j[None, :]
    da = tl.load(da_at, mask=inside, other=0.0).to(tl.float32)
    _write(da, z_ptr, bias_ptr, scale_ptr, dz_ptr, a_ptr, db_ptr, ds_ptr, m0, e, h0, M, E, H, GATED, TANH, BM, BN, BN)
