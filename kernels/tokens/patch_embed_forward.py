"""Forward kernel of `patch_embed`: pixels to tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import INTERPRETER, Launch, settings

__all__ = ["LAUNCH", "LAUNCH_FLOAT32", "Pixels", "launch_forward", "load_pixels"]


@triton.jit
def load_pixels(
    image_ptr,
    mean_ptr,
    inv_std_ptr,
    crop,  # int32 [M], of each row
    patch,  # int32 [M]
    wanted,  # bool [M]; 0 elsewhere
    k,  # int32 [STEP], places in a patch
    patches,
    columns,
    C: tl.constexpr,
    P: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Normalised pixels [M, STEP] in float32.

    The offsets are written so that the compiler sees which pixels lie together, and loads 4 of them at a time for a
    patch of 4 n pixels: it does not see it through `k % (P * P) // P`.
    """
    plane = patches * (P * P)
    base = crop.to(tl.int64) * (C * plane) + (patch // columns * columns * P + patch % columns) * P
    channel = k // (P * P)
    offset = channel * plane + (k // P - channel * P) * (columns * P) + k % P
    inside = k < C * P * P
    valid = wanted[:, None] & inside[None, :]
    x = tl.load(image_ptr + base[:, None] + offset[None, :], mask=valid, other=0.0).to(tl.float32)
    if NORMALISE:
        mean = tl.load(mean_ptr + channel, mask=inside, other=0.0)
        inv_std = tl.load(inv_std_ptr + channel, mask=inside, other=0.0)
        x = tl.where(valid, (x - mean[None, :]) * inv_std[None, :], 0.0)
    return x


@triton.jit
def _patch_embed_fwd_kernel(
    image_ptr,  # [N, C, h P, w P]
    weight_ptr,  # [D, K]
    bias_ptr,  # [D]
    position_ptr,  # [1 + T, D]
    cls_ptr,  # [D]
    registers_ptr,  # [R, D]
    mask_ptr,  # uint8 [N, T]
    mask_token_ptr,  # [D]
    mean_ptr,  # float32 [C]
    inv_std_ptr,  # float32 [C]
    out_ptr,  # [N (1 + R + T), D]
    rows,  # N (1 + R + T)
    patches,  # T
    columns,  # w
    dim,
    C: tl.constexpr,
    P: tl.constexpr,
    REGISTERS: tl.constexpr,
    MASKED: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):  # one program: TOKENS x WIDTH of the output; neighbours share their pixels
    tiles = tl.cdiv(dim, WIDTH)
    row = tl.program_id(0) // tiles * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % tiles * WIDTH + tl.arange(0, WIDTH)
    crop, token = row // (1 + REGISTERS + patches), row % (1 + REGISTERS + patches)
    patch = token - (1 + REGISTERS)
    wanted = (row < rows) & (patch >= 0)
    inside = column < dim
    dtype = weight_ptr.dtype.element_ty

    # Every token is `rest` + W x with x = 0 but for visible patches, so `rest` is where the product starts from.
    rest = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if MASKED:
        at = crop.to(tl.int64) * patches + patch
        masked = tl.load(mask_ptr + at, mask=wanted, other=0) != 0
        mask_token = tl.load(mask_token_ptr + column, mask=inside, other=0.0).to(tl.float32)
        rest = tl.where(masked[:, None], mask_token[None, :], rest)
        wanted = wanted & (masked == 0)
    cls = tl.load(cls_ptr + column, mask=inside, other=0.0).to(tl.float32)
    rest = tl.where((token == 0)[:, None], cls[None, :], rest)
    if REGISTERS > 0:
        is_register = (token > 0) & (patch < 0)
        at = (token - 1)[:, None] * dim + column[None, :]
        register = tl.load(registers_ptr + at, mask=is_register[:, None] & inside[None, :], other=0.0)
        rest = tl.where(is_register[:, None], register.to(tl.float32), rest)
    placed = (row < rows) & ((token == 0) | (patch >= 0))
    at = tl.where(token == 0, 0, patch + 1)[:, None] * dim + column[None, :]
    acc = rest + tl.load(position_ptr + at, mask=placed[:, None] & inside[None, :], other=0.0).to(tl.float32)

    K: tl.constexpr = C * P * P
    for start in range(0, K, STEP):
        k = start + tl.arange(0, STEP)
        x = load_pixels(image_ptr, mean_ptr, inv_std_ptr, crop, patch, wanted, k, patches, columns, C, P, NORMALISE)
        w = tl.load(weight_ptr + column[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(x.to(dtype), tl.trans(w), acc, input_precision="tf32x3")
    at = row.to(tl.int64)[:, None] * dim + column[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


# The forward kernel, for half precision and for float32 weights. Registers are those of masked crops of 3 bands; more
# bands, other patches and registers take up to 193. It spills where D is no multiple of 16.
LAUNCH = {
    INTERPRETER: Launch({"TOKENS": 16, "WIDTH": 16, "STEP": 16}),
    80: Launch({"TOKENS": 128, "WIDTH": 128, "STEP": 16}, 8, 4, "not measured; compiled: 128 registers, no spills"),
    90: Launch({"TOKENS": 128, "WIDTH": 128, "STEP": 32}, 8, 3, "not measured; compiled: 134 registers, no spills"),
    100: Launch({"TOKENS": 128, "WIDTH": 128, "STEP": 32}, 8, 3, "not measured; compiled: 153 registers, no spills"),
}
LAUNCH_FLOAT32 = {
    INTERPRETER: Launch({"TOKENS": 16, "WIDTH": 16, "STEP": 16}),
    80: Launch({"TOKENS": 64, "WIDTH": 64, "STEP": 16}, 4, 3, "not measured; compiled: 127 registers, no spills"),
    90: Launch({"TOKENS": 64, "WIDTH": 64, "STEP": 16}, 4, 3, "not measured; compiled: 124 registers, no spills"),
    100: Launch({"TOKENS": 64, "WIDTH": 64, "STEP": 16}, 4, 3, "not measured; compiled: 123 registers, no spills"),
}


class Pixels(NamedTuple):
    """What forms the patches of one group of crops."""

    image: Tensor
    mask: Tensor | None  # uint8
    mean: Tensor | None
    inv_std: Tensor | None
    patch: int
    registers: int

    @property
    def patches(self) -> int:
        """Patches T of a crop."""
        return self.image.shape[2] * self.image.shape[3] // self.patch**2

    @property
    def length(self) -> int:
        """Tokens of a crop."""
        return 1 + self.registers + self.patches

    @property
    def rows(self) -> int:
        """Tokens of the group."""
        return len(self.image) * self.length

    def constants(self) -> dict[str, int | bool]:
        """Compile-time arguments of both kernels that read pixels."""
        return {
            "C": self.image.shape[1],
            "P": self.patch,
            "REGISTERS": self.registers,
            "MASKED": self.mask is not None,
            "NORMALISE": self.mean is not None,
        }


def launch_forward(
    group: Pixels,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls: Tensor,
    registers: Tensor | None,
    mask_token: Tensor | None,
    out: Tensor,
) -> None:
    """Write the tokens of a group, [rows, D]."""
    row = settings(LAUNCH_FLOAT32 if weight.dtype == torch.float32 else LAUNCH, weight)
    tiles = triton.cdiv(group.rows, row.blocks["TOKENS"]) * triton.cdiv(len(bias), row.blocks["WIDTH"])
    if tiles:
        _patch_embed_fwd_kernel[(tiles,)](
            group.image,
            weight,
            bias,
            position,
            cls,
            registers,
            group.mask,
            mask_token,
            group.mean,
            group.inv_std,
            out,
            group.rows,
            group.patches,
            group.image.shape[3] // group.patch,
            len(bias),
            **group.constants(),
            **row.blocks,
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )
