"""How long a CPU takes for counted work: a rate a class of operations, each measured, and what an operation costs by itself.

A core computes and moves in turns, so that the time of a product is that of its FLOPs and of its bytes, not the longer of both as
on a GPU. Functions (exp, erf and what is made of them, norms) run at a rate of their own, far below a copy's; so do convolutions,
pooling, which compares every number of a window, and batch normalisation, which reads its input several times. An operation costs
dispatch, autograd and the Python around it, whatever its size; a convolution many times that, since its library brings tensors into
layouts of its own and back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.engine.plan.counting import Counting, Work
from armillary.engine.train.telemetry import measure_gemm

__all__ = ["CpuRates", "best"]

FUNCTIONS = (
    "gelu",
    "softmax",
    "norm",
    "exp",
    "log",
    "erf",
    "tanh",
    "sigmoid",
    "silu",
    "sin",
    "cos",
    "pow",
    "softplus",
)
"""Parts of the names of operations that do more with a number than a copy."""


def best(call: Callable[[], object], repeats: int = 5) -> float:
    """Processor seconds of the fastest of some calls, which others on the machine hardly lengthen."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


SIZES = (2**14, 2**17, 2**20, 2**23)
KEPT = 2**28
"""Bytes of a tensor that a rate is measured on, and of all that are kept meanwhile."""


@dataclass(frozen=True)
class CpuRates:
    """What this CPU reaches.

    Attributes:
        products: FLOP/s of matrix products.
        convolutions: FLOP/s of convolutions, beside what each costs by itself.
        attention: FLOP/s of attention in one operation.
        memory: Bytes/s of copies and sums, by the sizes of tensors.
        functions: Bytes/s of functions, likewise.
        pooling: Bytes/s of max-pooling.
        batch_norm: Bytes/s of batch normalisation.
        operation: Seconds of an operation on nothing, forward or backward.
        convolution: Seconds of a convolution of almost nothing, forward or backward.
    """

    products: float
    convolutions: float
    attention: float
    memory: tuple[float, ...]
    functions: tuple[float, ...]
    pooling: float
    batch_norm: float
    operation: float
    convolution: float

    @classmethod
    def measured(cls) -> CpuRates:
        """Measure all, in some seconds."""
        memory, functions = _rates(torch.clone), _rates(F.gelu)
        products = measure_gemm(torch.device("cpu"), torch.float32)
        operation = _operation()
        small = _Probe.of(_small_convolutions(), "convolution", operation)
        convolution = (small.seconds - small.moving(memory)) / small.times
        large = _Probe.of(_convolutions(), "convolution", operation)
        convolutions = large.flops / (large.seconds - large.moving(memory) - large.times * convolution)
        attention = _Probe.of(_attention(), "attention", operation)
        pool, norm = _Probe.of(_pooling(), "pool", operation), _Probe.of(_batch_norm(), "batch_norm", operation)
        return cls(
            products,
            convolutions,
            attention.flops / (attention.seconds - attention.moving(memory)),
            memory,
            functions,
            pool.bytes / (pool.seconds - pool.times * operation),
            norm.bytes / (norm.seconds - norm.times * operation),
            operation,
            convolution,
        )

    def lines(self) -> str:
        """The rates in one line."""
        return (
            f"products {self.products / 1e9:.0f} GFLOP/s, convolutions {self.convolutions / 1e9:.0f}, attention "
            f"{self.attention / 1e9:.0f}; copies "
            f"{_listed(self.memory)} GB/s for tensors of 16 KiB to 8 MiB, functions {_listed(self.functions)}, pooling "
            f"{self.pooling / 1e9:.1f}, batch normalisation {self.batch_norm / 1e9:.1f}; an operation {1e6 * self.operation:.1f} us, a convolution {1e6 * self.convolution:.0f}"
        )

    def seconds(self, work: Work) -> float:
        """Of one piece of work."""
        slow = not work.flops and any(part in work.name for part in FUNCTIONS)
        rate = self.attention if work.kind == "attention" else self.products
        itself = self.operation
        if "convolution" in work.name:
            rate, itself = self.convolutions, self.convolution
        for name, own in (("pool", self.pooling), ("batch_norm", self.batch_norm)):
            if name in work.name:
                return itself + work.bytes / own
        moving = work.bytes / _at(self.functions if slow else self.memory, work.bytes)
        return itself + moving + work.flops / rate

    def of(self, work: Mapping[Work, int]) -> float:
        """Of all work together."""
        return sum(times * self.seconds(one) for one, times in work.items())


def _rates(call: Callable[[Tensor], Tensor]) -> tuple[float, ...]:
    """Bytes/s of an operation on tensors of each size, whose outputs stay as activations do: pages that are new take much of the time."""
    found = []
    for size in SIZES:
        x, kept = torch.randn(size // 4), KEPT // size
        found.append(2 * x.nbytes * kept / best(lambda x=x, kept=kept: [call(x) for _ in range(kept)], 3))
    return tuple(found)


def _at(rates: tuple[float, ...], moved: int) -> float:
    """The rate of the size that is nearest to one of two tensors, in ratio."""
    return rates[min(range(len(SIZES)), key=lambda i: abs(math.log(max(moved, 1) / 2 / SIZES[i])))]


def _listed(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{rate / 1e9:.1f}" for rate in rates)


@dataclass(frozen=True)
class _Probe:
    """Some operations of one kind, forward and backward.

    Attributes:
        work: They, as counted.
        seconds: What they took.
    """

    work: Mapping[Work, int]
    seconds: float

    @classmethod
    def of(cls, forward: Callable[[], Tensor], name: str, operation: float) -> _Probe:
        """Those with a name among what is done; the others, which are small, cost what an operation costs by itself."""
        counting = Counting("cpu")
        with counting:
            forward().backward()
        work = {w: n for w, n in counting.work.items() if name in w.name}
        others = sum(counting.work.values()) - sum(work.values())
        return cls(work, best(lambda: forward().backward(), 20) - others * operation)

    @property
    def times(self) -> int:
        return sum(self.work.values())

    @property
    def flops(self) -> int:
        return sum(w.flops * n for w, n in self.work.items())

    @property
    def bytes(self) -> int:
        return sum(w.bytes * n for w, n in self.work.items())

    def moving(self, memory: tuple[float, ...]) -> float:
        """Seconds for what they move."""
        return sum(n * w.bytes / _at(memory, w.bytes) for w, n in self.work.items())


def _small_convolutions() -> Callable[[], Tensor]:
    """Convolutions with hardly a FLOP, as the shortcuts of a residual network are."""
    layers, x = nn.Sequential(*(nn.Conv2d(16, 16, 1, bias=False) for _ in range(8))), torch.randn(32, 16, 4, 4)
    return lambda: layers(x.requires_grad_()).sum()


def _convolutions() -> Callable[[], Tensor]:
    """The first, an early and a late convolution of a small residual network."""
    shapes = ((3, 16, 7, 2, 48), (16, 16, 3, 1, 12), (128, 128, 3, 1, 2))  # channels in and out, kernel, stride, side
    layers = [nn.Conv2d(a, b, k, stride, k // 2, bias=False) for a, b, k, stride, _ in shapes]
    inputs = [torch.randn(32, a, side, side, requires_grad=a > 3) for a, *_, side in shapes]  # an image has no gradient
    return lambda: torch.stack([layer(x).sum() for layer, x in zip(layers, inputs, strict=True)]).sum()


def _attention() -> Callable[[], Tensor]:
    """Attention of short sequences with heads of 16 numbers, where softmax takes as long as the products."""
    q = torch.randn(16, 4, 36, 16, requires_grad=True)
    return lambda: F.scaled_dot_product_attention(q, q, q).sum()


def _pooling() -> Callable[[], Tensor]:
    """A residual network's only pooling."""
    x = torch.randn(32, 16, 24, 24, requires_grad=True)
    return lambda: F.max_pool2d(x, 3, 2, 1).sum()


def _batch_norm() -> Callable[[], Tensor]:
    """One of the same network."""
    layer, x = nn.BatchNorm2d(16), torch.randn(32, 16, 12, 12, requires_grad=True)
    return lambda: layer(x).sum()


def _operation() -> float:
    """Seconds an operation of a chain of small layers, as methods are made of."""
    layers = nn.Sequential(*(m for _ in range(20) for m in (nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())))
    x, counting = torch.randn(2, 4), Counting("cpu")

    def step() -> None:
        (layers(x) + x).sum().backward()

    with counting:
        step()
    return best(step, 20) / sum(counting.work.values())
