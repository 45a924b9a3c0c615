"""Kernels of `window_embed`, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import INTERPRETER, Launch, settings

__all__ = ["LAUNCH", "LAUNCH_BACKWARD", "LAUNCH_BACKWARD_FLOAT32", "LAUNCH_FLOAT32", "MIN_STD", "WindowEmbed"]

MIN_STD = 0.2


@triton.jit
def _load_features(
    spectrum_ptr,
    mask_ptr,
    spectrum,  # int64
    token,  # int32 [TOKENS]
    tokens,
    length,
    mean,
    rest,
    std,
    WINDOW: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Features of some tokens of one spectrum, [TOKENS, FEATURES] float32, 0 from WINDOW + 2 on."""
    feature = tl.arange(0, FEATURES)
    wanted = token < tokens
    if MASKED:
        wanted &= tl.load(mask_ptr + spectrum * tokens + token, mask=wanted, other=1) == 0
    sample = (token[:, None] - 1) * STEP + feature[None, :] - 2
    inside = wanted[:, None] & (token > 0)[:, None] & (feature >= 2)[None, :] & (feature < WINDOW + 2)[None, :]
    x = tl.load(spectrum_ptr + spectrum * length + sample, mask=inside, other=0.0)
    x = tl.where(inside, (x - mean - rest) / std, 0.0)
    first = (wanted & (token == 0))[:, None]
    x = tl.where(first & (feature == 0)[None, :], (mean + rest - 2.0) / 2.0, x)
    return tl.where(first & (feature == 1)[None, :], (std - 2.0) / 8.0, x)


@triton.jit
def _window_embed_fwd_kernel(
    spectrum_ptr,  # float32 [B, L]
    weight_ptr,  # [D, WINDOW + 2]
    bias_ptr,  # [D]
    position_ptr,  # [at least tokens, D]
    mask_ptr,  # uint8 [B, tokens]
    statistics_ptr,  # float32 [B, 3]: mean, what rounding left of it, std
    out_ptr,  # [B, tokens, D]
    length,
    tokens,
    dim,
    WINDOW: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
    MIN_STD: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    SAMPLES: tl.constexpr,
):  # one program: TILES x TOKENS tokens of one spectrum, WIDTH columns
    across = tl.cdiv(dim, WIDTH)
    along = tl.cdiv(tokens, TILES * TOKENS)
    column = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    start = tl.program_id(0) // across % along * TILES * TOKENS
    spectrum = (tl.program_id(0) // across // along).to(tl.int64)

    sample = tl.arange(0, SAMPLES)
    total = tl.zeros([SAMPLES], tl.float32)
    for first in range(0, length, SAMPLES):
        total += tl.load(spectrum_ptr + spectrum * length + first + sample, mask=first + sample < length, other=0.0)
    mean = tl.sum(total, 0) / length
    total = tl.zeros([SAMPLES], tl.float32)
    squares = tl.zeros([SAMPLES], tl.float32)
    for first in range(0, length, SAMPLES):
        inside = first + sample < length
        x = tl.load(spectrum_ptr + spectrum * length + first + sample, mask=inside, other=0.0)
        deviation = tl.where(inside, x - mean, 0.0)
        total += deviation
        squares += deviation * deviation
    rest = tl.sum(total, 0) / length
    variance = (tl.sum(squares, 0) - rest * rest * length) / (length - 1)
    std = tl.where(variance < MIN_STD * MIN_STD, MIN_STD, tl.sqrt(variance))  # NaN stays
    tl.store(statistics_ptr + 3 * spectrum, mean)
    tl.store(statistics_ptr + 3 * spectrum + 1, rest)
    tl.store(statistics_ptr + 3 * spectrum + 2, std)

    feature = tl.arange(0, FEATURES)
    inside = column < dim
    within = inside[:, None] & (feature < WINDOW + 2)[None, :]
    weight = tl.load(weight_ptr + column[:, None] * (WINDOW + 2) + feature[None, :], mask=within, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for tile in range(0, TILES):
        token = start + tile * TOKENS + tl.arange(0, TOKENS)
        x = _load_features(
            spectrum_ptr, mask_ptr, spectrum, token, tokens, length, mean, rest, std, WINDOW, STEP, MASKED, FEATURES
        )
        valid = (token < tokens)[:, None] & inside[None, :]
        at = token[:, None] * dim + column[None, :]
        y = tl.dot(x.to(weight.dtype), tl.trans(weight), input_precision="tf32x3")
        y += bias[None, :] + tl.load(position_ptr + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(out_ptr + spectrum * tokens * dim + at, y.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _window_embed_bwd_kernel(
    grad_ptr,  # [B, tokens, D]
    spectrum_ptr,
    mask_ptr,
    statistics_ptr,
    d_weight_ptr,  # float32 [token tiles, splits, D, WINDOW + 2]
    d_position_ptr,  # float32 [splits, tokens, D]
    spectra,
    length,
    tokens,
    dim,
    splits,
    WINDOW: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # one program: TOKENS x WIDTH of SPLIT spectra
    across = tl.cdiv(dim, WIDTH)
    column = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    split = tl.program_id(0) // across % splits
    tile = tl.program_id(0) // across // splits
    token = tile * TOKENS + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None] & (column < dim)[None, :]
    at = token[:, None] * dim + column[None, :]
    d_position = tl.zeros([TOKENS, WIDTH], tl.float32)
    d_weight = tl.zeros([WIDTH, FEATURES], tl.float32)
    first = split.to(tl.int64) * SPLIT
    for number in range(0, tl.minimum(SPLIT, spectra - split * SPLIT)):
        spectrum = first + number
        g = tl.load(grad_ptr + spectrum * tokens * dim + at, mask=inside, other=0.0)
        mean = tl.load(statistics_ptr + 3 * spectrum)
        rest = tl.load(statistics_ptr + 3 * spectrum + 1)
        std = tl.load(statistics_ptr + 3 * spectrum + 2)
        x = _load_features(
            spectrum_ptr, mask_ptr, spectrum, token, tokens, length, mean, rest, std, WINDOW, STEP, MASKED, FEATURES
        )
        d_position += g.to(tl.float32)
        d_weight = tl.dot(tl.trans(g), x.to(g.dtype), d_weight, input_precision="tf32x3")
    tl.store(d_position_ptr + split.to(tl.int64) * tokens * dim + at, d_position, mask=inside)
    feature = tl.arange(0, FEATURES)
    part = (tile * splits + split).to(tl.int64) * dim * (WINDOW + 2)
    at = column[:, None] * (WINDOW + 2) + feature[None, :]
    inside = (column < dim)[:, None] & (feature < WINDOW + 2)[None, :]
    tl.store(d_weight_ptr + part + at, d_weight, mask=inside)


# By kernel, and by the weight's dtype. Registers are those of masked windows of 20 samples.
LAUNCH = {
    INTERPRETER: Launch({"TOKENS": 16, "TILES": 2, "WIDTH": 16, "SAMPLES": 64}),
    80: Launch(
        {"TOKENS": 64, "TILES": 4, "WIDTH": 128, "SAMPLES": 1024},
        8,
        1,
        "not measured; compiled: 102, 119, 115 registers on sm_80, 90, 100, no spills",
    ),
}
LAUNCH_FLOAT32 = {
    INTERPRETER: LAUNCH[INTERPRETER],
    80: Launch(
        {"TOKENS": 32, "TILES": 8, "WIDTH": 64, "SAMPLES": 1024},
        4,
        1,
        "not measured; compiled: 162 registers, no spills",
    ),
}
LAUNCH_BACKWARD = {
    INTERPRETER: Launch({"TOKENS": 16, "WIDTH": 16, "SPLIT": 2}),
    80: Launch(
        {"TOKENS": 64, "WIDTH": 128, "SPLIT": 24},
        8,
        2,
        "not measured; compiled: 192, 114, 164 registers on sm_80, 90, 100, no spills",
    ),
}
LAUNCH_BACKWARD_FLOAT32 = {
    INTERPRETER: LAUNCH_BACKWARD[INTERPRETER],
    80: Launch(
        {"TOKENS": 32, "WIDTH": 128, "SPLIT": 24},
        8,
        2,
        "not measured; compiled: 182, 138, 128 registers on sm_80, 90, 100, no spills",
    ),
}


class WindowEmbed(torch.autograd.Function):
    """Spectrum, mask, weight, bias, position, number of tokens and step to tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        spectrum: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        position: Tensor,
        tokens: int,
        step: int,
    ) -> Tensor:
        """Tokens [B, 1 + n, D]."""
        (spectra, length), (dim, features) = spectrum.shape, weight.shape
        statistics = torch.empty(spectra, 3, device=spectrum.device)
        out = torch.empty(spectra, tokens, dim, dtype=weight.dtype, device=weight.device)
        row = settings(LAUNCH_FLOAT32 if weight.dtype == torch.float32 else LAUNCH, weight)
        along = triton.cdiv(tokens, row.blocks["TILES"] * row.blocks["TOKENS"])
        if programs := spectra * along * triton.cdiv(dim, row.blocks["WIDTH"]):
            _window_embed_fwd_kernel[(programs,)](
                spectrum,
                weight,
                bias,
                position,
                mask,
                statistics,
                out,
                length,
                tokens,
                dim,
                WINDOW=features - 2,
                STEP=step,
                MASKED=mask is not None,
                MIN_STD=MIN_STD,
                FEATURES=_padded(features),
                **row.blocks,
                num_warps=row.num_warps,
                num_stages=row.num_stages,
            )
        ctx.save_for_backward(spectrum, mask, statistics)
        ctx.step, ctx.features, ctx.positions = step, features, len(position)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters."""
        spectrum, mask, statistics = ctx.saved_tensors
        spectra, tokens, dim = grad.shape
        grad = grad.contiguous()
        row = settings(LAUNCH_BACKWARD_FLOAT32 if grad.dtype == torch.float32 else LAUNCH_BACKWARD, grad)
        tiles, splits = triton.cdiv(tokens, row.blocks["TOKENS"]), triton.cdiv(spectra, row.blocks["SPLIT"])
        d_weight = torch.empty(tiles * splits, dim, ctx.features, device=grad.device)
        d_position = torch.empty(splits, tokens, dim, device=grad.device)
        if programs := tiles * splits * triton.cdiv(dim, row.blocks["WIDTH"]):
            _window_embed_bwd_kernel[(programs,)](
                grad,
                spectrum,
                mask,
                statistics,
                d_weight,
                d_position,
                spectra,
                spectrum.shape[1],
                tokens,
                dim,
                splits,
                WINDOW=ctx.features - 2,
                STEP=ctx.step,
                MASKED=mask is not None,
                FEATURES=_padded(ctx.features),
                **row.blocks,
                num_warps=row.num_warps,
                num_stages=row.num_stages,
            )
        of_token = d_position.sum(0)
        unused = ctx.positions - tokens
        return (
            None,
            None,
            d_weight.sum(0).to(grad.dtype) if ctx.needs_input_grad[2] else None,
            of_token.sum(0).to(grad.dtype) if ctx.needs_input_grad[3] else None,
            F.pad(of_token, (0, 0, 0, unused)).to(grad.dtype) if ctx.needs_input_grad[4] else None,
            None,
            None,
        )


def _padded(features: int) -> int:
    return max(16, triton.next_power_of_2(features))
