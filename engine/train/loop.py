"""The steps of a run, after everything has been opened and before anything is closed.

A step: micro-batches forward and backward; all ranks agree on loss, gradient norms and whether to stop; the optimizer
acts, or leaves everything as it was where a number is not finite; the teacher follows; counters, log, checkpoint.
"""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from armillary.engine.config.run import Run
from armillary.engine.train.evals import Evals
from armillary.engine.train.profile import StepProfile
from armillary.engine.train.supply import BatchSource, DataLost, Supply
from armillary.engine.train.telemetry import Meter
from armillary.engine.train.watch import Watch
from armillary.engine.weights import checkpoint
from armillary.engine.weights.verify import CheckpointError
from armillary.engine.zero.deepspeed_engine import Sharded, StepStatus
from armillary.engine.zero.processes import set_timeout

__all__ = ["Loop", "NonFinite", "StopRequest", "Stopped"]

COLLECT_STEPS = 100


class NonFinite(RuntimeError):
    """Too many steps in a row were skipped."""


class Stopped(Exception):
    """A signal ended the run; its state is saved."""


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGHUP instead of dying of them; a SIGINT after any interrupts at once.

    SIGHUP comes when a terminal is closed; under nohup, which ignores it, it stays ignored. Python hears signals in its main thread only; a training in another thread leaves them to that one.
    """

    def __init__(self) -> None:
        self.asked = False
        hears = threading.current_thread() is threading.main_thread()
        signals = [signal.SIGTERM, signal.SIGINT]
        signals += [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
        self._kept = {s: signal.signal(s, self._note) for s in signals if hears}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.asked = True

    def forget(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._kept.items():
            signal.signal(number, handler)


@contextmanager
def _garbage_in_step() -> Iterator[None]:
    """Leave the search for garbage to the loop, which does it on all ranks after the same steps, or each would wait for each.

    What is there already is not searched again; who has frozen things before keeps them so, as `unfreeze` knows no owner.
    """
    gc.collect()
    free = gc.get_freeze_count() == 0
    if free:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if free:
            gc.unfreeze()


class Loop:
    """The steps that are left of a run, and its checkpoints; the same on all ranks."""

    def __init__(
        self,
        run: Run,
        sharded: Sharded,
        loader: BatchSource,
        meter: Meter,
        progress: checkpoint.Progress,
        known: dict[str, Any],
        stop: StopRequest,
        saved: Path | None,
        evals: Evals,
    ):
        self.run, self.sharded, self.loader, self.meter = run, sharded, loader, meter
        self.progress, self.known, self.stop, self.evals = progress, known, stop, evals
        self.best: checkpoint.Best | None = None
        if run.checkpoint.keep_best is not None:
            self.best = checkpoint.agreed_best(run.folder / "checkpoints", run.checkpoint.keep_best, progress.step)
        self.saved_step = progress.step if saved is not None else -1
        self.saved_at = time.monotonic()
        self.results: dict[str, float] = {}

    def go(self) -> None:
        """Run the steps that are left."""
        self.supply = Supply(self.loader)
        watch = Watch(self.run.train.timeout_minutes / 2)
        trace = StepProfile(self.run, self.sharded.rank, self.sharded.device, self.meter.say)
        try:
            with _garbage_in_step():
                self._steps(watch, trace)
        except (NonFinite, Stopped, CheckpointError, DataLost):  # all ranks are here
            raise
        except Exception:
            if watch.world > 1:
                self.meter.say(f"ended at step {self.progress.step + 1}: {watch.behind()}", loud=True)
            raise
        finally:
            watch.close()
            trace.close(self.progress.step)

    def _steps(self, watch: Watch, trace: StepProfile) -> None:
        train = self.run.train
        in_steps = min(train.step_timeout_minutes, train.timeout_minutes)
        first = True
        while self.progress.step < train.steps and not self._stopped_early():
            if first:
                self.supply.begin()
                if said := self.supply.losses():
                    raise self._without_data(said)
            self._untimed(trace.before)
            status = self.step(watch)
            if status is None:
                self._wait_at_most(train.timeout_minutes, watch, "the checkpoint")
                raise self._without_data(self.supply.losses())
            self._untimed(trace.after)
            if self.progress.step % COLLECT_STEPS == 0:
                gc.collect()
            if first:  # the first step builds caches and compiles
                self.meter.restart_clock(self.loader.wait_seconds)
                first = False
                self._wait_at_most(in_steps, watch)
            stopping, due, _ = status.flags
            self._judge(status)
            better = self._note_best()
            if better or stopping or due or self.progress.step % self.run.checkpoint.every_steps == 0:
                self._wait_at_most(train.timeout_minutes, watch, "the checkpoint")
                self.save()
                self._wait_at_most(in_steps, watch)
            if stopping:
                self.meter.say(f"stopped by a signal at step {self.progress.step}; the same command continues")
                raise Stopped
        self._wait_at_most(train.timeout_minutes, watch, "the end")

    def _untimed(self, action: Callable[[int], None]) -> None:
        """Do something with the number of steps done that the throughput leaves out: a profiler takes seconds to start and to write."""
        began = time.perf_counter()
        action(self.progress.step)
        self.meter.pause(time.perf_counter() - began)

    def _wait_at_most(self, minutes: float, watch: Watch, place: str = "the next step") -> None:
        """How long ranks may wait for each other from here on."""
        set_timeout(minutes)
        watch.at(self._place(self.progress.step, -1), f"{place} after step {self.progress.step}", minutes / 2)

    def _place(self, done: int, part: int) -> int:
        """Number of a place in a step: before it (-1), with each of its micro-batches, at its end."""
        return done * (self.sharded.accumulation + 2) + part + 1

    def step(self, watch: Watch) -> StepStatus | None:
        """Consume one global batch; None where all ranks have left the step out, as one has no data for it."""
        sharded, progress, supply = self.sharded, self.progress, self.supply
        scalars = self.run.scalars(progress.step)
        sharded.optimizer.set_step(progress.step, scalars)
        status: StepStatus | None = None
        for micro in range(sharded.accumulation):
            batch = supply.next()
            watch.at(self._place(progress.step, micro), f"batch {micro + 1} of step {progress.step + 1}")
            losses = sharded.forward(batch, scalars)
            sharded.backward(losses.total)
            self.meter.add(losses)
            if micro == sharded.accumulation - 1:
                watch.at(self._place(progress.step, micro + 1), f"the end of step {progress.step + 1}")
                loss = self.meter.loss * math.nan if supply.lost else self.meter.loss  # no rank takes such a step
                status = sharded.agree(loss, [self.stop.asked, self._due(), bool(supply.lost)])
            sharded.step()
        assert status is not None
        if status.flags[-1]:
            self.meter.drop_step()
            supply.undo_step()
            return None
        supply.note_step()
        progress.step += 1
        progress.skipped += not status.finite
        progress.bad_in_a_row = 0 if status.finite else progress.bad_in_a_row + 1
        self.results = self.evals.results(progress.step)
        self.meter.pause(self.results.get("eval/seconds", 0.0))
        norms = {f"grad_norm/{name}": norm for name, norm in status.norms.items()}
        self.meter.end_step(
            progress.step, {**norms, **scalars, "skipped": progress.skipped, **self.results}, self.loader.wait_seconds
        )
        return status

    def _due(self) -> bool:
        """Rank 0's clock says when a checkpoint by time is due."""
        minutes = self.run.checkpoint.every_minutes
        return minutes is not None and self.sharded.rank == 0 and time.monotonic() - self.saved_at > 60 * minutes

    def _note_best(self) -> bool:
        """Whether this step has the highest score so far; then it is noted, before its checkpoint takes the former's place."""
        name = self.run.checkpoint.keep_best
        score = self.results.get(f"eval/{name}", math.nan)
        if name is None or math.isnan(score) or (self.best is not None and score <= self.best.score):
            return False
        self.best = checkpoint.Best(name, score, self.progress.step)
        checkpoint.write_best(self.run.folder / "checkpoints", self.best)
        self.meter.say(f"step {self.progress.step} is the best so far by {name}; its checkpoint stays")
        return True

    def _stopped_early(self) -> bool:
        """Whether the best score is so old that the run ends; the same before and after it was resumed."""
        patience, name, step = self.run.checkpoint.patience, self.run.checkpoint.keep_best, self.progress.step
        if patience is None or self.best is None:
            return False
        every = next(knn.every_steps for knn in self.run.evals if knn.name == name)
        if step // every - self.best.step // every < patience:
            return False
        self.meter.say(f"ended early at step {step}: {patience} evaluations brought no better {name}")
        return True

    def _judge(self, status: StepStatus) -> None:
        if status.finite:
            return
        bad, limit = self.progress.bad_in_a_row, self.run.train.max_bad_steps
        where = ", ".join(f"{k} {v:.3g}" for k, v in status.norms.items())
        self.meter.say(
            f"step {self.progress.step} skipped, {bad} in a row: loss {status.loss:.4g}, gradient norms {where}",
            loud=True,
        )
        if bad >= limit:
            self.meter.flush(self.loader.wait_seconds)
            raise NonFinite(
                f"{bad} steps in a row had a non-finite loss or gradient (train.max_bad_steps = {limit}), the last one "
                f"step {self.progress.step}; nothing of them was applied, checkpoints are from before. To go on from there "
                f"with another optim.lr or warm-up, which make it another run: `armillary export {self.run.folder} --format "
                "portable -o FILE`, then start the recipe under another --name with --restore FILE and the changes. Or look "
                "at the samples of these steps"
            )

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one."""
        if self.progress.step == self.saved_step:
            return
        self.meter.flush(self.loader.wait_seconds)
        self.progress.loader = self.supply.state
        self.progress.applied = self.sharded.layout.applied_steps
        folder = self.run.folder / "checkpoints"
        checkpoint.save(folder, self.sharded.layout, self.progress, self.run, self.known)
        self._keep_record()
        self.saved_step, self.saved_at = self.progress.step, time.monotonic()
        self.meter.restart_clock(self.loader.wait_seconds)

    def _without_data(self, said: str) -> DataLost:
        """Save the steps that are done; the error to leave with. All ranks together."""
        saved = ""
        try:
            if self.progress.step:
                self.save()
        except CheckpointError as error:
            saved = f"The steps since the last checkpoint are lost: {error}. "
        newest = checkpoint.latest(self.run.folder / "checkpoints")
        goes_on = "begins anew" if newest is None else f"continues from {newest.name}"
        path = self.run.data.path
        return DataLost(
            f"there are no data for step {self.progress.step + 1}{said}\n{saved}Bring {path} back whole, or name a copy that is whole by "
            f"--data.path (`armillary data check` reads every sample). Then the same command {goes_on}"
        )

    def _keep_record(self) -> None:
        """Write run.json again where somebody has moved or deleted the run's folder under way."""
        record = self.run.folder / "run.json"
        if self.sharded.rank == 0 and not record.exists():
            with suppress(OSError):  # the checkpoint, which was written, has it too
                self.run.save(record, **self.known, world=self.sharded.layout.world)
            self.meter.say(
                f"{self.run.folder}: was moved or deleted while the run was under way; it goes on in a new one",
                loud=True,
            )
