"""What products with an epilogue share: order of tiles, parts of an accumulator, and the choice of a path.

A path is how a product with its epilogue runs; the launch table of the product names one for each architecture:

    tma         persistent programs whose tiles come and go by tensor descriptors: the loads of a tile run during the
                epilogue of the one before. sm_90 or later; rows of 16-byte multiples; whole tiles of columns
    fused       one program a tile, plain pointers: any shape
    cublas      torch's product, then one elementwise kernel; always for float32 on a GPU, where a Triton product has no
                tensor cores to use (torch.backends.cuda.matmul.allow_tf32 holds there)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import Launch, settings

__all__ = ["COMPILED", "Gemm", "choose", "launch_persistent", "part_of", "place_tile"]


COMPILED = "not measured; compiled ahead of time for every form in bfloat16: at most {} registers, no spills"


@dataclass(frozen=True)
class Gemm(Launch):
    """One row of a product's launch table.

    Attributes:
        path: "tma", "fused" or "cublas"; the settings are those of this path.
    """

    path: Literal["tma", "fused", "cublas"] = "fused"


@triton.jit
def place_tile(tile, M, E, H, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row, expert and first column of a tile; GROUP row tiles pass all columns together, for the L2 cache."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(H, BN)
    band = GROUP * E * columns
    first = tile // band * GROUP
    height = tl.minimum(rows - first, GROUP)
    column = tile % band // height
    return (first + tile % band % height) * BM, column // columns, column % columns * BN


@triton.jit
def part_of(p, INDEX: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Columns INDEX * BN / PARTS to (INDEX + 1) * BN / PARTS of a tile [BM, BN]; PARTS is a power of 2."""
    if PARTS == 1:
        return p
    else:
        left, right = tl.split(tl.permute(tl.reshape(p, (BM, 2, BN // 2)), (0, 2, 1)))
        return part_of(left if INDEX < PARTS // 2 else right, INDEX % (PARTS // 2), PARTS // 2, BM, BN // 2)


def choose(
    tables: tuple[Mapping[int, Gemm], Mapping[int, Launch], Mapping[int, Launch]],
    x: Tensor,
    gates: int,
    columns: int,
    depth: int,
    matrices: Sequence[Tensor | None],
) -> tuple[str, Launch, dict[str, int]]:
    """Path of a product, its settings, and its blocks for this many gates.

    Args:
        tables: Launch tables of the product, of its path "fused" and of its elementwise kernel.
        x: One of its operands.
        gates: 2 for "swiglu", else 1; a tile then holds half as many columns of each.
        columns: What BN must divide for tensor descriptors.
        depth: What BK must divide for them.
        matrices: What descriptors are made of: contiguous, seen as [rows, last dimension].
    """
    product, fused, elementwise = tables
    row = cast(Gemm, settings(product, x))
    path, chosen = row.path, cast(Launch, row)
    if x.is_cuda and x.dtype == torch.float32:
        path = "cublas"
    elif path == "tma":
        fits = columns % row.blocks["BN"] == 0 and depth % row.blocks["BK"] == 0
        if not (fits and all(m is None or _aligned(m) for m in matrices)):
            path, chosen = "fused", settings(fused, x)
    if path == "cublas":
        chosen = settings(elementwise, x)
    return path, chosen, {**chosen.blocks, "BN": chosen.blocks["BN"] // gates}


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0


def launch_persistent(kernel: Any, tiles: int, x: Tensor, *args: Any, **options: Any) -> None:
    """Launch a kernel that makes tensor descriptors, with as many programs as the device runs at once.

    The allocator of their memory is set for this launch only, and in this thread: autograd runs in threads of its own.
    """
    programs = min(tiles, _multiprocessors(x.device.index or 0) if x.is_cuda else 2)

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device))
        kernel[(programs,)](*args, programs, **options)

    copy_context().run(run)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
