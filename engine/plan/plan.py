"""What a run will need, before it is started: memory, time, energy, network and disk, predicted for a GPU and a number of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from armillary.engine.config.config_json import type_problems
from armillary.engine.config.run import Run
from armillary.engine.plan.collectives import HIDDEN, Collective, Network, collectives, network
from armillary.engine.plan.dry_step import CHECKPOINTING, DryStep, StepCount
from armillary.engine.plan.gpus import Gpu, fp8_problems, gpu_named
from armillary.engine.plan.inputs import Inputs, inputs_of
from armillary.engine.plan.memory import GIB, Memory, Sizes, itemsize, zero_kinds
from armillary.engine.plan.roofline import Rates, device_seconds, optimizer_bytes
from armillary.engine.zero.deepspeed_engine import BUCKET

__all__ = ["RESERVE", "WORLDS", "Need", "Plan", "ScalingRow", "Variant", "largest_micro_batch", "plan_of"]

RESERVE = 0.1
"""Share of a GPU's memory that is left to its context, the libraries and fragments."""

WORLDS = tuple(8 * 2**i for i in range(8))


@dataclass(frozen=True)
class Need:
    """Memory of a rank as a straight line through two counted micro-batches.

    Attributes:
        fixed: Bytes by kind that do not depend on the micro-batch.
        start: Bytes of activations at a micro-batch of none.
        activation: Bytes of activations a sample.
        batch: Bytes of inputs a sample, those made ahead included.
    """

    fixed: dict[str, int]
    start: float
    activation: float
    batch: float

    @classmethod
    def of(cls, run: Run, sizes: Sizes, world: int, counts: tuple[StepCount, StepCount]) -> Need:
        """From two counts, the smaller micro-batch first."""
        small, large = counts
        slope = (large.activations - small.activations) / (large.samples - small.samples)
        ahead = 1 + run.data.prefetch
        bucket = min(BUCKET, max(sizes.trained, 2))
        size = itemsize(run)
        buffers = bucket * size * (2 if world > 1 else 1) + bucket * 4 * (size == 2)
        if run.train.zero_stage == 3:
            buffers += 2 * bucket * size
        fixed = zero_kinds(run, sizes, world) | {"buffers": buffers}
        return cls(fixed, large.activations - slope * large.samples, slope, ahead * large.batch / large.samples)

    def memory(self, samples: int, limit: int | None) -> Memory:
        """Of a micro-batch."""
        activations = max(0, round(self.start + self.activation * samples))
        return Memory(self.fixed | {"activations": activations, "inputs": round(self.batch * samples)}, limit)

    def largest(self, limit: int) -> int:
        """The largest micro-batch that fits; 0 where none does."""
        room = limit - sum(self.fixed.values()) - self.start
        return max(0, int(room / (self.activation + self.batch)))


@dataclass(frozen=True)
class Variant:
    """One way of sharing out memory.

    Attributes:
        name: What it changes.
        memory: At the plan's micro-batch.
        largest: The largest micro-batch that fits.
    """

    name: str
    memory: Memory
    largest: int


@dataclass(frozen=True)
class ScalingRow:
    """Weak scaling to a number of GPUs: the work of each stays, the batch grows.

    Attributes:
        world: GPUs.
        seconds: Of all messages of a step.
        step: Seconds of a step, where messages are hidden behind the backward pass as far as they can be, and where none is.
        one_port: Likewise hidden, with one 400 Gb/s port a node.
    """

    world: int
    seconds: float
    step: tuple[float, float]
    one_port: float


@dataclass(frozen=True)
class Plan:
    """A run on a number of GPUs.

    Attributes:
        run: With the batch that is planned.
        notes: What was changed or assumed, one sentence each.
        gpu: The GPU.
        world: Number of them.
        inputs: What the method is given.
        sizes: Parameters.
        count: A micro-batch.
        flops_per_sample: The method's own count of its model's FLOPs, which MFU refers to.
        variants: What recomputed activations and ZeRO-3 would change; the first one changes nothing.
        images: Samples that the recipe sees in all.
        network: Between ranks; with all ports of a node, and with one.
    """

    run: Run
    notes: tuple[str, ...]
    gpu: Gpu
    world: int
    inputs: Inputs
    sizes: Sizes
    count: StepCount
    flops_per_sample: float
    variants: tuple[Variant, ...]
    images: int
    networks: tuple[Network, Network]

    @property
    def rates(self) -> Rates:
        """What is assumed of the GPU."""
        return Rates.of(self.gpu, self.run.train.precision)

    @property
    def passes(self) -> int:
        """Micro-batches of a step."""
        return self.run.accumulation(self.world)

    @cached_property
    def shares(self) -> dict[str, float]:
        """Seconds of a step by what they go to; messages apart."""
        micro = device_seconds(self.count.work, self.rates)
        size = itemsize(self.run)
        copies, step = optimizer_bytes(
            self.sizes.trained, self.sizes.averaged, size, self.world, self.passes, self.run.train.reduce_once
        )
        moved = {"gradients into ZeRO": copies, "optimizer": step}
        return {k: v * self.passes for k, v in micro.items()} | {k: v / self.rates.memory for k, v in moved.items()}

    @property
    def messages(self) -> list[Collective]:
        """What ranks send each other in a step."""
        train, sizes = self.run.train, self.sizes
        return collectives(
            train.zero_stage, sizes.trained, sizes.averaged, sizes.frozen, itemsize(self.run), self.passes, BUCKET, train.reduce_once
        )  # fmt: skip

    def step_seconds(self, world: int, ports: Network) -> tuple[float, float]:
        """Of a step of as much work a GPU: messages hidden as far as they can be, and not hidden."""
        alone = sum(self.shares.values())
        behind = sum(m.hidden * ports.seconds(m, world) for m in self.messages)
        after = sum((not m.hidden) * ports.seconds(m, world) for m in self.messages)
        return alone + after + max(0.0, behind - HIDDEN * alone), alone + after + behind

    @property
    def rate(self) -> tuple[float, float]:
        """Samples/s of all GPUs: messages not hidden, and hidden."""
        hidden, plain = self.step_seconds(self.world, self.networks[0])
        return self.run.train.global_batch / plain, self.run.train.global_batch / hidden

    @property
    def scaling(self) -> list[ScalingRow]:
        """From one node to 128."""
        rows = []
        for world in WORLDS:
            seconds = sum(self.networks[0].seconds(m, world) for m in self.messages)
            steps = self.step_seconds(world, self.networks[0])
            rows.append(ScalingRow(world, seconds, steps, self.step_seconds(world, self.networks[1])[0]))
        return rows


def plan_of(run: Run, gpu: str, world: int) -> Plan:
    """Predict a run.

    Args:
        run: The run.
        gpu: Name of a GPU.
        world: Number of them.

    Raises:
        ValueError: An argument or the run breaks a rule; one a line.
    """
    card = gpu_named(gpu)
    if world < 1:
        raise ValueError(f"--gpus: must be at least 1, got {world}")
    if found := type_problems(run) or fp8_problems(run, card.capability):
        raise ValueError("\n".join(found))
    inputs = inputs_of(run)
    images = run.train.steps * run.train.global_batch
    notes = list(inputs.assumed)
    limit = round((1 - RESERVE) * card.memory_gib * GIB)
    step = _counted(run, inputs, card, notes)
    sizes = Sizes.of(step.method)
    if run.train.micro_batch == "auto":
        batch = largest_micro_batch(run, step, world, limit)
        run = _with_batch(run, batch)
        notes.append(f"train.micro_batch: auto is {batch} here")
    run = _divided(run, world, notes)
    passes = run.accumulation(world)
    if run.train.zero_stage == 2 and world > 1 and passes > 1 and not run.train.reduce_once:
        notes.append(
            f"gradients are sent {passes} times a step; --train.reduce-once sends them once, for {4 * sizes.trained / GIB:.2f} GiB more "
            "a GPU"
        )
    variants, dry = [], step
    for name, other in _variants(run):
        if other.method != dry.run.method:
            dry = DryStep(other, inputs, step.gpu)
        need = _need(other, dry, sizes, world)
        variants.append(Variant(name, need.memory(run.micro_batch, limit), need.largest(limit)))
    return Plan(
        run, tuple(notes), card, world, inputs, sizes, step.count(run.micro_batch), step.method.flops_per_sample(),
        tuple(variants), images, (network(card), network(card, "one")),
    )  # fmt: skip


def _counted(run: Run, inputs: Inputs, card: Gpu, notes: list[str]) -> DryStep:
    """The step on tensors that pass for the GPU's; on the CPU where the method asks its device for numbers.

    Raises:
        ValueError: It cannot be run there either.
    """
    samples = 4 if run.train.micro_batch == "auto" else max(1, run.micro_batch // 2)
    try:
        step = DryStep(run, inputs, card)
        step.count(samples)
        return step
    except NotImplementedError:  # a meta tensor has no numbers
        notes.append(
            "the method asks its device for numbers: its step was counted on this CPU, by the plain code path, which keeps more"
        )
    try:
        step = DryStep(run, inputs, None)
        step.count(samples)
        return step
    except NotImplementedError as error:
        raise ValueError(
            f"method: {type(run.method).__name__} cannot be planned: it asks its device for numbers, and its frozen weights are not "
            "here"
        ) from error


def largest_micro_batch(run: Run, step: DryStep, world: int, limit: int) -> int:
    """The largest micro-batch that fits and divides the global batch among the ranks.

    Raises:
        ValueError: The global batch is no multiple of the ranks, or not even one sample fits.
    """
    batch = run.train.global_batch
    if batch % world:
        raise ValueError(
            f"train.global_batch: must be a multiple of the {world} ranks for micro_batch auto, got {batch}"
        )
    need = _need(run, step, Sizes.of(step.method), world, around=8)
    fits = [b for b in range(1, batch // world + 1) if batch // world % b == 0 and b <= need.largest(limit)]
    if not fits:
        raise ValueError(
            "train.micro_batch: no micro-batch fits; " + "; ".join([need.memory(1, limit).line(), "recompute activations, or share "
            "more out (train.zero_stage 3, more ranks)"])
        )  # fmt: skip
    return max(fits)


def _need(run: Run, step: DryStep, sizes: Sizes, world: int, around: int | None = None) -> Need:
    samples = max(2, around or run.micro_batch)
    return Need.of(run, sizes, world, (step.count(samples // 2), step.count(samples)))


def _with_batch(run: Run, micro: int, whole: int | None = None) -> Run:
    return replace(run, train=replace(run.train, micro_batch=micro, global_batch=whole or run.train.global_batch))


def _divided(run: Run, world: int, notes: list[str]) -> Run:
    """The run with a batch that the GPUs can share, and what had to be changed for it."""
    whole, micro = run.train.global_batch, run.micro_batch
    if whole % (world * micro) == 0:
        return run
    if whole % world == 0:
        own = whole // world
        fitting = max(b for b in range(1, own + 1) if own % b == 0 and (b <= micro or b == 1))
        notes.append(
            f"train.micro_batch {micro} on {world} GPUs does not divide the batch of {whole}: planned with {fitting}"
        )
        return _with_batch(run, fitting)
    near = [n for n in range(1, whole + 1) if whole % n == 0]
    below, above = (
        max(n for n in near if n < world) if world > 1 else 1,
        min([n for n in near if n > world], default=whole),
    )
    grown = world * micro
    notes.append(
        f"the recipe's batch of {whole} cannot be shared by {world} GPUs, but by {below} or {above}: planned with "
        f"--train.global-batch {grown} and as many images in all, {-(-run.train.steps * whole // grown)} steps"
    )
    steps = -(-run.train.steps * whole // grown)
    return replace(run, train=replace(run.train, global_batch=grown, steps=steps))


def _variants(run: Run) -> list[tuple[str, Run]]:
    """The run, and what ZeRO-3 and recomputing make of it; those of one method next to each other."""
    kept = [("as it is", run)]
    field = next((name for name in CHECKPOINTING if hasattr(run.method, name)), None)
    if field is not None:
        on = bool(getattr(run.method, field))
        changed: Any = replace(run.method, **{field: not on})  # type: ignore[type-var]
        kept.append(("activations kept" if on else "recomputed", replace(run, method=changed)))
    found = []
    for name, one in kept:
        found.append((name, one))
        if run.train.zero_stage != 3:
            sharded = replace(one, train=replace(one.train, zero_stage=3))
            found.append((f"{name}, ZeRO-3".removeprefix("as it is, "), sharded))
    return found
