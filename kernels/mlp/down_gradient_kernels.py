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
def _at(m0, column, stride, BM: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of a tile [BM, WIDTH] of a matrix, from row m0 and a column on."""
    return m0.to(tl.int64) * stride + tl.arange(0, BM)[:, None] * stride + (column + tl.arange(0, WIDTH))[None, :]


@triton.jit
def _load(x, m0, column, stride, inside, BM: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Such a tile in float32; x is the matrix's pointer or, with TMA, its descriptor."""
    if TMA:
        return x.load([m0, column]).to(tl.float32)
    else:
        return tl.load(x + _at(m0, column, stride, BM, WIDTH), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(x, m0, column, stride, inside, value, BM: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Write what `_load` reads."""
    if TMA:
        x.store([m0, column], value.to(x.dtype))
    else:
        tl.store(x + _at(m0, column, stride, BM, WIDTH), value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _write(
    da,
    z,
    bias_ptr,
    scale_ptr,
    dz,
    a,
    db_ptr,
    ds_ptr,
    i,
    j,
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
    TMA: tl.constexpr,
):
    """Epilogue of one tile, in parts of WIDTH columns, one after the other, to save registers.

    z, dz and a are pointers or, with TMA, descriptors.
    """
    G: tl.constexpr = 2 if GATED else 1
    PARTS: tl.constexpr = BN // WIDTH
    row, in_rows = e * M + m0 + i, i < M - m0
    row_sums = tl.zeros((BM,), tl.float32)
    if db_ptr is not None:
        db_ptr += (m0 // BM).to(tl.int64) * (E * G * H)
    for part in tl.static_range(PARTS):
        at = h0 + part * WIDTH
        column = e * G * H + at
        inside = in_rows[:, None] & (j < H - at)[None, :]
        left = _load(z, m0, column, E * G * H, inside, BM, WIDTH, TMA)
        up = left
        if GATED:
            up = _load(z, m0, column + H, E * G * H, inside, BM, WIDTH, TMA)
        of_part = part_of(da, part, PARTS, BM, BN)
        d_left, d_up, act, sums = _epilogue(
            of_part, left, up, bias_ptr, scale_ptr, db_ptr, row, column + j, in_rows, j < H - at, H, GATED, TANH
        )
        row_sums += sums
        _store(dz, m0, column, E * G * H, inside, d_left, BM, WIDTH, TMA)
        if GATED:
            _store(dz, m0, column + H, E * G * H, inside, d_up, BM, WIDTH, TMA)
        _store(a, m0, e * H + at, E * H, inside, act, BM, WIDTH, TMA)
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
    _write(
        da, z_ptr, bias_ptr, scale_ptr, dz_ptr, a_ptr, db_ptr, ds_ptr, i, tl.arange(0, 32), m0, e, h0, M, E, H,
        GATED, TANH, BM, BN, 32, False,
    )  # fmt: skip


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
    i, j = tl.arange(0, BM), tl.arange(0, WIDTH)
    du_tiles = tl.make_tensor_descriptor(du_ptr, [E * M, D], [D, 1], [BM, BK])
    w_tiles = tl.make_tensor_descriptor(w_ptr, [E * D, H], [H, 1], [BK, BN])
    z_tiles = tl.make_tensor_descriptor(z_ptr, [M, E * G * H], [E * G * H, 1], [BM, WIDTH])
    dz_tiles = tl.make_tensor_descriptor(dz_ptr, [M, E * G * H], [E * G * H, 1], [BM, WIDTH])
    a_tiles = tl.make_tensor_descriptor(a_ptr, [M, E * H], [E * H, 1], [BM, WIDTH])
    tiles = tl.cdiv(M, BM) * E * tl.cdiv(H, BN)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        m0, e, h0 = place_tile(tile, M, E, H, BM, BN, GROUP)
        da = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            da = tl.dot(du_tiles.load([e * M + m0, k]), w_tiles.load([e * D + k, h0]), da, input_precision="ieee")
        _write(
            da, z_tiles, bias_ptr, scale_ptr, dz_tiles, a_tiles, db_ptr, ds_ptr, i, j, m0, e, h0, M, E, H,
            GATED, TANH, BM, BN, WIDTH, True,
        )  # fmt: skip


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
    _write(
        da, z_ptr, bias_ptr, scale_ptr, dz_ptr, a_ptr, db_ptr, ds_ptr, i, j, m0, e, h0, M, E, H,
        GATED, TANH, BM, BN, BN, False,
    )  # fmt: skip
