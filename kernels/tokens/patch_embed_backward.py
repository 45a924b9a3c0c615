"""Backward kernels of `patch_embed`: the patches once more for the weight's gradient, sums over crops for the others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import INTERPRETER, Launch, settings
from armillary.kernels.tokens.patch_embed_forward import Pixels, load_pixels

__all__ = ["LAUNCH_IM2COL", "LAUNCH_SUMS", "launch_im2col", "launch_sums"]


@triton.jit
def _im2col_kernel(
    image_ptr,
    mask_ptr,
    mean_ptr,
    inv_std_ptr,
    out_ptr,  # [N (1 + R + T), K]
    rows,
    patches,
    columns,
    C: tl.constexpr,
    P: tl.constexpr,
    REGISTERS: tl.constexpr,
    MASKED: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # one program: ROWS x STEP of the output
    K: tl.constexpr = C * P * P
    tiles: tl.constexpr = (K + STEP - 1) // STEP
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % tiles * STEP + tl.arange(0, STEP)
    crop = row // (1 + REGISTERS + patches)
    patch = row % (1 + REGISTERS + patches) - (1 + REGISTERS)
    wanted = (row < rows) & (patch >= 0)
    if MASKED:
        wanted &= tl.load(mask_ptr + crop.to(tl.int64) * patches + patch, mask=wanted, other=1) == 0
    x = load_pixels(image_ptr, mean_ptr, inv_std_ptr, crop, patch, wanted, k, patches, columns, C, P, NORMALISE)
    at = row.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (k < K)[None, :])


@triton.jit
def _patch_embed_bwd_kernel(
    grad_ptr,  # [N, L, D]
    mask_ptr,  # uint8 [N, T]
    sums_ptr,  # float32 [S, 1 or 2, L, D]: of the tokens that are not masked, and of those that are
    crops,
    length,  # L = 1 + R + T
    dim,
    REGISTERS: tl.constexpr,
    MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    CROPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # one program: one token, WIDTH columns, SPLIT crops
    tiles = tl.cdiv(dim, WIDTH)
    column = tl.program_id(0) % tiles * WIDTH + tl.arange(0, WIDTH)
    token = tl.program_id(0) // tiles % length
    split = tl.program_id(0) // tiles // length
    inside = column < dim
    patch = token - (1 + REGISTERS)
    shown = tl.zeros([CROPS, WIDTH], tl.float32)
    hidden = tl.zeros([CROPS, WIDTH], tl.float32)
    for start in range(0, SPLIT, CROPS):
        crop = split * SPLIT + start + tl.arange(0, CROPS)
        at = (crop.to(tl.int64) * length + token)[:, None] * dim + column[None, :]
        valid = (crop < crops)[:, None] & inside[None, :]
        g = tl.load(grad_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if MASKED:
            at = crop.to(tl.int64) * (length - 1 - REGISTERS) + patch
            masked = (tl.load(mask_ptr + at, mask=(crop < crops) & (patch >= 0), other=0) != 0)[:, None]
            hidden += tl.where(masked, g, 0.0)
            g = tl.where(masked, 0.0, g)
        shown += g
    sums = sums_ptr + (split.to(tl.int64) * (1 + MASKED) * length + token) * dim + column
    tl.store(sums, tl.sum(shown, 0), mask=inside)
    if MASKED:
        tl.store(sums + length * dim, tl.sum(hidden, 0), mask=inside)


LAUNCH_IM2COL = {
    INTERPRETER: Launch({"ROWS": 16, "STEP": 32}),
    80: Launch({"ROWS": 32, "STEP": 128}, 4, 1, "not measured; compiled: at most 54 registers, no spills"),
}
LAUNCH_SUMS = {
    INTERPRETER: Launch({"SPLIT": 4, "CROPS": 2, "WIDTH": 16}),
    80: Launch(
        {"SPLIT": 64, "CROPS": 8, "WIDTH": 256}, 4, 1, "not measured; compiled: at most 64 registers, no spills"
    ),
}


def launch_im2col(group: Pixels, out: Tensor) -> None:
    """Write the patches of a group, [rows, K], with zero rows for what is no visible patch."""
    row = settings(LAUNCH_IM2COL, out)
    tiles = triton.cdiv(group.rows, row.blocks["ROWS"]) * triton.cdiv(out.shape[1], row.blocks["STEP"])
    if tiles:
        _im2col_kernel[(tiles,)](
            group.image,
            group.mask,
            group.mean,
            group.inv_std,
            out,
            group.rows,
            group.patches,
            group.image.shape[3] // group.patch,
            **group.constants(),
            **row.blocks,
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )


def launch_sums(group: Pixels, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sums over crops of the tokens' gradient, [L, D] float32: of visible tokens and of masked ones."""
    row = settings(LAUNCH_SUMS, grad)
    crops, length, dim = len(group.image), group.length, grad.shape[1]
    masked = group.mask is not None
    splits = triton.cdiv(crops, row.blocks["SPLIT"])
    sums = torch.empty(splits, 1 + masked, length, dim, device=grad.device)
    if splits:
        _patch_embed_bwd_kernel[(splits * length * triton.cdiv(dim, row.blocks["WIDTH"]),)](
            grad,
            group.mask,
            sums,
            crops,
            length,
            dim,
            REGISTERS=group.registers,
            MASKED=masked,
            **row.blocks,
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )
    total = sums.sum(0)
    return total[0], total[1] if masked else None
