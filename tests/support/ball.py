"""What the tests of the geometry kernels share: rows, scalars, and the compilation of kernels over whole rows."""

from collections.abc import Mapping

import torch
from aot import ARCHITECTURES, SHARED_LIMIT, Resources, resources
from torch import Tensor

from armillary.kernels.launch import Launch
from armillary.kernels.rows import warps


def unit(rows: int, width: int) -> Tensor:
    """Random directions in float64."""
    x = torch.randn(rows, width, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def scalar(value: float, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def assert_rows_compile(
    kernel: str, names: list[str], table: Mapping[int, Launch], dim: int, half: set[str], constants: dict[str, object]
) -> list[Resources]:
    """A kernel of rows of `dim` columns compiles with at most 128 registers and no spills.

    Args:
        kernel: "module:name".
        names: Its arguments.
        table: Its launch table.
        dim: D.
        half: Pointers to bfloat16; all others are to float32.
        constants: Its compile-time arguments beside D, BLOCK_D and the table's blocks.
    """
    kinds = {name: "*bf16" if name in half else "*fp32" if name.endswith("_ptr") else "fp32" for name in names}
    used = {}
    for sm in ARCHITECTURES:
        row = table[sm]
        fixed = constants | row.blocks | {"D": dim, "BLOCK_D": 1 << (dim - 1).bit_length()}
        fixed = {name: value for name, value in fixed.items() if name in names}
        signature = {name: kind for name, kind in (kinds | {"rows": "i32"}).items() if name not in fixed}
        used |= resources(kernel, signature, fixed, architectures=(sm,), num_warps=warps(row, dim))
        assert used[sm].stack == used[sm].local == 0, (sm, used[sm])
        assert used[sm].shared <= SHARED_LIMIT[sm], (sm, used[sm])
        assert used[sm].registers <= 128, (sm, used[sm])
    return list(used.values())
