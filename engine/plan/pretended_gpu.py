"""The code path of a GPU without one: meta tensors that say they are CUDA ones, and Triton kernels that are noted, not run.

Plans count on it, and so do the tests of the recipes' steps, whose stricter rules lie on top (tests/support/absent_gpu.py). Inside, the choices of `kernels` fall as they do on the GPU, so that what is allocated, saved and launched there is what is counted.
Whatever would wait for the device (`item`, `nonzero`) raises, as meta tensors have no numbers, but for two questions: the lengths
of ragged sequences, which float32 attention asks for, are taken as equal; and whether anything is out of the ordinary is denied.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from armillary.engine.plan.counting import Counting, Kind
from armillary.kernels import launch, rows
from armillary.kernels.mlp import gemm
from armillary.kernels.tokens import attention
from armillary.kernels.tokens.attention import PackedSequences

__all__ = ["KernelLaunch", "pretended_gpu"]

ATTENTION = {
    "packed_attention_fwd_kernel": (2, 4, 0), "whole_bwd_kernel": (5, 7, 3), "queries_bwd_kernel": (3, 6, 1),
    "keys_bwd_kernel": (4, 7, 2),
}  # fmt: skip
"""Products that a Triton kernel of attention makes of a block of rows with all others, blocks it reads and writes, and how many of the
three gradients it sums."""


@dataclass(frozen=True)
class KernelLaunch:
    """A Triton kernel as it would have been launched.

    Attributes:
        kernel: The decorated function.
        grid: Programs along each axis.
        given: Arguments by name.
        options: What is no argument of it: num_warps, num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    given: Mapping[str, Any]
    options: Mapping[str, Any]


@contextmanager
def pretended_gpu(
    counting: Counting,
    capability: int,
    multiprocessors: int,
    launched: Callable[[KernelLaunch], None] = lambda _: None,
) -> Iterator[None]:
    """Let meta tensors pass for those of a GPU, whose Triton kernels are counted.

    Args:
        counting: Entered inside; takes the kernels' bytes.
        capability: Compute capability, 90 for 9.0.
        multiprocessors: Multiprocessors of the GPU.
        launched: Told of every launch before it is counted.
    """
    properties, autocast = SimpleNamespace(multi_processor_count=multiprocessors), torch.autocast
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "get_device_capability", lambda *_: divmod(capability, 10)),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.Tensor, "is_cuda", property(lambda self: self.device.type == "meta")),
            (torch, "is_autocast_enabled", lambda *_: False),  # neither knows the meta device
            (torch, "autocast", lambda kind, **more: nullcontext() if kind == "meta" else autocast(kind, **more)),
            (torch.Tensor, "__bool__", _answer),
            (F, "scaled_dot_product_attention", _attention),
            (attention, "_grouped", _even(attention._grouped)),
            (gemm, "_aligned", _aligned),
            (JITFunction, "run", _noted(counting, launched)),
            (InterpretedFunction, "run", _noted(counting, launched)),
        ):
            stack.enter_context(patch.object(target, name, value))
        for known in (launch._capability, rows.multiprocessors):
            known.cache_clear()
            stack.callback(known.cache_clear)
        stack.enter_context(counting)
        yield


_plain_bool = torch.Tensor.__bool__


def _answer(self: Tensor) -> bool:
    """Of a meta tensor False: code on a step's way asks so whether a rare case is there."""
    return False if self.device.type == "meta" else _plain_bool(self)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What PyTorch takes on a GPU: FlashAttention-2 for bf16 without a mask, else the memory-efficient kernel."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    aten = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale
        )[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def _even(grouped: Any) -> Any:
    """Attention by runs, where ragged sequences have no lengths: all are taken to be equally long."""

    def even(layout: PackedSequences, tokens: int) -> PackedSequences:
        if layout.runs is not None:
            return layout
        short, more = divmod(tokens, layout.sequences)
        return replace(layout, runs=((layout.sequences - more, short), (more, short + 1)))

    def call(q: Tensor, k: Tensor, v: Tensor, layout: PackedSequences, queries: PackedSequences) -> Tensor:
        return grouped(q, k, v, even(layout, len(k)), even(queries, len(q)))

    return call


def _aligned(x: Tensor) -> bool:
    """Whether tensor descriptors take it, as `gemm` asks its address, if the allocation begins at a multiple of 16."""
    return x.storage_offset() * x.element_size() % 16 == 0 == x.shape[-1] * x.element_size() % 16


def _noted(counting: Counting, launched: Callable[[KernelLaunch], None]) -> Any:
    """Replaces `JITFunction.run`: counts every tensor that a kernel is given once."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        named = {name: kwargs.pop(name) for name in self.arg_names if name in kwargs}
        given = {**dict(zip(self.arg_names, args, strict=False)), **named}
        programs = tuple(grid(given) if callable(grid) else grid)
        launched(KernelLaunch(self, programs, given, kwargs))
        tensors = [x for x in given.values() if isinstance(x, Tensor)]
        if strange := [x.device for x in tensors if x.device.type != "meta"]:
            raise ValueError(f"{self.fn.__name__}: was given a tensor on {strange[0]} beside those of the GPU")
        name, kind = self.fn.__name__, _kind(self)
        flops = _product_flops(given) if kind == "fused product" else 0
        size: int | None = None
        if name in ATTENTION:
            flops, size = _attention_work(name, given, math.prod(programs))
        counting.add(f"triton {name}", kind, tensors, flops, size)

    return run


@cache
def _kind(kernel: Any) -> Kind:
    """Whether a Triton kernel makes products, itself or in a function it calls."""
    if "attention" in kernel.fn.__module__:
        return "attention"
    source = inspect.getsource(kernel.fn)
    called = [kernel.fn.__globals__.get(name) for name in re.findall(r"\b(\w+)\(", source)]
    inner = [x for x in called if isinstance(x, JITFunction | InterpretedFunction) and x is not kernel]
    return "fused product" if "tl.dot" in source or any(_kind(x) != "bytes" for x in inner) else "bytes"


def _attention_work(name: str, given: Mapping[str, Any], programs: int) -> tuple[int, int]:
    """FLOPs and bytes of a kernel over blocks of rows of one head, padding included: it is given all, and takes some."""
    products, rows, sums = ATTENTION[name]
    block = given["BLOCK"] * given["DIM"] * programs
    size = rows * block * given["qkv_ptr"].element_size() + 4 * sums * given["DIM"] * programs
    return 2 * products * block * given["BLOCK"] * given.get("blocks", 1), size


def _product_flops(given: Mapping[str, Any]) -> int:
    """FLOPs of a kernel that multiplies rows by a weight, or makes a weight's gradient from them.

    The rows are M, or those of the output or of its gradient, which are as wide as the weight is long.
    """
    weights = [given[name] for name in ("w_ptr", "weight_ptr", "d_weight_ptr") if name in given]
    if not weights:
        return 0
    weight = weights[0]
    if "M" in given:
        return 2 * int(given["M"]) * int(weight.numel())
    dim, width = weight.shape[-2:]
    out = given["out_ptr"] if "out_ptr" in given else given["grad_ptr"]
    return 2 * int(out.numel()) // int(dim) * int(dim * width)
