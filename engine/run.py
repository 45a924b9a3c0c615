"""Run: the typed record of a training run that a recipe fills, and `main`, which starts it.

A recipe ends in `main(RECIPE, smoke=SMOKE, ...)`. The command line chooses a preset and changes any field:

    deepspeed recipes/dinov2_vitl.py --preset smoke --optim.lr 1e-4

Exit codes: 0 done; 1 crashed; 2 bad input, said before anything starts; 3 stopped because losses or gradients stayed
non-finite; 4 a checkpoint could not be written or read; 75 stopped by SIGTERM or SIGINT after saving (run it again).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from armillary.engine.data.eval_view import EvalView
from armillary.engine.record import PACKAGES, from_json, to_json
from armillary.engine.schedule import Schedules
from armillary.kernels.launch import Impl
from armillary.models.method import Batch, BatchKey, InputSpec, MethodConfig

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_CHECKPOINT",
    "EXIT_NON_FINITE",
    "EXIT_STOPPED",
    "Checkpointing",
    "Data",
    "Optim",
    "Run",
    "Telemetry",
    "Training",
    "Views",
    "main",
    "start",
]

EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_CHECKPOINT = 4
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h


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
        features: Folder of cached token features of frozen encoders: filled by the first run, read by later ones. None:
            the encoders run in every step.
        features_dtype: How they are stored; float16 takes half the space and rounds to 2^-11 of a value.
    """

    path: Path
    split: str = "train"
    reader: Literal["auto", "dali", "webdataset"] = "auto"
    on_corrupt: Literal["error", "skip"] = "error"
    threads: int = 2
    prefetch: int = 2
    features: Path | None = None
    features_dtype: Literal["float16", "float32"] = "float16"


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
        micro_batch: Samples a rank computes on at once; global_batch is a multiple of ranks * micro_batch.
        precision: "bf16" weights with fp32 masters, or "fp32".
        zero_stage: What is sharded over ranks: 1 optimizer state, 2 also gradients, 3 also weights.
        compile: Run the method through torch.compile.
        max_bad_steps: Steps in a row with a non-finite loss or gradient, all skipped, after which the run stops.
    """

    steps: int
    global_batch: int
    micro_batch: int
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[1, 2, 3] = 2
    compile: bool = False
    max_bad_steps: int = 10


@dataclass(frozen=True)
class Checkpointing:
    """When the run's whole state is written.

    Attributes:
        every_steps: Steps between checkpoints.
        every_minutes: Additionally after so many minutes; None: by steps only.
        keep: Newest checkpoints that stay.
        verify: Check every file's hash, not only its size, before resuming.
    """

    every_steps: int = 1000
    every_minutes: float | None = None
    keep: int = 2
    verify: bool = False


@dataclass(frozen=True)
class Telemetry:
    """What is written about the run while it goes.

    Attributes:
        every_steps: Steps between lines on the screen; the files get one entry a step regardless.
        tensorboard: Also write TensorBoard events.
    """

    every_steps: int = 10
    tensorboard: bool = True


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
        return self.train.global_batch // (self.train.micro_batch * world)

    def scalars(self, step: int) -> dict[str, float]:
        """Every schedule's value at a step."""
        return self.schedule.at(step, self.train.steps, self.optim.peak_lr(self.train.global_batch))

    def save(self, path: Path, **extra: Any) -> None:
        """Write the record as JSON, atomically.

        Args:
            path: File to write.
            extra: Facts that go beside the record (commit, command line).
        """
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w") as f:
            json.dump({"run": to_json(self), **extra}, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path | str, packages: Sequence[str] = PACKAGES) -> Run:
        """Read a record.

        Args:
            path: run.json, or the folder of a run.
            packages: Packages whose classes it may name; add your own for a method that is not part of armillary.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a run's record, or names classes or fields that do not exist (or may not be used).
        """
        path = Path(path)
        path = path / "run.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a run's folder holds run.json once the run has started")
        try:
            run = from_json(json.loads(path.read_text())["run"], packages)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not the record of a run: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(run, cls):
            raise ValueError(f"{path}: not the record of a run, but of a {type(run).__name__}")
        return run


def main(recipe: Run, **presets: Run) -> None:
    """Run a recipe from its file; ends the process with an exit code (see the module's description).

    Args:
        recipe: The recipe.
        presets: Variants that `--preset NAME` chooses.
    """
    sys.exit(start(recipe, presets, sys.argv[1:]))


def start(recipe: Run, presets: dict[str, Run], arguments: Sequence[str], open_loader: Any = None) -> int:
    """`main` as a function: parse, check, train.

    Args:
        recipe: The recipe.
        presets: Variants by name.
        arguments: Command line without the program's name.
        open_loader: Replaces `trainer.open_loader`.

    Returns:
        Exit code.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--preset", choices=sorted(presets), default=None)
    own.add_argument("--restore", type=Path, default=None)
    own.add_argument("--init-from", type=Path, default=None)
    own.add_argument("--local_rank", "--local-rank", type=int, default=None)  # put there by launchers, also in RANK
    first = os.environ.get("RANK", "0") == "0"
    try:
        with _Muted(not first):
            chosen, rest = own.parse_known_args(list(arguments))
            run = _override(recipe if chosen.preset is None else presets[chosen.preset], presets, rest)
    except SystemExit as error:
        return _leave(int(error.code or 0), first)
    from armillary.engine.checks import problems

    found = problems(run, int(os.environ.get("WORLD_SIZE", "1")), "smoke" in presets and chosen.preset != "smoke")
    for option in ("restore", "init_from"):
        path = getattr(chosen, option)
        if path is not None and not path.exists():
            found.append(f"--{option.replace('_', '-')}: an existing file, got {path}")
    if found:
        if first:
            print(f"{run.name}: this run cannot start:", *(f"  {p}" for p in found), sep="\n", file=sys.stderr)
        return _leave(EXIT_BAD_INPUT, first)
    from armillary.engine import trainer

    return trainer.run_to_exit_code(run, restore=chosen.restore, init_from=chosen.init_from, open_loader=open_loader)


def _override(base: Run, presets: dict[str, Run], arguments: list[str]) -> Run:
    import tyro

    options = "Besides the fields: "
    if presets:
        options += f"--preset {{{','.join(sorted(presets))}}} chooses a variant of the recipe; "
    options += (
        "--restore PATH continues a portable export; "
        "--init-from FILE starts from the encoder in a safetensors or public DINOv2 file."
    )
    return tyro.cli(
        tyro.conf.AvoidSubcommands[Run], default=base, args=arguments, description=options, prog=Path(sys.argv[0]).name
    )


class _Muted:
    """Nothing is printed inside: every rank parses, one speaks."""

    def __init__(self, mute: bool):
        self.mute = mute

    def __enter__(self) -> None:
        if self.mute:
            self.kept = sys.stdout, sys.stderr
            sys.stdout = sys.stderr = open(os.devnull, "w")

    def __exit__(self, *_: object) -> None:
        if self.mute:
            sys.stdout.close()
            sys.stdout, sys.stderr = self.kept


def _leave(code: int, first: bool) -> int:
    """Let rank 0 speak before the launcher, seeing another rank gone, kills it."""
    if not first and code:
        time.sleep(5)
    return code
