"""A training run from its record to its export: weights, processes, loader, loop. It knows methods, and no model by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from armillary.engine.atomic_file import require_writable
from armillary.engine.config.config_json import from_json, packages_of, to_json
from armillary.engine.config.provenance import facts
from armillary.engine.config.randomness import seed_everything
from armillary.engine.config.run import Run
from armillary.engine.data.format.survey import Survey
from armillary.engine.exclusive import InUse, exclusive
from armillary.engine.plan.memory import free_bytes, memory_of
from armillary.engine.token_cache.training import Interrupted, TokenCacheError, cached_tokens, fill_token_cache
from armillary.engine.train.checks import method_problems, space_problems
from armillary.engine.train.evals import Evals
from armillary.engine.train.loop import Loop, NonFinite, Stopped, StopRequest
from armillary.engine.train.supply import BatchSource, DataLost
from armillary.engine.train.telemetry import Meter
from armillary.engine.user_code import trust
from armillary.engine.weights import portable, resume
from armillary.engine.weights.checkpoint import Progress, latest
from armillary.engine.weights.export import export_encoder
from armillary.engine.weights.init_weights import init_encoder, init_method
from armillary.engine.weights.trained_encoder import EXPORT, TrainedEncoder
from armillary.engine.weights.verify import CheckpointError
from armillary.engine.zero.deepspeed_engine import Sharded
from armillary.engine.zero.processes import Ranks, end_processes, ranks, start_processes
from armillary.models.method import Method

__all__ = ["BadInput", "open_loader", "train"]


class BadInput(ValueError):
    """The run cannot start; the message has one broken rule a line."""


def open_loader(run: Run, method: Method, survey: Survey, device: torch.device, me: Ranks) -> BatchSource:
    """The loader of a run's survey for one rank."""
    from armillary.engine.data.loading.catalog_loader import CatalogLoader
    from armillary.engine.data.loading.loader import Loader

    data = run.data
    cached = data.token_cache is not None
    order: dict[str, Any] = {
        "split": data.split,
        "micro_batch": run.micro_batch,
        "accumulation": run.accumulation(me.world),
        "rank": me.rank,
        "world": me.world,
        "seed": run.seed,
        "device": device,
        "views": cached_tokens(run, survey, device) if cached else run.views.build(survey, device),
        "prepare": method.prepare,
        "prefetch": data.prefetch,
    }
    if cached or not run.views.modalities:
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
        Stopped: After SIGTERM, SIGINT or SIGHUP and a checkpoint.
        NonFinite: After `train.max_bad_steps` skipped steps in a row.
        CheckpointError: A checkpoint could not be written or read.
        DataLost: The survey could not be read any more, after a checkpoint.
    """
    me = ranks()
    run = _anywhere(run)
    survey = Survey.load(run.data.path)
    inputs = run.views.input_spec(survey)
    seed_everything(run.seed)
    method = run.method.build(inputs)
    known = facts(survey) | {"inputs": asdict(inputs)}
    if (base := method.base()) is not None:
        known["base"] = base.sha256
    newest = _startable(run, method, known, me.world, restore)
    memory = memory_of(run, method, me.world, free_bytes(run.resolved_device))
    if memory is not None and (found := memory.problems()):
        raise BadInput("\n".join(found))
    taken = {} if restore is None else {"--restore": restore}
    if newest is None and restore is None:
        taken = _take_weights(run, method, survey, init_from)

    with ExitStack() as leaving:
        device = start_processes(run.resolved_device, run.train.timeout_minutes, run.train.precision == "tf32")
        stop = StopRequest()  # not before: a signal to a process that waits for the others ends it
        leaving.callback(stop.forget)
        sharded: Sharded | None = None
        try:
            _own(run.folder, newest, me, leaving)
            resume.agree(newest, me.rank, run.checkpoint.verify)
            for option, path in taken.items() if newest is None else ():
                portable.agree(path, option, me)
            _materialise(run, method, device, me)
            sharded = Sharded(run, method, device)
            progress, note, set_random = _begin(run, sharded, newest, restore)
            if run.data.token_cache is not None:
                _fill_token_cache(run, sharded, survey, me, stop)
            loader = open_loader(run, method, survey, device, me)
            leaving.callback(loader.close)
            if progress.loader:
                loader.load_state_dict(progress.loader)
            if me.rank == 0:
                with _or_checkpoint_error("run.json"):
                    run.save(run.folder / "run.json", **known, world=me.world)
            dist.barrier()
            meter = Meter(run, method, device, progress.step)
            leaving.callback(meter.close)
            for line in (*([] if memory is None else [memory.line()]), *note):
                meter.say(line)
            evals = Evals(run, sharded.method, survey, device, me, meter.say, sharded.whole)
            loop = Loop(run, sharded, loader, meter, progress, known, stop, newest, evals)
            set_random()
            loop.go()
            loop.save()
            if me.rank == 0:
                with _or_checkpoint_error(
                    f"{EXPORT}, which `armillary export {run.folder}` makes from the checkpoint,"
                ):
                    # hashed as it was written, or by `agree`
                    export_encoder(TrainedEncoder.open(run.folder, verify=False), run.folder / EXPORT)
            meter.finished = True
            meter.say(f"done: {progress.step} steps, {progress.skipped} skipped; encoder in {run.folder / 'export'}")
            if loop.best is not None:
                meter.say(f"best by {loop.best.name}: {loop.best.score:.3f} at step {loop.best.step}")
        except (BadInput, Stopped, NonFinite, CheckpointError, DataLost):  # all ranks are here
            (sharded.destroy if sharded is not None else end_processes)()
            raise
        sharded.destroy()
    return run.folder


def _materialise(run: Run, method: Method, device: torch.device, me: Ranks) -> None:
    """Give frozen weights storage: rank 0 reads their files, and DeepSpeed sends every parameter of rank 0 to the others.

    Under ZeRO-3 they lie on the host until DeepSpeed has cut them.

    Raises:
        BadInput: On all ranks: rank 0 could not read them.
    """
    if method.base() is None:
        return
    place = torch.device("cpu") if run.train.zero_stage == 3 else device
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    said: list[str | None] = [None]
    try:
        method.materialise(place, dtype, read=me.rank == 0)
    except (ValueError, OSError) as error:
        said = [str(error)]
    dist.broadcast_object_list(said)
    if said[0] is not None:
        raise BadInput(f"method.base: {said[0]}")


def _anywhere(run: Run) -> Run:
    """The run with paths that mean the same wherever its record is read."""
    cache = run.data.token_cache
    data = replace(run.data, path=run.data.path.absolute(), token_cache=None if cache is None else cache.absolute())
    return replace(run, data=data)


def _own(folder: Path, newest: Path | None, me: Ranks, leaving: ExitStack) -> None:
    """Make the run's folder and own it until the end; all ranks together.

    Raises:
        BadInput: On all ranks: another process is at work there, or was a moment ago, or it cannot be written.
    """
    said: list[str | None] = [None]
    if me.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            leaving.enter_context(exclusive(folder))
            (folder / "checkpoints").mkdir(exist_ok=True)
            for name in ("metrics.jsonl", "run.json"):
                require_writable(folder / name)
            if latest(folder / "checkpoints") != newest:
                said = [f"out: {folder}: another job wrote there while this one started; start again"]
        except (InUse, OSError) as error:
            said = [f"out: {error}"]
    dist.broadcast_object_list(said)
    if said[0] is not None:
        raise BadInput(said[0])


@contextmanager
def _or_checkpoint_error(what: str) -> Iterator[None]:
    """A full or broken disk has its own exit code."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what} could not be written: {error}") from error


def _startable(run: Run, method: Method, known: dict[str, Any], world: int, restore: Path | None = None) -> Path | None:
    """Last checks before processes are started; the checkpoint to continue from."""
    record = to_json(run)
    try:
        trust(*packages_of(record))
        from_json(record)  # or no command could read the run back
    except ValueError as error:
        raise BadInput(str(error)) from error
    found = method_problems(run, method)
    newest = latest(run.folder / "checkpoints")
    if newest is not None:
        state = resume.open_archive(newest, hashed=["state.json"])[1]
        found += resume.same_run_problems(state, run, world, known, newest)
    elif restore is not None:
        found += _restorable(run, known, restore)
    found = found or space_problems(run, method)
    if found:
        raise BadInput("\n".join(found))
    return newest


def _restorable(run: Run, known: dict[str, Any], restore: Path) -> list[str]:
    """Why a portable export cannot be continued by this run: its position in the data would have no meaning."""
    try:
        state = portable.open_portable(restore, verify=False)[1]
        batch = int(state["run"]["train"]["global_batch"])
    except (CheckpointError, KeyError, TypeError, ValueError, OSError) as error:
        return [f"--restore: {error}"]
    found = []
    if batch != run.train.global_batch:
        found.append(
            f"train.global_batch: must be {batch}, as in {restore}, got {run.train.global_batch}; to begin anew with its "
            "weights alone, use --init-from"
        )
    if state.get("survey") != known["survey"]:
        found.append(
            f"data.path: must be the survey that {restore} was trained on, got one with other shards: {run.data.path}"
        )
    return found


def _take_weights(run: Run, method: Method, survey: Survey, init_from: Path | None) -> dict[str, Path]:
    """Fill what a new run takes from earlier ones.

    Returns:
        Where each lies, by the option that named it; `portable.agree` compares hashes, once for all ranks.

    Raises:
        BadInput: One does not fit, or is not readable.
        CheckpointError: It does not fit, because it is damaged.
    """
    taken: dict[str, Path] = {}

    @contextmanager
    def opened(option: str, source: Path | str) -> Iterator[TrainedEncoder]:
        try:
            encoder = TrainedEncoder.open(source, verify=False)
            yield encoder
        except (ValueError, OSError) as error:
            with suppress(ValueError, OSError):
                TrainedEncoder.open(source)
            raise BadInput(f"{option}: {error}") from error
        taken[option] = encoder.path

    for modality, source in method.starts_from().items():
        with opened(f"method.{modality}_from", source) as encoder:
            init_encoder(method, modality, encoder, run.views, survey)
    if init_from is not None:
        with opened("--init-from", init_from) as encoder:
            left_out = init_method(method, encoder)
        for line in left_out if ranks().rank == 0 else []:
            print(f"--init-from {init_from}: {line}", flush=True)
    return taken


def _fill_token_cache(run: Run, sharded: Sharded, survey: Survey, me: Ranks, stop: StopRequest) -> None:
    """Fill the cache of frozen encoders, whose weights are in place now."""

    def say(text: str) -> None:
        if me.rank == 0:
            print(text, flush=True)

    try:
        fill_token_cache(
            run, sharded.method, survey, sharded.device, rank=me.rank, world=me.world, stop=lambda: stop.asked, say=say
        )
    except (TokenCacheError, Interrupted) as error:  # all ranks are here
        if isinstance(error, Interrupted):
            say("stopped by a signal while filling data.token_cache; the same command continues")
            raise Stopped from error
        raise BadInput(str(error)) from error


def _begin(
    run: Run, sharded: Sharded, newest: Path | None, restore: Path | None
) -> tuple[Progress, list[str], Callable[[], None]]:
    """Bring weights and optimizer to where the run goes on.

    Returns:
        (counters, what to tell the user, what sets the random states; to be called last)
    """
    rank = sharded.rank
    if newest is not None:
        progress = resume.load(newest, sharded.layout)
        note = [f"continuing {newest}"]
        if restore is not None:
            note.append(f"--restore {restore} is not read again: the run has checkpoints of its own")
        return progress, note, lambda: resume.load_random(newest, rank)
    if restore is not None:
        progress, state = portable.restore(restore, sharded.layout)
        note = [f"continuing {restore} at step {progress.step}", *portable.changes(state, run)]
        return progress, note, lambda: seed_everything(run.seed, progress.step, rank)
    return Progress(), [], lambda: seed_everything(run.seed, 0, rank)
