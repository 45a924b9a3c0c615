r"""Self-attention of runs of equally long sequences on a CPU, from queries, keys and values as one linear layer wrote them.

    S = Q K^T / sqrt(D)        P = softmax(S), row by row        O = P V

as batched products over sequences and heads. These want each head by itself: one copy a run moves Q, K and V there, one moves the
result back, and one their three gradients. Left to autograd, taking qkv apart by kind and by run and putting its gradient together
again makes some twenty copies a block, a fifth of attention's time.

    dV = P^T dO    dP = dO V^T    dS = P (dP - sum_j P_ij dP_ij)    dQ = dS K / sqrt(D)    dK = dS^T Q / sqrt(D)

Shapes: P tokens, H heads, D; qkv [P, 3, H, D] and its gradient likewise; O [P, H, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.launch import untraced
from armillary.kernels.tokens.attention import MAX_SCORES_BYTES, PackedSequences

__all__ = ["run_attention", "suits_runs"]

Runs = tuple[tuple[int, int], ...]


def suits_runs(qkv: Tensor, layout: PackedSequences) -> bool:
    """Whether the tokens are runs on a CPU whose scores are small enough to be kept.

    Args:
        qkv: [P, 3, H, D].
        layout: Their sequences.
    """
    if qkv.device.type != "cpu" or layout.runs is None:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False  # both rewrite single operations
    scores = max((n * length**2 for n, length in layout.runs), default=0)
    return scores * qkv.shape[2] * qkv.element_size() <= MAX_SCORES_BYTES


@untraced
def run_attention(qkv: Tensor, layout: PackedSequences) -> Tensor:
    """Attention inside each sequence; arguments and result as `armillary.kernels.tokens.packed_attention`, for `suits_runs`."""
    assert layout.runs is not None
    return _RunAttention.apply(qkv, layout.runs)


class _RunAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, runs: Runs) -> Tensor:
        heads, dim = qkv.shape[2:]
        out, begin = qkv.new_empty(len(qkv), heads, dim), 0
        kept = []
        for n, length in runs:
            end = begin + n * length
            apart = qkv.new_empty(3, n, heads, length, dim)
            apart.copy_(_by_head(qkv[begin:end], n, length))
            q, k, v = apart.flatten(1, 2)
            scores = q.new_empty(n * heads, length, length)
            p = torch.baddbmm(scores, q, k.mT, beta=0, alpha=dim**-0.5, out=scores).softmax(-1)
            o = torch.bmm(p, v).view(n, heads, length, dim)
            out[begin:end].view(n, length, heads, dim).copy_(o.transpose(1, 2))
            kept += [apart, p]
            begin = end
        ctx.runs = runs
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        heads, dim = d_out.shape[1:]
        d_qkv, begin, kept = d_out.new_empty(len(d_out), 3, heads, dim), 0, iter(ctx.saved_tensors)
        for (n, length), apart, p in zip(ctx.runs, kept, kept, strict=True):
            end = begin + n * length
            q, k, v = apart.flatten(1, 2)
            d_apart = torch.empty_like(apart)
            d_q, d_k, d_v = d_apart.flatten(1, 2)
            d_o = d_out[begin:end].unflatten(0, (n, length)).transpose(1, 2).reshape(n * heads, length, dim)
            torch.bmm(p.mT, d_o, out=d_v)
            d_s = torch._softmax_backward_data(torch.bmm(d_o, v.mT), p, -1, p.dtype)
            torch.baddbmm(d_q, d_s, k, beta=0, alpha=dim**-0.5, out=d_q)
            torch.baddbmm(d_k, d_s.mT, q, beta=0, alpha=dim**-0.5, out=d_k)
            _by_head(d_qkv[begin:end], n, length).copy_(d_apart)
            begin = end
        return d_qkv, None


def _by_head(qkv: Tensor, n: int, length: int) -> Tensor:
    """A view [3, n, H, L, D] of n sequences' [n L, 3, H, D]."""
    return qkv.unflatten(0, (n, length)).permute(2, 0, 3, 1, 4)
