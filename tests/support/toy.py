"""A method, views and a loader small enough to test the engine with: a student with dropout that follows its teacher.

Run as a script under the deepspeed launcher it is a recipe; `FAULT` in the environment makes it fail in chosen ways.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.engine.config.run import Checkpointing, Data, Optim, Run, Telemetry, Training
from armillary.engine.config.schedule import Constant, Cosine, Linear, Schedules
from armillary.engine.data.format.survey import ShardRecord, Statistics, Survey
from armillary.engine.train import telemetry
from armillary.engine.weights import checkpoint
from armillary.models.method import Batch, InputSpec, Losses, Method, MethodConfig, ParameterGroup


@dataclass(frozen=True)
class ToyConfig(MethodConfig):
    """Toy.

    Attributes:
        width: Hidden units.
        dropout: Probability.
        frozen_input: The first layer is not trained.
        center_rate: Weight of the newest micro-batch in this rank's running mean.
    """

    width: int = 24
    dropout: float = 0.1
    frozen_input: bool = False
    center_rate: float = 0.1

    def problems(self, inputs: InputSpec) -> list[str]:
        return [] if self.width > 0 else [f"width: above 0, got {self.width}"]

    def build(self, inputs: InputSpec) -> Method:
        return Toy(self, inputs)


@dataclass
class Features:
    value: Tensor


class Encoder(nn.Module):
    def __init__(self, channels: int, width: int, dropout: float):
        super().__init__()
        self.stem = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 7, bias=False)
        self.gain = nn.Parameter(torch.ones(7))  # its own parameter and a dataclass out: ZeRO-3 must cope with both
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Features:
        return Features(self.gain * self.head(self.dropout(F.gelu(self.norm(self.stem(x))))))


class Toy(Method):
    required_scalars = ("teacher_temperature",)

    def __init__(self, config: ToyConfig, inputs: InputSpec):
        super().__init__()
        self.student = Encoder(inputs.channels, config.width, config.dropout)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.extra = nn.Parameter(torch.full((3,), 0.5))  # trained, without a teacher
        if config.frozen_input:
            self.projection = nn.Linear(inputs.channels, inputs.channels).requires_grad_(False)
        self.frozen_input, self.center_rate = config.frozen_input, config.center_rate
        self.register_buffer("center", torch.zeros(7))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        self.teacher.eval()
        x = batch["image"].flatten(1).to(self.student.stem.weight.dtype)
        if os.environ.get("FAULT", "").startswith("nan"):
            bad = {int(p) for p in os.environ["FAULT"][3:].split(",")}
            if any(int(p) in bad for p in batch["position"]):
                x = x * float("nan")  # poisons the loss, the gradients and the running mean
        if self.frozen_input:
            x = self.projection(x)
        with torch.no_grad():
            t = self.teacher(x).value.float()
            target = ((t - self.center) / scalars["teacher_temperature"]).softmax(-1)
            self.center.lerp_(t.mean(0), self.center_rate)
        cross = -(target * self.student(x).value.float().log_softmax(-1)).sum(-1).mean()
        extra = self.extra.float().square().mean()
        return Losses(cross + extra, {"cross": cross.detach(), "extra": extra.detach()})

    def parameter_groups(self) -> list[ParameterGroup]:
        named = {n: p for n, p in self.named_parameters() if p.requires_grad}
        plain = {n: p for n, p in named.items() if p.ndim > 1 and "head" not in n}
        flat = {n: p for n, p in named.items() if p.ndim == 1 and n != "extra"}
        return [
            ParameterGroup(plain, lr_scale=0.8),
            ParameterGroup(flat, weight_decay_scale=0.0),
            ParameterGroup({n: p for n, p in named.items() if "head" in n}, clip_group="head", freeze=True),
            ParameterGroup({"extra": self.extra}, clip_group="head", weight_decay_scale=0.0),
        ]

    def teacher_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(self.student.parameters(), self.teacher.parameters(), strict=True))

    def flops_per_sample(self) -> float:
        return 1e4

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        return {"features": self.teacher(batch["crop"].flatten(1)).value}

    def monitor(self) -> dict[str, float]:
        return {"center": float(self.center.abs().max())}

    def warnings(self, measures: Mapping[str, float]) -> list[str]:
        return ["the centre runs away"] if measures["center"] > 1e3 else []


@dataclass(frozen=True)
class ToyViews:
    """No views.

    Attributes:
        channels: Numbers a sample.
    """

    channels: int = 10
    modalities = ("image",)

    def problems(self, survey: Any) -> list[str]:
        return [] if self.channels == 10 else [f"channels: 10, got {self.channels}"]

    def input_spec(self, survey: Any) -> InputSpec:
        return InputSpec(channels=self.channels, global_size=1)

    def build(self, survey: Any, device: torch.device):
        return lambda batch, key: batch


class ToyLoader:
    """Global batches that are functions of the position alone; `log` collects a hash of each."""

    def __init__(self, run: Run, rank: int, world: int, device: torch.device):
        self.run, self.rank, self.world, self.device = run, rank, world, device
        self.position = 0
        self.wait_seconds = 0.0

    def __iter__(self):
        micro, world, total = self.run.train.micro_batch, self.world, self.run.train.global_batch
        while True:
            everything = torch.randn(total, 10, 1, 1, generator=torch.Generator().manual_seed(1000 + self.position))
            first = self.position
            for a in range(total // (micro * world)):
                low = (a * world + self.rank) * micro
                if low + micro >= total - (world - 1 - self.rank) * micro:
                    self.position = first + total
                rows = torch.arange(first + low, first + low + micro)
                yield Batch(image=everything[low : low + micro].to(self.device), position=rows)
            time.sleep(float(os.environ.get("STEP_SECONDS", "0")))

    def state_dict(self):
        return {"seed": self.run.seed, "epoch": 0, "position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

    def close(self):
        pass


def open_toy_loader(run, method, survey, device, me):
    return ToyLoader(run, me.rank, me.world, device)


def described_survey(count: int = 1000) -> Survey:
    """A survey of one shard that is nowhere on disk."""
    statistics = Statistics((0.0,), (1.0,), (0.0,), ((1.0,),), count)
    shards = (ShardRecord("train-000000.tar", "train", count, 1, "0" * 64),)
    return Survey("toy", ("r",), 1, 10, None, "count", "float16", (1.0,), (), shards, statistics)


def toy_survey(folder: Path, count: int = 1000) -> Path:
    """survey.json, and a shard of the length that it states: what checks and records need."""
    folder.mkdir(parents=True, exist_ok=True)
    described_survey(count).save(folder)
    (folder / "train-000000.tar").write_bytes(b"x")
    return folder


def toy_run(out: Path, survey: Path, **train: Any) -> Run:
    numbers = {"steps": 8, "global_batch": 8, "micro_batch": 2, "precision": "fp32"} | train
    return Run(
        name="toy",
        method=ToyConfig(),
        views=ToyViews(),
        data=Data(survey),
        optim=Optim(lr=0.02, clip_norm=0.5, freeze_last_layer_steps=2),
        schedule=Schedules(
            learning_rate=Cosine(end=1e-4, warmup_steps=3),
            weight_decay=Cosine(start=0.04, end=0.4),
            ema_momentum=Linear(start=0.8, end=1.0),
            teacher_temperature=Constant(0.07, warmup_steps=4, warmup_start=0.04),
        ),
        train=Training(**numbers),
        checkpoint=Checkpointing(every_steps=4),
        telemetry=Telemetry(every_steps=4, tensorboard=False),
        device="cpu",
        out=out,
        seed=5,
    )


def digest(folder: Path) -> str:
    """Hash of a checkpoint's state: every shard's manifest hash and the counters."""
    manifest = json.loads((folder / "manifest.json").read_text())
    state = json.loads((folder / "state.json").read_text())
    shards = [manifest[k]["sha256"] for k in sorted(manifest) if k.startswith("shard")]
    return hashlib.sha256(repr((shards, state["progress"])).encode()).hexdigest()


def arm_fault() -> None:
    """Make this process fail as `FAULT` says, on rank `FAULT_RANK` only (default 0).

    kill@shard,S kill@state,S kill@latest,S: SIGKILL inside the save of step S, before its shard, its state.json or
    `latest` is written. full@S: no space left in the save of step S. quota@S: none from step S on, for metrics.jsonl neither. crash@P: an exception at position P.
    lost@P: the sample at position P cannot be read.
    nanP,Q,...: NaN for the samples at these positions (on whatever rank has them).
    """
    kind, _, where = os.environ.get("FAULT", "").partition("@")
    if os.environ.get("RANK", "0") != os.environ.get("FAULT_RANK", "0"):
        return
    if kind == "kill":
        stage, step = where.split(",")
        name = f"step-{int(step):08d}"

        def deadly(original, matches):
            def wrapped(path, *args):
                if matches(path, *args):
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(path, *args)

            return wrapped

        in_save = {
            "shard": lambda path, *_: name in str(path),
            "state": lambda path, *_: name in str(path) and path.name == "state.json",
            "latest": lambda path, text: path.name == "latest" and text == name,
        }[stage]
        target = {"shard": "_write_shard", "state": "_write_text", "latest": "write_text"}[stage]
        setattr(checkpoint, target, deadly(getattr(checkpoint, target), in_save))
    if kind == "quota":
        append = telemetry.LineFile.append

        def to_a_full_disk(self, line):
            if json.loads(line)["step"] >= int(where):
                self._file = open("/dev/full", "ab", buffering=0)
            return append(self, line)

        telemetry.LineFile.append = to_a_full_disk
    if kind in ("full", "quota"):
        write = checkpoint.write_tensors

        def full(path, *args):
            step = int(path.parent.name.rpartition("-")[2])
            if step == int(where) or (kind == "quota" and step > int(where)):
                raise OSError(28, "No space left on device", str(path))
            return write(path, *args)

        checkpoint.write_tensors = full
    if kind == "crash":
        training_step = Toy.training_step

        def crash(self, batch, scalars):
            if int(where) in batch["position"]:
                raise RuntimeError("injected crash")
            return training_step(self, batch, scalars)

        Toy.training_step = crash
    if kind == "lost":
        batches = ToyLoader.__iter__

        def unreadable(self):
            for batch in batches(self):
                if int(where) in batch["position"]:
                    raise FileNotFoundError(2, "No such file or directory", "train-000000.tar")
                yield batch

        ToyLoader.__iter__ = unreadable


if __name__ == "__main__":
    # The script's classes must be found again under a name that does not depend on how it was started.
    sys.path.insert(0, str(Path(__file__).parent))
    import toy

    from armillary.engine.train.start import start

    toy.arm_fault()
    base = toy.toy_run(Path(os.environ["TOY_OUT"]), Path(os.environ["TOY_SURVEY"]))
    wide = replace(base, method=toy.ToyConfig(width=32))
    code = start(base, {"wide": wide}, sys.argv[1:], open_loader=toy.open_toy_loader)
    left = [Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")]
    if talking := [name for name in left if name.startswith(("pt_", "gloo_"))]:
        sys.exit(f"threads of the process group outlive the run, which ended with {code}: {talking}")
    sys.exit(code)
