"""What a run needs of a device's memory, by kind, before it starts.

Counted are weights, gradients and the optimizer's state as ZeRO shares them out, and what the method says of its activations
(`Method.activation_bytes`). Not counted: the libraries' own buffers, fragments, and what a step holds for moments only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from armillary.engine.config.run import Run
from armillary.engine.zero.processes import gpu_of, ranks, ranks_here
from armillary.models.method import Method

__all__ = ["GIB", "Memory", "Sizes", "free_bytes", "itemsize", "memory_of", "zero_kinds"]

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind.

    Attributes:
        kinds: Name and bytes, in the order in which they are told.
        free: Bytes that the device has free for a rank; None where nobody can tell.
    """

    kinds: dict[str, int]
    free: int | None

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.kinds.values())

    def line(self) -> str:
        """All of it in one line."""
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.kinds.items())
        of = "" if self.free is None else f" of {self.free / GIB:.2f} free"
        return f"memory of a rank in GiB: {parts}; together {self.total / GIB:.2f}{of}"

    def problems(self) -> list[str]:
        """The broken rule, where it does not fit."""
        if self.free is None or self.total <= self.free:
            return []
        return [
            f"train.micro_batch: must fit the device's memory; {self.line()}. Take fewer samples at once, recompute "
            "activations, share more out (train.zero_stage 3, more ranks), or train fewer parameters"
        ]


@dataclass(frozen=True)
class Sizes:
    """Parameters of a method.

    Attributes:
        trained: Trained ones.
        averaged: Those of them with a teacher.
        frozen: All others, teachers included.
        checkpoint: Bytes of one checkpoint, all ranks together: fp32 weight, two moments and the average; without what lies in
            files of its own.
    """

    trained: int
    averaged: int
    frozen: int
    checkpoint: int

    @classmethod
    def of(cls, method: Method) -> Sizes:
        """Of a method, which may be on the meta device."""
        students = {id(student) for student, _ in method.teacher_pairs()}
        teachers = {id(teacher) for _, teacher in method.teacher_pairs()}
        base = method.base()
        own = base.names if base is not None else frozenset()
        trained = averaged = frozen = kept = 0
        for name, p in method.named_parameters():
            size = p.numel()
            if p.requires_grad:
                trained += size
                averaged += size * (id(p) in students)
            else:
                frozen += size
                kept += 4 * size * (id(p) not in teachers and name not in own)
        return cls(trained, averaged, frozen, 12 * trained + 4 * averaged + kept)


def itemsize(run: Run) -> int:
    """Bytes of a number in the working precision."""
    return 2 if run.train.precision == "bf16" else 4


def zero_kinds(run: Run, sizes: Sizes, world: int) -> dict[str, int]:
    """Bytes of one rank that ZeRO shares out, by kind."""
    stage, size = run.train.zero_stage, itemsize(run)
    weights_of, gradients_of = world if stage == 3 else 1, world if stage > 1 else 1
    gradients = sizes.trained * (4 if stage > 1 else size) // gradients_of
    if run.train.reduce_once and stage == 2 and run.accumulation(world) > 1:
        gradients += 4 * sizes.trained
    return {
        "frozen weights": sizes.frozen * size // weights_of,
        "trained weights": sizes.trained * size // weights_of,
        "gradients": gradients,
        "optimizer": (12 * sizes.trained + 4 * sizes.averaged) // world,
    }


def memory_of(run: Run, method: Method, world: int, free: int | None) -> Memory | None:
    """What a rank needs; None where the method does not say what its activations take.

    Args:
        run: The run.
        method: Built; its frozen parameters may be on the meta device.
        world: Number of ranks.
        free: Result of `free_bytes`.
    """
    activations, sizes = method.activation_bytes(run.micro_batch, itemsize(run)), Sizes.of(method)
    if activations is None:
        return None
    kinds = zero_kinds(run, sizes, world) | {"activations (estimate)": activations}
    if run.evals and run.train.zero_stage == 3:
        # Whole weights lie where a step's activations were.
        whole = (sizes.trained + sizes.frozen) * itemsize(run)
        kinds["weights gathered for evals, beyond activations"] = max(0, whole - activations)
    return Memory(kinds, free)


def free_bytes(device: str) -> int | None:
    """Memory that this rank may use: of its GPU, or its share of what the machine has available; None if not known.

    Args:
        device: "cuda" or "cpu".
    """
    if device == "cuda":
        return int(torch.cuda.mem_get_info(gpu_of(ranks()))[0]) if torch.cuda.is_available() else None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return kilobytes * 1024 // ranks_here()
