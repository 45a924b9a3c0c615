"""A GPU that is not there: meta tensors that say they are CUDA ones, for whole training steps at real shapes.

    with absent_gpu(90) as gpu:                     # compute capability 9.0
        losses = method.training_step(batch, scalars)
        losses.total.backward()
    gpu.launches, gpu.operations, gpu.peak, gpu.bytes, gpu.flops

Choices between paths fall as on that GPU. PyTorch's operations give shapes without numbers; Triton kernels are noted, not run.
What would fail or wait on the GPU raises here: tensors on two devices or of two dtypes, a kernel given a tensor of the CPU, a grid or an
integer too large for a launch, and everything by which the host would wait for numbers (item, tolist, nonzero, masks as indices),
which a meta tensor does not have.
"""

import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.interpreter import InterpretedFunction

from armillary.kernels import launch, rows
from armillary.kernels.mlp import gemm

__all__ = ["Gpu", "Launch", "absent_gpu"]

MAX_INT = 2**31 - 1
ALLOCATION = 512  # bytes that the caching allocator rounds up to
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution"}
"""Operations whose factors must have one dtype, which the meta device does not look at."""
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: "module:name".
        grid: Programs along each axis.
        arguments: By name; a tensor as its Triton type, "*bf16".
        options: num_warps and num_stages.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: dict
    options: dict


@dataclass
class Gpu:
    """What a GPU would have been given.

    Attributes:
        launches: Triton's.
        operations: All operations that the host hands over, by name; views are none.
        bytes: Sizes of the tensors that they read and write, by name.
        flops: Of PyTorch's products and attention, and of the fused products of an MLP.
        live: Bytes of storages that are alive.
        peak: The most there were.
    """

    launches: list[Launch] = field(default_factory=list)
    operations: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    flops: int = 0
    live: int = 0
    peak: int = 0

    def note(self, name, tensors):
        """Count one operation."""
        self.operations[name] += 1
        self.bytes[name] += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)


class _Counting(TorchDispatchMode):
    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.seen = gpu, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = func._schema.name.partition("::")[2]
        on_cpu = [x for x in given if x.device.type == "cpu" and x.dim()]
        if on_cpu and len(on_cpu) < len(given) and name not in ("copy_", "_to_copy"):
            raise ValueError(f"{name}: takes a tensor of the CPU beside those of the GPU")
        if name in PRODUCTS and len({x.dtype for x in given}) > 1:
            raise ValueError(f"{name}: takes factors of several dtypes, {[x.dtype for x in given]}")
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]) and args[0].is_meta:
            raise ValueError("index: the host waits for the number of places in a mask")
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_meta]
        for x in made:
            self.hold(x)
        here = {id(x): x for x in (*given, *made) if x.is_meta}.values()
        if here and not func.is_view and "empty" not in name and name not in ("detach", "_unsafe_view", "lift_fresh"):
            self.gpu.note(name, here)
            formula = flop_registry.get(func._overloadpacket)
            self.gpu.flops += int(formula(*args, **kwargs, out_val=out)) if formula else 0
        return out

    def hold(self, x):
        """Count a storage while it is alive."""
        storage = x.untyped_storage()
        if storage._cdata not in self.seen:
            size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            self.seen.add(storage._cdata)
            self.gpu.live += size
            self.gpu.peak = max(self.gpu.peak, self.gpu.live)
            weakref.finalize(storage, self.free, storage._cdata, size)

    def free(self, key, size):
        self.seen.discard(key)
        self.gpu.live -= size


def _noted(gpu):
    """Replaces `run` of Triton's kernels: checks a launch, and notes it."""

    def run(self, *args, grid, warmup=False, **kwargs):
        names = self.arg_names
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        name = f"{self.fn.__module__}:{self.fn.__name__}"
        if missing := set(names) - set(given):
            raise TypeError(f"{name}: is not given {sorted(missing)}")
        grid = tuple(grid(given) if callable(grid) else grid)
        if not all(0 < n <= (MAX_INT if axis == 0 else 65535) for axis, n in enumerate(grid)):
            raise ValueError(f"{name}: cannot be launched with the grid {grid}")
        tensors = {k: x for k, x in given.items() if isinstance(x, torch.Tensor)}
        if strange := [k for k, x in tensors.items() if not x.is_meta]:
            raise ValueError(f"{name}: is given tensors that are not on the GPU: {strange}")
        if wide := {k: x for k, x in given.items() if isinstance(x, int) and abs(x) > MAX_INT}:
            raise ValueError(f"{name}: is given integers that do not fit 32 bits: {wide}")
        options = {k: v for k, v in kwargs.items() if k not in names}
        gpu.launches.append(Launch(name, grid, given | {k: f"*{TYPES[x.dtype]}" for k, x in tensors.items()}, options))
        gpu.note(f"triton {self.fn.__name__}", tensors.values())
        if ".mlp." in name and (depth := given.get("K", given.get("D"))):  # a fused product
            gates = 2 if given["GATED"] and "K" in given else 1
            gpu.flops += 2 * given["M"] * given["E"] * given["H"] * gates * depth

    return run


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What PyTorch takes on a GPU: FlashAttention-2 for halves without a mask, else its memory-efficient kernel."""
    aten = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale
        )[0]
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def absent_gpu(sm=90, multiprocessors=132):
    """Let meta tensors pass for those of a GPU of this compute capability (90: 9.0); gives a `Gpu`."""
    gpu, properties, autocast = Gpu(), SimpleNamespace(multi_processor_count=multiprocessors), torch.autocast
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "get_device_capability", lambda *_: divmod(sm, 10)),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.Tensor, "is_cuda", property(lambda self: self.device.type == "meta")),
            (torch, "is_autocast_enabled", lambda *_: False),  # neither of them knows the meta device
            (torch, "autocast", lambda kind, **more: autocast("cuda" if kind == "meta" else kind, **more)),
            (F, "scaled_dot_product_attention", _attention),
            (
                gemm,
                "_aligned",
                lambda x: x.storage_offset() * x.element_size() % 16 == 0 == x.shape[-1] * x.element_size() % 16,
            ),
            (triton.JITFunction, "run", _noted(gpu)),
            (InterpretedFunction, "run", _noted(gpu)),
        ):
            stack.enter_context(patch.object(target, name, value))
        for known in (launch._capability, rows.multiprocessors):
            known.cache_clear()
            stack.callback(known.cache_clear)
        stack.enter_context(_Counting(gpu))
        yield gpu
