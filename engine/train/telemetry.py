"""What a run says while it goes: progress bar or lines, metrics.jsonl, trackers.

metrics.jsonl gets one line a step. Its values stay on the device until a line is due on the screen (or a checkpoint),
and are only then reduced over ranks, so that a step costs no synchronisation for the log's sake. Nothing here ends a run: lines
that a full disk refuses wait for the next ones, and a screen that is gone is not written to.
Throughput, MFU, data wait and memory belong to the interval that the step is in.
"""

from __future__ import annotations

import json
import math
import re
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from armillary.engine.atomic_file import write_bytes
from armillary.engine.config.run import Run
from armillary.engine.plan.gpus import GPUS
from armillary.engine.train.trackers import Trackers
from armillary.kernels.launch import overrides
from armillary.models.method import Losses, Method

__all__ = ["LineFile", "Meter", "measure_gemm", "peak_flops"]


def measure_gemm(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Best measured matrix-product rate of this process, FLOP/s.

    Args:
        device: Where.
        dtype: Of both factors.
        size: Side of the square factors; chosen by device where None.
    """
    n = size or (8192 if device.type == "cuda" else 1024)
    a = torch.full((n, n), 0.5, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The rate that MFU refers to, FLOP/s a rank, and its name: data sheet for known GPUs in bf16, else measured."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for gpu in GPUS.values():
            if re.search(rf"\b{gpu.title}\b", name):  # an L40 is no L4, a GB200 no B200
                return gpu.bf16_tflops * 1e12, f"{name} dense bf16, {gpu.bf16_tflops:g} TFLOP/s"
    rate = measure_gemm(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return rate, f"measured {precision} GEMM rate, {rate / 1e12:.3g} TFLOP/s a rank"


def _keep_until(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run will do again, and a line cut short by a crash."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():  # after a power cut the last may be no text
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_bytes(path, b"".join(line + b"\n" for line in kept))


class LineFile:
    """A file that lines are appended to; what cannot be written stays in memory and goes first the next time.

    Where somebody has moved or deleted the file, or its folder, it is begun anew under its name.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "ab", buffering=0)
        self._waiting = b""

    def append(self, line: str) -> OSError | None:
        """Write a line, and what waits.

        Returns:
            Why something waits; None where nothing does.
        """
        self._waiting += line.encode() + b"\n"
        try:
            if not self._path.exists():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file.close()
                self._file = open(self._path, "ab", buffering=0)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Try once more, and close."""
        with suppress(OSError):
            self._file.write(self._waiting)
        self._file.close()


class Meter:
    """Collects every step's numbers on all ranks; rank 0 writes them.

    Args:
        run: The run.
        method: For its FLOPs, monitor and warnings.
        device: Where losses are.
        first_step: Steps already done.
        console: Replaces standard output.

    Attributes:
        finished: The run has come to its end; set by who closes it.
    """

    def __init__(self, run: Run, method: Method, device: torch.device, first_step: int, console: Console | None = None):
        self.run, self.method, self.device = run, method, device
        self.world, self.speaks = dist.get_world_size(), dist.get_rank() == 0
        self.console = console or Console(file=sys.stdout, soft_wrap=True)
        self.peak, self.peak_name = peak_flops(device, run.train.precision)
        self._sums: dict[str, Tensor] = {}
        self._parts = 0
        self._rows: list[dict[str, Tensor]] = []
        self._known: list[dict[str, float | int]] = []
        self._began = time.perf_counter()
        self._timed = 0
        self._measured = first_step
        self._waited = 0.0
        self._bar: Progress | None = None
        self.finished = False
        if self.speaks:
            _keep_until(run.folder / "metrics.jsonl", first_step)
            self._lines = LineFile(run.folder / "metrics.jsonl")
            self._refused = False
            self._introduce(first_step)
            self._trackers = Trackers(run, first_step, self.say)
            if self.console.is_terminal:
                self._bar = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[line]}"),
                    console=self.console,
                )
                self._bar.start()
                self._task = self._bar.add_task(run.name, total=run.train.steps, completed=first_step, line="")

    def _introduce(self, first_step: int) -> None:
        train, trained = (
            self.run.train,
            sum(getattr(p, "ds_numel", p.numel()) for p in self.method.parameters() if p.requires_grad),
        )
        self.say(
            f"{self.run.name}: step {first_step} of {train.steps}, {self.world} x {self.device.type}, "
            f"ZeRO-{train.zero_stage}, {train.precision}, batch {train.global_batch} = {self.world} ranks x "
            f"{self.run.accumulation(self.world)} x {self.run.micro_batch}, {trained / 1e6:.3g}M trained parameters, "
            f"{self.method.flops_per_sample() / 1e9:.3g} GFLOP a sample; MFU is of {self.peak_name}; "
            f"writing to {self.run.folder}" + "".join(f"; {name} by {impl}" for name, impl in overrides().items())
        )

    def say(self, text: str, loud: bool = False) -> None:
        """Print a line, on rank 0."""
        if not self.speaks:
            return
        with suppress(OSError, SystemExit):  # rich leaves where its pipe or terminal is gone
            self.console.print(text, style="bold red" if loud else None, markup=False, highlight=False)

    def add(self, losses: Losses) -> None:
        """Take the losses of a micro-batch."""
        for name, value in {"loss": losses.total, **losses.terms}.items():
            value = value.detach().float().reshape(())
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._parts += 1

    def drop_step(self) -> None:
        """Forget the micro-batches since the last step."""
        self._sums, self._parts = {}, 0

    @property
    def loss(self) -> Tensor:
        """Mean loss of this rank over the micro-batches added since the last step, a scalar on the device."""
        return self._sums["loss"] / self._parts

    def end_step(self, step: int, known: Mapping[str, float | int], waited: float) -> None:
        """Close a step.

        Args:
            step: Steps done, this one included.
            known: Numbers that all ranks have already: norms, schedules, counters.
            waited: Seconds that this rank has waited for data since the start.
        """
        self._rows.append({name: total / self._parts for name, total in self._sums.items()})
        self._known.append({"step": step, **known})
        self.drop_step()
        self._timed += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step % self.run.telemetry.every_steps == 0 or step == self.run.train.steps:
            self.flush(waited)

    def flush(self, waited: float) -> None:
        """Reduce over ranks and write what has been collected; all ranks together.

        Args:
            waited: Seconds that this rank has waited for data since the start.
        """
        if not self._rows:
            return
        names, values, highest = self._reduce()
        now = time.perf_counter()
        seconds = now - self._began
        wait, peak = self._over_ranks(waited - self._waited, self._peak_gib())
        rate = self.run.train.global_batch * self._timed / seconds if self._timed else math.nan
        interval = {
            "images_per_s": rate,
            "mfu": rate * self.method.flops_per_sample() / (self.world * self.peak),
            "data_wait": wait / seconds,
            "peak_gib": peak,
        }
        measures = self._measures(int(self._known[-1]["step"]))
        for i, known in enumerate(self._known):
            line = {**known, **{n: v for n, v in zip(names, values[i], strict=True) if v is not None}}
            line |= {"loss_max": highest[i], **interval}
            if i == len(self._known) - 1:
                line |= {f"monitor/{name}": value for name, value in measures.items()}
            self._write(line)
        if self.speaks:
            self._show(line)
        for warning in self.method.warnings(measures) if measures else []:
            self.say(f"WARNING: {warning}", loud=True)
        self._rows, self._known = [], []
        self._began, self._waited, self._timed = now, waited, 0

    def _measures(self, step: int) -> dict[str, float]:
        """Health measures, as often as they are worth: on a GPU they make the host wait for the device."""
        every = self.run.telemetry.monitor_steps or (100 if self.device.type == "cuda" else 1)
        if step // every == self._measured // every and step != self.run.train.steps:
            return {}
        self._measured = step
        return self.method.monitor()

    def _reduce(self) -> tuple[list[str], list[list[float | None]], list[float]]:
        """Means over ranks of what was collected.

        A method may leave a term out on some ranks or steps (no masks, no spectra): its mean is over those that have it.

        Returns:
            (names; by step, the mean of each, None where no rank has it; by step, the highest loss of any rank)
        """
        gathered: list[list[str]] = [[] for _ in range(self.world)]
        dist.all_gather_object(gathered, list(dict.fromkeys(name for row in self._rows for name in row)))
        names = list(dict.fromkeys(name for own in gathered for name in own))
        zero = torch.zeros((), device=self.device)
        sums = torch.stack([torch.stack([row.get(name, zero) for name in names]) for row in self._rows]).double()
        having = torch.tensor([[float(n in row) for n in names] for row in self._rows], dtype=torch.float64)
        both = torch.stack([sums, having.to(self.device)])
        top = torch.stack([row["loss"] for row in self._rows]).double()
        dist.all_reduce(both)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        totals, counts = both.tolist()
        means = [[t / c if c else None for t, c in zip(*row, strict=True)] for row in zip(totals, counts, strict=True)]
        return names, means, top.tolist()

    def _over_ranks(self, mean: float, largest: float) -> tuple[float, float]:
        """Mean over ranks of one number, and the largest of another."""
        values = torch.tensor([mean, largest], dtype=torch.float64, device=self.device)
        every = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(every, values)
        return sum(float(v[0]) for v in every) / self.world, max(float(v[1]) for v in every)

    def pause(self, seconds: float) -> None:
        """Leave what went into something else than steps out of the throughput."""
        self._began += seconds

    def restart_clock(self, waited: float) -> None:
        """Leave what has passed since the last flush (start-up, a checkpoint) out of the throughput."""
        self._began, self._waited, self._timed = time.perf_counter(), waited, 0

    def _peak_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _write(self, line: Mapping[str, float | int]) -> None:
        if not self.speaks:
            return
        plain = {k: v if math.isfinite(v) else None for k, v in line.items()}
        refused = self._lines.append(json.dumps(plain))
        if refused is not None and not self._refused:
            self.say(f"WARNING: metrics.jsonl cannot be written: {refused}; its lines wait in memory", loud=True)
        self._refused = refused is not None
        self._trackers.log(line)

    def _show(self, line: Mapping[str, float | int]) -> None:
        norms = " ".join(f"{k.partition('/')[2]} {v:.3g}" for k, v in line.items() if k.startswith("grad_norm/"))
        text = (
            f"loss {line['loss']:.4f} (max {line['loss_max']:.4f})  grad {norms}  lr {line['learning_rate']:.3g}  "
            f"{line['images_per_s']:.4g} images/s  MFU {line['mfu']:.1%}  wait {line['data_wait']:.0%}  "
            f"{line['peak_gib']:.2f} GiB  skipped {line['skipped']}"
        )
        if self._bar is not None:
            self._bar.update(self._task, line=text)
        else:
            self.say(f"step {line['step']}/{self.run.train.steps}  {text}")

    def close(self) -> None:
        """Close files and bar."""
        if self._bar is not None:
            with suppress(OSError, SystemExit):
                self._bar.stop()
        if self.speaks:
            self._lines.close()
            self._trackers.close(self.finished)
