"""Multi-head attention over packed sequences: softmax(Q Kᵀ / √d) V inside each sequence, nothing across them.

Sequences of several lengths lie one after the other in one token axis, so that every other layer runs once over all of
them. A `PackedSequences` says where they begin. Queries may have a layout of their own (fewer queries than keys), which is how a
last block computes only the tokens that are used.

Shapes: q [Tq, H, d]; k, v [T, H, d]; result [Tq, H, d], in the dtype of q. Softmax runs in float32 for bfloat16 and
float16 inputs.

Backends (`backend=`):
    flash_attn  flash_attn_varlen_func of flash-attn 2, or of flash-attn 4 (`flash_attn.cute`). CUDA, bf16 or fp16.
    torch       Nothing to install. CUDA, bf16 or fp16, ragged sequences: torch.nn.attention.varlen. Otherwise one
                scaled_dot_product_attention a run of equal lengths (queries padded within the run if ragged). On a CPU
                two batched products and a softmax, while the scores are small: for sequences of 26 and 145 tokens the
                fused kernel took 1.3 times as long in fp32, and in bf16 2 times forward and 6 times backward. Ragged
                sequences that differ little enough are padded there into one batch.
    dense       One score matrix over all tokens with a block mask: the reference, any device and float dtype.
    auto        flash_attn where it is installed and applies (CUDA, bf16 or fp16), else torch.
    triton      As auto. Self-attention never comes here then: `armillary.kernels.tokens.packed_attention`, which "auto" takes
                for short sequences on a GPU.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, islice
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BACKENDS", "Backend", "PackedSequences", "attention", "attention_reference", "check_backend"]

Backend = Literal["auto", "triton", "flash_attn", "torch", "dense"]
BACKENDS: tuple[str, ...] = get_args(Backend)
HALF = (torch.bfloat16, torch.float16)
MAX_SCORES_BYTES = 256 << 20  # of one run on a CPU
FEW_SCORES = 1 << 16  # of one head, on a CPU: below, a call costs more than what it computes


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Where the sequences of a packed token axis begin.

    Attributes:
        cu_seqlens: [N + 1] int32 on the tokens' device: first token of each sequence, then the number of tokens.
        max_len: At least the length of the longest sequence.
        runs: (sequences, length) of each run of equal lengths, in order; None where only the device knows the lengths.
    """

    cu_seqlens: Tensor
    max_len: int
    runs: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def from_runs(cls, runs: Sequence[tuple[int, int]], device: torch.device | str = "cpu") -> PackedSequences:
        """`count` sequences of `length` tokens for each (count, length); made once for equal arguments."""
        return _layout(tuple((int(n), int(length)) for n, length in runs), torch.device(device))

    @classmethod
    def from_lengths(cls, lengths: Tensor, max_len: int) -> PackedSequences:
        """Ragged sequences from a tensor of lengths, without waiting for the device.

        Args:
            lengths: [N] integers on the tokens' device.
            max_len: At least the largest of them.
        """
        return cls(F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), max_len)

    @property
    def sequences(self) -> int:
        """Number of sequences N."""
        return len(self.cu_seqlens) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """[N] int64 numbers of tokens."""
        return self.cu_seqlens.diff().long()

    @cached_property
    def longest(self) -> int:
        """Length of the longest sequence, by asking the device."""
        return int(self.lengths.max()) if self.sequences else 0

    @cached_property
    def places(self) -> Tensor:
        """[T] int64: where each token lies in a padded [N, longest] grid."""
        ahead = torch.arange(self.sequences, device=self.cu_seqlens.device) * self.longest - self.cu_seqlens[:-1]
        tokens = torch.arange(int(self.cu_seqlens[-1]), device=self.cu_seqlens.device)
        return tokens + ahead.repeat_interleave(self.lengths, output_size=len(tokens))


@lru_cache(maxsize=256)
def _layout(runs: tuple[tuple[int, int], ...], device: torch.device) -> PackedSequences:
    if any(n < 0 or length < 1 for n, length in runs):
        raise ValueError(f"runs: counts must be >= 0 and lengths >= 1, got {runs}")
    starts = accumulate((length for n, length in runs for _ in range(n)), initial=0)
    cu_seqlens = torch.tensor(list(starts), dtype=torch.int32, device=device)
    return PackedSequences(cu_seqlens, max((length for n, length in runs if n), default=0), runs)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedSequences,
    *,
    query_layout: PackedSequences | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside each sequence of a packed token axis; see the module's docstring for the backends.

    Args:
        q: [Tq, H, d] queries.
        k: [T, H, d] keys.
        v: [T, H, d] values.
        layout: Sequences of the keys and values.
        query_layout: Sequences of the queries, as many as `layout` has; the same as `layout` if absent.
        backend: One of `BACKENDS`.

    Returns:
        [Tq, H, d], dtype of q.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or value; the message names it.
        ImportError: `backend="flash_attn"` and the package is missing.
    """
    check_backend(backend)
    queries = query_layout or layout
    _check(q, k, v, layout, queries)
    half_on_cuda = q.is_cuda and q.dtype in HALF
    if backend == "flash_attn" and not half_on_cuda:
        raise ValueError(f"backend: flash_attn needs CUDA tensors in bf16 or fp16, got {q.dtype} on {q.device}")
    if backend == "dense":
        return attention_reference(q, k, v, layout, query_layout=query_layout)
    if backend == "flash_attn" or (backend in ("auto", "triton") and half_on_cuda and _flash_attn() is not None):
        flash = _flash_attn()
        if flash is None:
            raise ImportError("attention backend flash_attn: install flash-attn (2 or 4), or use backend torch")
        return _varlen(flash, q, k, v, layout, queries)
    if half_on_cuda and (layout.runs is None or queries.runs is None):
        from torch.nn.attention.varlen import varlen_attn

        return _varlen(varlen_attn, q, k, v, layout, queries)
    if q.device.type == "cpu" and layout.runs is None and _worth_padding(q, layout, queries):
        return _padded(q, k, v, layout, queries)
    return _grouped(q, k, v, layout, queries)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedSequences, *, query_layout: PackedSequences | None = None
) -> Tensor:
    """The same result from one [Tq, T] score matrix with a block mask; arguments as `attention`."""
    of_query = _sequence_of_token(query_layout or layout, len(q))
    mask = of_query[:, None] == _sequence_of_token(layout, len(k))[None, :]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.to(wide)).to(q.dtype)


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _check(q: Tensor, k: Tensor, v: Tensor, layout: PackedSequences, queries: PackedSequences) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name}: must be [tokens, heads, head dim], got shape {tuple(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: must be floating point with q's dtype and device ({q.dtype}, {q.device}), "
                f"got {x.dtype} on {x.device}"
            )
    if k.shape != v.shape:
        raise ValueError(f"v: must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q: must have k's heads and head dim {tuple(k.shape[1:])}, got {tuple(q.shape[1:])}")
    if queries.sequences != layout.sequences:
        raise ValueError(f"query_layout: must have layout's {layout.sequences} sequences, got {queries.sequences}")
    for name, tokens, lay in (("layout", len(k), layout), ("query_layout", len(q), queries)):
        if lay.cu_seqlens.device != q.device:
            raise ValueError(f"{name}: must be on {q.device} like q, got {lay.cu_seqlens.device}")
        if lay.runs is not None and sum(n * length for n, length in lay.runs) != tokens:
            raise ValueError(f"{name}: describes {sum(n * m for n, m in lay.runs)} tokens, got {tokens}")


@lru_cache(maxsize=1)
def _flash_attn() -> Callable[..., Tensor] | None:
    """flash_attn_varlen_func of the installed flash-attn package, 2 or 4; None where there is none."""
    for module in ("flash_attn", "flash_attn.cute"):
        try:
            return importlib.import_module(module).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
    return None


def _varlen(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedSequences,
    queries: PackedSequences,
) -> Tensor:
    # flash-attn 2 and torch's varlen_attn share these seven positional arguments (later ones differ between versions);
    # flash-attn 4 takes some of them by keyword only in part of its releases, so it gets names.
    if getattr(kernel, "__module__", "").startswith("flash_attn.cute"):
        out = kernel(
            q,
            k,
            v,
            cu_seqlens_q=queries.cu_seqlens,
            cu_seqlens_k=layout.cu_seqlens,
            max_seqlen_q=queries.max_len,
            max_seqlen_k=layout.max_len,
        )
    else:
        out = kernel(q, k, v, queries.cu_seqlens, layout.cu_seqlens, queries.max_len, layout.max_len)
    return out[0] if isinstance(out, tuple) else out


def _worth_padding(q: Tensor, layout: PackedSequences, queries: PackedSequences) -> bool:
    """Whether one padded batch costs less than an attention a run of equal lengths."""
    scores = layout.sequences * layout.longest * queries.longest
    if not scores or scores * q.shape[1] * q.element_size() > MAX_SCORES_BYTES:
        return False
    runs = len(layout.lengths.unique_consecutive())
    return scores - int((layout.lengths * queries.lengths).sum()) < FEW_SCORES * (runs - 1)


def _padded(q: Tensor, k: Tensor, v: Tensor, layout: PackedSequences, queries: PackedSequences) -> Tensor:
    """One attention over sequences that are padded to the longest one."""

    def padded(x: Tensor, by: PackedSequences) -> Tensor:
        grid = x.new_zeros(by.sequences * by.longest, *x.shape[1:]).index_copy(0, by.places, x)
        return grid.view(by.sequences, by.longest, *x.shape[1:]).transpose(1, 2)

    beyond = torch.arange(layout.longest) >= layout.lengths[:, None]
    bias = q.new_zeros(beyond.shape).masked_fill(beyond, -math.inf)
    out = _sdpa(padded(q, queries), padded(k, layout), padded(v, layout), bias)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, queries.places)


def _grouped(q: Tensor, k: Tensor, v: Tensor, layout: PackedSequences, queries: PackedSequences) -> Tensor:
    """One attention a run of equal key lengths; queries that are ragged within a run are padded there."""
    key_runs = layout.runs or _runs_of(_lengths(layout))
    lengths = iter(_lengths(queries))
    wanted_by_run = [list(islice(lengths, count)) for count, _ in key_runs]
    # split, not slices: the backward pass of a slice fills a whole tensor with zeros
    key_tokens = [count * length for count, length in key_runs]
    parts = zip(
        q.split([sum(wanted) for wanted in wanted_by_run]), k.split(key_tokens), v.split(key_tokens), strict=True
    )
    out = []
    for (count, length), wanted, (q_run, k_run, v_run) in zip(key_runs, wanted_by_run, parts, strict=True):
        if not count:
            continue
        k_run, v_run = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (k_run, v_run))
        longest = max(wanted)
        if sum(wanted) == count * longest:
            o = _sdpa(q_run.unflatten(0, (count, longest)).transpose(1, 2), k_run, v_run)
            out.append(o.transpose(1, 2).flatten(0, 1))
        else:
            # place[i] is where query i of the run lies in the padded [count, longest] grid
            place = torch.tensor([i * longest + j for i, m in enumerate(wanted) for j in range(m)], device=q.device)
            padded = q_run.new_zeros(count * longest, *q.shape[1:]).index_copy(0, place, q_run)
            o = _sdpa(padded.unflatten(0, (count, longest)).transpose(1, 2), k_run, v_run)
            out.append(o.transpose(1, 2).flatten(0, 1).index_select(0, place))
    if not out:
        return torch.empty_like(q)
    return out[0] if len(out) == 1 else torch.cat(out)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of [n, H, L, d] tensors; `bias` [n, keys] is added to the scores."""
    n, heads, length, dim = q.shape
    if q.device.type != "cpu" or n * heads * length * k.shape[2] * q.element_size() > MAX_SCORES_BYTES:
        return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias[:, None, None])
    q, k, v = (x.reshape(n * heads, -1, dim) for x in (q, k, v))
    added = q.new_zeros(1, 1, 1) if bias is None else bias.repeat_interleave(heads, 0)[:, None]
    scores = torch.baddbmm(added, q, k.mT, beta=0 if bias is None else 1, alpha=dim**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(n, heads, length, dim)


def _lengths(layout: PackedSequences) -> list[int]:
    if layout.runs is not None:
        return [length for n, length in layout.runs for _ in range(n)]
    return layout.cu_seqlens.diff().tolist()


def _runs_of(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    return tuple(runs)


def _sequence_of_token(layout: PackedSequences, tokens: int) -> Tensor:
    """[T] index of the sequence that each token belongs to."""
    index = torch.arange(tokens, device=layout.cu_seqlens.device)
    return torch.searchsorted(layout.cu_seqlens, index, right=True, out_int32=True)
