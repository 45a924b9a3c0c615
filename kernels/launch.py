"""What every kernel shares: the choice between PyTorch and Triton, launch settings by GPU, and refusals of bad input.

`impl` is the same word everywhere, from a recipe down to a kernel:

    reference   plain PyTorch: runs anywhere, in any float dtype, and is the oracle of the tests
    triton      the Triton kernels: a CUDA device, or a CPU under Triton's interpreter (TRITON_INTERPRET=1, for tests)
    auto        triton on a CUDA device, reference elsewhere and for float64; on a CPU prototype_rows_ is C++ (csrc/prototypes.cpp)

One operation can be taken out: ARMILLARY_IMPL="linear_gelu=reference,residual_norm=reference" in the environment overrides `impl`
of these alone, so that one bad kernel costs one kernel.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Literal, ParamSpec, TypeVar, get_args

import torch
import triton
from torch import Tensor

__all__ = [
    "IMPLS",
    "OPERATIONS",
    "Impl",
    "Launch",
    "check_tensor",
    "overrides",
    "refuse",
    "settings",
    "untraced",
    "use_triton",
]

P = ParamSpec("P")
R = TypeVar("R")

Impl = Literal["auto", "reference", "triton"]
IMPLS: tuple[str, ...] = get_args(Impl)

OPERATIONS = (
    "adamw_ema_", "column_logsumexp_", "decode_views", "down_gradient", "embed_crops", "fp8_linear", "gelu_linear", "geometry_combine",
    "geometry_ffn", "geometry_rows", "linear", "linear_gelu", "mobius_add", "packed_attention", "poincare_distance", "prototype_rows_",
    "radial_map", "residual_add", "residual_norm", "row_logsumexp", "sinkhorn_bias", "up_projection", "window_embed",
)  # fmt: skip
"""All that choose between PyTorch and Triton, by the names of their errors."""

INTERPRETER = 0  # the key of a launch table for Triton's interpreter: small blocks, so that small inputs have borders
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """One row of a launch table.

    Attributes:
        blocks: Compile-time sizes, by the name of the kernel's argument.
        num_warps: Warps a program.
        num_stages: Stages of software pipelining.
        source: Where the setting comes from: device, command and date of a measurement, or "not measured" and what was
            read from the compiler instead.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    source: str = "not measured"


def untraced(fn: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable` without its price: it imports torch's compiler, a second, where nothing is compiled."""

    disabled: list[Callable[P, R]] = []

    @wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not disabled and "torch._dynamo" in sys.modules:
            torch._dynamo.decorators.skip(call)  # nor is this frame traced
            disabled.append(torch.compiler.disable(fn))
        return (disabled[0] if disabled else fn)(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what the compiler looks for
    call._torchdynamo_disable_msg = None  # type: ignore[attr-defined]
    return call


def use_triton(operation: str, impl: str, x: Tensor) -> bool:
    """Whether an operation on `x` takes the Triton path.

    Args:
        operation: Name for the error.
        impl: "auto", "reference" or "triton".
        x: The operation's main input.

    Raises:
        ValueError: `impl` is none of the three, or "triton" is asked for where it cannot run.
    """
    if impl not in IMPLS:
        refuse(operation, "impl", f"must be one of {', '.join(IMPLS)}", repr(impl))
    impl = overrides().get(operation, impl)
    if impl != "triton":
        return impl == "auto" and x.is_cuda and x.dtype in FLOATS
    if x.dtype not in FLOATS:
        refuse(operation, "impl", f'must be "reference" or "auto" for {x.dtype}, which has no kernel', repr(impl))
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        refuse(operation, "impl", f'must be "reference" or "auto" for a tensor on {x.device}', repr(impl))
    return True


def overrides() -> dict[str, str]:
    """Implementations by operation, out of ARMILLARY_IMPL; not cached, because torch.compile warns of what is.

    Raises:
        ValueError: It does not say operation=impl, or names an operation or implementation that there is not.
    """
    found: dict[str, str] = {}
    for part in filter(None, os.environ.get("ARMILLARY_IMPL", "").split(",")):
        operation, _, impl = (word.strip() for word in part.partition("="))
        if operation not in OPERATIONS:
            raise ValueError(f"ARMILLARY_IMPL: must name operations out of {', '.join(OPERATIONS)}, got {operation!r}")
        if impl not in IMPLS:
            raise ValueError(f"ARMILLARY_IMPL: {operation} must be one of {', '.join(IMPLS)}, got {impl!r}")
        found[operation] = impl
    return found


def settings(table: Mapping[int, Launch], x: Tensor) -> Launch:
    """The row of a launch table for a tensor's device.

    Args:
        table: Rows by compute capability (80 for 8.0), and by `INTERPRETER`.
        x: A tensor on the device; not on a GPU, the interpreter's row is meant.

    Returns:
        The row of the highest capability that the device has; the lowest row for an older device.
    """
    if not x.is_cuda:
        return table[INTERPRETER]
    capability = _capability(x.device.index or 0)
    known = sorted(key for key in table if key != INTERPRETER)
    return table[max((key for key in known if key <= capability), default=known[0])]


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def refuse(operation: str, argument: str, rule: str, got: object) -> None:
    """Raise ValueError as `operation: argument rule, got value`."""
    raise ValueError(f"{operation}: {argument} {rule}, got {got}")


def check_tensor(
    operation: str,
    argument: str,
    x: Tensor,
    shape: Sequence[int | str],
    *,
    like: Tensor | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Raise ValueError unless a tensor is what a kernel can take: contiguous and of the right shape, dtype and device.

    Args:
        operation: Name for the error.
        argument: Name for the error.
        x: The tensor.
        shape: Its shape; a string stands for a dimension of any size and is shown in the error.
        like: A tensor whose device it must share.
        dtypes: Allowed dtypes; any where absent.
    """
    if not isinstance(x, Tensor):
        refuse(operation, argument, "must be a tensor", type(x).__name__)
    if x.dim() != len(shape) or any(isinstance(n, int) and n != m for n, m in zip(shape, x.shape, strict=True)):
        refuse(operation, argument, f"must have shape [{', '.join(map(str, shape))}]", list(x.shape))
    if dtypes is not None and x.dtype not in dtypes:
        refuse(operation, argument, f"must be {' or '.join(map(str, dtypes))}", x.dtype)
    if like is not None and x.device != like.device:
        refuse(operation, argument, f"must be on {like.device}", x.device)
    if not x.is_contiguous():
        refuse(operation, argument, "must be contiguous", f"strides {x.stride()} for shape {list(x.shape)}")
