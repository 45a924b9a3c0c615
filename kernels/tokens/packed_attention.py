r"""Self-attention of short packed sequences that reads queries, keys and values as one linear layer wrote them.

For each sequence and head, with Q, K, V [L, D] and a scale, 1 / sqrt(D) by default:

    S = scale Q K^T        P = softmax(S), row by row        O = P V

S is never in memory. A program takes a block of queries and goes over the keys block by block. It keeps each row's largest
score m so far, the sum l = Σ_j exp(S_ij - m) and the sum of exp(S_ij - m) V_j; when a larger score comes, both sums shrink by
exp(m_old - m_new), and in the end O is their ratio (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
arXiv:2205.14135). Kept for the backward pass are qkv, O, and one number a row, logsumexp_i = m + log l, from which
P_ij = exp(S_ij - logsumexp_i) is made again. With dO given:

    dV = P^T dO        dP = dO V^T        dS_ij = P_ij (dP_ij - δ_i)        dQ = scale dS K        dK = scale dS^T Q

    δ_i = Σ_j P_ij dP_ij = Σ_c dO_ic O_ic        (the softmax's derivative: a row of dS sums to zero)

A block of tokens is at most 64, and the next power of two of the sequence's length where that is less: 26 tokens are padded to
32, where libraries made for long sequences pad to 128. A sequence that is one block has all five products of the backward pass at
once, and δ from the first form. For longer ones a program makes dQ of its tokens from all keys, another dK and dV of its tokens
from all queries: seven products, but no two programs add to the same number, so there are no atomics and the same bits each time.
Each program also sums the rows of the gradients that it makes: the gradient of the bias of the layer that wrote qkv
(`armillary.kernels.column_sums`).

Shapes: P tokens, H heads, D <= 128; qkv [P, 3, H, D], its gradient likewise; O [P, H, D]. No copies of Q, K or V are made.
Products run in the dtype of qkv with float32 accumulation (float32: as torch.backends.cuda.matmul.allow_tf32 says), the softmax in
float32; P and dS are rounded to that dtype before the products that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.column_sums import attach_column_sums
from armillary.kernels.launch import Impl, Launch, check_tensor, refuse, settings, untraced, use_triton
from armillary.kernels.tokens.attention import HALF, PackedSequences, attention, attention_reference, check_backend
from armillary.kernels.tokens.packed_attention_kernels import (
    LAUNCH,
    keys_bwd_kernel,
    packed_attention_fwd_kernel,
    queries_bwd_kernel,
    whole_bwd_kernel,
)
from armillary.kernels.tokens.run_attention import run_attention, suits_runs

__all__ = ["packed_attention", "packed_attention_reference", "self_attention"]

MAX_HEAD = 128
SHORT = 192
"""Longest sequence for which this kernel is predicted to be faster than FlashAttention-2 (docs/kernels.md)."""

Piece = tuple[int, int, int]  # first sequence, sequences, tokens of the longest


def packed_attention_reference(qkv: Tensor, layout: PackedSequences, *, scale: float | None = None) -> Tensor:
    """`packed_attention` in plain PyTorch, from one score matrix over all tokens, in any float dtype."""
    q, k, v = qkv.unbind(1)
    factor = 1.0 if scale is None else scale * qkv.shape[-1] ** 0.5
    return attention_reference(q * factor, k, v, layout)


def _block(length: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(length)))


@lru_cache(maxsize=64)
def _pieces(runs: Sequence[tuple[int, int]], largest: int) -> tuple[Piece, ...]:
    """Runs that share a block size, next to each other, are one launch; where these are many, all are one."""
    pieces: list[Piece] = []
    first = 0
    for count, length in runs:
        if count and pieces and _block(pieces[-1][2], largest) == _block(length, largest):
            begin, before, longest = pieces[-1]
            pieces[-1] = begin, before + count, max(longest, length)
        elif count:
            pieces.append((first, count, length))
        first += count
    return tuple(pieces) if len(pieces) <= 4 else ((0, first, max(p[2] for p in pieces)),)


def _options(row: Launch, heads: int, dim: int, longest: int, precision: str) -> dict[str, Any]:
    """Constants and options of a kernel for sequences up to `longest` tokens."""
    largest, columns = row.blocks["BLOCK"], max(16, triton.next_power_of_2(dim))
    block = _block(longest, largest)
    warps = min(8, max(1, row.num_warps * block * columns // (largest * 64)))
    constants = {"HEADS": heads, "DIM": dim, "BLOCK": block, "COLUMNS": columns, "PRECISION": precision}
    return {**constants, "num_warps": warps, "num_stages": row.num_stages}


def _launches(qkv: Tensor, layout: PackedSequences) -> Iterator[tuple[tuple[int], tuple[int, int], dict[str, Any]]]:
    """Grid, (first sequence, blocks a sequence) and options of each launch."""
    row = settings(LAUNCH, qkv)
    whole = ((0, layout.sequences, layout.max_len),)
    pieces = whole if layout.runs is None else _pieces(layout.runs, row.blocks["BLOCK"])
    tf32 = qkv.is_cuda and qkv.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    for first, count, longest in pieces:
        options = _options(row, qkv.shape[2], qkv.shape[3], longest, "tf32" if tf32 else "ieee")
        blocks = triton.cdiv(longest, options["BLOCK"])
        yield (qkv.shape[2] * blocks * count,), (first, blocks), options


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: PackedSequences, scale: float) -> Tensor:
        tokens, _, heads, _ = qkv.shape
        out = torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
        lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device) if ctx.needs_input_grad[0] else None
        if tokens:
            for grid, place, options in _launches(qkv, layout):
                packed_attention_fwd_kernel[grid](qkv, out, lse, layout.cu_seqlens, *place, tokens, scale, **options)
        ctx.save_for_backward(qkv, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, lse = ctx.saved_tensors
        d_qkv, delta, d_out = torch.empty_like(qkv), torch.empty_like(lse), d_out.contiguous()
        if len(qkv):
            launches = [(*launch, launch[0][0] // qkv.shape[2]) for launch in _launches(qkv, ctx.layout)]
            sums = torch.empty(sum(one[-1] for one in launches), *qkv.shape[1:], dtype=torch.float32, device=qkv.device)
            parts = sums.split([one[-1] for one in launches])
            for (grid, (first, blocks), options, _), part in zip(launches, parts, strict=True):
                place = ctx.layout.cu_seqlens, first
                if blocks == 1:
                    whole_bwd_kernel[grid](qkv, d_out, lse, d_qkv, part, *place, len(qkv), ctx.scale, **options)
                    continue
                rest = delta, d_qkv, part, *place, blocks, len(qkv), ctx.scale
                queries_bwd_kernel[grid](qkv, out, d_out, lse, *rest, **options)
                keys_bwd_kernel[grid](qkv, d_out, lse, *rest, **options)
            attach_column_sums(d_qkv, sums.sum(0))
        return d_qkv, None, None


@untraced
def packed_attention(
    qkv: Tensor, layout: PackedSequences, *, scale: float | None = None, impl: Impl = "auto"
) -> Tensor:
    """Attention inside each sequence of packed tokens.

    Args:
        qkv: [P, 3, H, D] contiguous, float32, bfloat16 or float16 (the reference: any float), D <= 128.
        layout: Sequences of the tokens, all P of them.
        scale: Of the scores; 1 / sqrt(D) if absent.
        impl: See `armillary.kernels.launch`.

    Returns:
        [P, H, D], dtype of qkv.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or value; the message names it.
    """
    name = "packed_attention"
    fused = use_triton("packed_attention", impl, qkv)
    check_tensor(name, "qkv", qkv, ["P", 3, "H", "D"])
    _check_layout(name, qkv, layout)
    if not fused:
        return packed_attention_reference(qkv, layout, scale=scale)
    if not 1 <= qkv.shape[3] <= MAX_HEAD:
        refuse(name, "qkv", f"must have heads of 1 to {MAX_HEAD} numbers", qkv.shape[3])
    return _PackedAttention.apply(qkv, layout, qkv.shape[3] ** -0.5 if scale is None else scale)


def _check_layout(name: str, qkv: Tensor, layout: PackedSequences) -> None:
    check_tensor(name, "layout.cu_seqlens", layout.cu_seqlens, ["N + 1"], like=qkv, dtypes=[torch.int32])
    if layout.runs is not None and (tokens := sum(n * length for n, length in layout.runs)) != len(qkv):
        refuse(name, "layout", f"must describe the {len(qkv)} tokens of qkv", tokens)


def self_attention(qkv: Tensor, layout: PackedSequences, *, backend: str = "auto") -> Tensor:
    """Self-attention by the backend that suits: `packed_attention`, `run_attention`, or one of `armillary.kernels.tokens.attention`.

    Args:
        qkv: [P, 3, H, D], what one linear layer made of P tokens.
        layout: Their sequences.
        backend: One of `armillary.kernels.tokens.attention.BACKENDS`. "auto" takes `packed_attention` on a GPU for bf16 and
            fp16, heads up to 128 and sequences up to 192 tokens, "triton" always; "auto" and "torch" take `run_attention` on a CPU.

    Returns:
        [P, H, D], dtype of qkv.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or value; the message names it.
    """
    check_backend(backend)
    if backend == "triton":
        return packed_attention(qkv, layout, impl="triton")
    suits = qkv.dtype in HALF and layout.max_len <= SHORT and qkv.shape[-1] <= MAX_HEAD
    if backend == "auto" and suits and use_triton("packed_attention", "auto", qkv):
        return packed_attention(qkv, layout)
    if backend in ("auto", "torch") and suits_runs(qkv, layout):
        _check_layout("self_attention", qkv, layout)
        return run_attention(qkv, layout)
    q, k, v = qkv.unbind(1)
    return attention(q, k, v, layout, backend=backend)
