"""The training loop. It knows methods, batches and steps, and no model by name.

A step: micro-batches forward and backward; all ranks agree on loss, gradient norms and whether to stop; the optimizer
acts, or leaves everything as it was where a number is not finite; the teacher follows; counters, log, checkpoint.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from armillary.engine.config.config_json import from_json, packages_of, to_json
from armillary.engine.config.provenance import facts
from armillary.engine.config.randomness import seed_everything
from armillary.engine.config.run import Run
from armillary.engine.data.format.survey import Survey
from armillary.engine.token_cache.training import Interrupted, TokenCacheError, fill_token_cache, token_cache_loader
from armillary.engine.train.checks import method_problems, space_problems
from armillary.engine.train.telemetry import Meter
from armillary.engine.user_code import trust
from armillary.engine.weights import checkpoint, portable
from armillary.engine.weights.export import export_encoder
from armillary.engine.weights.init_weights import init_encoder, init_method
from armillary.engine.weights.trained_encoder import EXPORT, TrainedEncoder
from armillary.engine.zero.deepspeed_engine import Ranks, Sharded, StepStatus, ranks, start_processes
from armillary.models.method import Batch, Method

__all__ = ["BadInput", "BatchSource", "NonFinite", "Stopped", "open_loader", "train"]


class BadInput(ValueError):
    """The run cannot start; the message has one broken rule a line."""


class NonFinite(RuntimeError):
    """Too many steps in a row were skipped."""


class Stopped(Exception):
    """A signal ended the run; its state is saved."""


class BatchSource(Protocol):
    """What the loop needs of a loader: see `engine.data.loader.Loader`."""

    wait_seconds: float

    def __iter__(self) -> Iterator[Batch]:
        """Endless micro-batches of this rank."""

    def state_dict(self) -> dict[str, Any]:
        """Where the next global batch begins."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""

    def close(self) -> None:
        """Stop threads."""


def open_loader(run: Run, method: Method, survey: Survey, device: torch.device, me: Ranks) -> BatchSource:
    """The loader of a run's survey for one rank."""
    from armillary.engine.data.loading.catalog_loader import CatalogLoader
    from armillary.engine.data.loading.loader import Loader

    data = run.data
    if data.token_cache is not None:
        return token_cache_loader(run, method, survey, device, rank=me.rank, world=me.world)
    views = run.views.build(survey, device)
    order: dict[str, Any] = {
        "split": data.split,
        "micro_batch": run.train.micro_batch,
        "accumulation": run.accumulation(me.world),
        "rank": me.rank,
        "world": me.world,
        "seed": run.seed,
        "device": device,
        "views": views,
        "prepare": method.prepare,
        "prefetch": data.prefetch,
    }
    if not run.views.modalities:
        return CatalogLoader(data.path, **order)
    return Loader(
        data.path,
        **order,
        modalities=run.views.modalities,
        reader=data.reader,
        on_corrupt=data.on_corrupt,
        threads=data.threads,
    )


OpenLoader = Callable[[Run, Method, Survey, torch.device, Ranks], BatchSource]


class _StopRequest:
    """Remembers SIGTERM and SIGINT instead of dying of them; a SIGINT after either interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._kept = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.asked = True

    def forget(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._kept.items():
            signal.signal(number, handler)


def train(
    run: Run, *, restore: Path | None = None, init_from: Path | None = None, open_loader: OpenLoader = open_loader
) -> Path:
    """Train from the newest checkpoint of the run's folder, or from the start.

    Args:
        run: The run; its record has been checked (`checks.problems`).
        restore: Portable export to continue where the folder has no checkpoint.
        init_from: Encoder to start with where there is neither.
        open_loader: Makes the loader.

    Returns:
        The run's folder.

    Raises:
        BadInput: Found before any process group is started.
        Stopped: After SIGTERM or SIGINT and a checkpoint.
        NonFinite: After `train.max_bad_steps` skipped steps in a row.
        CheckpointError: A checkpoint could not be written or read.
    """
    me = ranks()
    survey = Survey.load(run.data.path)
    inputs = run.views.input_spec(survey)
    seed_everything(run.seed)
    method = run.method.build(inputs)
    known = facts(survey) | {"inputs": asdict(inputs)}
    newest = _startable(run, method, known, me.world)
    if newest is None and restore is None:
        _take_weights(run, method, survey, init_from)

    with ExitStack() as leaving:
        stop = _StopRequest()
        leaving.callback(stop.forget)
        device = start_processes(run.resolved_device)
        sharded = Sharded(run, method, device)
        progress, note, set_random = _begin(run, sharded, newest, restore)
        if run.data.token_cache is not None:
            _bring_features(run, sharded, survey, me, stop)
        loader = open_loader(run, method, survey, device, me)
        leaving.callback(loader.close)
        if progress.loader:
            loader.load_state_dict(progress.loader)
        if me.rank == 0:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.save(run.folder / "run.json", **known, world=me.world)
        dist.barrier()
        meter = Meter(run, method, device, progress.step)
        leaving.callback(meter.close)
        for line in note:
            meter.say(line)
        loop = _Loop(run, sharded, loader, meter, progress, known, stop, newest)
        set_random()
        try:
            loop.go()
            loop.save()
            if me.rank == 0:
                export_encoder(TrainedEncoder.open(run.folder), run.folder / EXPORT)
            meter.say(f"done: {progress.step} steps, {progress.skipped} skipped; encoder in {run.folder / 'export'}")
        except (Stopped, NonFinite, checkpoint.CheckpointError):  # all ranks are here
            sharded.destroy()
            raise
        sharded.destroy()
    return run.folder


def _startable(run: Run, method: Method, known: dict[str, Any], world: int) -> Path | None:
    """Last checks before processes are started; the checkpoint to continue from."""
    record = to_json(run)
    try:
        trust(*packages_of(record))
        from_json(record)  # or no command could read the run back
    except ValueError as error:
        raise BadInput(str(error)) from error
    found = method_problems(run, method)
    newest = checkpoint.latest(run.folder / "checkpoints")
    if newest is not None:
        state = checkpoint.open_archive(newest)[1]
        found += checkpoint.same_run_problems(state, run, world, known, newest)
    found = found or space_problems(run, method)
    if found:
        raise BadInput("\n".join(found))
    return newest


def _take_weights(run: Run, method: Method, survey: Survey, init_from: Path | None) -> None:
    """Fill what a new run takes from earlier ones."""
    for modality, source in method.starts_from().items():
        try:
            init_encoder(method, modality, TrainedEncoder.open(source), run.views, survey)
        except (ValueError, OSError) as error:
            raise BadInput(f"method.{modality}_from: {error}") from error
    if init_from is not None:
        try:
            init_method(method, TrainedEncoder.open(init_from))
        except (ValueError, OSError) as error:
            raise BadInput(f"--init-from: {error}") from error


def _bring_features(run: Run, sharded: Sharded, survey: Survey, me: Ranks, stop: _StopRequest) -> None:
    """Fill the cache of frozen encoders, whose weights are in place now."""

    def say(text: str) -> None:
        if me.rank == 0:
            print(text, flush=True)

    try:
        fill_token_cache(
            run, sharded.method, survey, sharded.device, rank=me.rank, world=me.world, stop=lambda: stop.asked, say=say
        )
    except (TokenCacheError, Interrupted) as error:  # all ranks are here
        sharded.destroy()
        if isinstance(error, Interrupted):
            say("stopped by a signal while filling data.token_cache; the same command continues")
            raise Stopped from error
        raise BadInput(str(error)) from error


def _begin(
    run: Run, sharded: Sharded, newest: Path | None, restore: Path | None
) -> tuple[checkpoint.Progress, list[str], Callable[[], None]]:
    """Bring weights and optimizer to where the run goes on.

    Returns:
        (counters, what to tell the user, what sets the random states; to be called last)
    """
    rank = sharded.rank
    if newest is not None:
        progress = checkpoint.load(newest, sharded.layout, run.checkpoint.verify)
        note = [f"continuing {newest}"]
        if restore is not None:
            note.append(f"--restore {restore} is not read again: the run has checkpoints of its own")
        return progress, note, lambda: checkpoint.load_random(newest, rank)
    if restore is not None:
        progress, state = portable.restore(restore, sharded.layout)
        note = [f"continuing {restore} at step {progress.step}", *portable.changes(state, run)]
        return progress, note, lambda: seed_everything(run.seed, progress.step, rank)
    return checkpoint.Progress(), [], lambda: seed_everything(run.seed, 0, rank)


class _Loop:
    def __init__(
        self,
        run: Run,
        sharded: Sharded,
        loader: BatchSource,
        meter: Meter,
        progress: checkpoint.Progress,
        known: dict[str, Any],
        stop: _StopRequest,
        saved: Path | None,
    ):
        self.run, self.sharded, self.loader, self.meter = run, sharded, loader, meter
        self.progress, self.known, self.stop = progress, known, stop
        self.saved_step = progress.step if saved is not None else -1
        self.saved_at = time.monotonic()

    def go(self) -> None:
        """Run the steps that are left."""
        batches, first = iter(self.loader), True
        while self.progress.step < self.run.train.steps:
            verdict = self.step(batches)
            if first:  # the first step builds caches and compiles
                self.meter.restart_clock(self.loader.wait_seconds)
                first = False
            stopping, due = verdict.flags
            self._judge(verdict)
            if stopping or due or self.progress.step % self.run.checkpoint.every_steps == 0:
                self.save()
            if stopping:
                self.meter.say(f"stopped by a signal at step {self.progress.step}; the same command continues")
                raise Stopped

    def step(self, batches: Iterator[Batch]) -> StepStatus:
        """Consume one global batch."""
        sharded, progress = self.sharded, self.progress
        scalars = self.run.scalars(progress.step)
        sharded.optimizer.set_step(progress.step, scalars)
        verdict: StepStatus | None = None
        for micro in range(sharded.accumulation):
            losses = sharded.forward(next(batches), scalars)
            sharded.backward(losses.total)
            self.meter.add(losses)
            if micro == sharded.accumulation - 1:
                verdict = sharded.agree(self.meter.loss, [self.stop.asked, self._due()])
            sharded.step()
        assert verdict is not None
        progress.step += 1
        progress.skipped += not verdict.finite
        progress.bad_in_a_row = 0 if verdict.finite else progress.bad_in_a_row + 1
        norms = {f"grad_norm/{name}": norm for name, norm in verdict.norms.items()}
        self.meter.end_step(progress.step, {**norms, **scalars, "skipped": progress.skipped}, self.loader.wait_seconds)
        return verdict

    def _due(self) -> bool:
        """Rank 0's clock says when a checkpoint by time is due."""
        minutes = self.run.checkpoint.every_minutes
        return minutes is not None and self.sharded.rank == 0 and time.monotonic() - self.saved_at > 60 * minutes

    def _judge(self, verdict: StepStatus) -> None:
        if verdict.finite:
            return
        bad, limit = self.progress.bad_in_a_row, self.run.train.max_bad_steps
        where = ", ".join(f"{k} {v:.3g}" for k, v in verdict.norms.items())
        self.meter.say(
            f"step {self.progress.step} skipped, {bad} in a row: loss {verdict.loss:.4g}, gradient norms {where}",
            loud=True,
        )
        if bad >= limit:
            self.meter.flush(self.loader.wait_seconds)
            raise NonFinite(
                f"{bad} steps in a row had a non-finite loss or gradient (train.max_bad_steps = {limit}), the last one "
                f"step {self.progress.step}; nothing of them was applied, checkpoints are from before. Lower optim.lr, "
                "lengthen the warm-up or look at the samples of these steps"
            )

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one."""
        if self.progress.step == self.saved_step:
            return
        self.meter.flush(self.loader.wait_seconds)
        self.progress.loader = self.loader.state_dict()
        self.progress.applied = self.sharded.layout.applied_steps
        folder = self.run.folder / "checkpoints"
        checkpoint.save(folder, self.sharded.layout, self.progress, self.run, self.known)
        self.saved_step, self.saved_at = self.progress.step, time.monotonic()
        self.meter.restart_clock(self.loader.wait_seconds)
