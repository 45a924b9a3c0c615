"""A GPU that is not there, and is strict: `engine.plan.pretended_gpu` with what a plan may overlook made an error.

    with absent_gpu(90) as gpu:                     # compute capability 9.0
        losses = method.training_step(batch, scalars)
        losses.total.backward()
    gpu.launches, gpu.operations, gpu.peak, gpu.bytes, gpu.flops

    StrictStep(run, inputs_of(run), GPUS["h100"]).taken(8)   # the whole micro-batch of a recipe

What would fail or wait on the GPU raises: tensors on two devices or of two dtypes, a kernel given a tensor of the CPU, a grid or an
integer too large for a launch, and everything by which the host would wait for numbers (item, tolist, nonzero, a tensor as a
condition, masks as indices, lengths of ragged sequences), which a meta tensor does not have.
"""

import importlib
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import triton
from torch.utils._pytree import tree_leaves

from armillary.engine.plan.counting import Counting
from armillary.engine.plan.dry_step import DryStep
from armillary.engine.plan.pretended_gpu import pretended_gpu
from armillary.kernels.tokens import attention

__all__ = ["Gpu", "Launch", "StrictStep", "absent_gpu", "compile_jobs"]

MAX_INT = 2**31 - 1
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution"}
"""Operations whose factors must have one dtype, which the meta device does not look at."""
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}  # fmt: skip
plain_bool, plain_grouped = torch.Tensor.__bool__, attention._grouped


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


class Gpu(Counting):
    """Counts what a GPU would have been given, and refuses what it would.

    Attributes:
        launches: Triton's.
        uploads: Places in the code where the host copied numbers to the device and waited for it to take them.
    """

    def __init__(self):
        super().__init__()
        self.launches = []
        self.uploads = []

    @property
    def operations(self):
        """All operations that the host hands over, by name; views are none."""
        return self._by_name(lambda work: 1)

    @property
    def bytes(self):
        """Bytes that they read and write, by name."""
        return self._by_name(lambda work: work.bytes)

    @property
    def flops(self):
        """Of all products."""
        return sum(work.flops * times for work, times in self.work.items())

    def _by_name(self, amount):
        found = Counter()
        for work, times in self.work.items():
            found[work.name] += amount(work) * times
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = func._schema.name.partition("::")[2]
        on_cpu = [x for x in given if x.device.type == "cpu" and x.dim()]
        if on_cpu and len(on_cpu) < len(given) and name not in ("copy_", "_to_copy"):
            raise ValueError(f"{name}: takes a tensor of the CPU beside those of the GPU")
        if (
            on_cpu
            and name in ("copy_", "_to_copy")
            and not (kwargs.get("non_blocking") or (args[2:] and args[2] is True))
        ):
            self.uploaded(kwargs.get("device") or args[0].device)
        if name in PRODUCTS and len({x.dtype for x in given}) > 1:
            raise ValueError(f"{name}: takes factors of several dtypes, {[x.dtype for x in given]}")
        if name == "_scaled_mm" and not _takes(*args[:2]):
            raise ValueError("_scaled_mm: rows of both factors must lie along the sum, and be multiples of 16 long")
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]) and args[0].is_meta:
            raise ValueError("index: the host waits for the number of places in a mask")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def uploaded(self, device):
        """Note a copy from the host, if it goes to the GPU."""
        if torch.device(device).type == "meta":
            ours = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.uploads.append(f"{ours[-1].filename}:{ours[-1].lineno}")

    def launched(self, launch):
        """Check a launch, and note it."""
        fn, given, grid = launch.kernel.fn, launch.given, launch.grid
        name = f"{fn.__module__}:{fn.__name__}"
        if missing := set(launch.kernel.arg_names) - set(given):
            raise TypeError(f"{name}: is not given {sorted(missing)}")
        if not all(0 < n <= (MAX_INT if axis == 0 else 65535) for axis, n in enumerate(grid)):
            raise ValueError(f"{name}: cannot be launched with the grid {grid}")
        if wide := {k: x for k, x in given.items() if isinstance(x, int) and abs(x) > MAX_INT}:
            raise ValueError(f"{name}: is given integers that do not fit 32 bits: {wide}")
        types = {k: f"*{TYPES[x.dtype]}" for k, x in given.items() if isinstance(x, torch.Tensor)}
        self.launches.append(Launch(name, grid, {**given, **types}, dict(launch.options)))


def _takes(a, b):
    """Whether a GPU multiplies these 8-bit floats."""
    lies = a.stride() == (a.shape[1], 1) and b.stride() == (1, b.shape[0])
    return lies and a.shape[1] % 16 == 0 == b.shape[1] % 16


def _noting(gpu, make):
    """`torch.tensor` or `as_tensor`, which copies numbers to the device and waits."""

    def call(data, *args, **kwargs):
        made = make(data, *args, **kwargs)
        if not isinstance(data, torch.Tensor):
            gpu.uploaded(made.device)
        return made

    return call


@contextmanager
def absent_gpu(sm=90, multiprocessors=132):
    """Let meta tensors pass for those of a GPU of this compute capability (90: 9.0); gives a `Gpu`."""
    gpu = Gpu()
    with (
        pretended_gpu(gpu, sm, multiprocessors, gpu.launched),
        patch.object(torch.Tensor, "__bool__", plain_bool),
        patch.object(torch, "tensor", _noting(gpu, torch.tensor)),
        patch.object(torch, "as_tensor", _noting(gpu, torch.as_tensor)),
        patch.object(attention, "_grouped", plain_grouped),
    ):
        yield gpu


class StrictStep(DryStep):
    """A run's micro-batch, forward and backward, on a GPU that is not there.

    Attributes:
        seen: The `Gpu` of the last one.
    """

    @contextmanager
    def counting(self):
        with absent_gpu(self.gpu.capability, self.gpu.multiprocessors) as self.seen:
            yield self.seen

    def taken(self, samples, gpu=None):
        """The `Gpu` that took a micro-batch of so many samples; another one than before where it is named."""
        self.gpu = gpu or self.gpu
        self._count(samples)
        return self.seen


def compile_jobs(launches):
    """Arguments and options of `aot.resources` for launches that differ in their code, without the architectures."""
    jobs = {}
    for one in launches:
        module, name = one.kernel.split(":")
        kernel = triton.JITFunction(getattr(importlib.import_module(module), name).fn)
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        signature, constants, divisible = {}, {}, []
        for argument, value in one.arguments.items():
            if argument in fixed or value is None or (value == 1 and not isinstance(value, bool)):
                constants[argument] = value
            elif isinstance(value, int):
                signature[argument] = "i32"
                divisible += [argument] if value % 16 == 0 else []
            else:
                signature[argument] = value if isinstance(value, str) else "fp32"
        job = (one.kernel, signature, constants), {"divisible": tuple(divisible), **one.options}
        jobs[repr(job)] = job
    return list(jobs.values())
