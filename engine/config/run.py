"""Run: the typed record of a training run that a recipe fills."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from armillary.engine.atomic_file import write_json
from armillary.engine.config.config_json import from_json, to_json
from armillary.engine.config.evals import KNN
from armillary.engine.config.schedule import Schedules
from armillary.engine.data.views.eval_view import EvalView
from armillary.kernels.launch import Impl
from armillary.models.method import Batch, BatchKey, InputSpec, MethodConfig

__all__ = [
    "Checkpointing",
    "Data",
    "Optim",
    "Profile",
    "Run",
    "Telemetry",
    "Training",
    "Views",
]


class Views(Protocol):
    """What a recipe's `views` offers: a frozen dataclass that turns samples into model inputs."""

    def problems(self, survey: Any) -> list[str]:
        """Broken rules for this survey, as `field: rule, got value`."""

    def input_spec(self, survey: Any) -> InputSpec:
        """What the views hand to the method."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the loader has to read, of "image", "spectrum" and "vectors"."""

    def build(self, survey: Any, device: torch.device) -> Callable[[Batch, BatchKey], Batch]:
        """The function that adds model inputs to a batch."""

    def eval_view(self, survey: Any, device: torch.device) -> EvalView:
        """What makes the inputs of the frozen encoder."""


@dataclass(frozen=True)
class Data:
    """Where samples come from.

    Attributes:
        path: Folder of a packed survey (made by `armillary data`).
        split: Split to train on.
        reader: Which library reads the shards; "auto" takes DALI where it works.
        on_corrupt: What a corrupt sample does: end the run, or be replaced.
        threads: CPU threads a rank for decoding and augmentation.
        prefetch: Micro-batches made ahead.
        token_cache: Folder of cached token features of frozen encoders: filled by the first run, read by later ones. None:
            the encoders run in every step.
        token_cache_dtype: How they are stored; float16 takes half the space and rounds to 2^-11 of a value.
    """

    path: Path
    split: str = "train"
    reader: Literal["auto", "dali", "webdataset"] = "auto"
    on_corrupt: Literal["error", "skip"] = "error"
    threads: int = 2
    prefetch: int = 2
    token_cache: Path | None = None
    token_cache_dtype: Literal["float16", "float32"] = "float16"


@dataclass(frozen=True)
class Optim:
    """AdamW.

    Attributes:
        lr: Peak learning rate.
        lr_reference_batch: Global batch that `lr` holds for; the peak is lr * sqrt(global_batch / this). None: as is.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        clip_norm: Gradient norm of each clip group is limited to this; None for no limit.
        freeze_last_layer_steps: Steps for which the last layer of a projection head stays as initialised.
        impl: Implementation of the update, see `armillary.kernels.launch`.
    """

    lr: float
    lr_reference_batch: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 3.0
    freeze_last_layer_steps: int = 0
    impl: Impl = "auto"

    def peak_lr(self, global_batch: int) -> float:
        """Learning rate after the warm-up at this batch."""
        return (
            self.lr if self.lr_reference_batch is None else self.lr * math.sqrt(global_batch / self.lr_reference_batch)
        )


@dataclass(frozen=True)
class Training:
    """Length, batch and numerics.

    Attributes:
        steps: Optimizer steps, each on one global batch.
        global_batch: Samples a step, over all ranks and micro-batches.
        micro_batch: Samples a rank computes on at once; global_batch is a multiple of ranks * micro_batch. "auto": the largest
            that fits the device by count (see `armillary.engine.plan`); the run's record has the number, and keeps it.
        precision: "bf16" weights with fp32 masters, "fp32", or "tf32": fp32 whose products a GPU rounds to 10 bits (on an H100
            some six times faster; on a CPU the same as fp32).
        zero_stage: What is sharded over ranks: 1 optimizer state, 2 also gradients, 3 also weights.
        reduce_once: Under ZeRO-2 each rank adds up the gradients of its micro-batches, and ranks sum them once a step, not after each
            micro-batch: that much less traffic, for 4 bytes a trained parameter on each rank. ZeRO-1 always does so.
        compile: Run the method through torch.compile.
        max_bad_steps: Steps in a row with a non-finite loss or gradient, all skipped, after which the run stops.
        timeout_minutes: How long ranks wait for each other at the start and to write, before the run ends; a link that is cut
            is noticed by nothing else.
        step_timeout_minutes: The same in steps, where it is shorter, after the first one, which compiles; after half of it the
            ranks that do not come are named.
    """

    steps: int
    global_batch: int
    micro_batch: int | Literal["auto"]
    precision: Literal["bf16", "fp32", "tf32"] = "bf16"
    zero_stage: Literal[1, 2, 3] = 2
    reduce_once: bool = False
    compile: bool = False
    max_bad_steps: int = 10
    timeout_minutes: float = 30.0
    step_timeout_minutes: float = 10.0


@dataclass(frozen=True)
class Checkpointing:
    """When the run's whole state is written.

    Attributes:
        every_steps: Steps between checkpoints.
        every_minutes: Additionally after so many minutes; None: by steps only.
        keep: Newest checkpoints that stay.
        keep_best: Name of one of the run's `evals`, such as "knn/redshift": the checkpoint with its highest score stays as well,
            and is written when that score is found.
        patience: End the run where so many evaluations for `keep_best` in a row brought no higher score; None: never.
        verify: Before resuming, each rank compares the hash of its own file, not only the sizes of all.
    """

    every_steps: int = 1000
    every_minutes: float | None = None
    keep: int = 2
    keep_best: str | None = None
    patience: int | None = None
    verify: bool = True


@dataclass(frozen=True)
class Telemetry:
    """What is written about the run while it goes.

    Attributes:
        every_steps: Steps between lines on the screen; the files get one entry a step regardless.
        tensorboard: Also write TensorBoard events.
        tracker: Also write to one of these, whose package must be installed, see `engine.train.trackers`.
        project: What the tracker files the run under.
        monitor_steps: Steps between the method's health measures (collapse); None: with every line, on a GPU every 100.
    """

    every_steps: int = 10
    tensorboard: bool = True
    tracker: Literal["wandb", "mlflow", "trackio"] | None = None
    project: str = "armillary"
    monitor_steps: int | None = None


@dataclass(frozen=True)
class Profile:
    """What is traced of the run.

    Attributes:
        steps: "20:26" has rank 0 trace steps 21 to 26, as they are counted in the log, into the run's folder; "" traces nothing.
    """

    steps: str = ""

    @property
    def span(self) -> range:
        """Steps done before each step that is traced.

        Raises:
            ValueError: `steps` is not two whole numbers, the smaller one first.
        """
        if not self.steps:
            return range(0)
        first, _, last = self.steps.partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise ValueError(f'must be two whole numbers like "20:26", the smaller one first, got {self.steps!r}')
        return range(int(first), int(last))


@dataclass(frozen=True)
class Run:
    """A training run, whole. Everything in it can be changed from the command line.

    Attributes:
        name: The run's folder is out/name.
        method: Model and objective.
        views: Crops and augmentation, see `Views`.
        data: Survey.
        optim: Optimizer.
        schedule: Learning rate, weight decay, momentum and temperature over the steps.
        train: Length, batch and numerics.
        checkpoint: Saving.
        telemetry: Logging.
        profile: Tracing.
        evals: What the run evaluates of itself while it trains.
        device: "auto" asks for a GPU and does not fall back to the CPU by itself.
        out: Folder of runs; shared by all machines of the run.
        seed: Of initialisation, data order, augmentation and dropout.
    """

    name: str
    method: MethodConfig
    views: Any  # a `Views`: of a protocol tyro would not look up the fields of the value
    data: Data
    optim: Optim
    schedule: Schedules
    train: Training
    checkpoint: Checkpointing = Checkpointing()
    telemetry: Telemetry = Telemetry()
    profile: Profile = Profile()
    evals: tuple[KNN, ...] = ()
    device: Literal["auto", "cuda", "cpu"] = "auto"
    out: Path = Path("runs")
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.out / self.name

    @property
    def resolved_device(self) -> str:
        """ "cpu" or "cuda"."""
        return "cpu" if self.device == "cpu" else "cuda"

    def accumulation(self, world: int) -> int:
        """Micro-batches a step for this number of ranks."""
        return self.train.global_batch // (self.micro_batch * world)

    @property
    def micro_batch(self) -> int:
        """Samples a rank computes on at once.

        Raises:
            ValueError: Nobody has chosen them yet (`engine.plan.auto`).
        """
        if self.train.micro_batch == "auto":
            raise ValueError("train.micro_batch: must be a number by now, got 'auto'")
        return self.train.micro_batch

    def scalars(self, step: int) -> dict[str, float]:
        """Every schedule's value at a step."""
        return self.schedule.at(step, self.train.steps, self.optim.peak_lr(self.train.global_batch))

    def save(self, path: Path, **extra: Any) -> None:
        """Write the record as JSON, atomically.

        Args:
            path: File to write.
            extra: Facts that go beside the record (commit, command line).
        """
        write_json(path, {"run": to_json(self), **extra})

    @classmethod
    def load(cls, path: Path | str) -> Run:
        """Read a record.

        Args:
            path: run.json, or the folder of a run.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a run's record, or names classes or fields that do not exist (or may not be used).
        """
        path = Path(path)
        path = path / "run.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a run's folder holds run.json once the run has started")
        try:
            record = json.loads(path.read_text())["run"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the record of a run: {error!r}") from error
        return cls.from_record(record, path)

    @classmethod
    def from_record(cls, record: Any, path: Path) -> Run:
        """Rebuild a run from its record as JSON types, which was found at `path`.

        Raises:
            ValueError: As for `load`.
        """
        try:
            run = from_json(record)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the record of a run: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(run, cls):
            raise ValueError(f"{path}: not the record of a run, but of a {type(run).__name__}")
        return run
