"""Kernels of `packed_attention`, forward and backward.

A program belongs to one head and one block of BLOCK tokens of one sequence. It goes over that sequence's blocks in order, and
everything that it writes is its own: no atomics, so the same bits each time.

Shapes: P tokens, H heads, DIM numbers a head, which COLUMNS is the next power of two of. qkv and d_qkv [P, 3, H, DIM]; out
and d_out [P, H, DIM]; lse float32 [H, P], the logarithm to base 2 of each row's sum; delta float32 [H, P]; sums float32
[blocks, 3, H, DIM], of each block's rows of d_qkv; cu int32 [N + 1].
`scale` is that of the scores, and everywhere exponentials are powers of 2.
"""

import triton
import triton.language as tl

from armillary.kernels.launch import INTERPRETER, Launch

__all__ = ["LAUNCH", "keys_bwd_kernel", "packed_attention_fwd_kernel", "queries_bwd_kernel", "whole_bwd_kernel"]

LOG2_E = tl.constexpr(1.4426950408889634)

COMPILED = "not measured; compiled ahead of time in bfloat16 for heads of 64: at most {} registers, no spills"

LAUNCH = {  # BLOCK: the largest; shorter sequences take a smaller one, with as many fewer warps
    INTERPRETER: Launch({"BLOCK": 16}, source="small, so that short sequences have several blocks"),
    80: Launch({"BLOCK": 64}, num_warps=4, num_stages=2, source=COMPILED.format(255)),
    90: Launch({"BLOCK": 64}, num_warps=4, num_stages=2, source=COMPILED.format(193)),
}


@triton.jit
def _place(cu_ptr, first, blocks, HEADS: tl.constexpr):
    """Head, block, first token and length of the sequence of this program; the heads of a block are neighbours in time."""
    program = tl.program_id(0)
    sequence = first + program // (HEADS * blocks)
    start = tl.load(cu_ptr + sequence)
    return program % HEADS, program // HEADS % blocks, start.to(tl.int64), tl.load(cu_ptr + sequence + 1) - start


@triton.jit
def _load(x_ptr, stride, left, DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """BLOCK rows [BLOCK, COLUMNS] of one head, of which `left` exist; 0 elsewhere."""
    i, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = i < left
    if DIM != COLUMNS:
        inside = inside & (c < DIM)
    return tl.load(x_ptr + i * stride + c, mask=inside, other=0.0)


@triton.jit
def _store(x_ptr, stride, left, value, DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Write what `_load` reads."""
    i, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = i < left
    if DIM != COLUMNS:
        inside = inside & (c < DIM)
    tl.store(x_ptr + i * stride + c, value.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_sums(sums_ptr, part, value, HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over the rows of a block of gradients, whose rows behind the end are 0; part 0: of q, 1: of k, 2: of v."""
    c = tl.arange(0, COLUMNS)
    row = (tl.program_id(0) // HEADS).to(tl.int64) * 3 + part
    tl.store(sums_ptr + (row * HEADS + tl.program_id(0) % HEADS) * DIM + c, tl.sum(value, 0), mask=c < DIM)


@triton.jit
def packed_attention_fwd_kernel(
    qkv_ptr,
    out_ptr,
    lse_ptr,  # None: not wanted
    cu_ptr,
    first,  # sequence of the first program
    blocks,  # programs a sequence and head
    tokens,  # P
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax over the keys in one pass: what was summed is scaled down whenever a larger score comes."""
    WIDTH: tl.constexpr = HEADS * DIM
    ROW: tl.constexpr = 3 * WIDTH
    head, block, start, length = _place(cu_ptr, first, blocks, HEADS)
    done = block * BLOCK
    if done < length:
        i = tl.arange(0, BLOCK)
        of_head = qkv_ptr + start * ROW + head * DIM
        q = _load(of_head + done * ROW, ROW, length - done, DIM, BLOCK, COLUMNS)
        largest = tl.full((BLOCK,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        out = tl.zeros((BLOCK, COLUMNS), tl.float32)
        for key in range(0, length, BLOCK):
            k = _load(of_head + WIDTH + key * ROW, ROW, length - key, DIM, BLOCK, COLUMNS)
            s = tl.dot(q, k.T, input_precision=PRECISION) * (scale * LOG2_E)
            s = tl.where((i < length - key)[None, :], s, -float("inf"))
            larger = tl.maximum(largest, tl.max(s, 1))
            p = tl.exp2(s - larger[:, None])
            shrink = tl.exp2(largest - larger)
            total = total * shrink + tl.sum(p, 1)
            v = _load(of_head + 2 * WIDTH + key * ROW, ROW, length - key, DIM, BLOCK, COLUMNS)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
            largest = larger
        at = out_ptr + (start + done) * WIDTH + head * DIM
        _store(at, WIDTH, length - done, out / total[:, None], DIM, BLOCK, COLUMNS)
        if lse_ptr is not None:
            lse = largest + tl.log2(total)
            tl.store(lse_ptr + head.to(tl.int64) * tokens + start + done + i, lse, mask=i < length - done)


@triton.jit
def _at(x_ptr, head, start, tokens):
    """Numbers [H, P] of one head from a token on."""
    return x_ptr + head.to(tl.int64) * tokens + start


@triton.jit
def _probabilities(k, q, lse, keys, scale, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """P of a block of queries for a block of keys, `keys` of which exist, transposed: [keys, queries]."""
    s = tl.dot(k, q.T, input_precision=PRECISION) * (scale * LOG2_E)
    p = tl.exp2(s - lse[None, :])
    return tl.where((tl.arange(0, BLOCK) < keys)[:, None], p, 0.0)


@triton.jit
def whole_bwd_kernel(
    qkv_ptr,
    d_out_ptr,
    lse_ptr,
    d_qkv_ptr,
    sums_ptr,
    cu_ptr,
    first,
    tokens,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All three gradients of sequences that are one block."""
    WIDTH: tl.constexpr = HEADS * DIM
    ROW: tl.constexpr = 3 * WIDTH
    head, _, start, length = _place(cu_ptr, first, 1, HEADS)
    i = tl.arange(0, BLOCK)
    of_head = qkv_ptr + start * ROW + head * DIM
    d_at = d_qkv_ptr + start * ROW + head * DIM
    q = _load(of_head, ROW, length, DIM, BLOCK, COLUMNS)
    k = _load(of_head + WIDTH, ROW, length, DIM, BLOCK, COLUMNS)
    v = _load(of_head + 2 * WIDTH, ROW, length, DIM, BLOCK, COLUMNS)
    d_o = _load(d_out_ptr + start * WIDTH + head * DIM, WIDTH, length, DIM, BLOCK, COLUMNS)
    lse = tl.load(_at(lse_ptr, head, start, tokens) + i, mask=i < length, other=0.0)
    p = _probabilities(k, q, lse, length, scale, BLOCK, PRECISION)
    d_v = tl.dot(p.to(d_o.dtype), d_o, input_precision=PRECISION)
    _store(d_at + 2 * WIDTH, ROW, length, d_v, DIM, BLOCK, COLUMNS)
    _store_sums(sums_ptr, 2, d_v, HEADS, DIM, COLUMNS)
    d_p = tl.dot(v, d_o.T, input_precision=PRECISION)
    d_s = (p * (d_p - tl.sum(p * d_p, 0)[None, :])).to(q.dtype)
    d_k = tl.dot(d_s, q, input_precision=PRECISION)
    _store(d_at + WIDTH, ROW, length, d_k * scale, DIM, BLOCK, COLUMNS)
    _store_sums(sums_ptr, 1, d_k * scale, HEADS, DIM, COLUMNS)
    d_q = tl.dot(d_s.T, k, input_precision=PRECISION)
    _store(d_at, ROW, length, d_q * scale, DIM, BLOCK, COLUMNS)
    _store_sums(sums_ptr, 0, d_q * scale, HEADS, DIM, COLUMNS)


@triton.jit
def queries_bwd_kernel(
    qkv_ptr,
    out_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    d_qkv_ptr,
    sums_ptr,
    cu_ptr,
    first,
    blocks,
    tokens,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_q of a block of queries from all keys, and the queries' delta."""
    WIDTH: tl.constexpr = HEADS * DIM
    ROW: tl.constexpr = 3 * WIDTH
    head, block, start, length = _place(cu_ptr, first, blocks, HEADS)
    done = block * BLOCK
    if done < length:
        i, left = tl.arange(0, BLOCK), length - done
        of_head = qkv_ptr + start * ROW + head * DIM
        at = (start + done) * WIDTH + head * DIM
        q = _load(of_head + done * ROW, ROW, left, DIM, BLOCK, COLUMNS)
        d_o = _load(d_out_ptr + at, WIDTH, left, DIM, BLOCK, COLUMNS)
        o = _load(out_ptr + at, WIDTH, left, DIM, BLOCK, COLUMNS)
        delta = tl.sum(o.to(tl.float32) * d_o.to(tl.float32), 1)
        tl.store(_at(delta_ptr, head, start + done, tokens) + i, delta, mask=i < left)
        lse = tl.load(_at(lse_ptr, head, start + done, tokens) + i, mask=i < left, other=0.0)
        d_q = tl.zeros((BLOCK, COLUMNS), tl.float32)
        for key in range(0, length, BLOCK):
            k = _load(of_head + WIDTH + key * ROW, ROW, length - key, DIM, BLOCK, COLUMNS)
            v = _load(of_head + 2 * WIDTH + key * ROW, ROW, length - key, DIM, BLOCK, COLUMNS)
            s = tl.dot(q, k.T, input_precision=PRECISION) * (scale * LOG2_E)
            p = tl.where((i < length - key)[None, :], tl.exp2(s - lse[:, None]), 0.0)
            d_p = tl.dot(d_o, v.T, input_precision=PRECISION)
            d_q = tl.dot((p * (d_p - delta[:, None])).to(k.dtype), k, d_q, input_precision=PRECISION)
        d_at = d_qkv_ptr + (start + done) * ROW + head * DIM
        _store(d_at, ROW, left, d_q * scale, DIM, BLOCK, COLUMNS)
        _store_sums(sums_ptr, 0, d_q * scale, HEADS, DIM, COLUMNS)
    else:
        _store_sums(sums_ptr, 0, tl.zeros((BLOCK, COLUMNS), tl.float32), HEADS, DIM, COLUMNS)


@triton.jit
def keys_bwd_kernel(
    qkv_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    d_qkv_ptr,
    sums_ptr,
    cu_ptr,
    first,
    blocks,
    tokens,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k and d_v of a block of keys from all queries."""
    WIDTH: tl.constexpr = HEADS * DIM
    ROW: tl.constexpr = 3 * WIDTH
    head, block, start, length = _place(cu_ptr, first, blocks, HEADS)
    done = block * BLOCK
    if done < length:
        i, left = tl.arange(0, BLOCK), length - done
        of_head = qkv_ptr + start * ROW + head * DIM
        do_at = d_out_ptr + start * WIDTH + head * DIM
        k = _load(of_head + WIDTH + done * ROW, ROW, left, DIM, BLOCK, COLUMNS)
        v = _load(of_head + 2 * WIDTH + done * ROW, ROW, left, DIM, BLOCK, COLUMNS)
        d_k = tl.zeros((BLOCK, COLUMNS), tl.float32)
        d_v = tl.zeros((BLOCK, COLUMNS), tl.float32)
        for query in range(0, length, BLOCK):
            inside = i < length - query
            q = _load(of_head + query * ROW, ROW, length - query, DIM, BLOCK, COLUMNS)
            d_o = _load(do_at + query * WIDTH, WIDTH, length - query, DIM, BLOCK, COLUMNS)
            lse = tl.load(_at(lse_ptr, head, start + query, tokens) + i, mask=inside, other=0.0)
            delta = tl.load(_at(delta_ptr, head, start + query, tokens) + i, mask=inside, other=0.0)
            p = _probabilities(k, q, lse, left, scale, BLOCK, PRECISION)
            d_v = tl.dot(p.to(d_o.dtype), d_o, d_v, input_precision=PRECISION)
            d_p = tl.dot(v, d_o.T, input_precision=PRECISION)
            d_k = tl.dot((p * (d_p - delta[None, :])).to(q.dtype), q, d_k, input_precision=PRECISION)
        d_at = d_qkv_ptr + (start + done) * ROW + head * DIM
        _store(d_at + WIDTH, ROW, left, d_k * scale, DIM, BLOCK, COLUMNS)
        _store(d_at + 2 * WIDTH, ROW, left, d_v, DIM, BLOCK, COLUMNS)
        _store_sums(sums_ptr, 1, d_k * scale, HEADS, DIM, COLUMNS)
        _store_sums(sums_ptr, 2, d_v, HEADS, DIM, COLUMNS)
    else:
        for part in tl.static_range(1, 3):
            _store_sums(sums_ptr, part, tl.zeros((BLOCK, COLUMNS), tl.float32), HEADS, DIM, COLUMNS)
