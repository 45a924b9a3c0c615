"""What a piece of a program does to a device: live memory by kind, FLOPs and bytes moved, operation by operation.

Counted are PyTorch's operations as they reach the dispatcher, backward pass included; so nothing has to be known of the model.
On the meta device they have shapes and no numbers, and cost no memory.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["Counting", "Kind", "Work"]

Kind = Literal["product", "fused product", "attention", "bytes"]

ATTENTION_OF_A_CPU = {
    f"_scaled_dot_product_flash_attention_for_cpu{end}": flop_registry[
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{end}")
    ]
    for end in ("", "_backward")
}
"""FLOPs of operations that PyTorch's registry lacks."""

ALLOCATION = 512
"""Bytes that a GPU's caching allocator rounds up to."""

GATHERS = {"index", "index_select", "embedding", "gather"}
"""Operations that read as much of their input as they write."""

WRITES_ONLY = {
    "zeros",
    "ones",
    "full",
    "arange",
    "zeros_like",
    "ones_like",
    "full_like",
    "zero_",
    "fill_",
    "new_zeros",
    "scalar_tensor",
}


@dataclass(frozen=True)
class Work:
    """One operation as the device sees it; equal ones are counted together.

    Attributes:
        phase: Part of the step it belongs to.
        name: PyTorch's name of it, or that of the Triton kernel.
        kind: What limits it: one of the kinds of products, or bytes alone.
        dtype: Of the factors of a product, else of the first tensor.
        flops: 2 a multiply-add; 0 where there is no product.
        bytes: What it must read and write.
    """

    phase: str
    name: str
    kind: Kind
    dtype: torch.dtype
    flops: int
    bytes: int


def _bytes(x: Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded one lie there once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class Counting(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        device: Type of the device whose tensors count; allocations on the meta device are rounded up as on a GPU.

    Attributes:
        work: How often each piece of work was done.
        peak: Largest number of live bytes.
        at_peak: Live bytes by kind at that moment.
        live: Live bytes by kind now.
        total: Live bytes of all kinds now.
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device, self.rounding = device, ALLOCATION if device == "meta" else 1
        self.work: Counter[Work] = Counter()
        self.live: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.phase = ""
        self.total = 0
        self._seen: set[int] = set()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Work and new memory inside belong to this phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def restart(self, *tensors: Tensor) -> None:
        """Forget work and peak; these tensors have been there before, and count as live."""
        self.work.clear()
        for tensor in tensors:
            if tensor.device.type == self.device:
                self._allocated(tensor)
        self.peak = 0
        self._note_peak()

    def add(self, name: str, kind: Kind, tensors: list[Tensor], flops: int = 0, size: int | None = None) -> None:
        """Count work on these tensors; `size` replaces the sum of their bytes."""
        moved = sum(_bytes(x) for x in tensors) if size is None else size
        self.work[Work(self.phase, name, kind, tensors[0].dtype, flops, moved)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        taken, made = self._here((args, kwargs)), self._here(out)
        if taken or made:
            self._count(func, args, kwargs, out, taken, made)
            for tensor in made:
                self._allocated(tensor)
            self._note_peak()
        return out

    def _here(self, tree: Any) -> list[Tensor]:
        return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == self.device]

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, taken: list[Tensor], made: list[Tensor]) -> None:
        name = func._schema.name.partition("::")[2]
        if func.is_view or "empty" in name or name in ("detach", "_unsafe_view", "lift_fresh", "alias"):
            return
        formula = flop_registry.get(func._overloadpacket, ATTENTION_OF_A_CPU.get(name))
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        kind: Kind = "bytes" if formula is None else "attention" if "attention" in name or "attn" in name else "product"
        size = None
        if name in WRITES_ONLY:
            size = sum(map(_bytes, made))
        elif name in GATHERS:
            size = 2 * sum(map(_bytes, made))
        self.add(name, kind, taken + [x for x in made if not any(x is y for y in taken)], flops, size)

    def _allocated(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        self._seen.add(key)
        self.total += size
        self.live[self.phase] += size
        weakref.finalize(storage, self._freed, key, size, self.phase)

    def _freed(self, key: int, size: int, phase: str) -> None:
        self._seen.discard(key)
        self.total -= size
        self.live[phase] -= size

    def _note_peak(self) -> None:
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, {kind: size for kind, size in self.live.items() if size}
