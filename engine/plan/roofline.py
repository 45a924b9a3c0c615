"""Step time by roofline: each operation takes as long as its FLOPs or its bytes, whichever is longer, at rates that are reached."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from armillary.engine.plan.counting import Work
from armillary.engine.plan.gpus import Gpu

__all__ = ["Rates", "device_seconds", "optimizer_bytes"]


@dataclass(frozen=True)
class Rates:
    """What a device reaches.

    Attributes:
        products: FLOP/s of library products by dtype.
        fused: Factor of it that Triton's products with a function in their epilogue reach.
        attention: Factor of it for attention on short sequences, whose tiles are padded.
        memory: Bytes/s.
        launch_seconds: Host time of an operation; a step takes at least that of all its operations.
    """

    products: Mapping[torch.dtype, float]
    fused: float
    attention: float
    memory: float
    launch_seconds: float

    @classmethod
    def of(cls, gpu: Gpu, precision: str) -> Rates:
        """What is assumed of a GPU: an H100's estimated shares of the data sheet's rates, taken for all GPUs."""
        single = 0.63 * gpu.tf32_tflops if precision == "tf32" else 0.82 * gpu.fp32_tflops
        half = 0.63e12 * gpu.bf16_tflops
        products = {torch.bfloat16: half, torch.float16: half, torch.float32: 1e12 * single}
        if gpu.fp8_tflops:
            products |= dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2), 0.63e12 * gpu.fp8_tflops)
        return cls(products, 0.77, 0.56, 0.9e12 * gpu.memory_tbs, 5e-6)

    def lines(self) -> list[str]:
        """The assumptions, one a line."""
        half, single = (self.products[d] / 1e12 for d in (torch.bfloat16, torch.float32))
        eight = self.products.get(torch.float8_e4m3fn, 0.0) / 1e12
        also = f" ({eight:.0f} of 8-bit floats)" if eight else ""
        return [
            f"products reach {half:.0f} TFLOP/s in bf16{also} and {single:.0f} in float32, Triton's fused ones {self.fused:.0%} of it, "
            f"attention {self.attention:.0%}",
            f"memory {self.memory / 1e12:.2f} TB/s; an operation costs the host {1e6 * self.launch_seconds:.0f} us",
        ]

    def seconds(self, work: Work) -> float:
        """Of one piece of work."""
        moving = work.bytes / self.memory
        if not work.flops:
            return moving
        share = {"fused product": self.fused, "attention": self.attention}.get(work.kind, 1.0)
        rate = self.products.get(work.dtype) or min(self.products.values())
        return max(moving, work.flops / (share * rate))


def device_seconds(work: Mapping[Work, int], rates: Rates) -> dict[str, float]:
    """Seconds of a micro-batch by what they go to: kinds of products, everything that only moves bytes, and waiting for the host."""
    by_kind: dict[str, float] = defaultdict(float)
    names = {"product": "products", "fused product": "fused products", "bytes": "norms, copies, elementwise"}
    for w, count in work.items():
        by_kind[names.get(w.kind, w.kind)] += count * rates.seconds(w)
    host = sum(work.values()) * rates.launch_seconds
    found = {name: by_kind[name] for name in (*names.values(), "attention") if name in by_kind}
    if (bubble := host - sum(found.values())) > 0:
        found["waiting for the host"] = bubble
    return found


def optimizer_bytes(
    trained: int, averaged: int, itemsize: int, world: int, passes: int, reduce_once: bool
) -> tuple[float, float]:
    """Bytes that ZeRO's gradient copies and the optimizer of a step move on one rank.

    A gradient goes into the bucket, from there into a float32 copy for the sum over ranks, and is added to the share of this
    rank. AdamW reads weight, two moments and gradient, writes the first three, then the working copy; an average is read and written.

    Args:
        trained: Trained parameters.
        averaged: Those with a teacher.
        itemsize: Bytes of a working weight.
        world: Ranks.
        passes: Micro-batches of a step.
        reduce_once: Gradients are added up in float32, and go into buckets after the last micro-batch alone.
    """
    copies = trained * (2 * itemsize + itemsize + 4 + 4 + 4) + 3 * 4 * trained / world
    step = (trained * (28 + 4) + averaged * (8 + itemsize)) / world + (trained + averaged) * itemsize
    if reduce_once:
        return copies + (passes - 1) * trained * (itemsize + 8), step
    return passes * copies, step
