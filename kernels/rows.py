"""What kernels over rows share: a tensor [..., D] is cut into tiles of whole rows, and a whole row fits one program.

A row map needs |row| before it can write the row, so a program that holds the row in registers reads it once. A tile has
ROWS rows of BLOCK = next power of two >= D columns, about as many elements as the launch table's TILE; a row wider than a
tile gets proportionally more warps instead, and narrow rows come at most one a thread (a map has tens of numbers a row), so
that the registers a thread stay about the same from D = 1 to D = MAX_WIDTH.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import FLOATS, Launch, check_tensor, refuse, settings

__all__ = [
    "MAX_WIDTH",
    "Tiles",
    "check_rows",
    "load_rows",
    "multiprocessors",
    "programs",
    "row_tile",
    "scalar",
    "tiles",
    "warps",
    "wide",
]

MAX_WIDTH = 8192
"""Widest row: 16 elements a thread of 16 warps."""


@dataclass(frozen=True)
class Tiles:
    """How a launch cuts a tensor [..., D].

    Attributes:
        rows: Rows in all.
        width: Columns D.
        programs: Tiles in all.
        options: ROWS, BLOCK and num_warps, as keyword arguments of the launch.
    """

    rows: int
    width: int
    programs: int
    options: dict[str, int]


def tiles(table: Mapping[int, Launch], x: Tensor) -> Tiles:
    """The tiles of a tensor [..., D], by the launch table's row for its device (key TILE: elements a program)."""
    row = settings(table, x)
    tile, width = row.blocks["TILE"], x.shape[-1]
    count = x.numel() // width
    block = triton.next_power_of_2(width)
    held = max(1, min(tile // block, 32 * row.num_warps))
    options = {"ROWS": held, "BLOCK": block, "num_warps": row.num_warps * max(1, block // tile)}
    return Tiles(count, width, triton.cdiv(count, held), options)


@triton.jit
def row_tile(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows [ROWS, 1], the offsets of their elements [ROWS, BLOCK], and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    return row, row * width + column, (row < rows) & (column < width)


@triton.jit
def load_rows(x_ptr, at, inside):
    """Elements of a tile in float32, 0 where there are none."""
    return tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)


def warps(launch: Launch, dim: int) -> int:
    """Warps for rows of `dim` columns, so that the registers a thread stay as the launch table has them."""
    return min(launch.num_warps * max(1, triton.next_power_of_2(dim) // 1024), 16)


def programs(launch: Launch, x: Tensor, rows: int) -> int:
    """Programs of a kernel that walks over the rows: as many as the device holds at a time, at most one a row."""
    held = launch.blocks["PROGRAMS"] * (multiprocessors(x.device.index or 0) if x.is_cuda else 1)
    return max(1, min(held, rows))


@cache
def multiprocessors(index: int) -> int:
    """Multiprocessors of the GPU of this index."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def wide(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 for a float64 tensor."""
    return torch.promote_types(x.dtype, torch.float32)


def check_rows(operation: str, argument: str, x: Tensor, like: Tensor | None = None) -> None:
    """Raise ValueError unless `x` is contiguous floating point [..., D], 1 <= D <= MAX_WIDTH.

    Args:
        operation: Name for the error.
        argument: Name for the error.
        x: The tensor.
        like: A tensor whose shape, dtype and device it must share.
    """
    if like is not None:
        return check_tensor(operation, argument, x, list(like.shape), like=like, dtypes=(like.dtype,))
    if not isinstance(x, Tensor) or x.dim() == 0:
        refuse(operation, argument, "must be a tensor [..., D]", list(x.shape) if isinstance(x, Tensor) else repr(x))
    check_tensor(operation, argument, x, [*x.shape[:-1], "D"], dtypes=(*FLOATS, torch.float64))
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        refuse(operation, argument, f"must have rows of 1 to {MAX_WIDTH} elements", list(x.shape))


def scalar(operation: str, argument: str, value: Tensor | float, like: Tensor, *, positive: bool) -> Tensor:
    """A number that kernels read from the device, as a 0-d tensor of `like`'s wide dtype; differentiable.

    Args:
        operation: Name for the error.
        argument: Name for the error.
        value: A finite number, or a 0-d float32 or float64 tensor on `like`'s device.
        like: The operation's main input.
        positive: Refuse values <= 0. The value of a tensor on a GPU is not looked at: the host would have to wait for it.

    Raises:
        ValueError: A wrong type, shape, dtype, device or value.
    """
    if isinstance(value, Tensor):
        check_tensor(operation, argument, value, (), like=like, dtypes=(torch.float32, torch.float64))
    elif not isinstance(value, int | float):
        refuse(operation, argument, "must be a number or a 0-d tensor", type(value).__name__)
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        number = float(value.detach()) if isinstance(value, Tensor) else float(value)
        if not math.isfinite(number) or (positive and number <= 0):
            refuse(operation, argument, "must be finite and positive" if positive else "must be finite", number)
    if isinstance(value, Tensor):
        return value.to(wide(like))
    return torch.full((), value, dtype=wide(like), device=like.device)
