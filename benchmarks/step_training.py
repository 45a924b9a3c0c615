"""One rank's training step, taken apart by the clock: forward by hooks on the method's modules, then what follows it.

bf16 means what DeepSpeed does: parameters, activations and gradients in bf16, and for each group of parameters one flat
fp32 tensor of weights, moments and averaged teacher. No ZeRO and no loader: this is the arithmetic of one rank.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from common import summary
from torch import Tensor, nn

from armillary.engine.zero.optim import AdamW, build_groups
from armillary.models.method import Batch, BatchKey, InputSpec, Method, MethodConfig

__all__ = ["Clock", "Subject", "Training", "phase_columns"]

AFTER_FORWARD = ("backward", "clip", "optimizer", "copy")


class Clock:
    """Times phases. On a GPU the marks are events in its stream, so that reading them costs the step nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a step."""
        self.marks = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """End a phase now."""
        if self.device.type != "cuda":
            self.marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((phase, event))

    def around(self, module: nn.Module, before: str, inside: str) -> None:
        """What came before a call of this module belongs to one phase, the call to another."""
        module.register_forward_pre_hook(lambda *_: self.mark(before))
        module.register_forward_hook(lambda *_: self.mark(inside))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the start; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = defaultdict(float)
        for (_, before), (phase, now) in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(before, float):
                found[phase] += now - before
            else:
                found[phase] += before.elapsed_time(now) / 1e3
        return dict(found)


class Subject(ABC):
    """A method to be timed, with its inputs.

    Attributes:
        config: The method.
        inputs: What it is built for.
        unit: What a sample is called.
        scalars: Values of its schedules.
        ahead: Phase of what comes before forward.
        forward: Phases of forward; the last one ends with it.
    """

    unit: ClassVar[str]
    scalars: ClassVar[dict[str, float]] = {"learning_rate": 1e-4, "weight_decay": 0.04}
    ahead: ClassVar[str]
    forward: ClassVar[tuple[str, ...]]

    def __init__(self, config: MethodConfig, inputs: InputSpec) -> None:
        self.config, self.inputs = config, inputs

    @property
    def phases(self) -> tuple[str, ...]:
        """All phases of a step, in order."""
        return (self.ahead, *self.forward, *AFTER_FORWARD)

    @abstractmethod
    def watch(self, method: Any, clock: Clock) -> None:
        """Let modules of the method mark the phases of forward."""

    @abstractmethod
    def batch(self, index: int, size: int) -> Batch:
        """Random inputs on the CPU, the same for the same index."""

    def settle(self, method: Any, device: torch.device, size: int) -> None:  # noqa: B027
        """Make ready what is not timed, for batches of this size."""

    def prepared(self, method: Method, batch: Batch, index: int, device: torch.device) -> Batch:
        """The batch as a loader hands it to the step."""
        size = len(batch["position"])
        made = method.prepare(batch, BatchKey(seed=index, epoch=0, first_position=0, global_batch=size))
        return Batch(**{name: x.to(device) for name, x in made.items()})  # type: ignore[typeddict-item, attr-defined]


class _Flat:
    """Weights of a group of parameters as ZeRO keeps them on one rank: one float32 tensor, with views of its parts."""

    def __init__(self, params: Sequence[Tensor], teachers: Sequence[Tensor] | None) -> None:
        self.params, self.teachers = params, teachers
        self.weight = nn.Parameter(torch.cat([p.detach().flatten() for p in params]).float())
        self.weight.grad = torch.empty_like(self.weight)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Parts of a flat tensor in the parameters' shapes."""
        parts = flat.detach().split([p.numel() for p in self.params])
        return [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]

    def gather(self) -> None:
        """Take the parameters' gradients."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        assert self.weight.grad is not None
        torch._foreach_copy_(self.views(self.weight.grad), grads)

    def scatter(self, average: Tensor | None) -> None:
        """Hand the new weights to the parameters, and the average to the teacher's."""
        torch._foreach_copy_(self.params, self.views(self.weight))
        if self.teachers is not None and average is not None:
            torch._foreach_copy_(self.teachers, self.views(average))


class Training:
    """Method, optimizer with fp32 weights and averaged teacher of one rank.

    Args:
        subject: The method.
        precision: "fp32" or "bf16".
        device: Where.
        batch: Samples of a micro-batch.
    """

    def __init__(self, subject: Subject, precision: str, device: torch.device, batch: int) -> None:
        self.subject, self.device, self.batch = subject, device, batch
        with device:
            self.method: Any = subject.config.build(subject.inputs).to(device)
        groups = build_groups(self.method)
        self.pairs = self.method.teacher_pairs()
        self.flat: list[_Flat] = []
        if precision == "bf16":
            teacher_of = {id(s): t for s, t in self.pairs}
            for group in groups:
                teachers = [teacher_of[id(p)] for p in group["params"]] if group["average"] else None
                self.flat.append(_Flat(group["params"], teachers))
                group["params"] = [self.flat[-1].weight]
            self.method.bfloat16()
        self.optimizer = AdamW(groups, clip_norm=3.0, impl=getattr(subject.config, "impl", "auto"))
        self.steps = 0
        self.loss = math.nan  # of the last step
        self.clock = Clock(device)
        subject.watch(self.method, self.clock)
        subject.settle(self.method, device, batch)

    def prepared(self, index: int) -> Batch:
        """A batch of random inputs with what the method adds to it."""
        return self.subject.prepared(self.method, self.subject.batch(index, self.batch), index, self.device)

    def step(self, batch: Batch | None = None) -> dict[str, float]:
        """One step; seconds of each phase.

        Args:
            batch: From `prepared`; if absent a new one, whose preparation is a phase of the step.
        """
        inputs = self.subject.batch(self.steps, self.batch) if batch is None else batch
        clock = self.clock
        clock.start()
        if batch is None:
            inputs = self.subject.prepared(self.method, inputs, self.steps, self.device)
            clock.mark(self.subject.ahead)
        losses = self.method(inputs, self.subject.scalars)
        clock.mark(self.subject.forward[-1])
        losses.total.backward()
        clock.mark("backward")
        for flat in self.flat:
            flat.gather()
        finite = self.optimizer.clip_local()
        clock.mark("clip")
        self.optimizer.set_step(self.steps, self.subject.scalars)
        self.optimizer.step()
        clock.mark("optimizer")
        with torch.no_grad():
            for flat in self.flat:
                flat.scatter(self.optimizer.state[flat.weight].get("ema"))
        if not self.flat:
            self.optimizer.refresh(self.pairs)
        clock.mark("copy")
        for p in self.method.parameters():
            p.grad = None
        self.loss = losses.total.item()
        if not finite or not math.isfinite(self.loss):
            raise FloatingPointError(f"step {self.steps}: the loss is {self.loss}, finite gradients: {finite}")
        self.steps += 1
        return clock.seconds()


def phase_columns(steps: Sequence[dict[str, float]], batch: int, subject: Subject) -> dict[str, float]:
    """Milliseconds a sample of the whole step, with percentiles, and of each phase: medians over steps."""
    total = summary([1e3 * sum(s.values()) / batch for s in steps])
    name = f"ms_per_{subject.unit}"
    row = {name: total.median, f"{name}_p20": total.p20, f"{name}_p80": total.p80}
    return row | {
        f"{phase}_ms": summary([1e3 * s.get(phase, 0.0) / batch for s in steps]).median for phase in subject.phases
    }
