"""What products with an epilogue share: order of tiles, parts of an accumulator, launch tables, choice and launch of a path.

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
from typing import Any, Literal, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import INTERPRETER, Launch, settings
from armillary.kernels.rows import multiprocessors

__all__ = [
    "COMPILED",
    "Gemm",
    "Kernels",
    "choose",
    "fused_table",
    "launch",
    "launch_persistent",
    "part_of",
    "place_tile",
    "product_table",
]


COMPILED = "not measured; compiled ahead of time for every form in bfloat16: at most {} registers, no spills"


@dataclass(frozen=True)
class Gemm(Launch):
    """One row of a product's launch table.

    Attributes:
        path: "tma", "fused" or "cublas"; the settings are those of this path.
    """

    path: Literal["tma", "fused", "cublas"] = "fused"


def product_table(sm80: int, sm90: int, sm100: int) -> dict[int, Gemm]:
    """Launch table of a product, until its own is measured; the arguments are the registers that its kernels take."""
    wide = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}
    return {
        INTERPRETER: Gemm(
            {"BM": 32, "BN": 64, "BK": 16, "GROUP": 2}, source="small, so that small inputs have borders"
        ),
        80: Gemm({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, num_warps=8, num_stages=4, source=COMPILED.format(sm80)),
        90: Gemm(wide, num_warps=8, source=COMPILED.format(sm90), path="tma"),
        100: Gemm(wide, num_warps=8, source=COMPILED.format(sm100), path="tma"),
        120: Gemm(source="not measured; tiles as large as those of 10.0 do not fit its shared memory", path="cublas"),
    }


def fused_table(product: Mapping[int, Gemm], sm90: int) -> dict[int, Launch]:
    """Launch table of the path "fused" where the product's own path is "tma" and the shape has no descriptors."""
    blocks = {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}
    return {
        INTERPRETER: product[INTERPRETER],
        80: product[80],
        90: Launch(blocks, num_warps=8, source=COMPILED.format(sm90)),
    }


@dataclass(frozen=True)
class Kernels:
    """A product's kernels, one a path; each takes its operands, M, E, H, and but for the elementwise one the depth."""

    tma: Any
    fused: Any
    elementwise: Any


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


def launch(
    kernels: Kernels,
    chosen: tuple[str, Launch, dict[str, int]],
    x: Tensor,
    operands: Sequence[Tensor | None],
    sizes: tuple[int, int, int],
    depth: int,
    *,
    whole: bool,
    activation: str,
) -> None:
    """Run the kernel of a path.

    Args:
        kernels: Of the product.
        chosen: What `choose` returned; for "cublas" the product has been made.
        x: A tensor on the device.
        operands: Tensors that the kernel takes, in its order.
        sizes: M, E and H.
        depth: Length of the sum.
        whole: Whether no load of the path "fused" needs a mask.
        activation: "gelu", "gelu_tanh" or "swiglu".
    """
    path, row, blocks = chosen
    (m, experts, h), stages = sizes, {"num_stages": row.num_stages}
    tiles = triton.cdiv(m, blocks["BM"]) * experts * triton.cdiv(h, blocks["BN"])
    options: dict[str, Any] = {"GATED": activation == "swiglu", "TANH": activation == "gelu_tanh", **blocks}
    options["num_warps"] = row.num_warps
    if path == "cublas":
        kernels.elementwise[(tiles,)](*operands, *sizes, **options)
    elif path == "tma":
        launch_persistent(kernels.tma, tiles, x, *operands, *sizes, depth, **options, **stages)
    else:
        kernels.fused[(tiles,)](*operands, *sizes, depth, EVEN=whole, **options, **stages)


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0


def launch_persistent(kernel: Any, tiles: int, x: Tensor, *args: Any, **options: Any) -> None:
    """Launch a kernel that makes tensor descriptors, with as many programs as the device runs at once.

    The allocator of their memory is set for this launch only, and in this thread: autograd runs in threads of its own.
    """
    programs = min(tiles, multiprocessors(x.device.index or 0) if x.is_cuda else 2)

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device))
        kernel[(programs,)](*args, programs, **options)

    copy_context().run(run)
