"""Self-attention of packed crops and of spectra, from qkv as one linear layer writes it."""

from __future__ import annotations

import torch
from cases.case import Case, Problem, Way, dtype_of, gaussian

from armillary.kernels.tokens.attention import PackedSequences
from armillary.kernels.tokens.packed_attention import packed_attention, self_attention

STUDENT = ((124, 145), (504, 26))  # crops that run a branch and their tokens, of 90 images


def cases(tiny: bool) -> list[Case]:
    """Runs of (sequences, tokens), heads H, numbers a head: student and teacher of a ViT-L step, spectra, one length alone."""
    if tiny:
        return [_case(((2, 20), (3, 5)), 2, 16, True, tiny)]
    return [
        _case(STUDENT, 16, 64, True, tiny),
        _case(((180, 145),), 16, 64, False, tiny),
        _case(((504, 26),), 16, 64, False, tiny),
        _case(((160, 197),), 16, 64, False, tiny),
        _case(((64, 778),), 6, 128, False, tiny),
    ]


def _case(runs: tuple[tuple[int, int], ...], heads: int, dim: int, compiled: bool, tiny: bool) -> Case:
    tokens = sum(n * length for n, length in runs)

    def build(device: torch.device) -> Problem:
        layout = PackedSequences.from_runs(runs, device)
        ragged = PackedSequences(layout.cu_seqlens, layout.max_len)  # takes PyTorch's kernel for ragged sequences
        others: dict[str, Way] = {}
        if device.type == "cuda":
            others["varlen"] = lambda qkv: self_attention(qkv, ragged, backend="torch")
        return Problem(
            {"qkv": gaussian(tokens, 3, heads, dim, dtype=dtype_of(tiny), device=device)},
            lambda qkv: packed_attention(qkv, layout, impl="triton"),
            lambda qkv: self_attention(qkv, layout, backend="torch"),
            ("qkv",),
            others=others,
        )

    one = float(tokens * heads * dim * dtype_of(tiny).itemsize)
    scores = 2.0 * heads * dim * sum(n * length**2 for n, length in runs)
    name = f"P={tokens} H={heads} D={dim} " + " ".join(f"{n}x{length}" for n, length in runs)
    predicted = {"triton": 0.53, "varlen": 0.67} if runs == STUDENT else {}
    return Case("packed_attention", name, build, (4 * one, 8 * one), (2 * scores, 5 * scores), compiled, predicted)
