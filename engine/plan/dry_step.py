"""A training step that nobody takes: the method's own code on the meta device, with shapes and without numbers.

A step for a CPU is run, on few samples, since the choices of its code path depend on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from armillary.engine.config.run import Run
from armillary.engine.plan.counting import Counting, Work
from armillary.engine.plan.inputs import Inputs, example_batch, prepared_batch
from armillary.engine.plan.pretended_gpu import pretended_gpu
from armillary.models.method import Batch, Method

__all__ = ["CHECKPOINTING", "Chip", "DryStep", "StepCount"]

CHECKPOINTING = ("checkpoint_activations", "activation_checkpointing")
"""Fields by which a method's configuration has activations computed again."""


class Chip(Protocol):
    """What the choices of kernels ask of a GPU."""

    @property
    def capability(self) -> int:
        """90 for 9.0."""

    @property
    def multiprocessors(self) -> int:
        """Their number."""


@dataclass(frozen=True)
class StepCount:
    """What a micro-batch does to a device, forward and backward.

    Attributes:
        samples: Of the micro-batch.
        batch: Bytes of the inputs.
        activations: Most bytes at any moment beside inputs, parameters and buffers; a parameter's gradient is among them until it
            is whole.
        work: Every piece of work, and how often it is done.
    """

    samples: int
    batch: int
    activations: int
    work: Mapping[Work, int]

    @property
    def flops(self) -> int:
        """Of all products, 2 a multiply-add."""
        return sum(w.flops * n for w, n in self.work.items())

    @property
    def operations(self) -> int:
        """Operations that the host hands to the device."""
        return sum(self.work.values())


class DryStep:
    """A run's method, and what micro-batches of it would do.

    Args:
        run: The run.
        inputs: What its method is given.
        gpu: Whose code path is taken, without storage; None: a CPU's, on which the step is run.

    Attributes:
        method: Its parameters in the working precision, its buffers as they were built.
    """

    def __init__(self, run: Run, inputs: Inputs, gpu: Chip | None):
        self.run, self.inputs, self.gpu = run, inputs, gpu
        self.device = torch.device("cpu" if gpu is None else "meta")
        self.method = _built(run, inputs, self.device)
        for p in self.method.parameters():
            if run.train.precision == "bf16" and p.is_floating_point():
                p.data = p.data.to(torch.bfloat16)
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_taken)
        self.method.train()
        self._counts: dict[int, StepCount] = {}

    def count(self, samples: int) -> StepCount:
        """One micro-batch.

        Args:
            samples: Its size.
        """
        if samples not in self._counts:
            self._counts[samples] = self._count(samples)
        return self._counts[samples]

    def _count(self, samples: int) -> StepCount:
        prepared = prepared_batch(self.method, example_batch(self.inputs, samples))
        batch = _moved(prepared, self.device)
        with self.counting() as counting:
            if self.run.data.token_cache is not None:
                with torch.no_grad():
                    batch = _cached(self.method, batch)
            given = [x for x in batch.values() if isinstance(x, Tensor)]
            counting.restart(*self.method.parameters(), *self.method.buffers(), *given)
            held = counting.peak
            with counting.during("forward"):
                losses = self.method(batch, self.run.scalars(0))
            with counting.during("backward"):
                losses.total.backward()
            del losses
        return StepCount(samples, sum(x.nbytes for x in given), counting.peak - held, dict(counting.work))

    @contextmanager
    def counting(self) -> Iterator[Counting]:
        """What counts the work done inside: of the GPU, where one was named."""
        gpu, counting = self.gpu, Counting(self.device.type)
        with counting if gpu is None else pretended_gpu(counting, gpu.capability, gpu.multiprocessors):
            yield counting


def _built(run: Run, inputs: Inputs, device: torch.device) -> Method:
    """The method on a device; what does not build without numbers is built on the CPU and loses them then."""
    try:
        with device:
            return run.method.build(inputs.spec).to(device)  # buffers may be elsewhere
    except (NotImplementedError, RuntimeError):
        return run.method.build(inputs.spec).to(device)


def _taken(p: Tensor) -> None:
    """Hook: a whole gradient leaves for ZeRO's bucket."""
    p.grad = None


def _moved(batch: Batch, device: torch.device) -> Batch:
    moved: dict[str, Any] = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items()}
    return Batch(**moved)  # type: ignore[typeddict-item]


def _cached(method: Method, batch: Batch) -> Batch:
    """The batch with cached tokens in place of what they are made of."""
    kept = {k: x for k, x in batch.items() if k not in ("crop", "spectrum", "spectrum_ivar")}
    return Batch(**kept, **method.tokens(batch))  # type: ignore[typeddict-item]
