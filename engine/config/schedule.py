"""Schedules: numbers as functions of the training step.

A schedule warms up linearly (both end points included, as `numpy.linspace`) from `warmup_start` to its first value over
`warmup_steps` steps, then holds, or goes on a line or half a cosine towards `end` over the remaining ones. These are the
curves of DINOv2's `CosineScheduler`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, fields, replace

__all__ = ["Constant", "Cosine", "Linear", "Schedule", "Schedules", "WarmRestarts"]


@dataclass(frozen=True)
class _Warmup(ABC):
    """A linear warm-up to a first value, and what follows.

    Attributes:
        start: Value after the warm-up; None in `schedule.learning_rate`, whose peak is `optim.lr`.
        warmup_steps: Steps of linear warm-up.
        warmup_start: Value at step 0 of the warm-up.
    """

    start: float | None = None
    _: KW_ONLY
    warmup_steps: int = 0
    warmup_start: float = 0.0

    def at(self, step: int, total_steps: int) -> float:
        """Value at a step (0 is the first) of `total_steps`."""
        peak, warmup = self.start, self.warmup_steps
        if peak is None:
            raise ValueError("schedule.start: must be a number, as only learning_rate may leave it out, got None")
        if step >= warmup:
            return self._after(peak, step - warmup, total_steps - warmup)
        if warmup == 1:
            return self.warmup_start
        return self.warmup_start + (peak - self.warmup_start) * step / (warmup - 1)

    @abstractmethod
    def _after(self, peak: float, step: int, steps: int) -> float:
        """Value at a step of the `steps` after the warm-up."""


@dataclass(frozen=True)
class Constant(_Warmup):
    """A value that stays."""

    def _after(self, peak: float, step: int, steps: int) -> float:
        return peak


@dataclass(frozen=True)
class Linear(_Warmup):
    """A line from `start`, after the warm-up, to `end` at the last step, which it reaches.

    Attributes:
        end: Value at the last step.
    """

    end: float = 0.0

    def _after(self, peak: float, step: int, steps: int) -> float:
        return peak + (self.end - peak) * (min(step / (steps - 1), 1.0) if steps > 1 else 0.0)


@dataclass(frozen=True)
class Cosine(_Warmup):
    """Half a cosine from `start`, after the warm-up, towards `end`, which it would reach one step after the last.

    Attributes:
        end: Value at `total_steps`.
    """

    end: float = 0.0

    def _after(self, peak: float, step: int, steps: int) -> float:
        if step >= steps:
            return self.end
        return self.end + 0.5 * (peak - self.end) * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class WarmRestarts(_Warmup):
    """Half cosines from `start` towards `end`, one after the other, each longer than the one before.

    Unlike the others it warms up as PyTorch's LinearLR does, to reach `start` one value after the warm-up. The cosines are
    those of CosineAnnealingWarmRestarts (Loshchilov and Hutter, arXiv:1608.03983).

    Attributes:
        end: Value that a cosine would reach one value after its last.
        period_steps: Steps of the first cosine.
        growth: Length of a cosine over that of the one before.
        hold_steps: Steps for which a value holds: those of an epoch, where it changes once an epoch.
    """

    end: float = 0.0
    period_steps: int = 1000
    growth: int = 2
    hold_steps: int = 1

    def at(self, step: int, total_steps: int) -> float:
        """Value at a step (0 is the first) of `total_steps`."""
        step -= step % self.hold_steps
        if self.start is not None and step < self.warmup_steps:
            return self.warmup_start + (self.start - self.warmup_start) * step / self.warmup_steps
        return super().at(step, total_steps)

    def _after(self, peak: float, step: int, steps: int) -> float:
        period = self.period_steps
        while step >= period:
            step, period = step - period, period * self.growth
        return self.end + 0.5 * (peak - self.end) * (1 + math.cos(math.pi * step / period))


Schedule = Constant | Linear | Cosine | WarmRestarts


@dataclass(frozen=True)
class Schedules:
    """The scheduled numbers of a run, by name; methods and the optimizer read them every step.

    Attributes:
        learning_rate: Its start is left out: the peak is `optim.lr`, scaled to the batch.
        weight_decay: Decoupled weight decay.
        ema_momentum: Momentum of the teacher; needed where the method has one.
        teacher_temperature: Softmax temperature of the teacher; needed where the method asks for it.
    """

    learning_rate: Schedule = Cosine()
    weight_decay: Schedule = Constant(0.04)
    ema_momentum: Schedule | None = None
    teacher_temperature: Schedule | None = None

    def at(self, step: int, total_steps: int, peak_lr: float) -> dict[str, float]:
        """Value of every schedule that is set, by name.

        Args:
            step: 0 is the first step.
            total_steps: Steps of the run.
            peak_lr: Learning rate after the warm-up.
        """
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        named["learning_rate"] = replace(self.learning_rate, start=peak_lr)
        return {name: schedule.at(step, total_steps) for name, schedule in named.items() if schedule is not None}

    def problems(self) -> list[str]:
        """Broken rules as `field: rule, got value`, without the name of the section."""
        found: list[str] = []
        for field in fields(self):
            schedule: Schedule | None = getattr(self, field.name)
            if schedule is None:
                continue
            name = field.name
            if name == "learning_rate" and schedule.start is not None:
                found.append(f"{name}.start: must be None, because its peak is optim.lr, got {schedule.start!r}")
            if name != "learning_rate" and schedule.start is None:
                found.append(f"{name}.start: must be a number, got None")
            if schedule.warmup_steps < 0:
                found.append(f"{name}.warmup_steps: must be at least 0, got {schedule.warmup_steps}")
            found += [
                f"{name}.{key}: must be at least 1, got {getattr(schedule, key)}"
                for key in ("period_steps", "growth", "hold_steps")
                if getattr(schedule, key, 1) < 1
            ]
            for key in ("start", "end", "warmup_start"):
                value = getattr(schedule, key, None)
                if value is None or (key == "warmup_start" and schedule.warmup_steps == 0):
                    continue
                if not math.isfinite(value) or value < 0:
                    found.append(f"{name}.{key}: must be a finite number >= 0, got {value!r}")
                elif name == "ema_momentum" and value > 1:
                    found.append(f"{name}.{key}: must be in [0, 1], got {value!r}")
                elif name == "teacher_temperature" and value == 0:
                    found.append(f"{name}.{key}: must be positive, got {value!r}")
        return found
